"""Which columns of the vocabulary a rank holds, and where the label of each token is."""

from typing import NamedTuple

import torch
from torch import Tensor

ELSEWHERE = -1
"""Local target of a token whose label is in another rank's shard."""

IGNORED = -2
"""Local target of a token that does not count."""


class Shard(NamedTuple):
    """A rank's part of the vocabulary: the columns [rank * V_local, (rank + 1) * V_local) of the padded
    one."""

    first: int
    """Global id of the shard's first column."""

    columns: int
    """How many of its columns are real; those after them are padding. 0: the whole shard is padding."""

    vocab_size: int
    """The true vocabulary size V of all ranks together."""

    @property
    def whole(self) -> bool:
        """Whether this rank holds every real column."""
        return self.columns == self.vocab_size

    @classmethod
    def of_rank(cls, rank: int, vp_width: int, vocab_size: int) -> "Shard":
        first = rank * vp_width
        return cls(first, min(max(vocab_size - first, 0), vp_width), vocab_size)

    def local_targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        """[...] int32: the label's column in this shard, ``ELSEWHERE`` or ``IGNORED``."""
        local = labels - self.first
        held = (local >= 0) & (local < self.columns)
        target = torch.where(held, local, ELSEWHERE)
        return torch.where(valid, target, IGNORED).to(torch.int32)
