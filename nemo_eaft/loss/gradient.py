"""The gradient with respect to one rank's logits, from the softmax recomputed a block of rows at a time."""

import torch
from torch import Tensor

from nemo_eaft.loss.records import selected, skippable, statistics_dtype
from nemo_eaft.loss.rows import TokenRows, row_blocks
from nemo_eaft.loss.shard import IGNORED, Shard


def write_gradient(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    shard: Shard,
    maximum: Tensor,
    log_sum: Tensor,
    coefficient: Tensor,
) -> None:
    """Fill every cell of ``grad``, which may be the logits themselves, rounding once to its dtype."""
    source, sink = TokenRows(logits.detach()), TokenRows(grad)
    itemsize = statistics_dtype(logits.dtype).itemsize
    for start, stop in row_blocks(source.tokens, shard.columns, logits.device, itemsize):
        rows = slice(start, stop)
        if skippable(target[rows]):
            sink.write(start, stop, grad.new_zeros(stop - start, 0))
            continue
        values = gradient_rows(
            source.read(start, stop),
            target[rows],
            shard.columns,
            maximum[rows],
            log_sum[rows],
            coefficient[rows],
        )
        sink.write(start, stop, values)


def gradient_rows(
    block: Tensor, target: Tensor, columns: int, maximum: Tensor, log_sum: Tensor, coefficient: Tensor
) -> Tensor:
    """[r, columns]: ``coefficient * (softmax(z) - onehot(label))`` before rounding, +0 in ignored rows.

    Args:
        block: [r, V_local] logits.
        target, maximum, log_sum: [r], the rows' local targets and merged statistics.
        coefficient: [r], weight times upstream gradient, 0 in rows that do not count.
    """
    z = selected(block, target, columns)
    # z - m first: m + log_sum in one number would lose the digits of log_sum at large offsets.
    z.sub_(maximum.unsqueeze(-1)).sub_(log_sum.unsqueeze(-1)).exp_()
    if columns > 0:
        index = target.clamp(min=0).long().unsqueeze(-1)
        held = (target >= 0).unsqueeze(-1).to(z.dtype)
        z.scatter_(1, index, z.gather(1, index) - held)
    return z.mul_(coefficient.unsqueeze(-1))


def coefficients(weight: Tensor, grad_loss: Tensor, target: Tensor) -> Tensor:
    """[tokens]: weight times upstream gradient; exactly 0 at ignored tokens, whatever comes upstream."""
    return torch.where(target != IGNORED, weight * grad_loss.flatten(), 0.0)


def refuse_second_derivative() -> None:
    """Raise where the gradient itself is to be differentiated.

    ``once_differentiable`` would only do so where the upstream gradient requires grad; otherwise it returns a
    constant, and a gradient penalty would silently be without gradient.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the EAFT loss cannot be differentiated twice: backward needs create_graph=False")
