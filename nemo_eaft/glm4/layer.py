"""A transformer layer with a norm on both sides of attention and MLP, and its specifications.

    h = h + post_self_attn_layernorm(attention(input_layernorm(h)))
    h = h + post_mlp_layernorm(mlp(pre_mlp_layernorm(h)))

The two norms more belong to the layer, not to the linear layer before them, as NeMo's Gemma 2 and 3 have it
(`TERowParallelLinearLayerNorm`): an adapter on that linear layer (LoRA) is added before the norm then, as in the model
that it is merged into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

if TYPE_CHECKING:
    from nemo_eaft.glm4.model import GLM4Config


@dataclass
class SandwichNormLayerSubmodules(TransformerLayerSubmodules):
    """What the layer is made of."""

    post_self_attn_layernorm: ModuleSpec | type = IdentityOp
    post_mlp_layernorm: ModuleSpec | type = IdentityOp


class SandwichNormLayer(TransformerLayer):
    """Megatron's layer with the outputs of attention and MLP normed before they are added to the residual.

    Both norms see [s, b, h] (with sequence parallelism this rank's slice of s, as Megatron's other norms) and are
    replicated on every tensor-parallel rank. A checkpoint has them as `post_self_attn_layernorm.weight` and
    `post_mlp_layernorm.weight`, Hugging Face's names. Everything else, recompute included, is Megatron's: of
    `TransformerLayer` (megatron-core 0.15.3) this uses that `self_attn_bda` and `mlp_bda` are called with the output
    and its bias, the residual and the dropout.

    Args: those of `TransformerLayer`, which may differ from version to version.
    """

    self_attn_bda: Any
    mlp_bda: Any

    def __init__(
        self, config: TransformerConfig, submodules: SandwichNormLayerSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        norm: dict[str, Any] = {
            "config": self.config,
            "hidden_size": self.config.hidden_size,
            "eps": self.config.layernorm_epsilon,
        }
        self.post_self_attn_layernorm = build_module(submodules.post_self_attn_layernorm, **norm)
        self.post_mlp_layernorm = build_module(submodules.post_mlp_layernorm, **norm)
        # Looked up when called: a norm may be replaced later.
        self._add_attention, self.self_attn_bda = self.self_attn_bda, self._add_normed_attention
        self._add_mlp, self.mlp_bda = self.mlp_bda, self._add_normed_mlp

    def _add_normed_attention(self, training: bool, fused: bool) -> Callable[..., Any]:
        return _after(self.post_self_attn_layernorm, self._add_attention(training, fused))

    def _add_normed_mlp(self, training: bool, fused: bool) -> Callable[..., Any]:
        return _after(self.post_mlp_layernorm, self._add_mlp(training, fused))


def _after(norm: Callable[..., Any], add: Callable[..., Any]) -> Callable[..., Any]:
    """`add`, one of Megatron's bias-dropout-add functions, of the normed output."""

    def add_normed(output_and_bias: tuple[Any, Any], residual: Any, dropout: float) -> Any:
        output, bias = output_and_bias
        # The bias of a row-parallel layer is added late, here; it is part of what the norm has to see.
        return add((norm(output if bias is None else output + bias), None), residual, dropout)

    return add_normed


def with_post_norms(spec: ModuleSpec, norm: ModuleSpec | type) -> ModuleSpec:
    """The specification of a `TransformerLayer` as one of a `SandwichNormLayer`, with `norm` as both norms."""
    assert spec.module is TransformerLayer, spec.module
    known = {entry.name: getattr(spec.submodules, entry.name) for entry in fields(TransformerLayerSubmodules)}
    submodules = SandwichNormLayerSubmodules(**known, post_self_attn_layernorm=norm, post_mlp_layernorm=norm)
    return ModuleSpec(module=SandwichNormLayer, params=spec.params, submodules=submodules)


def transformer_engine_layer_spec(config: GLM4Config) -> ModuleSpec:
    """The layer from Transformer Engine's modules."""
    from megatron.core.extensions.transformer_engine import TENorm
    from nemo.collections.llm.gpt.model import base

    return with_post_norms(base.transformer_engine_layer_spec(config), TENorm)


def local_layer_spec(config: GLM4Config) -> ModuleSpec:
    """The layer from Megatron-Core's own modules."""
    from nemo.collections.llm.gpt.model import base

    spec = base.local_layer_spec(config)
    return with_post_norms(spec, spec.submodules.input_layernorm)


def glm4_layer_spec(config: GLM4Config) -> ModuleSpec:
    """Transformer Engine's modules where it is installed, else Megatron-Core's own, as NeMo chooses.

    Raises:
        ValueError: `use_transformer_engine_full_layer_spec` (one layer of Transformer Engine with no place for the two
            norms) or `num_moe_experts`.
    """
    from nemo.collections.llm.gpt.model import base

    if config.use_transformer_engine_full_layer_spec:
        raise ValueError("use_transformer_engine_full_layer_spec: True; GLM-4 needs False, that layer lacks its norms")
    if config.num_moe_experts:
        raise ValueError(f"num_moe_experts: {config.num_moe_experts}; GLM-4-0414 is dense, allowed is None")
    return transformer_engine_layer_spec(config) if base.HAVE_TE else local_layer_spec(config)
