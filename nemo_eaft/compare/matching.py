"""Methods against one of them at equal target quality, with bootstrap intervals over seeds and rows.

Each draw takes rows (samples, windows, questions) with replacement, the same ones for every method, and seeds with
replacement, the same ones for all methods that have as many; everything is then computed anew, the levels too. The
interval is that of the 2.5th to the 97.5th percentile of the draws. With one seed for each learning rate it is over
rows alone, and says nothing of what another seed would do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_eaft.compare.record import MEASURES, QUALITY, Path, Values
from nemo_eaft.compare.statistics import Course, Curve, common_range, curve_at, levels_in, mean_difference

PARTS = (0.25, 0.5, 0.75, 1.0)
"""Levels: parts of the way from the base model's target cross-entropy to the lowest one that both methods reach."""
DRAWS = 1000
_LEAST = 0.95  # of the draws must have a value, or there is no interval


@dataclass(frozen=True)
class Interval:
    """A value and where 95 % of its draws lie; None where too few draws have it."""

    value: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval is on one side of 0; 0 where nothing is shown."""
        if self.low is None or self.high is None:
            return 0
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


@dataclass(frozen=True)
class Level:
    """Both methods at one level of target cross-entropy."""

    part: float
    target: float
    """Nats per token."""
    value: float
    reference: float
    difference: Interval


@dataclass(frozen=True)
class Match:
    """One measure of one method against the reference; ``levels`` is empty where the curves do not overlap."""

    measure: str
    method: str
    levels: tuple[Level, ...]
    mean_difference: Interval | None
    """Area between the curves over the width of their common range."""
    span: tuple[float, float] | None
    """The common range of target cross-entropy."""


@dataclass(frozen=True)
class Matching:
    """What came out."""

    reference: str
    matches: tuple[Match, ...]
    learning_rates: dict[str, tuple[float | None, ...]]
    """Method -> the learning rates that take part: those with the most seeds."""
    seeds: dict[str, int]
    """Method -> seeds for each of these."""
    draws: int


def match(paths: Sequence[Path], reference: str, draws: int = DRAWS, seed: int = 0) -> Matching:
    """Compare every method with ``reference``.

    Args:
        paths: the runs; measured on the same rows, from the same base model.
        reference: the method that the others are compared with.
        draws: of the bootstrap, 0 or more.
        seed: of the draws.

    Raises:
        ValueError: no such method, or runs that were not measured alike.
    """
    methods = {path.method for path in paths}
    if reference not in methods:
        raise ValueError(f"reference={reference!r} is none of the methods {', '.join(sorted(methods))}")
    _check(paths)
    taking_part = _most_seeds(paths)
    generator = np.random.default_rng(seed)
    weights = _weights(paths[0], draws, generator)
    quality = {path.name: _means(path, QUALITY, weights) for path in paths}
    chosen = _seeds({name: len(next(iter(curve.values()))) for name, curve in taking_part.items()}, draws, generator)

    matches = []
    for measure in paths[0].points[0]:
        if measure == QUALITY:
            continue
        values = {path.name: forgetting(path, measure, weights) for path in paths}
        curves = {
            method: {
                rate: _drawn([Course(quality[run.name], values[run.name]) for run in runs], chosen[method])
                for rate, runs in rates.items()
            }
            for method, rates in taking_part.items()
        }
        theirs = curves.pop(reference)
        matches += [_match(measure, method, mine, theirs) for method, mine in curves.items()]
    return Matching(
        reference,
        tuple(matches),
        {method: tuple(curve) for method, curve in taking_part.items()},
        {method: len(next(iter(curve.values()))) for method, curve in taking_part.items()},
        draws,
    )


def _drawn(courses: Sequence[Course], chosen: NDArray[np.int64]) -> list[Course]:
    """The course of another seed in each draw: [draws + 1, points] each."""
    quality, other = (np.stack(each) for each in zip(*courses, strict=True))
    draws = np.arange(len(chosen))
    return [Course(quality[index, draws], other[index, draws]) for index in chosen.T]


def _match(measure: str, method: str, mine: Curve, theirs: Curve) -> Match:
    """The first line of every array is what was measured, the others are draws."""
    lowest, base = common_range(mine, theirs)
    if not lowest[0] < base[0]:
        return Match(measure, method, (), None, None)
    levels = levels_in(lowest, base, PARTS)
    values, reference = curve_at(mine, levels), curve_at(theirs, levels)
    differences = np.where((lowest < base)[:, None], values - reference, np.nan)
    found = tuple(
        Level(part, float(levels[0, n]), float(values[0, n]), float(reference[0, n]), _interval(differences[:, n]))
        for n, part in enumerate(PARTS)
    )
    area = _interval(mean_difference(mine, theirs))
    return Match(measure, method, found, area, (float(lowest[0]), float(base[0])))


def forgetting(path: Path, measure: str, weights: Mapping[str, Values] | None = None) -> Values:
    """[draws + 1, points] of what counts as forgetting; a measure that is none (``exact``) as it is.

    weights: units -> [draws + 1, units] how often each is taken; None: each once, so that there is one line.
    """
    means = _means(path, measure, weights)
    how = MEASURES[measure].forgetting
    if how == "rise":
        return means - means[:, :1]
    return means[:, :1] - means if how == "fall" else means


def _means(path: Path, measure: str, weights: Mapping[str, Values] | None) -> Values:
    values = np.array([point[measure].values for point in path.points])
    counts = np.array(path.points[0][measure].counts, dtype=np.float64)
    taken = np.ones((1, len(counts))) if weights is None else weights[MEASURES[measure].units]
    means: Values = (taken @ values.T) / (taken @ counts)[:, None]
    return means


def _weights(path: Path, draws: int, generator: np.random.Generator) -> dict[str, Values]:
    found: dict[str, Values] = {}
    for measure, sums in path.points[0].items():
        units, count = MEASURES[measure].units, len(sums.counts)
        if units not in found:
            drawn = generator.multinomial(count, np.full(count, 1 / count), size=draws)
            found[units] = np.concatenate([np.ones((1, count)), drawn])
    return found


def _seeds(counts: Mapping[str, int], draws: int, generator: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """Method -> [draws + 1, seeds] the seeds that take part, by their place; the first line has each once."""
    by_count = {
        count: np.concatenate([np.arange(count)[None], generator.integers(count, size=(draws, count))])
        for count in sorted(set(counts.values()))
    }
    return {method: by_count[count] for method, count in counts.items()}


def _most_seeds(paths: Sequence[Path]) -> dict[str, dict[float | None, list[Path]]]:
    """Method -> learning rate -> runs in the order of their seeds, at the learning rates with the most of them: one
    that was tried with a single seed would win by luck."""
    found: dict[str, dict[float | None, list[Path]]] = {path.method: {} for path in paths}
    for path in sorted(paths, key=lambda path: (path.seed is None, path.seed, path.name)):
        found[path.method].setdefault(path.learning_rate, []).append(path)
    for method, rates in found.items():
        most = max(map(len, rates.values()))
        found[method] = {rate: runs for rate, runs in rates.items() if len(runs) == most}
    return found


def _check(paths: Sequence[Path]) -> None:
    base = paths[0].points[0]
    for path in paths:
        if path.points[0] != base:
            raise ValueError(f"{path.name} and {paths[0].name} do not begin at the same measured base model")


def _interval(values: Values) -> Interval:
    """The first value is what was measured, the others are draws."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not len(drawn) or len(drawn) < _LEAST * (len(values) - 1):
        return Interval(float(values[0]), None, None)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))
