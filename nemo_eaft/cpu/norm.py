"""Layer norms for Megatron's local specification that work under sequence parallelism.

Megatron-Core 0.15.3 `transformer/torch_norm.py` refuses sequence parallelism, because the weight of a plain torch norm
is not marked: each rank sees a slice of the sequence, so its gradient has to be summed over the tensor-parallel group,
and Megatron does that for parameters with `sequence_parallel=True` (`distributed/finalize_model_grads.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

# Norms that Transformer Engine fuses into the linear layer behind them; that layer holds the extra state then. In front
# of experts there is a router, and the norm is a layer of its own (models/gpt/gpt_layer_specs.py).
FUSED_NORM_NAMES = ("input_layernorm", "pre_mlp_layernorm")
FUSED_NORM_NAMES_OF_EXPERTS = ("input_layernorm",)


class _CheckpointedNorm(torch.nn.Module):
    """Writes the empty `_extra_state` that Transformer Engine's norms expect in a checkpoint, and ignores theirs."""

    fused_names = FUSED_NORM_NAMES

    def get_extra_state(self) -> None:
        """Nothing: the entry exists for Transformer Engine's sake."""
        return None

    def set_extra_state(self, state: Any) -> None:
        """A Transformer Engine checkpoint may hold FP8 metadata here, which has no meaning on the CPU."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """This norm's entries under Megatron's names; replicated on every tensor-parallel rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        if prefix.rstrip(".").rsplit(".", 1)[-1] in self.fused_names:
            state.pop("_extra_state", None)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Checkpoints of fused norms, and of plain torch norms, have no extra state.
        state_dict.setdefault(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LocalRMSNorm(_CheckpointedNorm, torch.nn.RMSNorm):
    """torch.nn.RMSNorm with Megatron's marks and checkpoint entries."""


class LocalLayerNorm(_CheckpointedNorm, torch.nn.LayerNorm):
    """torch.nn.LayerNorm with Megatron's marks and checkpoint entries."""


def build_norm(
    cls: type,
    config: TransformerConfig,
    hidden_size: int,
    eps: float = 1e-5,
    persist_layer_norm: bool = False,
    zero_centered_gamma: bool = False,
    normalization: str = "LayerNorm",
) -> torch.nn.Module:
    """What `WrappedTorchNorm(config, hidden_size, eps)` builds; same signature, sequence parallelism allowed.

    Raises:
        ValueError: `config` asks for a norm that torch does not have.
    """
    kinds = {"LayerNorm": LocalLayerNorm, "RMSNorm": LocalRMSNorm}
    if config.normalization not in kinds:
        raise ValueError(f"normalization: {config.normalization!r}; the CPU backend has {sorted(kinds)}")
    if config.layernorm_zero_centered_gamma:
        raise ValueError("layernorm_zero_centered_gamma: True; the CPU backend has no zero-centred norm (Gemma)")
    if config.memory_efficient_layer_norm:
        raise ValueError("memory_efficient_layer_norm: True; the CPU backend has none (it is Apex's)")
    # As Transformer Engine's: an import checks that every weight keeps the dtype that the model was built with.
    norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
    if config.num_moe_experts:
        norm.fused_names = FUSED_NORM_NAMES_OF_EXPERTS
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
