"""What is kept of a measurement: a value for each row, and the path that a run takes through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

QUALITY = "target"
"""The measure by which models are matched: cross-entropy of the answers of held-out rows, nats per token."""


@dataclass(frozen=True)
class Measure:
    """How a measure is named, and how it becomes forgetting."""

    title: str
    unit: str
    forgetting: str | None
    """``value``: it is forgetting itself; ``rise``, ``fall``: what it has risen or fallen since the base model;
    None: it is no forgetting."""
    units: str
    """What is drawn again by the bootstrap; measures of one kind of units share the draw."""


MEASURES = {
    QUALITY: Measure("target cross-entropy", "nats per token", None, "rows"),
    "exact": Measure("exact match", "share of rows", None, "rows"),
    "drift": Measure("drift, KL(base || tuned)", "nats per token", "value", "samples"),
    "text": Measure("cross-entropy of general text", "nats per token", "rise", "windows"),
    "probe": Measure("knowledge probe", "share right", "fall", "questions"),
    "answer": Measure("cross-entropy of the probe's right answers", "nats per question", "rise", "questions"),
}


@dataclass(frozen=True)
class Sums:
    """One measure of one model, a sum and a count for each unit (row, sample, window, question)."""

    values: tuple[float, ...]
    """Nats summed over the tokens of a unit; 1 or 0 where a unit is right or wrong."""
    counts: tuple[int, ...]
    """Tokens of a unit; 1 where the unit is counted as a whole, as a question is."""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.counts) or not self.counts or min(self.counts) < 1:
            raise ValueError(f"{len(self.values)} values and {len(self.counts)} counts, each of at least 1, are needed")

    @property
    def mean(self) -> float:
        """The mean over all tokens (or units), not over units of different lengths."""
        return float(np.sum(self.values) / np.sum(self.counts))


Measures = dict[str, Sums]
"""Measures of one model by their names in :data:`MEASURES`; all but ``target`` and ``exact`` may be missing."""


def to_json(measures: Measures) -> dict[str, Any]:
    """Plain values, with nine significant digits."""
    return {
        name: {"values": [float(f"{value:.9g}") for value in sums.values], "counts": list(sums.counts)}
        for name, sums in measures.items()
    }


def from_json(mapping: Mapping[str, Any]) -> Measures:
    """What :func:`to_json` made.

    Raises:
        ValueError: a name that is no measure.
    """
    for name in mapping:
        if name not in MEASURES:
            raise ValueError(f"{name!r} is no measure; there are {', '.join(MEASURES)}")
    return {name: Sums(tuple(each["values"]), tuple(each["counts"])) for name, each in mapping.items()}


@dataclass(frozen=True)
class Path:
    """One run from the base model on."""

    name: str
    method: str
    learning_rate: float | None
    """None: not known, as for a folder of weights."""
    seed: int | None
    steps: tuple[int, ...]
    """Optimizer steps done at each point; the first is 0, the base model."""
    points: tuple[Measures, ...]

    def __post_init__(self) -> None:
        assert len(self.steps) == len(self.points)
        assert self.steps[0] == 0
        assert all(before < after for before, after in zip(self.steps, self.steps[1:], strict=False))
        sizes = {name: sums.counts for name, sums in self.points[0].items()}
        for point in self.points:
            if {name: sums.counts for name, sums in point.items()} != sizes:
                raise ValueError(f"{self.name}: its checkpoints were not measured on the same rows")
