"""What is measured: a size, a type, an entropy; and the tensors of one case."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One size. A shard is measured alone, as a group of one rank: without the collective of the real one."""

    tokens: int
    """Tokens N."""

    vocab: int
    """The whole vocabulary V."""

    shards: int = 1
    """Tensor-parallel ranks; V is a multiple of it."""

    dtype: str = "bfloat16"
    """A key of ``DTYPES``."""

    top_k: int | None = 20
    """How many logits the entropy is over; None: all of them."""

    hidden: int | None = None
    """Width D of the hidden states where the output layer is part of the case; None: logits are given."""

    def __post_init__(self) -> None:
        assert self.vocab % self.shards == 0, f"{self.vocab} columns do not divide over {self.shards} shards"
        assert self.dtype in DTYPES, self.dtype

    @property
    def width(self) -> int:
        """Columns of the shard, V / TP."""
        return self.vocab // self.shards

    @property
    def logits(self) -> int:
        """How many logits the case has."""
        return self.tokens * self.width

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def limit_bytes(self) -> int:
        """Bytes per logit that any loss on given logits must move: read forward, read and write backward."""
        return 3 * self.torch_dtype.itemsize

    def title(self) -> str:
        size = (
            f"{self.tokens} x {self.width}" if self.hidden is None else f"{self.tokens} x {self.hidden} x {self.width}"
        )
        shard = "" if self.shards == 1 else f" (a TP{self.shards} shard of {self.vocab}, no collective)"
        entropy = "full entropy" if self.top_k is None else f"top-{self.top_k}"
        layer = "" if self.hidden is None else "output layer and loss, "
        return f"{layer}{size}{shard}, {self.dtype}, {entropy}"


class Inputs(NamedTuple):
    """What a contender gets: (logits,) or (hidden, weight), leaves that require grad, and the labels."""

    tensors: tuple[Tensor, ...]
    labels: Tensor


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random tensors of a case: logits [tokens, V / TP], or hidden [tokens, D] and weight [V / TP, D].

    Filled in place, so that nothing larger than themselves is ever allocated.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors = tuple(torch.empty(shape, dtype=case.torch_dtype, device=device) for shape in _shapes(case))
    fill(tensors, case, generator)
    labels = torch.randint(case.width, (case.tokens,), device=device, generator=generator)
    return Inputs(tuple(tensor.requires_grad_() for tensor in tensors), labels)


def fill(tensors: tuple[Tensor, ...], case: Case, generator: torch.Generator | None = None) -> None:
    """New random values, such that the logits have a standard deviation of about 2."""
    with torch.no_grad():
        tensors[0].normal_(std=2.0, generator=generator)
        if case.hidden is not None:
            tensors[1].normal_(std=case.hidden**-0.5, generator=generator)


def _shapes(case: Case) -> list[tuple[int, int]]:
    if case.hidden is None:
        return [(case.tokens, case.width)]
    return [(case.tokens, case.hidden), (case.width, case.hidden)]
