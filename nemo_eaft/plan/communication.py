"""What the loss sends, in bytes per micro-batch and rank of the last stage."""

from __future__ import annotations

from nemo_eaft.plan.batch import MicroBatch
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.loss_memory import LossPath
from nemo_eaft.plan.shape import ModelShape
from nemo_eaft.settings import Settings

_FLOAT32 = 4


def record_width(top_k: int | None) -> int:
    """Numbers per token in a record: that of :mod:`nemo_eaft.loss.records`, which needs torch."""
    return 3 + (1 if top_k is None else top_k)


def loss_collectives(
    shape: ModelShape, layout: Layout, settings: Settings, batch: MicroBatch, path: LossPath
) -> dict[str, int]:
    """Bytes that this rank gives to each collective of the loss; none with one tensor-parallel rank.

    The output layer's own, which every path has, are left out: its hidden gradient, or with
    ``eaft_fused_linear`` the same numbers sent by the loss.
    """
    if layout.tensor == 1:
        return {}
    tokens = batch.tokens
    if path in ("stock_unfused", "stock_fused"):
        # One sum of both numbers, or one of each.
        return {"all_reduce_max": tokens * _FLOAT32, "all_reduce_sum": 2 * tokens * _FLOAT32}
    top_k = settings.loss.eaft_config().effective_top_k(shape.vocab_size)
    return {"all_gather_records": tokens * record_width(top_k) * _FLOAT32}
