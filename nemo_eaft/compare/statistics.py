"""Forgetting at equal target quality, and the area between two methods' curves. Plain arithmetic on arrays.

A run is a path of points (target cross-entropy, forgetting), from the base model over its checkpoints. A level of
target cross-entropy is reached between the last checkpoint that is above it and the first one that is not; forgetting
there is interpolated linearly between these two. A level that a run has not reached has no value: nothing is
extrapolated. A method's curve is, at each level, the mean over seeds at the learning rate where that mean is lowest,
among the learning rates with which every seed has reached the level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nemo_eaft.compare.record import Values

GRID = 200
"""Equal parts into which the common range of two curves is cut for the area between them."""


class Course(NamedTuple):
    """One run in two numbers a checkpoint."""

    quality: Values
    """[points] target cross-entropy, nats per token; the first is the base model's."""
    other: Values
    """[points] what is wanted at a level of it."""


Curve = Mapping[Any, Sequence[Course]]
"""Learning rate (None: not known) -> a course for each seed."""


def at_level(course: Course, levels: Values) -> Values:
    """[levels] of ``other`` where the course first reaches each level of quality; NaN where it does not, and above the
    base model's quality."""
    quality, other = course
    best = np.minimum.accumulate(quality)
    # The first point at or below each level; -best never falls.
    place = np.searchsorted(-best, -levels, side="left")
    found = np.full(len(levels), np.nan)
    inside = (place > 0) & (place < len(quality))
    after = place[inside]
    before = after - 1
    part = (quality[before] - levels[inside]) / (quality[before] - quality[after])
    found[inside] = other[before] + part * (other[after] - other[before])
    found[(place == 0) & (levels == quality[0])] = other[0]
    return found


def curve_at(curve: Curve, levels: Values) -> Values:
    """[levels] of a method: the lowest, over learning rates, of the means over seeds; NaN where no learning rate has
    reached a level with every seed."""
    means = np.array([np.mean([at_level(course, levels) for course in courses], axis=0) for courses in curve.values()])
    # min passes over what is not reached
    lowest: Values = np.min(np.where(np.isnan(means), np.inf, means), axis=0)
    return np.where(np.isinf(lowest), np.nan, lowest)


def reach(curve: Curve) -> float:
    """The lowest target cross-entropy that every seed of some learning rate has reached."""
    return min(max(float(course.quality.min()) for course in courses) for courses in curve.values())


def common_range(first: Curve, second: Curve) -> tuple[float, float] | None:
    """From the lowest target cross-entropy that both methods reach to that of the base model; None where one of them
    never gets below the base model, so that the curves do not overlap."""
    base = next(iter(first.values()))[0].quality[0]
    lowest = max(reach(first), reach(second))
    return (lowest, float(base)) if lowest < base else None


def levels_in(span: tuple[float, float], parts: Sequence[float]) -> Values:
    """Levels at parts of the way from the base model (0) to the lowest common target cross-entropy (1)."""
    lowest, base = span
    # Rounding must not put the last one where nobody has been.
    return np.clip(base - np.asarray(parts, dtype=np.float64) * (base - lowest), lowest, base)


def mean_difference(first: Curve, second: Curve, span: tuple[float, float]) -> float:
    """The area between two curves over ``span``, divided by its width: mean of ``first - second`` over levels.

    By the trapezoidal rule between the levels of all checkpoints in it and :data:`GRID` equal parts: exact for curves
    of one learning rate whose target cross-entropy falls from checkpoint to checkpoint.
    """
    knots = [course.quality for curve in (first, second) for courses in curve.values() for course in courses]
    levels = np.unique(np.concatenate([np.linspace(*span, GRID + 1), *knots]))
    levels = levels[(levels >= span[0]) & (levels <= span[1])]
    difference = curve_at(first, levels) - curve_at(second, levels)
    return float(np.sum((difference[1:] + difference[:-1]) / 2 * np.diff(levels)) / (span[1] - span[0]))
