"""What a rank knows about each row of its shard, and how the ranks' knowledge becomes the whole row's.

A record holds, per token, of the real columns z of one shard:

    column 0        m    the maximum, -Inf for a shard without real columns
    column 1        d    sum of e^(z - m)
    column 2        z_y  the label's logit, 0 on the ranks that do not hold it
    columns 3...    the K largest values in descending order, filled up with -Inf
        or 3        u    sum of (z - m) e^(z - m), when the entropy is over the whole vocabulary

Everything is relative to the maximum, so that no offset of the logits costs digits, the entropy ln d - u/d is
a sum of two terms that are never negative, and a logit of -Inf contributes 0 * -Inf = 0. A NaN or +Inf makes
d NaN and everything after it.

d of a peaked row is 1 and little more, and rounds to float32: the cross-entropy of a label that is the peak, and the
entropy over the whole vocabulary, are right to some 4e-7 nats, not to 1e-6 of themselves. The entropy of the K largest
is, down to some 1e-11 nats.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_eaft.loss.rows import TokenRows, row_blocks
from nemo_eaft.loss.scratch import Scratch, skippable
from nemo_eaft.loss.shard import IGNORED, Shard
from nemo_eaft.loss.topk import top_values

_MAXIMUM, _SUM, _TARGET, _ENTROPY = 0, 1, 2, 3


class RowStatistics(NamedTuple):
    """The whole row's values, from all shards, each [tokens]."""

    maximum: Tensor
    """Largest logit m."""

    log_sum: Tensor
    """ln of the sum of e^(z - m), nats, at least 0. ``maximum + log_sum`` is logsumexp(z)."""

    cross_entropy: Tensor
    """logsumexp(z) - z_y, nats."""

    entropy: Tensor
    """Entropy over the K largest logits, or over the whole row, nats."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, float32 for any other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def record_width(top_k: int | None) -> int:
    """Numbers per token in a record."""
    return 3 + (1 if top_k is None else top_k)


def local_records(logits: Tensor, target: Tensor, shard: Shard, top_k: int | None) -> Tensor:
    """One record per token of this rank's shard.

    Args:
        logits: [..., V_local], any strides; not written to. Rows of ignored tokens and padding columns take
            no part in any arithmetic.
        target: [tokens] int32 from ``Shard.local_targets``.
        shard: this rank's columns.
        top_k: K, or None for the whole vocabulary.

    Returns:
        [tokens, record_width(top_k)] of ``statistics_dtype(logits.dtype)``.
    """
    dtype = statistics_dtype(logits.dtype)
    if shard.columns == 0:
        return empty_records(target, top_k, dtype)
    rows = TokenRows(logits)
    records = torch.zeros(rows.tokens, record_width(top_k), dtype=dtype, device=logits.device)
    scratch = Scratch(shard.columns, dtype, logits.device)
    for start, stop in row_blocks(rows.tokens, shard.columns, logits.device, dtype.itemsize):
        if skippable(target[start:stop]):
            continue
        block = rows.read(start, stop)[:, : shard.columns]
        write_record(records[start:stop], block, target[start:stop], top_k, scratch)
    return records


def empty_records(target: Tensor, top_k: int | None, dtype: torch.dtype) -> Tensor:
    """The records of a shard without real columns."""
    records = torch.zeros(len(target), record_width(top_k), dtype=dtype, device=target.device)
    records[:, _MAXIMUM] = float("-inf")
    if top_k is not None:
        records[:, _ENTROPY:] = float("-inf")
    return records.masked_fill_((target == IGNORED).unsqueeze(-1), 0.0)


def write_record(record: Tensor, block: Tensor, target: Tensor, top_k: int | None, scratch: Scratch) -> None:
    """Fill the records of a few rows: [r, record_width], from [r, columns] logits and [r] local targets."""
    z = scratch.converted(block)
    largest = None if top_k is None else top_values(z, top_k)
    maximum = z.amax(dim=-1) if largest is None else largest[:, 0]
    probability, peak = scratch.softmax(z, maximum)
    record[:, _MAXIMUM] = maximum
    record[:, _SUM] = probability.sum(dim=-1).div_(peak)
    record[:, _TARGET] = target_value(z, target)
    if largest is not None:
        record[:, _ENTROPY:] = largest
    else:
        shifted = z - finite_shift(maximum).unsqueeze(-1)
        record[:, _ENTROPY] = shifted_sum(shifted, probability).div_(peak)
    record.masked_fill_((target == IGNORED).unsqueeze(-1), 0.0)


def target_value(rows: Tensor, target: Tensor) -> Tensor:
    """[r]: each row's value at its local target, 0 where the label is not in this shard."""
    value = rows.gather(1, target.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    return torch.where(target >= 0, value, 0.0)


def finite_shift(maximum: Tensor) -> Tensor:
    """What to subtract before the exponential: the maximum, or 0 for -Inf, as -Inf - -Inf is NaN."""
    return torch.where(maximum == float("-inf"), 0.0, maximum)


def shifted_sum(shifted: Tensor, exponential: Tensor) -> Tensor:
    """Sum over the last axis of x times a multiple of e^x, 0 for x = -Inf; overwrites ``shifted``."""
    # The most negative finite number times e^x = 0 is 0; NaN stays NaN.
    return shifted.clamp_(min=torch.finfo(shifted.dtype).min).mul_(exponential).sum(dim=-1)


def merge_records(records: Tensor, top_k: int | None) -> RowStatistics:
    """Combine the records of all ranks, in rank order, so that the same records give the same bits
    everywhere.

    Args:
        records: [ranks, tokens, record_width(top_k)].
        top_k: K, or None for the whole vocabulary.
    """
    ranks = records.shape[0]
    maxima, sums = records[..., _MAXIMUM], records[..., _SUM]
    maximum = maxima.amax(dim=0)
    # A shard without finite logits has m = -Inf and d = 0; its shift must stay a number for u + shift * d.
    shift = torch.where(sums == 0, 0.0, maxima - finite_shift(maximum))
    scale = torch.where(sums == 0, 0.0, shift.exp())
    total = _add_in_order([sums[rank] * scale[rank] for rank in range(ranks)])
    log_sum = total.log()
    target = _add_in_order([records[rank, :, _TARGET] for rank in range(ranks)])
    cross_entropy = (maximum - target) + log_sum
    if top_k is None:
        # shift * d overflows for a shard so far below that its scale is 0: 0 * -Inf again.
        partial = torch.where(scale == 0, 0.0, (records[..., _ENTROPY] + shift * sums) * scale)
        entropy = log_sum - _add_in_order([partial[rank] for rank in range(ranks)]) / total
    else:
        values = torch.cat([records[rank, :, _ENTROPY:] for rank in range(ranks)], dim=-1)
        entropy = entropy_of_sorted(values.topk(top_k, dim=-1).values)
    return RowStatistics(maximum, log_sum, cross_entropy, entropy)


def entropy_of_sorted(logits: Tensor) -> Tensor:
    """[...] nats: the entropy of softmax over the last axis, in the shifted form ln d - u/d.

    A peaked row has d = 1 + x with a small x, of which the sum d keeps the digits above 6e-8 only; so x is summed
    by itself. The entropy is then right to 1e-6 of itself down to some 1e-11 nats, and to 3e-6 below, where logits are
    so far apart that their difference rounds.

    Args:
        logits: [..., K] in descending order.
    """
    shifted = logits - finite_shift(logits.amax(dim=-1, keepdim=True))
    exponential = shifted.exp()
    # What the largest adds to 1 is 0, or NaN, or -1 where every logit is -Inf.
    rest = exponential[..., 1:].sum(dim=-1) + (exponential[..., 0] - 1)
    return rest.log1p() - shifted_sum(shifted, exponential) / (1 + rest)


def _add_in_order(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
