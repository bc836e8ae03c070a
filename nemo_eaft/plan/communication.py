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

    With ``loss.gate=stock`` EAFT's quantities are measured, so their records are sent as well. The output layer's own
    collectives, which every path has, are left out: its hidden gradient, or with ``eaft_fused_linear`` the same numbers
    sent by the loss.
    """
    if layout.tensor == 1:
        return {}
    top_k = settings.loss.eaft_config().effective_top_k(shape.vocab_size)
    sent = {"all_gather_records": batch.tokens * record_width(top_k) * _FLOAT32}
    if path in ("stock_unfused", "stock_fused"):
        # The label's logit and the sum: one reduction of both, or one of each.
        sent |= {"all_reduce_max": batch.tokens * _FLOAT32, "all_reduce_sum": 2 * batch.tokens * _FLOAT32}
    return sent
