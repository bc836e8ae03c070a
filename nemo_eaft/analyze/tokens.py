"""The tokens of one row, with what the loss and the model say of each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from nemo_eaft.config import EAFTConfig
from nemo_eaft.gates import is_conflict
from nemo_eaft.landscape.counts import Floats, Integers

BEFORE, AFTER = 32, 12
"""Tokens of a row that are kept around a single one."""


@dataclass(frozen=True)
class Tokens:
    """Some tokens in the loss; arrays of one length, float64 but where said."""

    position: Integers
    """Place in the row, from 0, of the token that was to be predicted; int64."""
    cross_entropy: Floats
    """nats"""
    entropy: Floats
    """nats"""
    entropy_ratio: Floats
    """Entropy divided by the normaliser."""
    weight: Floats
    gradient: Floats
    """Norm of the gradient of the plain cross-entropy at the logits."""
    top: Integers
    """The token that the model would have said; int64."""
    top_probability: Floats

    @property
    def probability(self) -> Floats:
        """What the model gives the label."""
        return np.exp(-self.cross_entropy)

    def finite(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Where every value is a number."""
        values = (self.cross_entropy, self.entropy, self.weight, self.gradient)
        return np.logical_and.reduce([np.isfinite(value) for value in values])

    def conflicts(self, config: EAFTConfig) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Where the model is sure and the label disagrees."""
        # In float32, as the loss decides it.
        ratio = torch.from_numpy(self.entropy_ratio.astype(np.float32))
        return is_conflict(torch.from_numpy(self.cross_entropy.astype(np.float32)), ratio, config).numpy()

    def suppressed(self) -> Floats:
        """What the certainty of the model takes off the push of a token: gradient * (1 - entropy ratio), 0 at least."""
        return self.gradient * np.clip(1.0 - self.entropy_ratio, 0.0, None)

    def of(self, where: Any) -> Tokens:
        """Those of an index of numpy."""
        return Tokens(*(getattr(self, entry.name)[where] for entry in fields(self)))


@dataclass(frozen=True)
class RowTokens:
    """A row, or a part of one."""

    row: int
    """Number in the prepared file, from 0."""
    first: int
    """Place in the row of the first of `ids`."""
    ids: list[int]
    """Token ids, prompt included."""
    values: Tokens
    """Of its tokens in the loss; positions count from the beginning of the row."""

    def of(self, where: Any) -> RowTokens:
        """With only some of the tokens in the loss."""
        return RowTokens(self.row, self.first, self.ids, self.values.of(where))

    def around(self, place: int) -> RowTokens:
        """The `place`-th token in the loss alone, with its surroundings."""
        position = int(self.values.position[place]) - self.first
        start, stop = max(0, position - BEFORE), position + AFTER + 1
        return RowTokens(self.row, self.first + start, self.ids[start:stop], self.values.of([place]))

    def conflict_gradient(self, config: EAFTConfig) -> float:
        """How hard its confident conflicts push: the sum of their gradient norms."""
        return float(self.values.gradient[self.values.conflicts(config)].sum())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {entry.name: getattr(self.values, entry.name).tolist() for entry in fields(Tokens)}
        return {"row": self.row, "first": self.first, "ids": self.ids, "values": values}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> RowTokens:
        """What `to_json` gave."""
        whole = ("position", "top")
        values: dict[str, Any] = {
            name: np.array(value, dtype=np.int64 if name in whole else np.float64)
            for name, value in plain["values"].items()
        }
        return cls(plain["row"], plain["first"], list(plain["ids"]), Tokens(**values))
