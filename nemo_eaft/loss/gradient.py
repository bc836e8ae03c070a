"""The gradient with respect to one rank's logits, from the softmax recomputed a block of rows at a time."""

import torch
from torch import Tensor

from nemo_eaft.loss.records import statistics_dtype
from nemo_eaft.loss.rows import TokenRows, row_blocks
from nemo_eaft.loss.scratch import Scratch, clear_rows, skippable
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
    dtype = statistics_dtype(logits.dtype)
    scratch = Scratch(shard.columns, dtype, logits.device)
    for start, stop in row_blocks(source.tokens, shard.columns, logits.device, dtype.itemsize):
        rows = slice(start, stop)
        if skippable(target[rows]):
            sink.write(start, stop, grad.new_zeros(stop - start, 0))
            continue
        place = sink.direct(start, stop, shard.columns, dtype)
        values = gradient_rows(
            source.read(start, stop)[:, : shard.columns],
            target[rows],
            maximum[rows],
            log_sum[rows],
            coefficient[rows],
            shard.whole,
            scratch,
            place,
        )
        if place is None:
            sink.write(start, stop, values)


def gradient_rows(
    block: Tensor,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    coefficient: Tensor,
    whole: bool,
    scratch: Scratch,
    place: Tensor | None,
) -> Tensor:
    """[r, columns]: ``coefficient * (softmax(z) - onehot(label))`` before rounding, +0 in ignored rows.

    Args:
        block: [r, columns] logits.
        target, maximum, log_sum: [r], the rows' local targets and merged statistics.
        coefficient: [r], weight times upstream gradient, 0 in rows that do not count.
        whole: the block has all columns of the vocabulary, so its maximum is the merged one.
        scratch: holds the result until the next block, unless there is a place for it.
        place: [r, columns] of the statistics' dtype, which may be the block itself: the result goes there.
    """
    z = scratch.converted(block)
    if z.shape[-1] == 0:
        return z
    local_maximum = maximum if whole else z.amax(dim=-1)
    probability, peak = scratch.softmax(z, local_maximum)
    # e^(z - m) / d from the shard's own softmax. The maxima first: m + log_sum in one number would lose the digits of
    # log_sum at large offsets.
    scale = (local_maximum - maximum).sub_(log_sum).exp_().div_(peak)
    index = target.clamp(min=0).long().unsqueeze(-1)
    held = (target >= 0).to(z.dtype)
    at_label = (probability.gather(1, index).squeeze(-1) * scale - held) * coefficient
    values = torch.mul(probability, (scale * coefficient).unsqueeze(-1), out=probability if place is None else place)
    values.scatter_(1, index, at_label.unsqueeze(-1))
    clear_rows(values, target == IGNORED)
    return values


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
