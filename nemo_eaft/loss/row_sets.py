"""Tokens of logits tensors as a kernel reaches them: by two strides, nothing copied, whatever the strides."""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the parameters of kernels their types at the launch.)

import itertools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# What Triton asks of every stride to see that rows start on 16 bytes.
_ALIGNED = 16


class RowSet(NamedTuple):
    """Consecutive tokens that a kernel reaches with two strides."""

    first: int
    """The first of the tokens."""

    tokens: int
    inner: int
    """Token t is at [t // inner, t % inner] of the views."""

    views: tuple[Tensor, ...]
    """[outer, inner, width] each, on the storage of the tensor given."""

    @property
    def aligned(self) -> bool:
        """Whether Triton can see that each row starts on 16 bytes and its columns are contiguous."""
        return all(
            view.stride(-1) == 1
            and all(start % _ALIGNED == 0 for start in (view.storage_offset(), *view.stride()[:-1]))
            for view in self.views
        )


def row_sets(*tensors: Tensor) -> list[RowSet]:
    """Tensors of one shape [..., width] as row sets, and nothing copied whatever the strides.

    Dimensions that continue each other become one. Nearly all logits then have one or two left, and one set; of any
    more, each index of the outermost ones is a set.
    """
    sizes: list[int] = []
    strides: list[list[int]] = []
    for dim, size in enumerate(tensors[0].shape[:-1]):
        step = [tensor.stride(dim) for tensor in tensors]
        if size == 1:
            continue
        if sizes and strides[-1] == [stride * size for stride in step]:
            sizes[-1] *= size
            strides[-1] = step
        else:
            sizes.append(size)
            strides.append(step)
    while len(sizes) < 2:
        sizes.insert(0, 1)
        strides.insert(0, [0] * len(tensors))
    outer, inner = sizes[-2:]
    tokens = outer * inner
    sets = []
    for number, index in enumerate(itertools.product(*(range(size) for size in sizes[:-2]))):
        views = []
        for i, tensor in enumerate(tensors):
            start = tensor.storage_offset() + sum(at * step[i] for at, step in zip(index, strides[:-2], strict=True))
            shape, stride = (outer, inner, tensor.shape[-1]), (strides[-2][i], strides[-1][i], tensor.stride(-1))
            views.append(tensor.detach().as_strided(shape, stride, start))
        if tokens:
            sets.append(RowSet(number * tokens, tokens, inner, tuple(views)))
    return sets


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Where row [row // inner, row % inner] of a view begins, in elements, as a 64-bit number."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
