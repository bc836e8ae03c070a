"""Interpolation, area and bootstrap against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from nemo_eaft.compare import matching, statistics
from nemo_eaft.compare.arguments import NUMBERS
from nemo_eaft.compare.matching import forgetting, match, seed_scale
from nemo_eaft.compare.record import Path, Sums
from nemo_eaft.compare.statistics import (
    Between,
    Course,
    at_level,
    begin,
    common_range,
    curve_at,
    levels_in,
    mean_difference,
    reach,
)


def course(*points: tuple[float, float]) -> Course:
    quality, other = zip(*points, strict=True)
    return Course(np.array(quality), np.array(other))


def test_interpolation_between_the_checkpoints_around_a_level() -> None:
    """The parabola through all three has the curvature 8/15. 1.5 is half of the way to the second point: 0.2 on the
    straight line, and twice that curvature takes a quarter of it away, but not to below the first point's 0. 0.75 is
    half of the way from it: 0.7, and a sixteenth. 1.0 and 2.0 are points themselves."""
    run = course((2.0, 0.0), (1.0, 0.4), (0.5, 1.0))
    found = at_level(run, np.array([2.0, 1.5, 1.0, 0.75, 0.5]))
    np.testing.assert_allclose(found.value, [0.0, 0.1, 0.4, 0.7 - 1 / 30, 1.0], rtol=0, atol=1e-15)
    np.testing.assert_allclose(found.margin, [0.0, 0.1, 0.0, 1 / 30, 0.0], rtol=0, atol=1e-15)


def test_a_quadratic_is_met_and_a_cubic_is_within_the_margin() -> None:
    places = (0.0, 0.3, 0.4, 0.8, 1.0, 1.3)
    ways = np.linspace(0.3, 1.0, 50)  # where there is a checkpoint on both sides
    square = at_level(course(*((2 - way, way + 3 * way**2) for way in places)), 2 - ways)
    np.testing.assert_allclose(square.value, ways + 3 * ways**2, atol=1e-12)
    np.testing.assert_allclose(square.margin, 0, atol=1e-12)
    cubic = at_level(course(*((2 - way, way**3) for way in places)), 2 - ways)
    off = np.abs(cubic.value - ways**3)
    assert (off <= cubic.margin + 1e-12).all()
    assert off.max() > 0.2 * cubic.margin.max() > 0, "a margin that is needed"


def test_nothing_is_extrapolated() -> None:
    run = course((2.0, 0.0), (1.0, 0.4))
    found = at_level(run, np.array([0.999, 0.0, 2.001]))
    assert np.isnan(found.value).all()
    assert np.isnan(found.margin).all()


def test_a_run_that_turns_back_is_taken_where_it_first_arrives() -> None:
    """1.2 is reached on the way to the second point, where the straight line has 0.32; 0.9 between 1.6 and 0.8, where
    it has 1.5. The parabolas through the turn bend beyond the values of the checkpoints, so that these are the ends."""
    run = course((2.0, 0.0), (1.0, 0.4), (1.6, 0.8), (0.8, 1.6))
    found = at_level(run, np.array([1.2, 0.9]))
    np.testing.assert_allclose(found.value, [(0.32 + 0.4) / 2, (0.8 + 1.5) / 2], atol=1e-15)
    np.testing.assert_allclose(found.margin, [0.04, 0.35], atol=1e-15)


def test_a_curve_is_the_best_learning_rate_that_all_seeds_reached() -> None:
    slow = [course((2.0, 0.0), (1.0, 0.2)), course((2.0, 0.0), (1.5, 0.1), (1.25, 0.3))]
    fast = [course((2.0, 0.0), (0.5, 0.9)), course((2.0, 0.0), (0.5, 1.5))]
    curve = {1e-5: slow, 1e-4: fast}
    # At 1.5: slow 0.1 and 0.1, fast 0.3 and 0.5. At 1.1: one seed of slow has not arrived; fast 0.54 and 0.9.
    np.testing.assert_allclose(curve_at(curve, np.array([1.5, 1.1])).value, [0.1, 0.72], atol=1e-15)
    assert reach({1e-5: slow}) == 1.25
    assert reach(curve) == 0.5
    assert np.isnan(curve_at(curve, np.array([0.4])).value).all()


def test_levels_are_parts_of_where_both_were_measured() -> None:
    first = {None: [course((2.0, 0.0), (1.75, 0.1), (0.5, 1.0))]}
    second = {None: [course((2.0, 0.0), (1.5, 0.1), (1.0, 1.0))]}
    assert [float(each) for each in common_range(first, second)] == [1.0, 1.5]
    np.testing.assert_allclose(levels_in(np.array(1.0), np.array(1.5), (0.0, 0.25, 1.0)), [1.5, 1.375, 1.0])
    # A third of 0.1 in float64: the last level must not fall below the range.
    assert levels_in(np.array(0.1 / 3), np.array(0.7), (1.0,))[0] == 0.1 / 3
    # Every learning rate and seed has passed its first checkpoint where the range begins; it ends at the best reach.
    rates = {1e-5: first[None], 1e-4: [course((2.0, 0.0), (1.2, 0.6), (0.7, 2.0)), course((2.0, 0.0), (1.3, 0.5))]}
    assert begin(rates) == 1.2
    assert [float(each) for each in common_range(rates, second)] == [1.0, 1.2]
    # A run that is worse at its first checkpoint than the base model begins there.
    assert begin({None: [course((2.0, 0.0), (2.5, 0.6), (0.7, 2.0))]}) == 2.0
    never = {None: [course((2.0, 0.0), (2.1, 1.0))]}
    far = {None: [course((2.0, 0.0), (0.9, 0.1), (0.5, 1.0))]}
    for other in (never, far):
        assert np.isnan(common_range(second, other)).all()
        assert np.isnan(mean_difference(second, other).value)


def test_the_area_between_two_curves() -> None:
    """Over 1 to 2, straight lines to 1 and to 0.5 have the mean difference 0.25. The parabolas through the point before
    have the curvature 0.5 and 0.25, in the mean over the range a sixth of it below; half between none and twice."""
    first = {None: [course((3.0, 0.0), (2.0, 0.0), (1.0, 1.0))]}
    second = {None: [course((3.0, 0.0), (2.0, 0.0), (1.0, 0.5))]}
    found = mean_difference(first, second)
    assert found.value == pytest.approx(0.25 - (0.5 - 0.25) / 6, abs=3e-4)
    assert found.margin == pytest.approx((0.5 + 0.25) / 6, abs=3e-4)
    # With a bend off the grid, against the mean over many levels.
    bent = {None: [course((3.0, 0.0), (2.0, 0.0), (1.66, 0.9), (1.0, 1.0))]}
    many = np.linspace(1, 2, 100001)
    expected = curve_at(bent, many).value - curve_at(second, many).value
    assert mean_difference(bent, second).value == pytest.approx(expected.mean(), abs=1e-3)


def test_the_area_of_one_level() -> None:
    """One checkpoint, as a folder of weights has it, is compared at its own level."""
    curve = {None: [course((3.0, 0.0), (2.0, 1.0), (1.0, 4.0), (0.5, 6.25))]}
    alone = {None: [course((3.0, 0.0), (1.5, 2.0))]}
    assert mean_difference(alone, curve).value == pytest.approx(2.0 - 2.25, abs=1e-12)


def run(method: str, seed: int, steps: list[int], target: list[float], drift: list[list[float]]) -> Path:
    """Two rows and as many samples as `drift` has, one token each, so that means are plain ones."""
    points = [
        {
            "target": Sums((each, each), (1, 1)),
            "drift": Sums(tuple(drift_of), (1,) * len(drift_of)),
        }
        for each, drift_of in zip(target, drift, strict=True)
    ]
    return Path(f"{method}-{seed}", method, 1e-5, seed, tuple(steps), tuple(points))


def two_methods() -> list[Path]:
    """`slow` needs twice the steps to the same place, and forgets as much there; at equal steps it forgets half."""
    nothing, first, second, last = [0.0, 0.0], [0.1, 0.3], [0.2, 0.6], [0.5, 0.9]
    return [
        run("quick", 0, [0, 10, 20, 30], [2.0, 1.5, 1.0, 0.5], [nothing, first, second, last]),
        run("slow", 0, [0, 20, 40], [2.0, 1.5, 1.0], [nothing, first, second]),
    ]


def test_equal_quality_is_not_equal_steps() -> None:
    """By steps `slow` forgets less after twenty; by what it has learned, nothing less."""
    quick, slow = two_methods()
    result = match([quick, slow], "quick", draws=50)
    (drift,) = result.matches
    assert drift.mean_difference is not None
    assert drift.span == (1.0, 1.5)
    assert abs(drift.mean_difference.value) < 0.01
    assert drift.mean_difference.sign == 0
    assert [drift.levels[place].difference.value for place in (0, 4)] == pytest.approx([0.0, 0.0])
    assert [level.target for level in drift.levels] == [1.5, 1.375, 1.25, 1.125, 1.0]
    assert [drift.levels[place].reference for place in (0, 4)] == pytest.approx([0.2, 0.4])
    assert slow.points[1]["drift"].mean - quick.points[2]["drift"].mean == pytest.approx(-0.2)


def test_intervals_over_rows() -> None:
    """Two samples: a draw takes the first twice, each once, or the second twice, with 1/4, 1/2, 1/4. The difference at
    the last level is that of the first sample, of both, or of the second: 0.1, 0.2, 0.3."""
    paths = [
        run("a", 0, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.4, 0.8]]),
        run("b", 0, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.3, 0.5]]),
    ]
    last = match(paths, "b", draws=400).matches[0].levels[-1].difference
    assert last.value == pytest.approx(0.2)
    assert [last.low, last.high] == pytest.approx([0.1, 0.3])
    assert last.sign == 1


def with_seeds(values: Sequence[float]) -> list[Path]:
    """Runs of `a` that differ in their seeds alone, and as many of `b`, all alike."""
    paths = []
    for seed, drift in enumerate(values):
        paths.append(run("a", seed, [0, 1], [2.0, 1.0], [[0.0, 0.0], [drift, drift]]))
        paths.append(run("b", seed, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.0, 0.0]]))
    return paths


def test_intervals_over_seeds() -> None:
    """Rows that are all alike leave nothing to draw, so the whole width comes from the seeds: means of three of
    0.1, 0.2, 0.6 drawn with replacement lie between 0.1 and 0.6, and 0.3 is the one that was measured; their
    distances from it are scaled."""
    paths = with_seeds((0.1, 0.2, 0.6))
    result = match(paths, "b", draws=500)
    interval = result.matches[0].levels[-1].difference
    assert interval.value == pytest.approx(0.3)
    # The lowest and highest of the 27 draws have 1/27 each, more than 2.5 %.
    scale = (3 / 2) ** 0.5 * 4.302653 / 1.959964
    assert [interval.low, interval.high] == pytest.approx([0.3 - 0.2 * scale, 0.3 + 0.3 * scale], rel=1e-4)
    assert result.seeds == {"a": 3, "b": 3}
    assert match(paths, "b", draws=500) == result
    # One seed: no width at all.
    alone = match(paths[:2], "b", draws=100).matches[0].levels[-1].difference
    assert [alone.low, alone.high] == pytest.approx([0.1, 0.1])


def with_rows_and_seeds() -> list[Path]:
    """Three seeds of each, whose three rows differ in both methods and all seeds."""
    generator = np.random.default_rng(4)
    return [
        run(method, seed, [0, 1], [2.0, 1.0], [[0.0] * 3, generator.uniform(size=3).tolist()])
        for method in "ab"
        for seed in range(3)
    ]


def test_an_interval_does_not_depend_on_what_else_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on methods with more seeds or fewer, nor on other measures, nor on how many draws are worked on at once.
    With one stream of random numbers for all it would, and a bound near 0 would change its side."""
    paths = with_rows_and_seeds()
    (alone,) = match(paths, "b", draws=20).matches
    assert alone.mean_difference is not None
    assert alone.mean_difference.low != alone.mean_difference.high
    four = [*paths, *paths][:4]
    others = [dataclasses.replace(path, name=f"c{n}", method="c", seed=n) for n, path in enumerate(four)]
    first, second = match([*others, *paths], "b", draws=20).matches
    assert (first.method, second) == ("c", alone)
    probe = {"probe": Sums((1.0, 0.0, 1.0), (1, 1, 1))}
    more = [dataclasses.replace(path, points=tuple(probe | each for each in path.points)) for path in paths]
    assert match(more, "b", draws=20).matches[-1:] == (alone,)
    for at_once in (1, 7, 21, 100):
        monkeypatch.setattr(matching, "_AT_ONCE", at_once)
        assert match(paths, "b", draws=20).matches == (alone,)


def test_draws_of_different_things_are_independent() -> None:
    """As many rows as texts, and as seeds, are drawn apart: a draw that takes the first row twice does not take the
    first seed twice."""
    rows, texts, seeds = (matching._drawn(3, 1000, 0, what) for what in ("rows", "samples", "seeds"))
    for one, other in ((rows, texts), (rows, seeds), (texts, seeds)):
        assert abs(np.corrcoef(one[:, 0], other[:, 0])[0, 1]) < 0.1
    assert not np.array_equal(seeds, matching._drawn(3, 1000, 1, "seeds"))


def test_seeds_are_drawn_in_pairs() -> None:
    """With each seed `a` forgets 0.1 more than `b` with the same one, however far the seeds are from each other: there
    is nothing to doubt. Of two methods with unlike numbers of seeds each is drawn by itself."""
    values = (0.0, 1.0, 5.0)
    paths = [
        run(method, seed, [0, 1], [2.0, 1.0], [[0.0, 0.0], [value + more, value + more]])
        for method, more in (("a", 0.1), ("b", 0.0))
        for seed, value in enumerate(values)
    ]
    paired = match(paths, "b", draws=100).matches[0]
    for interval in (paired.mean_difference, paired.levels[-1].difference):
        assert interval is not None
        assert [interval.low, interval.high] == pytest.approx([0.1, 0.1])
    unlike = match([path for path in paths if (path.method, path.seed) != ("a", 2)], "b", draws=100).matches[0]
    assert unlike.mean_difference is not None
    assert unlike.mean_difference.low is not None
    assert unlike.mean_difference.high is not None
    assert unlike.mean_difference.low < -3 < 3 < unlike.mean_difference.high


def test_draws_of_the_command_are_those_of_the_function() -> None:
    assert NUMBERS["draws"][0] == matching.DRAWS
    assert f"each with {matching.SEED_DRAWS} of seeds" in NUMBERS["draws"][2]


@pytest.mark.parametrize("seeds, covered, plain", [(2, 0.93, 0.5), (3, 0.95, 0.75), (5, 0.94, 0.84)])
def test_how_often_an_interval_of_few_normal_seeds_holds_the_truth(seeds: int, covered: float, plain: float) -> None:
    """Of 2000 experiments; the plain percentile interval is the wrong variant."""
    generator = np.random.default_rng(1)
    found = generator.normal(size=(2000, seeds))
    weights = matching._seeds({"method": seeds}, 1000 // matching.SEED_DRAWS, 1)[seeds].reshape(-1, seeds)
    np.testing.assert_allclose(weights.sum(1), 1)
    low, high = np.percentile(weights @ found.T, [2.5, 97.5], axis=0)
    # Four standard errors of a share of 2000.
    assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(covered, abs=0.02)
    drawn = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=1000) / seeds
    low, high = np.percentile(drawn @ found.T, [2.5, 97.5], axis=0)
    assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(plain, abs=0.04)


def test_the_scale_is_that_of_students_t() -> None:
    """By a table of its 97.5th percentiles, for degrees of freedom."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 9: 2.262, 19: 2.093, 39: 2.023}
    for degrees, quantile in table.items():
        expected = ((degrees + 1) / degrees) ** 0.5 * quantile / 1.95996
        assert seed_scale(degrees + 1) == pytest.approx(expected, rel=2e-3), degrees
    assert seed_scale(1) == 1.0


def test_one_run_twice_is_not_two_seeds() -> None:
    once = run("a", 0, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.3, 0.3]])
    again = Path("again", "a", once.learning_rate, 0, once.steps, once.points)
    with pytest.raises(ValueError, match="and again are both a at learning rate 1e-05 with seed 0: give one of them"):
        match([once, again], "a", draws=10)


def test_a_curve_that_turns_between_two_checkpoints_is_within_the_margin() -> None:
    """A quadratic with its lowest place between two checkpoints; and two checkpoints at one level."""
    quality = np.array([2.0, 1.5, 1.0, 0.5, 0.0])
    other = (quality - 0.7) ** 2
    levels = np.linspace(1.0, 0.5, 21)
    found = at_level(Course(quality, other), levels)
    truth = (levels - 0.7) ** 2
    assert truth.min() < min(other[2], other[3])
    assert np.all(np.abs(found.value - truth) <= found.margin + 1e-12)
    assert np.all(found.margin <= abs(other[2] - other[3]) + 1e-12)
    level = at_level(Course(np.array([2.0, 1.5, 1.0, 1.0, 0.5]), np.array([0.0, 0.1, 0.4, 0.9, 1.0])), np.array([1.25]))
    assert level.margin[0] == pytest.approx(0.3)


def test_seeds_of_one_learning_rate_do_not_win_by_luck() -> None:
    lucky = run("a", 0, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.01, 0.01]])
    lucky = Path("lucky", lucky.method, 1e-3, lucky.seed, lucky.steps, lucky.points)
    paths = [run("a", seed, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.4, 0.4]]) for seed in range(2)]
    paths += [run("b", seed, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.0, 0.0]]) for seed in range(2)]
    result = match([lucky, *paths], "b", draws=10)
    assert result.learning_rates["a"] == (1e-5,)
    assert result.matches[0].levels[-1].value == pytest.approx(0.4)


SHAPES: dict[str, Callable[[float], float]] = {
    "quadratic": lambda way: way**2,
    "power 1.5": lambda way: way**1.5,
    "exponential": lambda way: math.exp(3 * way) - 1,
    "saturating": lambda way: way / (1.2 - way),
}


def straight(course: Course, levels: NDArray[np.float64]) -> Between:
    """Interpolation by straight lines, of courses that fall from checkpoint to checkpoint."""
    places = np.broadcast_to(levels, (*course.other.shape[:-1], levels.shape[-1]))
    quality = np.broadcast_to(course.quality, course.other.shape)
    found = np.empty_like(places)
    for index in np.ndindex(places.shape[:-1]):
        found[index] = np.interp(-places[index], -quality[index], course.other[index])
    return Between(found, np.zeros_like(found))


def sampled(method: str, ways: Sequence[float], shape: Callable[[float], float], seed: int = 0) -> Path:
    """One curve, measured at some places of the way from 2 to 1 nats; samples that forget 0.5 to 1.5 times as much."""
    ways = (0.0, *ways)
    drift = [[factor * shape(way) for factor in np.linspace(0.5, 1.5, 12)] for way in ways]
    return run(method, seed, list(range(len(ways))), [2.0 - way for way in ways], drift)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "quick, slow",
    [((0.8, 0.95, 1.0), (0.55, 0.78, 0.88, 0.99)), ((0.4, 0.7, 1.0), (0.15, 0.3, 0.45, 0.65, 0.8, 0.95))],
)
def test_one_curve_in_other_steps_does_not_differ(
    quick: list[float], slow: list[float], shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two samplings of one curve: who takes smaller steps must not pass for who forgets less."""
    paths = [sampled("sft", quick, SHAPES[shape]), sampled("eaft", slow, SHAPES[shape])]
    drift = match(paths, "sft", draws=100).matches[0]
    assert drift.span == (2.0 - slow[-1], 2.0 - quick[0])
    assert drift.mean_difference is not None
    assert drift.mean_difference.sign == 0
    assert not drift.turning
    # The wrong variant: straight lines from the base model on.
    monkeypatch.setattr(statistics, "begin", lambda curve: next(iter(curve.values()))[0].quality[..., 0])
    monkeypatch.setattr(statistics, "at_level", straight)
    old = match(paths, "sft", draws=100).matches[0].mean_difference
    assert old is not None
    assert old.sign == -1


def test_a_difference_between_curves_is_shown_through_the_steps() -> None:
    """The same places, with 0.7 of what the other forgets: the mean over the range is that of the curves."""
    ways = [0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0]
    paths = [sampled("sft", ways, lambda way: way**2), sampled("eaft", ways[1:], lambda way: 0.7 * way**2)]
    drift = match(paths, "sft", draws=100).matches[0]
    assert drift.mean_difference is not None
    assert drift.mean_difference.sign == -1
    # The mean of way^2 over 0.2 to 1, times -0.3.
    assert drift.mean_difference.value == pytest.approx(-0.3 * (1 - 0.2**3) / 3 / 0.8, abs=0.002)


def test_a_difference_that_turns_is_said_to() -> None:
    ways = [0.2, 0.4, 0.6, 0.8, 1.0]
    paths = [sampled("sft", ways, lambda way: way), sampled("eaft", ways, lambda way: 2 * way**2)]
    drift = match(paths, "sft", draws=100).matches[0]
    assert drift.mean_difference is not None
    assert [level.difference.sign for level in drift.levels] == [-1, -1, 1, 1, 1]
    assert [level.part for level in drift.turning] == [0.0, 0.25]


def test_where_nothing_is_left_there_is_no_verdict() -> None:
    paths = [
        run("a", 0, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.4, 0.4]]),
        run("b", 0, [0, 1], [2.0, 2.5], [[0.0, 0.0], [0.4, 0.4]]),
        run("c", 0, [0, 1, 2], [2.0, 0.5, 0.4], [[0.0, 0.0], [0.4, 0.4], [0.4, 0.5]]),
        run("d", 0, [0, 1, 2], [2.0, 1.5, 0.8], [[0.0, 0.0], [0.1, 0.1], [0.4, 0.5]]),
    ]
    never, coarse, one = match(paths, "a", draws=10).matches
    assert (never.levels, never.mean_difference, never.span) == ((), None, None)
    assert never.why_not == "b never got below the base model's target cross-entropy with every seed"
    assert (coarse.levels, coarse.mean_difference, coarse.span) == ((), None, None)
    assert coarse.why_not is not None
    far = "c is at 0.5000 nats at the first checkpoint of a run, farther than what a reaches"
    assert coarse.why_not.startswith(far)
    assert one.span == (1.0, 1.0)
    assert [level.part for level in one.levels] == [1.0]


def test_runs_that_cannot_be_compared() -> None:
    first = run("a", 0, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.4, 0.4]])
    other = run("b", 0, [0, 1], [2.1, 1.0], [[0.0, 0.0], [0.4, 0.4]])
    with pytest.raises(ValueError, match="do not begin at the same measured base model"):
        match([first, other], "a")
    with pytest.raises(ValueError, match="reference='c' is none of the methods a, b"):
        match([first, other], "c")
    with pytest.raises(ValueError, match="not measured on the same rows"):
        run("a", 0, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.4, 0.4, 0.4]])


def test_what_counts_as_forgetting() -> None:
    """Cross-entropy of general text rises, right answers are lost, drift is forgetting itself."""
    base = {
        "target": Sums((2.0,), (1,)),
        "exact": Sums((0.0,), (1,)),
        "drift": Sums((0.0,), (3,)),
        "text": Sums((6.0,), (2,)),
        "probe": Sums((1.0, 1.0, 0.0, 1.0), (1, 1, 1, 1)),
        "answer": Sums((0.5, 1.0, 2.0, 0.5), (1, 1, 1, 1)),
    }
    tuned = {
        "target": Sums((1.0,), (1,)),
        "exact": Sums((1.0,), (1,)),
        "drift": Sums((0.6,), (3,)),
        "text": Sums((7.0,), (2,)),
        "probe": Sums((1.0, 0.0, 0.0, 0.0), (1, 1, 1, 1)),
        "answer": Sums((1.0, 3.0, 2.0, 4.0), (1, 1, 1, 1)),
    }
    path = Path("a", "a", None, None, (0, 5), (base, tuned))
    found = {measure: forgetting(path, measure)[0].tolist() for measure in base}
    assert found == {
        "target": [2.0, 1.0],
        "exact": [0.0, 1.0],
        "drift": [0.0, pytest.approx(0.2)],
        "text": [0.0, 0.5],
        "probe": [0.0, 0.5],
        "answer": [0.0, 1.5],
    }
