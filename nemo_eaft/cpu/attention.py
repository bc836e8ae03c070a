"""Attention over packed sequences and with a sliding window, for Megatron's local specification.

Megatron-Core 0.15.3 `transformer/dot_product_attention.py` refuses packed sequences and leaves them to Transformer
Engine. Here each packed sequence goes through the unpacked code by itself, so packing changes nothing by construction.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig


def with_window(init: Callable[..., None]) -> Callable[..., None]:
    """`DotProductAttention.__init__` that takes `window_size` as NeMo's models give it, a list.

    Its mask is remembered by the window (megatron-core 0.15.3, transformer/utils.py, get_sliding_window_causal_mask:
    `lru_cache`), for which a list will not do. A window (w, 0) means what it means to Transformer Engine: a token sees
    itself and the w before it. The mask that context parallelism needs would be ignored (fusions/fused_softmax.py).
    """

    def wrapped(self: Any, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        init(self, config, *args, **kwargs)
        softmax = self.scale_mask_softmax
        if softmax.window_size is None:
            return
        if config.context_parallel_size > 1:
            raise ValueError(
                f"window_size: {softmax.window_size} with context_parallel_size={config.context_parallel_size}; the "
                "CPU backend has sliding-window attention with parallel.context=1 only"
            )
        softmax.window_size = tuple(softmax.window_size)

    return wrapped


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
