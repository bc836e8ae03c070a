"""The Triton kernel that takes the K largest values of each row, given the maxima of its groups of columns."""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the parameters of kernels their types at the launch.)

import triton
import triton.language as tl

from nemo_eaft.loss.row_sets import row_offset
from nemo_eaft.loss.shard import IGNORED

_IGNORED = tl.constexpr(IGNORED)
_NONE = tl.constexpr(2**31 - 1)  # a column that is none


@triton.jit(do_not_specialize=["groups", "top_k", "record_width", "inner"])
def selection(
    records,
    maxima,
    logits,
    target,
    columns,
    groups,
    top_k,
    record_width,
    pitch,
    inner,
    outer_stride,
    inner_stride,
    column_stride,
    GROUP: tl.constexpr,
    CLUSTERS: tl.constexpr,
    CLUSTER: tl.constexpr,
    OPENED: tl.constexpr,
    FLOAT: tl.constexpr,
    KEY: tl.constexpr,
    SIGN_SHIFT: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Columns 3 and on of a row's record: its K largest values in descending order, then -Inf.

    A tournament. A group of columns is opened when its maximum is the largest value left anywhere; from then on its
    next value is known. Each round takes the largest of the closed groups' maxima and the opened groups' next values,
    so the values are those of ``torch.topk`` whatever the ties, and at most K groups are read. The closed maxima are
    themselves held as the largest of each CLUSTER.

    Values are compared as integers of the same order, equal ones by index: what was taken is then everything before a
    (key, index). The key below all, ``none``, stands for no value. Where the keys of NaN stand does not matter: a row
    with NaN gets nothing else.
    """
    row = tl.program_id(0)
    record = records + row.to(tl.int64) * record_width
    if tl.load(target + row) == _IGNORED:
        for k in range(top_k):
            tl.store(record + 3 + k, 0.0)
        return
    source = logits + row_offset(row, inner, outer_stride, inner_stride)
    peaks = maxima + row.to(tl.int64) * pitch
    none: tl.constexpr = -LARGEST - 1
    maximum = tl.load(record)
    is_nan = maximum != maximum

    members = tl.arange(0, CLUSTER)
    lanes = tl.arange(0, GROUP)
    clusters = tl.arange(0, CLUSTERS)
    slots = tl.arange(0, OPENED)
    tile = clusters[:, None] * CLUSTER + members[None, :]
    peak = tl.load(peaks + tile, mask=tile < groups, other=float("-inf")).to(FLOAT)
    peak_key = tl.where(tile < groups, _ordered(peak, KEY, SIGN_SHIFT, LARGEST), none)
    closed_key = tl.max(peak_key, 1)
    closed_group = tl.min(tl.where(peak_key == closed_key[:, None], tile, _NONE), 1)
    opened_key = tl.full([OPENED], none, KEY)
    opened_column = tl.zeros([OPENED], tl.int32)
    opened = tl.sum(opened_column, 0)  # 0, a scalar of the loop

    for k in range(top_k):
        best_closed = tl.max(closed_key, 0)
        best_opened = tl.max(opened_key, 0)
        opens = best_closed > best_opened
        taken = tl.maximum(best_closed, best_opened)
        value = (taken ^ ((taken >> SIGN_SHIFT) & LARGEST)).to(FLOAT, bitcast=True)
        value = tl.where(taken == none, float("-inf"), value)
        tl.store(record + 3 + k, tl.where(is_nan, float("nan"), value))

        group = tl.min(tl.where(closed_key == best_closed, closed_group, _NONE), 0)
        last = tl.min(tl.where(opened_key == best_opened, opened_column, _NONE), 0)

        # The next value of the group that held the taken one.
        column = tl.where(opens, group, last // GROUP) * GROUP + lanes
        real = column < columns
        z = tl.load(source + column.to(tl.int64) * column_stride, mask=real, other=0.0).to(FLOAT)
        key = tl.where(real, _ordered(z, KEY, SIGN_SHIFT, LARGEST), none)
        taken_column = tl.where(opens, tl.min(tl.where(key == taken, column, _NONE), 0), last)
        left = (key < taken) | ((key == taken) & (column > taken_column))
        next_key = tl.max(tl.where(left, key, none), 0)
        next_column = tl.min(tl.where(left & (key == next_key), column, _NONE), 0)
        held = tl.where(opens, slots == opened, (opened_key == best_opened) & (opened_column == last))
        opened_key = tl.where(held, next_key, opened_key)
        opened_column = tl.where(held, next_column, opened_column)
        opened += opens.to(tl.int32)

        # The next closed group of the cluster that held the group just opened.
        cluster = group // CLUSTER
        member = cluster * CLUSTER + members
        others = tl.load(peaks + member, mask=member < groups, other=float("-inf")).to(FLOAT)
        others_key = _ordered(others, KEY, SIGN_SHIFT, LARGEST)
        shut = (others_key < best_closed) | ((others_key == best_closed) & (member > group))
        shut = shut & (member < groups)
        peak_next = tl.max(tl.where(shut, others_key, none), 0)
        group_next = tl.min(tl.where(shut & (others_key == peak_next), member, _NONE), 0)
        closed_key = tl.where((clusters == cluster) & opens, peak_next, closed_key)
        closed_group = tl.where((clusters == cluster) & opens, group_next, closed_group)


@triton.jit
def _ordered(z, KEY: tl.constexpr, SIGN_SHIFT: tl.constexpr, LARGEST: tl.constexpr):
    """Integers in the order of the values: negative floats count down in their lower bits. Both zeros are 0."""
    bits = z.to(KEY, bitcast=True)
    return tl.where(z == 0.0, 0, bits ^ ((bits >> SIGN_SHIFT) & LARGEST))
