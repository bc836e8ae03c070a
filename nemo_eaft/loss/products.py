"""Matrix products that add into a tensor, and how large a piece of the logits is at once."""

import torch
from torch import Tensor

# Bytes of logits in a piece, those of float32 copies included. On a CPU the whole of forward and backward stays
# below 64 MiB beside inputs and gradients; forward has room for more, and a product of few rows by the whole weight
# is slow (measured at 49152 x 576 on two cores with MKL: 122 rows at a time take 1.4 times as long as all, 256 rows
# 1.1).
# A GPU needs pieces that fill it: 128 MiB of bfloat16 are 8192 tokens by 8192 columns; with the float32 gradient of
# 8192 hidden states of 5120 that is below 400 MB (counted, not measured).
_CPU_PIECE_BYTES = 24 << 20
_CPU_CHUNK_BYTES = 40 << 20
_DEVICE_PIECE_BYTES = 128 << 20
_ONEDNN_BYTES = 8 << 20
"""Of a product in float32 by oneDNN and of the rows that make it. Of 4 to 1024 MiB none was faster by more than a third
at nine shapes, and 1024 took twice the time for 213 tokens' part of a gradient of 49152 x 576 (two cores)."""
_LEAST_ROWS = 16
_LEAST_COLUMNS = 512
_COLUMN_UNIT = 128


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are held in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def token_chunks(tokens: int, vp_width: int, like: Tensor) -> list[slice]:
    """Ranges of tokens whose whole rows [chunk, V_local] are one piece; one empty range for no tokens."""
    step = max(_elements(like, _CPU_CHUNK_BYTES) // max(vp_width, 1), _LEAST_ROWS)
    # The last chunk is as large as the others.
    number = max(-(-tokens // step), 1)
    return _ranges(tokens, -(-tokens // number) or 1) or [slice(0, 0)]


def vocabulary_tiles(tokens: int, columns: int, like: Tensor) -> tuple[list[slice], list[slice]]:
    """Ranges of columns and of tokens such that one of each is a piece: all tokens, unless they are so many
    that a piece would be a few columns only. The range of tokens is one empty range for no tokens."""
    elements = _elements(like, _CPU_PIECE_BYTES)
    width = max(elements // max(tokens, 1) // _COLUMN_UNIT * _COLUMN_UNIT, _LEAST_COLUMNS)
    width = min(width, max(columns, 1))
    return _ranges(columns, width), _ranges(tokens, max(elements // width, _LEAST_ROWS)) or [slice(0, 0)]


def piece_buffer(elements: int, like: Tensor) -> Tensor:
    """Flat memory for the largest of several pieces, used again for each; empty where a product brings its own."""
    return torch.empty(0 if _by_onednn(like) else elements, dtype=like.dtype, device=like.device)


def product_in(buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, at the beginning of a ``piece_buffer``, or in memory of its own where that is empty."""
    if _by_onednn(a):
        return _onednn_product(a, b)
    out = buffer[: a.shape[0] * b.shape[1]].view(a.shape[0], b.shape[1])
    return torch.mm(a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """``total += a @ b``, or ``total = a @ b`` where ``fresh``; summed at least in float32 and rounded once.

    No temporary of ``total``'s size for float32. On a CPU bfloat16 and float16 are multiplied as float32 where
    ``total`` is wider, because PyTorch has no product there whose result is wider than its factors.

    Args:
        total: [m, n], of the factors' dtype or wider.
        a: [m, k].
        b: [k, n] of the same dtype.
        fresh: ``total`` holds nothing yet, possibly NaN.
    """
    beta = 0.0 if fresh else 1.0
    wide = wide_dtype(a.dtype)
    if total.dtype == wide and _by_onednn(total):
        _add_by_onednn(total, a, b.to(wide), fresh)
    elif total.dtype == a.dtype and _sums_wide(a):
        total.addmm_(a, b, beta=beta)
    elif total.dtype == wide:
        if a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # since torch 2.8
            torch.ops.aten.addmm.dtype_out(total, a, b, wide, beta=beta, alpha=1, out=total)
        else:
            total.addmm_(a.to(wide), b.to(wide), beta=beta)
    else:
        product = a.to(wide) @ b.to(wide)
        total.copy_(product if fresh else product.add_(total))


def _add_by_onednn(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """:func:`add_product` some rows at a time: oneDNN adds nothing, and copies what is not contiguous."""
    step = max(_ONEDNN_BYTES // (total.element_size() * max(sum(b.shape), 1)), 1)
    for rows in _ranges(len(total), step):
        product = _onednn_product(a[rows].to(b.dtype), b)
        if fresh:
            total[rows] = product
        else:
            total[rows].add_(product)


def _sums_wide(factor: Tensor) -> bool:
    """Whether a product in the factors' own dtype is summed at least in float32, and at full speed."""
    if factor.is_cuda or factor.dtype == wide_dtype(factor.dtype):
        return True
    # oneDNN's, on processors that have it. PyTorch's own product of float16 is 30 times slower than that of float32.
    return factor.dtype == torch.bfloat16 and _has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _by_onednn(like: Tensor) -> bool:
    """Whether products of this dtype on this device are oneDNN's, instead of MKL's, which PyTorch takes for float32.

    On an AMD EPYC with AVX-512 MKL's took twice the time (torch 2.13, two cores, 1024 x 576 by 576 x 6144: 38 ms
    against 17). Not measured on other processors.
    """
    return like.dtype == torch.float32 and like.device.type == "cpu" and _has_onednn()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _onednn_product(a: Tensor, b: Tensor) -> Tensor:
    if a.numel() == 0 or b.numel() == 0:
        return a @ b
    # aten/src/ATen/native/mkldnn/Linear.cpp, torch 2.13: what torch.compile makes of a linear layer on a CPU.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return product


def _elements(like: Tensor, cpu_bytes: int) -> int:
    if like.device.type == "cpu":
        return cpu_bytes // wide_dtype(like.dtype).itemsize
    return _DEVICE_PIECE_BYTES // like.element_size()


def _ranges(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
