"""Bytes of logits and loss on the last stage, at the worst moment, for each way to compute the loss.

Beside what the layers keep (:mod:`nemo_eaft.plan.activations`) and in one micro-batch: with 1F1B a loss is computed
and differentiated before the next. Megatron-Core 0.15.3 ``tensor_parallel/cross_entropy.py``,
``fusions/fused_cross_entropy.py``; :mod:`nemo_eaft.loss`.
"""

from __future__ import annotations

from typing import Literal

from nemo_eaft.plan.batch import MicroBatch
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.shape import ModelShape
from nemo_eaft.settings import Settings

LossPath = Literal["stock_unfused", "stock_fused", "eaft_unfused", "eaft_fused_linear"]
LOSS_PATHS: tuple[LossPath, ...] = ("stock_unfused", "stock_fused", "eaft_unfused", "eaft_fused_linear")

_FLOAT32 = 4
# Bytes of logits at once (loss/products.py; on a CPU counted as float32 ones) and of each scratch tensor of the PyTorch
# path (loss/rows.py).
_PIECE = {"transformer_engine": 128 << 20, "local": 40 << 20}
_SCRATCH = {"transformer_engine": 0, "local": 5 << 20}
# Of a product on a CPU in float32 and of the rows that make it (loss/products.py).
_PRODUCT = 8 << 20


def loss_path(settings: Settings, fused_linear: bool) -> LossPath:
    """Which one a run takes; ``fused_linear``: what ``loss.fused_linear`` means there."""
    if settings.loss.gate == "stock":
        # NeMo's default (cross_entropy_loss_fusion) is Megatron's fused one; the CPU backend turns fusions off.
        return "stock_unfused" if settings.run.backend == "cpu" else "stock_fused"
    return "eaft_fused_linear" if fused_linear else "eaft_unfused"


def loss_bytes(shape: ModelShape, layout: Layout, batch: MicroBatch, path: LossPath) -> int:
    """Logits, loss, and the gradients of both and of the output layer, at their most."""
    tokens, item = batch.tokens, batch.itemsize
    columns = shape.vocab_size // layout.tensor
    logits, wide = tokens * columns * item, tokens * columns * _FLOAT32
    hidden = tokens * shape.hidden_size * item
    # The output layer's backward: gradients of hidden states and of the weight, which main_grad then takes.
    weight = columns * shape.hidden_size * item
    output_layer = logits + hidden + weight
    if path in ("stock_unfused", "stock_fused"):
        # Float32 logits become their softmax and its gradient in place; beside them bfloat16 logits, or gradients.
        if item < _FLOAT32:
            return max(logits + wide, output_layer)
        # Megatron's fused gradient is bfloat16 whatever the logits are, and autograd widens it.
        return max(wide + (tokens * columns * 2 if path == "stock_fused" else 0), output_layer)
    scratch = min(_SCRATCH[batch.layers], wide) * (2 if item < _FLOAT32 else 1)
    if path == "eaft_unfused":
        return max(2 * logits + scratch, output_layer)
    on_cpu = batch.layers == "local"
    piece = min(_PIECE[batch.layers] // _FLOAT32 * item if on_cpu else _PIECE[batch.layers], logits)
    wide_hidden = tokens * shape.hidden_size * _FLOAT32
    narrow = item < _FLOAT32
    at_once = piece + scratch
    if on_cpu:
        # Narrow factors are widened for a product in float32: the weight or the hidden states as a whole, the piece
        # some rows at a time. What oneDNN copies inside a product is not counted.
        wide_piece, wide_factor = (piece * 2, 2) if narrow else (0, 0)
        of_hidden = weight * wide_factor + min(_PRODUCT, wide_hidden + wide_piece)
        of_weight = hidden * wide_factor + min(_PRODUCT, columns * shape.hidden_size * _FLOAT32 + wide_piece)
        at_once = piece + max(scratch, of_hidden, of_weight)
    if layout.tensor == 1 and layout.virtual_pipeline == 1:
        # Both gradients are made in forward, in float32.
        made = wide_hidden + columns * shape.hidden_size * _FLOAT32
        backward = (wide_hidden + hidden if narrow else hidden) + weight
        return made + max(at_once, backward)
    gathered = hidden if layout.sequence else 0
    return gathered + wide_hidden + max(at_once, hidden + weight)
