"""Mixture of experts for Megatron's local specification.

Megatron-Core 0.15.3 runs experts as one grouped product (Transformer Engine or `grouped_gemm`). Its plain form, one
expert after the other (`transformer/moe/experts.py`, SequentialMLP), gives the same numbers and writes the names of
Transformer Engine's grouped experts into a checkpoint, but for one norm. Tokens go from rank to rank by all-to-all, as
on a GPU: an all-gather would need batches of one length on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

_NORM = "pre_mlp_layernorm."


def use_plain_experts(config: TransformerConfig) -> None:
    """Choose the forms without GPU kernels and streams."""
    config.moe_grouped_gemm = False
    config.moe_permute_fusion = False
    config.moe_token_dispatcher_type = "alltoall"


def with_own_norm(get_spec: Callable[..., ModuleSpec]) -> Callable[..., ModuleSpec]:
    """`get_gpt_layer_local_spec` whose norm before experts keeps its own name, as in Transformer Engine's layers.

    In a dense layer Transformer Engine fuses that norm with the first linear layer; in front of experts it does not.
    """

    def wrapped(num_experts: int | None = None, *args: Any, **kwargs: Any) -> ModuleSpec:
        spec = get_spec(num_experts, *args, **kwargs)
        if num_experts:
            names = spec.submodules.sharded_state_dict_keys_map
            assert _NORM in names, names
            del names[_NORM]
        return spec

    return wrapped


def splits_as_numbers(self: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
    """`MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize` where the sizes of what is sent are on the host already
    and only have to become arrays, as `torch.distributed.all_to_all_single` wants them."""
    if not self.drop_and_pad and point == self.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            if isinstance(splits := getattr(self, name), torch.Tensor):
                setattr(self, name, splits.numpy())
    return tokens_per_expert
