"""What is known of the tokens seen so far: counts, sums and the most conflicting ones; its size does not grow.

Batches add to a tally of their own, tallies are merged in the order of the batches, so the same batches give the same
bits however often the analysis was interrupted. Everything is on the host; sums are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from nemo_eaft.analyze.tokens import RowTokens
from nemo_eaft.config import EAFTConfig
from nemo_eaft.landscape.counts import FINE, GRID, Bins, Floats, Integers

ALPHAS = (0.33, 1.0, 2.0)
"""Exponents that are compared, whatever the run's own is."""
TOP_ROWS = 20
TOP_TOKENS = 60

SUMS = (
    "cross_entropy",
    "entropy",
    "weight",
    "loss",
    "gradient",
    "weighted_gradient",
    "conflict_gradient",
    "conflict_weighted_gradient",
)


def _grid() -> Integers:
    return np.zeros((GRID, GRID), dtype=np.int64)


def _fine() -> Integers:
    return np.zeros(FINE, dtype=np.int64)


@dataclass
class Tally:
    """See the module. Gradients are norms at the logits (`logit_gradient`), added up over tokens."""

    rows: int = 0
    read: int = 0
    """Tokens of the rows, prompts included; padding is not."""
    tokens: int = 0
    """Tokens in the loss whose values are finite."""
    not_finite: int = 0
    """Tokens in the loss with a value that is not: in no other number here."""
    conflicts: int = 0
    sums: Floats = field(default_factory=lambda: np.zeros(len(SUMS)))
    """In the order of SUMS, over the tokens."""
    by_alpha: Floats = field(default_factory=lambda: np.zeros((len(ALPHAS), 2)))
    """For each of ALPHAS, sum of ratio ** alpha * gradient: over all tokens, over the conflicts."""
    grid: Integers = field(default_factory=_grid)
    """[GRID, GRID] tokens by entropy ratio and label probability."""
    ratios: Integers = field(default_factory=_fine)
    """[FINE] tokens by entropy ratio."""
    weights: Integers = field(default_factory=_fine)
    """[FINE] tokens by weight."""
    weight_by_ratio: Floats = field(default_factory=lambda: np.zeros(FINE))
    """[FINE] sum of the weights of the tokens in each bin of `ratios`."""
    top_rows: list[RowTokens] = field(default_factory=list)
    """The rows whose conflicts push hardest, the hardest first."""
    top_tokens: list[RowTokens] = field(default_factory=list)
    """Single tokens (the one in `values`) with some of their row, by what their certainty takes away."""

    def add(self, row: RowTokens, config: EAFTConfig, bins: Bins) -> None:
        """Take in one row."""
        finite = row.values.finite()
        self.rows += 1
        self.read += len(row.ids)
        self.not_finite += int((~finite).sum())
        row = row.of(finite)
        values = row.values
        conflict = values.conflicts(config)
        weighted = values.weight * values.gradient
        self.tokens += len(finite[finite])
        self.conflicts += int(conflict.sum())
        of_conflicts = (values.gradient[conflict], weighted[conflict])
        summed = (values.cross_entropy, values.entropy, values.weight, values.weight * values.cross_entropy)
        self.sums += [float(each.sum()) for each in (*summed, values.gradient, weighted, *of_conflicts)]
        for place, alpha in enumerate(ALPHAS):
            pushed = values.entropy_ratio**alpha * values.gradient
            self.by_alpha[place] += (pushed.sum(), pushed[conflict].sum())
        probability, ratio, weight = (
            torch.from_numpy(each) for each in (values.probability, values.entropy_ratio, values.weight)
        )
        grid, ratios, weights = (places.numpy() for places in bins.places(probability, ratio, weight))
        self.grid += np.bincount(grid, minlength=GRID * GRID).reshape(GRID, GRID)
        self.ratios += np.bincount(ratios, minlength=FINE)
        self.weights += np.bincount(weights, minlength=FINE)
        self.weight_by_ratio += np.bincount(ratios, weights=values.weight, minlength=FINE)
        self._keep_rows([row] if conflict.any() else [], config)
        hardest = np.argsort(-values.suppressed(), kind="stable")[:TOP_TOKENS]
        self._keep_tokens([row.around(int(place)) for place in hardest])

    def merge(self, later: Tally, config: EAFTConfig) -> None:
        """Take in what later rows gave."""
        for entry in fields(self):
            if not entry.name.startswith("top_"):
                setattr(self, entry.name, getattr(self, entry.name) + getattr(later, entry.name))
        self._keep_rows(later.top_rows, config)
        self._keep_tokens(later.top_tokens)

    def _keep_rows(self, more: list[RowTokens], config: EAFTConfig) -> None:
        if more:
            self.top_rows = sorted([*self.top_rows, *more], key=lambda row: (-row.conflict_gradient(config), row.row))
            del self.top_rows[TOP_ROWS:]

    def _keep_tokens(self, more: list[RowTokens]) -> None:
        def order(one: RowTokens) -> tuple[float, int, int]:
            return -float(one.values.suppressed()[0]), one.row, int(one.values.position[0])

        self.top_tokens = sorted([*self.top_tokens, *more], key=order)[:TOP_TOKENS]

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats come back as the same bits."""
        plain: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, np.ndarray):
                value = value.tolist()
            elif isinstance(value, list):
                value = [row.to_json() for row in value]
            plain[entry.name] = value
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Tally:
        """What `to_json` gave."""
        tally = cls()
        for entry in fields(cls):
            value, now = plain[entry.name], getattr(tally, entry.name)
            if isinstance(now, np.ndarray):
                value = np.array(value, dtype=now.dtype).reshape(now.shape)
            elif isinstance(now, list):
                value = [RowTokens.from_json(row) for row in value]
            setattr(tally, entry.name, value)
        return tally
