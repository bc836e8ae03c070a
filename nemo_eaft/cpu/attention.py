"""Attention over packed sequences for Megatron's local specification.

Megatron-Core 0.15.3 `transformer/dot_product_attention.py` refuses packed sequences and leaves them to Transformer
Engine. Here each packed sequence goes through the unpacked code by itself, so packing changes nothing by construction.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams


def with_packed_sequences(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`DotProductAttention.forward` that also takes `packed_seq_params` (block-diagonal causal attention).

    Packed query, key and value are [tokens, heads, head_dim], this rank's heads; the result is
    [tokens, hidden_size_per_partition].
    """

    def packed_forward(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        if packed_seq_params is None:
            return forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias)
        # Where sequences start, with the padding behind each: causal attention never looks at it (attention.py:813
        # gives rotary embeddings the same bounds).
        starts = packed_seq_params.cu_seqlens_q_padded
        bounds = (packed_seq_params.cu_seqlens_q if starts is None else starts).tolist()
        if bounds[-1] > query.size(0):
            raise ValueError(f"cu_seqlens: sequences of {bounds[-1]} tokens in a batch of {query.size(0)}")
        # Tokens behind the last sequence are padding: they attend among themselves and nobody counts them.
        if bounds[-1] < query.size(0):
            bounds.append(query.size(0))
        parts = []
        for start, stop in itertools.pairwise(bounds):
            if start == stop:
                continue
            # No mask given: the local softmax builds the causal one itself.
            q, k, v = (t[start:stop].unsqueeze(1) for t in (query, key, value))
            parts.append(forward(self, q, k, v, None, attn_mask_type, attention_bias).squeeze(1))
        return torch.cat(parts)

    return packed_forward
