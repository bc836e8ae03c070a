"""Forgetting at equal target quality, and the area between two methods' curves. Plain arithmetic on arrays.

A run is a path of points (target cross-entropy, forgetting), from the base model over its checkpoints. A level of
target cross-entropy is reached between the last checkpoint that is above it and the first one that is not; forgetting
there is interpolated between these two, with a margin (:func:`at_level`). A level that a run has not reached has no
value: nothing is extrapolated. A method's curve is, at each level, the mean over seeds at the learning rate where that
mean is lowest, among the learning rates with which every seed has reached the level.

Two methods are compared between trained checkpoints alone (:func:`common_range`). On the way from the base model to the
first checkpoint nothing was measured, and forgetting is convex there (drift about quadratic), so that a straight line
lies above it: the higher, the farther the first checkpoint is. A method that takes larger steps would be charged for
that, and the same curve in smaller steps would pass for less forgetting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nemo_eaft.compare.record import Values

GRID = 25
"""Equal parts into which the common range of two curves is cut for the area between them."""


class Course(NamedTuple):
    """One run in two numbers a checkpoint. Leading dimensions, such as the draws of a bootstrap, go through all."""

    quality: Values
    """[..., points] target cross-entropy, nats per token; the first is the base model's."""
    other: Values
    """[..., points] what is wanted at a level of it."""


Curve = Mapping[Any, Sequence[Course]]
"""Learning rate (None: not known) -> a course for each seed."""


class Between(NamedTuple):
    """What is interpolated."""

    value: Values
    """[..., levels]; NaN where there is none."""
    margin: Values
    """[..., levels] how far, at most, the truth is above or below it, as far as neighbouring checkpoints tell."""


def at_level(course: Course, levels: Values) -> Between:
    """``other`` where the course first reaches each of [..., levels] of quality; NaN where it does not, and above the
    base model's quality.

    Two parabolas go through the two checkpoints around a level: one through the checkpoint before them as well, one
    through the checkpoint after them. Both are exact for a quadratic, as drift is near the base model. Any other curve
    whose third derivative keeps its sign lies between the two (the remainders of the interpolation have opposite
    signs); ``value`` is their middle and ``margin`` half of what is between them. Behind the last checkpoint there is
    none, and before the first trained one nothing comes before the base model: there the curvature is taken to be
    between none and twice that of the one parabola.

    A curve that rises, or falls, through all four checkpoints is taken to do so between them: all stays between the
    values of the two. Where it turns at one of the two, the margin reaches as far as the parabolas leave them, at most
    over their difference; and over all of it where two neighbours are at one level, through which there is no parabola.
    """
    quality, other = course
    points = quality.shape[-1]
    best = np.minimum.accumulate(quality, axis=-1)
    # The first point at or below each level: as many as are above it, for `best` never rises.
    shape = np.broadcast_shapes(best.shape[:-1], levels.shape[:-1])
    place = np.zeros((*shape, levels.shape[-1]), dtype=np.int64)
    for point in range(points):
        place += best[..., point, None] > levels
    after = np.clip(place, 1, points - 1)

    lead = np.broadcast_shapes(other.shape[:-1], shape)

    def take(values: Values, index: Any) -> Values:
        """As ``np.take_along_axis``, in a fifth of its time."""
        rows = np.broadcast_to(values, (*lead, values.shape[-1])).reshape(-1, values.shape[-1])
        flat = np.broadcast_to(index, (*lead, index.shape[-1])).reshape(len(rows), -1)
        starts = np.arange(len(rows))[:, None] * rows.shape[1]
        return np.take(rows, flat + starts).reshape(*lead, -1)

    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.diff(other) / np.diff(quality)
        # Curvature of the parabola through three neighbours; two at the same level have no parabola.
        bend = np.diff(slope) / (quality[..., 2:] - quality[..., :-2])
        # Of the two through a segment, that ends at point 1, 2, ...; with one alone, none and twice its curvature.
        none = np.zeros((*bend.shape[:-1], 1))
        before, behind = np.concatenate([none, bend], -1), np.concatenate([bend, none], -1)
        if points > 2:
            before[..., -1] *= 2
            behind[..., 0] *= 2
        begun, ended = take(quality, after - 1), take(quality, after)
        low, high = take(other, after - 1), take(other, after)
        straight = low + take(slope, after - 1) * (levels - begun)
        inside = (levels - begun) * (levels - ended)
        rises = np.sign(np.diff(other))
        # At the two ends of the run nothing is known to turn.
        end = np.zeros((*rises.shape[:-1], 1), dtype=bool)
        turn = np.concatenate([end, rises[..., 1:] * rises[..., :-1] < 0, end], -1)
        turns = take(turn[..., 1:] | turn[..., :-1], after - 1)
        free = [straight + take(each, after - 1) * inside for each in (before, behind)]
        held = [np.clip(each, np.minimum(low, high), np.maximum(low, high)) for each in free]
        known = np.isfinite(free[0]) & np.isfinite(free[1])
        middle = np.where(known, (held[0] + held[1]) / 2, straight)
        far = np.max([np.abs(np.where(turns, f, h) - middle) for f, h in zip(free, held, strict=True)], axis=0)
        far = np.where(known, np.minimum(far, np.abs(high - low)), np.abs(high - low))
    found = (place > 0) & (place < points)
    value, margin = np.where(found, middle, np.nan), np.where(found, far, np.nan)
    begins = (place == 0) & (levels == quality[..., :1])
    return Between(np.where(begins, other[..., :1], value), np.where(begins, 0.0, margin))


class OfMethod(NamedTuple):
    """A method at levels of quality."""

    value: Values
    """[..., levels] the mean over seeds."""
    margin: Values
    """[..., levels] the mean of their margins."""
    seeds: Values
    """[..., levels, seeds] what each of them has."""


def curve_at(curve: Curve, levels: Values) -> OfMethod:
    """A method at [..., levels], at the learning rate where the mean over seeds is lowest; NaN where no learning rate
    has reached a level with every seed. All learning rates have as many seeds."""
    seeds, margins = [], []
    for courses in curve.values():
        found = [at_level(course, levels) for course in courses]
        seeds.append(np.stack([each.value for each in found], axis=-1))
        margins.append(np.mean([each.margin for each in found], axis=0))
    means = [each.mean(-1) for each in seeds]
    # What is not reached is passed over.
    best = np.argmin(np.where(np.isnan(means), np.inf, means), axis=0)[None]
    value, margin = (np.take_along_axis(np.stack(each), best, 0)[0] for each in (means, margins))
    return OfMethod(value, margin, np.take_along_axis(np.stack(seeds), best[..., None], 0)[0])


def reach(curve: Curve) -> Values:
    """[...] the lowest target cross-entropy that every seed of some learning rate has reached."""
    lowest: Values = np.min(
        [np.max([course.quality.min(-1) for course in courses], axis=0) for courses in curve.values()], axis=0
    )
    return lowest


def begin(curve: Curve) -> Values:
    """[...] the lowest target cross-entropy of the first trained checkpoints, over all learning rates and seeds, or the
    base model's where that is lower: from here on nothing is interpolated from the base model.

    A learning rate that is far at its first checkpoint takes the beginning from all of them. Were it left out there
    alone, the method would be without it just where the other method, in smaller steps, still has it."""
    first = [course.quality[..., :2].min(-1) for courses in curve.values() for course in courses]
    highest: Values = np.min(first, axis=0)
    return highest


def common_range(first: Curve, second: Curve) -> tuple[Values, Values]:
    """[...] the lowest and the highest target cross-entropy at which both methods were measured: from the first
    trained checkpoint that is farther, to the last place that both reach. NaN where there is none: a method never got
    below the base model, or one is at its first checkpoint farther than the other at its last."""
    base = next(iter(first.values()))[0].quality[..., 0]
    lowest, highest = np.maximum(reach(first), reach(second)), np.minimum(begin(first), begin(second))
    there = (lowest <= highest) & (lowest < base)
    return np.where(there, lowest, np.nan), np.where(there, highest, np.nan)


def levels_in(lowest: Values, highest: Values, parts: Sequence[float]) -> Values:
    """[..., parts] levels at parts of the common range, from its beginning (0: ``highest``) to its end (1)."""
    low, high = np.asarray(lowest)[..., None], np.asarray(highest)[..., None]
    # Rounding must not put the last one where nobody has been.
    levels: Values = np.clip(high - np.asarray(parts, dtype=np.float64) * (high - low), low, high)
    return levels


class Area(NamedTuple):
    """The area between two curves over their common range, divided by its width."""

    value: Values
    """[...] the mean of ``first - second`` over levels."""
    margin: Values
    """[...] the mean of both margins together."""
    first: Values
    """[..., seeds] the mean of what each seed of the first has; the mean of these less that of the second's is
    ``value``."""
    second: Values
    """[..., seeds]"""


def mean_difference(first: Curve, second: Curve) -> Area:
    """[...] of two curves; the difference itself where the range is one level; NaN where there is none.

    By the trapezoidal rule between the levels of all checkpoints in it and :data:`GRID` equal parts.
    """
    lowest, highest = common_range(first, second)
    grid = levels_in(lowest, highest, np.linspace(1, 0, GRID + 1).tolist())
    knots = [course.quality for curve in (first, second) for courses in curve.values() for course in courses]
    # Those outside move to the ends, where they have no width.
    inside = np.clip(np.concatenate([grid, *knots], axis=-1), lowest[..., None], highest[..., None])
    levels = np.sort(inside, axis=-1)
    widths, whole = np.diff(levels, axis=-1), highest - lowest

    def mean(values: Values) -> Values:
        area = np.sum((values[..., 1:] + values[..., :-1]) / 2 * widths, axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(lowest < highest, area / whole, values[..., 0])

    def of_seeds(values: Values) -> Values:
        return np.stack([mean(values[..., seed]) for seed in range(values.shape[-1])], axis=-1)

    mine, theirs = curve_at(first, levels), curve_at(second, levels)
    return Area(
        mean(mine.value - theirs.value),
        mean(mine.margin + theirs.margin),
        of_seeds(mine.seeds),
        of_seeds(theirs.seeds),
    )
