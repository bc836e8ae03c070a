"""The order in which rows are drawn: decided by `trainer.seed`, and continued by a longer run."""

from __future__ import annotations

from typing import Any

import numpy as np
from nemo.collections.llm.gpt.data.utils import _OnlineSampleMapping


class RowOrder:
    """Every row once in each epoch; takes the place of the `samples_mapping` of NeMo's unpacked data sets.

    NeMo 2.7.3 shuffles all epochs of a run together, with the seed 1 (collections/llm/gpt/data/core.py,
    GPTSFTDataset._build_samples_mapping): `seed` has no effect, and a run that is made longer draws rows again that it
    has drawn before their turn. Here each epoch is shuffled by NeMo's own class, with a seed made of `seed` and the
    epoch alone, so the order depends neither on the length of the run nor on the rank. NeMo's packed data set does that
    itself.

    rows: rows of the data set.
    samples: how many are drawn, over all epochs.
    seed: 0 to 2**32 - 1.
    """

    def __init__(self, rows: int, samples: int, seed: int) -> None:
        assert rows > 0, rows
        self._rows, self._samples, self._seed = rows, samples, seed
        self._epoch = -1
        self._shuffled: Any = None

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[int, None, None]:
        """The row drawn at a place of the order, in NeMo's form."""
        if not 0 <= index < self._samples:
            raise IndexError(f"place {index} of an order of {self._samples}")
        epoch, place = divmod(int(index), self._rows)
        if epoch != self._epoch:
            # NeMo adds the number of a block of a million rows to the seed, which has 32 bits.
            seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0]) >> 1
            self._shuffled = _OnlineSampleMapping(self._rows, self._rows, seed=seed)
            self._epoch = epoch
        return int(self._shuffled[place][0]), None, None
