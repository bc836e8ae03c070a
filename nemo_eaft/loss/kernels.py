"""The two passes over one rank's logits as Triton kernels: what ``records.py`` and ``gradient.py`` do in PyTorch.

    statistics   one program a row: reads the shard once; maximum, sum, entropy sum, label's logit, block maxima
    selection    one program a row: the K largest values, from the block maxima and the few blocks that hold them
    gradient     one program a piece of a row: the softmax again, times the coefficient, rounded once

Each configuration is a fixed function of dtype, width and K: no autotuning, no atomics, no waiting for the device, so
the same inputs give the same bits. Offsets are 64-bit, as 16384 x 151936 elements pass 2**31. Loads are 16 bytes wide
where the columns are contiguous and every row starts on 16 bytes; other rows, such as those of an odd width, are read
an element at a time, right but slower.

NaN: ``tl.max`` skips it, on a GPU as in the interpreter, and it reaches the sum, as e^(NaN - m) is NaN. +Inf does so
as Inf - Inf. A row with NaN then gets NaN for its maximum and its K values, as in PyTorch.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the parameters of kernels their types at the launch.)

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_eaft.loss.records import empty_records, record_width, statistics_dtype
from nemo_eaft.loss.row_sets import RowSet, row_offset, row_sets
from nemo_eaft.loss.selection import selection
from nemo_eaft.loss.shard import IGNORED, Shard
from nemo_eaft.loss.topk import block_columns

_IGNORED = tl.constexpr(IGNORED)
_LOG2_E = tl.constexpr(math.log2(math.e))

# Columns a program holds in registers at once, and how many of them a thread. Several programs then fit on a
# multiprocessor, and while some wait for memory others calculate. Fewer where each column needs more registers.
_LEAST_BLOCK = 1024
_BLOCK = 8192
_DOUBLE_BLOCK = 2048
_THREAD_COLUMNS = 32
_NARROW_THREAD_COLUMNS = 16
_DOUBLE_THREAD_COLUMNS = 8
_LOAD_BYTES = 16
# Pieces of a row in the gradient are this many blocks, so that their number evens out the last wave of programs.
_PIECE_BLOCKS = 4
# Block maxima that the selection searches at once.
_CLUSTER = 64
_WARP_MAXIMA = 4096
_WARP_OPENED = 128


def local_records(logits: Tensor, target: Tensor, shard: Shard, top_k: int | None) -> Tensor:
    """One record per token of this rank's shard; arguments, result and errors as ``records.local_records``.

    Needs one block maximum in the logits' dtype for every 64 or 128 columns, until it returns.
    """
    assert target.is_contiguous()
    dtype = statistics_dtype(logits.dtype)
    tokens = logits.shape[:-1].numel()
    columns = shard.columns
    if columns == 0:
        return empty_records(target, top_k, dtype)
    records = torch.empty(tokens, record_width(top_k), dtype=dtype, device=logits.device)
    group = block_columns(logits.shape[-1])
    groups = triton.cdiv(columns, group)
    pitch = triton.cdiv(groups, 16) * 16
    maxima = torch.empty(0 if top_k is None else tokens, pitch, dtype=logits.dtype, device=logits.device)
    block = _block(columns, dtype)
    with _on_device(logits):
        for rows in row_sets(logits):
            part = slice(rows.first, rows.first + rows.tokens)
            (view,) = rows.views
            _statistics[(rows.tokens,)](
                records[part],
                maxima[part],
                view,
                target[part],
                columns,
                records.shape[1],
                pitch,
                rows.inner,
                *view.stride(),
                WHOLE_ENTROPY=top_k is None,
                BLOCK=block,
                GROUP=group,
                # Sums are kept in as many parts as there are loads, so that each part is in one thread.
                VECTOR=_LOAD_BYTES // logits.element_size() if rows.aligned else 1,
                FLOAT=_TYPES[dtype][0],
                num_warps=_warps(block, dtype, rows),
            )
            if top_k is None:
                continue
            clusters = triton.next_power_of_2(triton.cdiv(groups, _CLUSTER))
            opened = triton.next_power_of_2(min(top_k, groups))
            small = clusters * _CLUSTER <= _WARP_MAXIMA and opened <= _WARP_OPENED
            selection[(rows.tokens,)](
                records[part],
                maxima[part],
                view,
                target[part],
                columns,
                groups,
                top_k,
                records.shape[1],
                pitch,
                rows.inner,
                *view.stride(),
                GROUP=group,
                CLUSTERS=clusters,
                CLUSTER=_CLUSTER,
                OPENED=opened,
                FLOAT=_TYPES[dtype][0],
                KEY=_TYPES[dtype][1],
                SIGN_SHIFT=dtype.itemsize * 8 - 1,
                LARGEST=2 ** (dtype.itemsize * 8 - 1) - 1,
                num_warps=1 if small else 8,
            )
    return records


def write_gradient(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    shard: Shard,
    maximum: Tensor,
    log_sum: Tensor,
    coefficient: Tensor,
) -> None:
    """Fill every cell of ``grad``, which may be the logits themselves; as ``gradient.write_gradient``.

    ``maximum``, ``log_sum`` and ``coefficient`` are [tokens], contiguous, of the statistics' dtype.
    """
    assert all(each.is_contiguous() for each in (target, maximum, log_sum, coefficient))
    width = logits.shape[-1]
    if width == 0:
        return
    dtype = statistics_dtype(logits.dtype)
    block = _block(width, dtype)
    pieces = triton.cdiv(width, block * _PIECE_BLOCKS)
    with _on_device(logits):
        for rows in row_sets(grad, logits):
            part = slice(rows.first, rows.first + rows.tokens)
            sink, source = rows.views
            _gradient[(rows.tokens * pieces,)](
                sink,
                source,
                target[part],
                maximum[part],
                log_sum[part],
                coefficient[part],
                shard.columns,
                width,
                pieces,
                rows.inner,
                *sink.stride(),
                *source.stride(),
                BLOCK=block,
                PIECE=block * _PIECE_BLOCKS,
                FLOAT=_TYPES[dtype][0],
                num_warps=_warps(block, dtype, rows),
            )


@triton.jit(do_not_specialize=["record_width", "inner"])
def _statistics(
    records,
    maxima,
    logits,
    target,
    columns,
    record_width,
    pitch,
    inner,
    outer_stride,
    inner_stride,
    column_stride,
    WHOLE_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Columns 0 to 2 of a row's record, and its entropy sum or its block maxima.

    Running values are kept per group of columns modulo BLOCK, and sums per VECTOR columns besides, so that where loads
    are wide no reduction of the loop crosses warps, and none but the groups' maxima crosses threads.
    """
    row = tl.program_id(0)
    record = records + row.to(tl.int64) * record_width
    label = tl.load(target + row)
    if label == _IGNORED:
        for column in tl.static_range(4 if WHOLE_ENTROPY else 3):
            tl.store(record + column, 0.0)
        return
    source = logits + row_offset(row, inner, outer_stride, inner_stride)
    peaks = maxima + row.to(tl.int64) * pitch
    lanes = tl.arange(0, BLOCK)
    offsets = lanes.to(tl.int64)
    slots = tl.arange(0, BLOCK // GROUP)
    m = tl.full([BLOCK // GROUP], float("-inf"), FLOAT)
    d = tl.zeros([BLOCK // GROUP, GROUP // VECTOR], FLOAT)
    u = tl.zeros([BLOCK // GROUP, GROUP // VECTOR], FLOAT)
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z = tl.load(source + (start + offsets) * column_stride).to(FLOAT)
        peak, m, d, u = _accumulate(z, m, d, u, WHOLE_ENTROPY, BLOCK, GROUP, VECTOR)
        if not WHOLE_ENTROPY:
            tl.store(peaks + start // GROUP + slots, peak.to(maxima.dtype.element_ty))
    if whole < columns:
        real = whole + lanes < columns
        z = tl.load(source + (whole + offsets) * column_stride, mask=real, other=0.0).to(FLOAT)
        # After the conversion: padding takes no part whatever was made of it.
        z = tl.where(real, z, float("-inf"))
        peak, m, d, u = _accumulate(z, m, d, u, WHOLE_ENTROPY, BLOCK, GROUP, VECTOR)
        if not WHOLE_ENTROPY:
            held = whole + slots * GROUP < columns
            tl.store(peaks + whole // GROUP + slots, peak.to(maxima.dtype.element_ty), mask=held)

    maximum = tl.max(m, 0)
    shift = m - _finite_shift(maximum)
    scale = _exp(shift)
    sums = tl.sum(d, 1)
    total = tl.sum(sums * scale, 0)
    if WHOLE_ENTROPY:
        partial = tl.where(scale == 0, 0.0, (tl.sum(u, 1) + shift * sums) * scale)
        tl.store(record + 3, tl.sum(partial, 0))
    # A sum that is NaN without +Inf means NaN among the logits.
    maximum = tl.where((total != total) & (maximum != float("inf")), float("nan"), maximum)
    tl.store(record, maximum)
    tl.store(record + 1, total)
    value = tl.load(source + tl.maximum(label, 0).to(tl.int64) * column_stride).to(FLOAT)
    tl.store(record + 2, tl.where(label >= 0, value, 0.0))


@triton.jit
def _accumulate(
    z, m, d, u, WHOLE_ENTROPY: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr
):
    """The groups' maxima in these BLOCK columns, and the running m, d and u with the columns added."""
    z = tl.reshape(z, [BLOCK // GROUP, GROUP // VECTOR, VECTOR])
    peak = tl.max(tl.max(z, 2), 1)
    new = tl.maximum(m, peak)
    finite = _finite_shift(new)
    step = m - finite
    scale = _exp(step)
    shifted = z - finite[:, None, None]
    exponential = _exp(shifted)
    if WHOLE_ENTROPY:
        # Twice 0 * -Inf: where the old maximum is -Inf or far below the new one, and so is e^x at a logit of -Inf.
        moved = tl.where(scale[:, None] == 0, 0.0, (u + step[:, None] * d) * scale[:, None])
        u = moved + tl.sum(tl.where(exponential == 0, 0.0, shifted * exponential), 2)
    d = d * scale[:, None] + tl.sum(exponential, 2)
    return peak, new, d, u


@triton.jit(do_not_specialize=["pieces", "inner"])
def _gradient(
    grad,
    logits,
    target,
    maximum,
    log_sum,
    coefficient,
    columns,
    width,
    pieces,
    inner,
    grad_outer_stride,
    grad_inner_stride,
    grad_column_stride,
    outer_stride,
    inner_stride,
    column_stride,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """PIECE columns of a row's gradient. No program but its own reads a cell, and before it writes: grad may be the
    logits."""
    program = tl.program_id(0)
    row = program // pieces
    first = program % pieces * PIECE
    end = tl.minimum(first + PIECE, width)
    label = tl.load(target + row)
    source = logits + row_offset(row, inner, outer_stride, inner_stride)
    sink = grad + row_offset(row, inner, grad_outer_stride, grad_inner_stride)
    lanes = tl.arange(0, BLOCK)
    offsets = lanes.to(tl.int64)
    if label == _IGNORED:
        for start in range(first, end, BLOCK):
            column = start + lanes
            nothing = tl.zeros([BLOCK], grad.dtype.element_ty)
            tl.store(sink + (start + offsets) * grad_column_stride, nothing, mask=column < width)
        return
    m = tl.load(maximum + row)
    log_d = tl.load(log_sum + row)
    scale = tl.load(coefficient + row)
    whole = tl.minimum(end, tl.maximum(first, columns // BLOCK * BLOCK))
    for start in range(first, whole, BLOCK):
        column = start + lanes
        z = tl.load(source + (start + offsets) * column_stride).to(FLOAT)
        value = _gradient_of(z, m, log_d, scale, column == label)
        tl.store(sink + (start + offsets) * grad_column_stride, value.to(grad.dtype.element_ty))
    for start in range(whole, end, BLOCK):
        column = start + lanes
        real = column < columns
        z = tl.load(source + (start + offsets) * column_stride, mask=real, other=0.0).to(FLOAT)
        value = tl.where(real, _gradient_of(z, m, log_d, scale, column == label), 0.0)
        tl.store(sink + (start + offsets) * grad_column_stride, value.to(grad.dtype.element_ty), mask=column < width)


@triton.jit
def _gradient_of(z, m, log_d, scale, is_label):
    # z - m first: m + log_d in one number would lose the digits of log_d at large offsets.
    probability = _exp((z - m) - log_d)
    return tl.where(is_label, probability - 1.0, probability) * scale


@triton.jit
def _exp(x):
    # One instruction after the product, where tl.exp spends four to keep results below 1.2e-38.
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _finite_shift(m):
    """What to subtract before the exponential: the maximum, or 0 for -Inf, as -Inf - -Inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


_TYPES = {torch.float32: (tl.float32, tl.int32), torch.float64: (tl.float64, tl.int64)}
"""Of a statistics' dtype: the same in Triton, and the integers of its size."""


def _block(columns: int, dtype: torch.dtype) -> int:
    most = _DOUBLE_BLOCK if dtype == torch.float64 else _BLOCK
    return min(most, max(_LEAST_BLOCK, triton.next_power_of_2(columns)))


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def _warps(block: int, dtype: torch.dtype, rows: RowSet) -> int:
    if dtype == torch.float64:
        columns = _DOUBLE_THREAD_COLUMNS
    else:
        columns = _THREAD_COLUMNS if rows.aligned else _NARROW_THREAD_COLUMNS
    return block // (32 * columns)
