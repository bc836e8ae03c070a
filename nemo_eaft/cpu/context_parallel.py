"""Context parallelism for Megatron's local specification.

Megatron-Core 0.15.3 `transformer/dot_product_attention.py` leaves it to Transformer Engine, whose ring passes keys and
values from rank to rank. Here every rank gathers them all, which gives the same numbers for more memory. Each rank
holds two of 2 x ranks equal pieces of a sequence, the r-th from the front and the r-th from the back
(`core/utils.py`, get_batch_on_this_cp_rank), so that causal attention costs all ranks the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig


def allowing_context_parallel(init: Callable[..., None]) -> Callable[..., None]:
    """`DotProductAttention.__init__` without its refusal of more than one context-parallel rank."""

    def wrapped(self: Any, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        shown = copy.copy(config)
        shown.context_parallel_size = 1
        init(self, shown, *args, **kwargs)
        self.config = config

    return wrapped


def over_whole_sequence(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`DotProductAttention.forward` whose queries, this rank's pieces [s / ranks, b, heads, head_dim], attend to the
    keys and values of the whole sequence."""

    def wrapped(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        ranks = parallel_state.get_context_parallel_world_size()
        if ranks == 1:
            return forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        if packed_seq_params is not None:
            raise ValueError(
                "packed sequences with context parallelism: NeMo 2.7.3 cuts the row boundaries like tokens"
            )
        key, value = (_in_order(_gathered(tensor), ranks) for tensor in (key, value))
        mask = _masked(query.size(0), ranks, parallel_state.get_context_parallel_rank())
        return forward(self, query, key, value, mask, attn_mask_type, attention_bias)

    return wrapped


def _gathered(pieces: torch.Tensor) -> torch.Tensor:
    """All ranks' pieces along dimension 0, in rank order; its backward adds up what the ranks want to change."""
    group = parallel_state.get_context_parallel_group()
    gathered: torch.Tensor = gather_from_sequence_parallel_region(pieces.contiguous(), group=group)
    return gathered


def _in_order(gathered: torch.Tensor, ranks: int) -> torch.Tensor:
    """The pieces of a whole sequence in the order of its tokens."""
    pieces = gathered.chunk(2 * ranks)
    front = [pieces[2 * rank] for rank in range(ranks)]
    back = [pieces[2 * rank + 1] for rank in reversed(range(ranks))]
    return torch.cat(front + back)


def _masked(tokens: int, ranks: int, rank: int) -> torch.Tensor:
    """[1, 1, tokens, ranks * tokens] bool, True where a token of this rank must not look: at what comes after it."""
    piece = tokens // 2
    places = torch.arange(piece)
    mine = torch.cat([places + rank * piece, places + (2 * ranks - rank - 1) * piece])
    return (torch.arange(ranks * tokens) > mine.unsqueeze(1))[None, None]
