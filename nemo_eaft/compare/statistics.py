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

GRID = 100
"""Equal parts into which the common range of two curves is cut for the area between them."""


class Course(NamedTuple):
    """One run in two numbers a checkpoint. Leading dimensions, such as the draws of a bootstrap, go through all."""

    quality: Values
    """[..., points] target cross-entropy, nats per token; the first is the base model's."""
    other: Values
    """[..., points] what is wanted at a level of it."""


Curve = Mapping[Any, Sequence[Course]]
"""Learning rate (None: not known) -> a course for each seed."""


def at_level(course: Course, levels: Values) -> Values:
    """[..., levels] of ``other`` where the course first reaches each level of quality; NaN where it does not, and above
    the base model's quality."""
    quality, other = course
    points = quality.shape[-1]
    best = np.minimum.accumulate(quality, axis=-1)
    # The first point at or below each level: as many as are above it, for `best` never rises.
    place = (best[..., :, None] > levels[..., None, :]).sum(-2)
    after = np.clip(place, 1, points - 1)

    def take(values: Values, index: Any) -> Values:
        return np.take_along_axis(np.broadcast_to(values, (*index.shape[:-1], points)), index, -1)

    upper, lower = take(quality, after - 1), take(quality, after)
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (upper - levels) / (upper - lower)
        between = take(other, after - 1) + part * (take(other, after) - take(other, after - 1))
    found = np.where((place > 0) & (place < points), between, np.nan)
    return np.where((place == 0) & (levels == quality[..., :1]), other[..., :1], found)


def curve_at(curve: Curve, levels: Values) -> Values:
    """[..., levels] of a method: the lowest, over learning rates, of the means over seeds; NaN where no learning rate
    has reached a level with every seed."""
    means = [np.mean([at_level(course, levels) for course in courses], axis=0) for courses in curve.values()]
    # What is not reached is passed over.
    lowest: Values = np.min(np.where(np.isnan(means), np.inf, means), axis=0)
    return np.where(np.isinf(lowest), np.nan, lowest)


def reach(curve: Curve) -> Values:
    """[...] the lowest target cross-entropy that every seed of some learning rate has reached."""
    lowest: Values = np.min(
        [np.max([course.quality.min(-1) for course in courses], axis=0) for courses in curve.values()], axis=0
    )
    return lowest


def common_range(first: Curve, second: Curve) -> tuple[Values, Values]:
    """[...] the lowest target cross-entropy that both methods reach, and that of the base model. Where the one is not
    below the other, one of the methods never got below the base model, and the curves do not overlap."""
    base: Values = next(iter(first.values()))[0].quality[..., 0]
    return np.maximum(reach(first), reach(second)), base


def levels_in(lowest: Values, base: Values, parts: Sequence[float]) -> Values:
    """[..., parts] levels at parts of the way from the base model (0) to the lowest common target cross-entropy (1)."""
    low, high = np.asarray(lowest)[..., None], np.asarray(base)[..., None]
    # Rounding must not put the last one where nobody has been.
    levels: Values = np.clip(high - np.asarray(parts, dtype=np.float64) * (high - low), low, np.maximum(low, high))
    return levels


def mean_difference(first: Curve, second: Curve) -> Values:
    """[...] the area between two curves over their common range, divided by its width: the mean of ``first - second``
    over levels; NaN where they do not overlap.

    By the trapezoidal rule between the levels of all checkpoints in it and :data:`GRID` equal parts: exact for curves
    of one learning rate whose target cross-entropy falls from checkpoint to checkpoint.
    """
    lowest, base = common_range(first, second)
    grid = levels_in(lowest, base, np.linspace(1, 0, GRID + 1).tolist())
    knots = [course.quality for curve in (first, second) for courses in curve.values() for course in courses]
    levels = np.sort(np.concatenate([grid, *knots], axis=-1), axis=-1)
    # Those outside move to the ends, where they have no width.
    levels = np.clip(levels, lowest[..., None], np.maximum(lowest, base)[..., None])
    difference = curve_at(first, levels) - curve_at(second, levels)
    area = np.sum((difference[..., 1:] + difference[..., :-1]) / 2 * np.diff(levels, axis=-1), axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Values = np.where(lowest < base, area / (base - lowest), np.nan)
    return mean
