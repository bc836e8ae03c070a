"""Methods against one of them at equal target quality, with bootstrap intervals over seeds and rows.

Each draw takes rows (samples, windows, questions) with replacement, the same ones for every method. Levels, range and
learning rates are found anew for it, from all seeds. For each draw of rows seeds are drawn with replacement many times,
the same ones for all methods that have as many; which seeds were drawn moves the means alone. The interval is that of
the 2.5th to the 97.5th percentile of the draws, made wider by the margin of the interpolation between checkpoints: what
coarse checkpoints leave open is not shown. With one seed for each learning rate it is over rows alone, and says nothing
of what another seed would do.

Few seeds drawn with replacement spread too little: of three normal ones the plain percentile interval holds the true
mean 75 times in 100, not 95. So each draw's distance from the mean over all seeds is made wider by
:func:`seed_scale`, after which it is 95 of 100 for three seeds, 93 for two and 94 for five (simulated in
``tests/compare/test_statistics.py``). The rows are many and are drawn plainly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nemo_eaft.compare.record import MEASURES, QUALITY, Path, Values
from nemo_eaft.compare.statistics import (
    Area,
    Course,
    Curve,
    OfMethod,
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
DRAWS = 2000
"""Draws of the rows."""
SEED_DRAWS = 50
"""Draws of the seeds for each of them, which cost next to nothing. An end of the interval hangs on the few draws that
take one seed alone (of three, one in 27): the upper end of ``benchmarks/forgetting``'s main comparison is at 0.016 nats
with a standard deviation of 0.009 for 20000 draws of rows with one of seeds each, at 0.012 with 0.003 for 5000 with 50,
in a quarter of the time."""
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

    def of(self, method: str, measure: str) -> Match:
        """The one comparison of a method, other than the reference, by a measure."""
        (found,) = (each for each in self.matches if (each.method, each.measure) == (method, measure))
        return found


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
    counts = {method: len(next(iter(rates.values()))) for method, rates in taking_part.items()}

    # All measures at once, for they share the levels. A part of the draws at a time, so that memory is bounded.
    measures = [measure for measure in paths[0].points[0] if measure != QUALITY]
    others = [method for method in taking_part if measures and method != reference]

    def curves_of(draws_of: slice) -> dict[str, Curve]:
        taken = {units: each[draws_of] for units, each in weights.items()}
        return {method: _curve(measures, rates, taken) for method, rates in taking_part.items()}

    # The first draw is what was measured.
    measured = curves_of(slice(1))
    ranges = {
        method: [float(end[0, 0]) for end in common_range(measured[method], measured[reference])] for method in others
    }
    parts = {
        method: PARTS if lowest < highest else PARTS[-1:]
        for method, (lowest, highest) in ranges.items()
        if not np.isnan(lowest)
    }
    found: dict[str, list[_Found]] = {method: [] for method in parts}
    for start in range(0, draws + 1, _AT_ONCE):
        curves = curves_of(slice(start, start + _AT_ONCE))
        for method, each in found.items():
            each.append(_at_levels(curves[method], curves[reference], parts[method]))
    of_seeds = _seeds(counts, draws, seed)
    pairs = [
        _matches(measures, method, parts[method], found[method], of_seeds[counts[method]], of_seeds[counts[reference]])
        if method in found
        else _no_range(measures, method, _why_not(method, measured[method], reference, measured[reference]))
        for method in others
    ]
    return Matching(
        reference,
        tuple(match for of_measure in zip(*pairs, strict=True) for match in of_measure),
        {method: tuple(rates) for method, rates in taking_part.items()},
        counts,
        draws,
    )


class _Found(NamedTuple):
    """A part of the draws of two methods; they stand in the second place."""

    levels: Values
    """[1, draws, levels] of target cross-entropy."""
    mine: OfMethod
    """[measures, draws, levels]"""
    theirs: OfMethod
    area: Area
    """[measures, draws]"""


def _curve(
    measures: Sequence[str], rates: Mapping[float | None, Sequence[Path]], weights: Mapping[str, Values]
) -> Curve:
    """[measures, draws, points] of one method; the weights are [draws, units]."""
    return {
        rate: [
            Course(
                _means(run, QUALITY, weights)[None],
                np.stack([forgetting(run, measure, weights) for measure in measures]),
            )
            for run in runs
        ]
        for rate, runs in rates.items()
    }


def _at_levels(mine: Curve, theirs: Curve, parts: Sequence[float]) -> _Found:
    levels = levels_in(*common_range(mine, theirs), parts)
    return _Found(levels, curve_at(mine, levels), curve_at(theirs, levels), mean_difference(mine, theirs))


def _matches(
    measures: Sequence[str],
    method: str,
    parts: Sequence[float],
    found: Sequence[_Found],
    mine: Values,
    theirs: Values,
) -> list[Match]:
    """Of one method.

    Args:
        parts: of the common range.
        found: all parts of the draws; the first draw of the first is what was measured.
        mine, theirs: of :func:`_seeds`, for as many seeds as each has.
    """
    levels = np.concatenate([each.levels for each in found], axis=1)
    values, others = (
        OfMethod(*(np.concatenate(each, axis=1) for each in zip(*of, strict=True)))
        for of in ([each.mine for each in found], [each.theirs for each in found])
    )
    areas = Area(*(np.concatenate(each, axis=1) for each in zip(*(each.area for each in found), strict=True)))

    differences, margins = values.value - others.value, values.margin + others.margin

    def interval(difference: Values, first: Values, second: Values, margin: Values) -> Interval:
        drawn = _drawn_means(first[1:], mine) - _drawn_means(second[1:], theirs)
        return _interval(difference[0], drawn, margin[1:])

    return [
        Match(
            measure,
            method,
            tuple(
                Level(
                    part,
                    float(levels[0, 0, number]),
                    float(values.value[place, 0, number]),
                    float(others.value[place, 0, number]),
                    interval(
                        differences[place, :, number],
                        values.seeds[place, :, number],
                        others.seeds[place, :, number],
                        margins[place, :, number],
                    ),
                )
                for number, part in enumerate(parts)
            ),
            interval(areas.value[place], areas.first[place], areas.second[place], areas.margin[place]),
            (float(levels[0, 0].min()), float(levels[0, 0].max())),
        )
        for place, measure in enumerate(measures)
    ]


def _no_range(measures: Sequence[str], method: str, reason: str) -> list[Match]:
    return [Match(measure, method, (), None, None, reason) for measure in measures]


def _drawn_means(seeds: Values, weights: Values) -> Values:
    """[draws, seed draws] from [draws, seeds] and [draws, seed draws, seeds]."""
    means: Values = np.einsum("ds,dns->dn", seeds, weights)
    return means


def _why_not(method: str, mine: Curve, reference: str, theirs: Curve) -> str:
    curves = {method: mine, reference: theirs}
    reached = {name: float(reach(curve)[0, 0]) for name, curve in curves.items()}
    for name, curve in curves.items():
        if reached[name] >= next(iter(curve.values()))[0].quality[0, 0, 0]:
            return f"{name} never got below the base model's target cross-entropy with every seed"
    begins = {name: float(begin(curve)[0, 0]) for name, curve in curves.items()}
    far, near = min(begins, key=lambda name: begins[name]), max(reached, key=lambda name: reached[name])
    return (
        f"{far} is at {begins[far]:.4f} nats at the first checkpoint of a run, farther than what {near} reaches with "
        f"every seed, {reached[near]:.4f}; checkpoints closer together at the beginning are needed (trainer.save_every)"
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
    """Number of seeds -> [draws, seed draws, seeds] the weight of each in the mean."""
    found = {}
    for count in set(counts.values()):
        distance = _drawn(count, draws * SEED_DRAWS, seed, "seeds").reshape(draws, SEED_DRAWS, count) - 1
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


def _interval(value: float, drawn: Values, margin: Values) -> Interval:
    """value: what was measured; drawn: [draws, seed draws]; margin: [draws] of each draw of rows."""
    there = np.isfinite(drawn).all(1)
    if not len(drawn) or there.mean() < _LEAST:
        return Interval(float(value), None, None)
    drawn, margin = drawn[there], margin[there][:, None]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn - margin, tail), np.percentile(drawn + margin, 100 - tail)
    return Interval(float(value), float(low), float(high))
