"""What ranks do with GLM-4 models; as in `jobs`, each function runs on every rank of `ranks.run_ranks`."""

from __future__ import annotations

import atexit
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from nemo_eaft.convert import convert_to_nemo
from tests.nemo.jobs import nemo_logits


def _rotate_halves() -> None:
    from nemo_eaft.glm4 import GLM4Config

    post_init = GLM4Config.__post_init__

    def wrapped(self: Any) -> None:
        self.rotary_interleaved = False
        post_init(self)

    GLM4Config.__post_init__ = wrapped


def _skip_norm(method: str, add: str) -> None:
    from nemo_eaft.glm4.layer import SandwichNormLayer

    setattr(SandwichNormLayer, method, lambda self, training, fused: getattr(self, add)(training, fused))


def _rotate_whole_heads() -> None:
    from nemo_eaft.glm4 import GLM4Config

    post_init = GLM4Config.__post_init__

    def wrapped(self: Any) -> None:
        self.rotary_percent = 1.0
        post_init(self)

    GLM4Config.__post_init__ = wrapped


WRONG = {
    "halves rotated, not neighbours": _rotate_halves,
    "whole heads rotated": _rotate_whole_heads,
    "no norm after attention": lambda: _skip_norm("_add_normed_attention", "_add_attention"),
    "no norm after the MLP": lambda: _skip_norm("_add_normed_mlp", "_add_mlp"),
}


def wrong_logits(name: str, checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """[b, s, V] of a model that is wrong in one way."""
    WRONG[name]()
    return nemo_logits(checkpoint, tokens)


def by_nemo_alone(source: Path, checkpoint: Path, output: Path) -> list[str]:
    """There and back by NeMo's own functions, as a script does it; nothing of `nemo_eaft.convert`.

    Returns:
        The folders in the system's place for temporary files that the end of the process leaves there.
    """
    scratch = output.parent / "scratch"
    scratch.mkdir()
    tempfile.tempdir = str(scratch)
    from nemo.collections import llm

    from nemo_eaft.glm4 import GLM4Config9B, GLM4Model

    llm.import_ckpt(GLM4Model(GLM4Config9B()), f"hf://{source}", output_path=checkpoint)
    llm.export_ckpt(checkpoint, "hf", output)
    assert any(path.name.startswith("nemo_eaft-tokenizer-") for path in scratch.iterdir())
    atexit._run_exitfuncs()
    return [path.name for path in scratch.iterdir() if path.name.startswith("nemo_eaft-")]


def refused(source: Path, output: Path) -> str:
    """The message of an import that must not happen."""
    try:
        convert_to_nemo(source, output)
    except ValueError as error:
        return str(error)
    raise AssertionError("it was converted")


def parameter_counts() -> dict[str, int]:
    """Of the named configurations, as Megatron builds them on the meta device."""
    from megatron.core import parallel_state, tensor_parallel

    from nemo_eaft.glm4 import GLM4Config9B, GLM4Config32B

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    # Megatron names a device for every weight.
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]
    counts = {}
    for kind in (GLM4Config9B, GLM4Config32B):
        model = kind(init_model_with_meta_device=True).configure_model(None, pre_process=True, post_process=True)
        # Norms name no device, and are small.
        assert all(parameter.is_meta for parameter in model.parameters() if parameter.dim() > 1)
        counts[kind.__name__] = sum(parameter.numel() for parameter in model.parameters())
    return counts


@dataclasses.dataclass
class Spec:
    """What a layer's specification names."""

    module: str
    modules: dict[str, bool]
    """By name of the submodule: whether it is the class that was expected."""


def transformer_engine_spec() -> Spec:
    """Read only: Transformer Engine is not here, so its classes are Megatron's stand-ins, told apart by identity."""
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.identity_op import IdentityOp
    from nemo.collections.llm.gpt.model import base

    from nemo_eaft.glm4 import GLM4Config9B
    from nemo_eaft.glm4.layer import glm4_layer_spec

    # Megatron imports it only where Transformer Engine is, and asks for its version.
    gpt_layer_specs.TESpecProvider = provider.TESpecProvider
    provider.is_te_min_version = lambda version: True
    gpt_layer_specs.HAVE_TE = base.HAVE_TE = True
    spec = glm4_layer_spec(GLM4Config9B())
    layer, attention, mlp = spec.submodules, spec.submodules.self_attention, spec.submodules.mlp
    found = {
        "input_layernorm": (layer.input_layernorm, IdentityOp),
        "linear_qkv": (attention.submodules.linear_qkv, te.TELayerNormColumnParallelLinear),
        "core_attention": (attention.submodules.core_attention, te.TEDotProductAttention),
        "linear_proj": (attention.submodules.linear_proj, te.TERowParallelLinear),
        "q_layernorm": (attention.submodules.q_layernorm, IdentityOp),
        "post_self_attn_layernorm": (layer.post_self_attn_layernorm, te.TENorm),
        "pre_mlp_layernorm": (layer.pre_mlp_layernorm, IdentityOp),
        "linear_fc1": (mlp.submodules.linear_fc1, te.TELayerNormColumnParallelLinear),
        "linear_fc2": (mlp.submodules.linear_fc2, te.TERowParallelLinear),
        "post_mlp_layernorm": (layer.post_mlp_layernorm, te.TENorm),
    }
    distinct = {id(kind) for _, kind in found.values()}
    assert len(distinct) == 5, "stand-ins that cannot be told apart"
    return Spec(spec.module.__name__, {name: is_ is wanted for name, (is_, wanted) in found.items()})


def forget_sequence_parallelism() -> None:
    """The gradient of the norms after attention is of this rank's part of the sequence only."""
    from nemo_eaft.glm4.layer import SandwichNormLayer

    build = SandwichNormLayer.__init__

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.post_self_attn_layernorm.weight.sequence_parallel = False

    SandwichNormLayer.__init__ = wrapped  # type: ignore[method-assign]


def context_of(checkpoint: Path) -> tuple[str, str, str, str]:
    """The classes of trainer, model, configuration and layer of a checkpoint's whole context."""
    from nemo.lightning import io

    context = io.load_context(checkpoint)
    config = context.model.config
    return (
        type(context.trainer).__name__,
        type(context.model).__name__,
        type(config).__name__,
        config.transformer_layer_spec(config).module.__name__,
    )
