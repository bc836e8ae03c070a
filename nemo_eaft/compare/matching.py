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

    def curves(measure_values: Mapping[str, Values], method: str, draw: int) -> Curve:
        return {
            rate: [
                Course(quality[runs[index].name][draw], measure_values[runs[index].name][draw])
                for index in chosen[method][draw]
            ]
            for rate, runs in taking_part[method].items()
        }

    matches = []
    for measure in paths[0].points[0]:
        if measure == QUALITY:
            continue
        values = {path.name: forgetting(path, measure, weights) for path in paths}
        for method in taking_part:
            if method != reference:
                pairs = [(curves(values, method, draw), curves(values, reference, draw)) for draw in range(draws + 1)]
                matches.append(_match(measure, method, pairs))
    return Matching(
        reference,
        tuple(matches),
        {method: tuple(curve) for method, curve in taking_part.items()},
        {method: len(next(iter(curve.values()))) for method, curve in taking_part.items()},
        draws,
    )


def _match(measure: str, method: str, pairs: Sequence[tuple[Curve, Curve]]) -> Match:
    """The first pair is what was measured, the others are draws."""
    span = common_range(*pairs[0])
    if span is None:
        return Match(measure, method, (), None, None)
    levels, areas = [], []
    for mine, theirs in pairs:
        drawn = common_range(mine, theirs)
        if drawn is None:
            levels.append(np.full((2, len(PARTS)), np.nan))
            areas.append(np.nan)
            continue
        at = levels_in(drawn, PARTS)
        levels.append(np.stack([curve_at(mine, at), curve_at(theirs, at)]))
        areas.append(mean_difference(mine, theirs, drawn))
    table = np.array(levels)
    differences = table[:, 0] - table[:, 1]
    targets = levels_in(span, PARTS)
    found = tuple(
        Level(part, float(targets[n]), float(table[0, 0, n]), float(table[0, 1, n]), _interval(differences[:, n]))
        for n, part in enumerate(PARTS)
    )
    return Match(measure, method, found, _interval(np.array(areas)), span)


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


def _seeds(counts: Mapping[str, int], draws: int, generator: np.random.Generator) -> dict[str, list[Sequence[int]]]:
    """Method -> for the measured and each draw the indices of its seeds."""
    by_count: dict[int, list[Sequence[int]]] = {}
    for count in sorted(set(counts.values())):
        drawn = generator.integers(count, size=(draws, count))
        by_count[count] = [range(count), *drawn.tolist()]
    return {method: by_count[count] for method, count in counts.items()}


def _most_seeds(paths: Sequence[Path]) -> dict[str, dict[float | None, list[Path]]]:
    """Method -> learning rate -> runs in the order of their seeds, at the learning rates with the most of them: one
    that was tried with a single seed would win by luck."""
    found: dict[str, dict[float | None, list[Path]]] = {}
    for path in sorted(paths, key=lambda path: (path.seed is None, path.seed, path.name)):
        found.setdefault(path.method, {}).setdefault(path.learning_rate, []).append(path)
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
