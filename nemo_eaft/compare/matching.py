"""Methods against one of them at equal target quality, with bootstrap intervals over seeds and rows.

Each draw takes rows (samples, windows, questions) with replacement, the same ones for every method, and seeds with
replacement, the same ones for all methods that have as many. Levels, range and learning rates are found anew for every
draw of rows, from all seeds; which seeds were drawn moves the means alone. The interval is that of the 2.5th to the
97.5th percentile of the draws, made wider by the margin of the interpolation between checkpoints: what coarse
checkpoints leave open is not shown. With one seed for each learning rate it is over rows alone, and says nothing of
what another seed would do.

Few seeds drawn with replacement spread too little: of three normal ones the plain percentile interval holds the true
mean 75 times in 100, not 95. So each draw's distance from the mean over all seeds is made wider by
:func:`seed_scale`, after which it is 95 of 100 for three seeds, 93 for two and 94 for five (simulated in
``tests/compare/test_statistics.py``). The rows are many and are drawn plainly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_eaft.compare.record import MEASURES, QUALITY, Path, Values
from nemo_eaft.compare.statistics import (
    Course,
    Curve,
    begin,
    common_range,
    curve_at,
    levels_in,
    mean_difference,
    reach,
)

PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Levels: parts of the common range of target cross-entropy, from where it begins at a trained checkpoint to its end at
the lowest one that both methods reach."""
DRAWS = 10_000
"""With a thousand, a bound moves by a tenth of the interval's width from one seed of the draws to another."""
CONFIDENCE = 0.95
_LEAST = 0.95  # of the draws must have a value, or there is no interval
_AT_ONCE = 500  # draws
_NOTHING = 1e-9  # nats or shares; results are kept with nine digits
# 97.5th percentile of Student's t with 1, 2, 3 and 4 degrees of freedom; above, an expansion has three digits.
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764)
_NORMAL = 1.959964


def seed_scale(count: int) -> float:
    """By how much the distance of a draw of so many seeds from their mean is made wider: sqrt(n / (n - 1)), for a draw
    of n has the spread of n, not of n - 1, times Student's t over the normal quantile, for the spread itself is known
    from n alone (the two corrections of Hesterberg, "What Teachers Should Know About the Bootstrap", The American
    Statistician 69, 2015, put on the distances and not on the percentiles, which three seeds do not have)."""
    degrees = count - 1
    if degrees < 1:
        return 1.0
    z = _NORMAL
    # Abramowitz and Stegun 26.7.5.
    expanded = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    expanded += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    quantile = _STUDENT[degrees - 1] if degrees <= len(_STUDENT) else expanded
    return float(np.sqrt(count / degrees)) * quantile / z


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
        return -1 if self.high < -_NOTHING else 1 if self.low > _NOTHING else 0


@dataclass(frozen=True)
class Level:
    """Both methods at one level of target cross-entropy."""

    part: float
    """Of the common range: 0 where it begins, 1 where it ends."""
    target: float
    """Nats per token."""
    value: float
    reference: float
    difference: Interval


@dataclass(frozen=True)
class Match:
    """One measure of one method against the reference; ``levels`` is empty where there is no common range."""

    measure: str
    method: str
    levels: tuple[Level, ...]
    mean_difference: Interval | None
    """Area between the curves over the width of their common range."""
    span: tuple[float, float] | None
    """The common range of target cross-entropy: the lowest one that both reach, and the farther of the two first
    trained checkpoints."""
    why_not: str | None = None
    """Why there is no common range."""

    @property
    def turning(self) -> tuple[Level, ...]:
        """Levels that disagree: those with another sign than a mean that is shown to have one; where it is not, those
        that are shown to have one, if they differ in it."""
        sign = self.mean_difference.sign if self.mean_difference is not None else 0
        if sign:
            return tuple(level for level in self.levels if level.difference.value * sign < -_NOTHING)
        shown = tuple(level for level in self.levels if level.difference.sign)
        return shown if len({level.difference.sign for level in shown}) == 2 else ()


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
    weights = _weights(paths[0], draws, seed)
    counts = {method: len(next(iter(curve.values()))) for method, curve in taking_part.items()}
    seed_weights = _seeds(counts, draws, seed)

    # All measures at once, for they share the levels. A part of the draws at a time, so that memory is bounded.
    measures = [measure for measure in paths[0].points[0] if measure != QUALITY]
    curves: list[dict[str, Curve]] = []
    for start in range(0, draws + 1, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        taken = {units: each[part] for units, each in weights.items()}
        curves.append(
            {
                method: _curve(measures, rates, taken, seed_weights[counts[method]][part])
                for method, rates in taking_part.items()
            }
        )
    pairs = [
        _match(measures, method, reference, [(each[method], each[reference]) for each in curves])
        for method in taking_part
        if measures and method != reference
    ]
    return Matching(
        reference,
        tuple(match for of_measure in zip(*pairs, strict=True) for match in of_measure),
        {method: tuple(rates) for method, rates in taking_part.items()},
        counts,
        draws,
    )


def _curve(
    measures: Sequence[str],
    rates: Mapping[float | None, Sequence[Path]],
    weights: Mapping[str, Values],
    seed_weights: Values,
) -> Curve:
    """[measures, draws, points] of one method; the weights are [draws, units] and [draws, seeds]."""
    return {
        rate: [
            Course(
                _means(run, QUALITY, weights)[None],
                np.stack([forgetting(run, measure, weights) for measure in measures]),
                weight[None],
            )
            for run, weight in zip(runs, seed_weights.T, strict=True)
        ]
        for rate, runs in rates.items()
    }


def _match(measures: Sequence[str], method: str, reference: str, pairs: Sequence[tuple[Curve, Curve]]) -> list[Match]:
    """pairs: both curves, [measures, draws, points], a part of the draws in each; the first draw of the first is what
    was measured."""
    lowest, highest = (float(end[0, 0]) for end in common_range(*pairs[0]))
    if np.isnan(lowest):
        reason = _why_not(method, pairs[0][0], reference, pairs[0][1])
        return [Match(measure, method, (), None, None, reason) for measure in measures]
    parts = PARTS if lowest < highest else PARTS[-1:]
    found = [_at_levels(mine, theirs, parts) for mine, theirs in pairs]
    # Draws stand in the second place of all of them.
    levels, values, value_margins, others, other_margins, areas, area_margins = (
        np.concatenate(each, axis=1) for each in zip(*found, strict=True)
    )
    return [
        Match(
            measure,
            method,
            tuple(
                Level(
                    part,
                    float(levels[0, 0, number]),
                    float(values[place, 0, number]),
                    float(others[place, 0, number]),
                    _interval(
                        values[place, :, number] - others[place, :, number],
                        value_margins[place, :, number] + other_margins[place, :, number],
                    ),
                )
                for number, part in enumerate(parts)
            ),
            _interval(areas[place], area_margins[place]),
            (lowest, highest),
        )
        for place, measure in enumerate(measures)
    ]


def _at_levels(mine: Curve, theirs: Curve, parts: Sequence[float]) -> tuple[Values, ...]:
    """Levels, both curves there with their margins, and the mean difference with its own."""
    levels = levels_in(*common_range(mine, theirs), parts)
    return (levels, *curve_at(mine, levels), *curve_at(theirs, levels), *mean_difference(mine, theirs))


def _why_not(method: str, mine: Curve, reference: str, theirs: Curve) -> str:
    curves = {method: mine, reference: theirs}
    reached = {name: float(reach(curve)[0, 0]) for name, curve in curves.items()}
    for name, curve in curves.items():
        if reached[name] >= next(iter(curve.values()))[0].quality[0, 0, 0]:
            return f"{name} never got below the base model's target cross-entropy with every seed"
    begins = {name: float(begin(curve)[0, 0]) for name, curve in curves.items()}
    far, near = min(begins, key=lambda name: begins[name]), max(reached, key=lambda name: reached[name])
    return (
        f"{far} is at {begins[far]:.3f} nats at the first checkpoint of a run, farther than what {near} reaches with "
        f"every seed, {reached[near]:.3f}; checkpoints closer together at the beginning are needed (trainer.save_every)"
    )


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


def _drawn(count: int, draws: int, seed: int, what: str) -> Values:
    """[draws, count] how often each of ``count`` is taken. Of every kind of things the draws are its own, so that what
    else is measured, or compared, moves no interval."""
    generator = np.random.default_rng([seed, count, *what.encode()])
    drawn: Values = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
    return drawn


def _weights(path: Path, draws: int, seed: int) -> dict[str, Values]:
    found: dict[str, Values] = {}
    for measure, sums in path.points[0].items():
        units, count = MEASURES[measure].units, len(sums.counts)
        if units not in found:
            drawn = _drawn(count, draws, seed, units)
            found[units] = np.concatenate([np.ones((1, count)), drawn])
    return found


def _seeds(counts: Mapping[str, int], draws: int, seed: int) -> dict[int, Values]:
    """Number of seeds -> [draws + 1, seeds] the weight of each in the mean; in the first line all have the same."""
    found = {}
    for count in set(counts.values()):
        distance = np.concatenate([np.zeros((1, count)), _drawn(count, draws, seed, "seeds") - 1])
        found[count] = (1 + seed_scale(count) * distance) / count
    return found


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
    known: dict[tuple[object, ...], str] = {}
    for path in paths:
        if path.points[0] != base:
            raise ValueError(f"{path.name} and {paths[0].name} do not begin at the same measured base model")
        if path.seed is not None:
            other = known.setdefault((path.method, path.learning_rate, path.seed), path.name)
            if other != path.name:
                # Counted as two seeds they would make the interval narrow.
                raise ValueError(
                    f"{other} and {path.name} are both {path.method} at learning rate {path.learning_rate:g} with seed "
                    f"{path.seed}: give one of them"
                )


def _interval(values: Values, margin: Values) -> Interval:
    """The first of each is what was measured, the others are draws."""
    there = np.isfinite(values[1:])
    drawn, margin = values[1:][there], margin[1:][there]
    if not len(drawn) or len(drawn) < _LEAST * (len(values) - 1):
        return Interval(float(values[0]), None, None)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn - margin, tail), np.percentile(drawn + margin, 100 - tail)
    return Interval(float(values[0]), float(low), float(high))
