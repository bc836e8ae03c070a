"""Interpolation, area and bootstrap against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_eaft.compare.matching import forgetting, match
from nemo_eaft.compare.record import Path, Sums
from nemo_eaft.compare.statistics import Course, at_level, common_range, curve_at, levels_in, mean_difference, reach


def course(*points: tuple[float, float]) -> Course:
    quality, other = zip(*points, strict=True)
    return Course(np.array(quality), np.array(other))


def test_interpolation_between_the_checkpoints_around_a_level() -> None:
    run = course((2.0, 0.0), (1.0, 0.4), (0.5, 1.0))
    # 1.5 is half of the way to the second point, 0.75 half of the way from it; 1.0 and 2.0 are points themselves.
    levels = np.array([2.0, 1.5, 1.0, 0.75, 0.5])
    np.testing.assert_allclose(at_level(run, levels), [0.0, 0.2, 0.4, 0.7, 1.0], rtol=0, atol=1e-15)


def test_nothing_is_extrapolated() -> None:
    run = course((2.0, 0.0), (1.0, 0.4))
    assert np.isnan(at_level(run, np.array([0.999, 0.0, 2.001]))).all()


def test_a_run_that_turns_back_is_taken_where_it_first_arrives() -> None:
    run = course((2.0, 0.0), (1.0, 0.4), (1.6, 0.8), (0.8, 1.6))
    # 1.2 is reached on the way to the second point; 0.9 between 1.6 and 0.8, at seven eighths.
    np.testing.assert_allclose(at_level(run, np.array([1.2, 0.9])), [0.32, 0.8 + 0.875 * 0.8], atol=1e-15)


def test_a_curve_is_the_best_learning_rate_that_all_seeds_reached() -> None:
    slow = [course((2.0, 0.0), (1.0, 0.2)), course((2.0, 0.0), (1.5, 0.1), (1.25, 0.3))]
    fast = [course((2.0, 0.0), (0.5, 0.9)), course((2.0, 0.0), (0.5, 1.5))]
    curve = {1e-5: slow, 1e-4: fast}
    # At 1.5: slow 0.1 and 0.1, fast 0.3 and 0.5. At 1.1: one seed of slow has not arrived; fast 0.54 and 0.9.
    np.testing.assert_allclose(curve_at(curve, np.array([1.5, 1.1])), [0.1, 0.72], atol=1e-15)
    assert reach({1e-5: slow}) == 1.25
    assert reach(curve) == 0.5
    assert np.isnan(curve_at(curve, np.array([0.4]))).all()


def test_levels_are_parts_of_what_both_have_reached() -> None:
    first = {None: [course((2.0, 0.0), (0.5, 1.0))]}
    second = {None: [course((2.0, 0.0), (1.0, 1.0))]}
    assert [float(each) for each in common_range(first, second)] == [1.0, 2.0]
    np.testing.assert_allclose(levels_in(np.array(1.0), np.array(2.0), (0.25, 1.0)), [1.75, 1.0])
    # A third of 0.1 in float64: the last level must not fall below the range.
    assert levels_in(np.array(0.1 / 3), np.array(0.7), (1.0,))[0] == 0.1 / 3
    never = {None: [course((2.0, 0.0), (2.1, 1.0))]}
    assert [float(each) for each in common_range(first, never)] == [2.0, 2.0]
    assert np.isnan(mean_difference(first, never))


def test_the_area_between_two_curves() -> None:
    # Over 1 to 2: a straight line to 1 and one to 0.5, so that the difference goes from 0 to 0.5: mean 0.25.
    first = {None: [course((2.0, 0.0), (1.0, 1.0))]}
    second = {None: [course((2.0, 0.0), (1.0, 0.5))]}
    assert mean_difference(first, second) == pytest.approx(0.25, abs=1e-12)
    # With a bend off the grid: 0 to 1 over the first 1/3, then level; areas 1/6 + 2/3, less 1/4.
    bent = {None: [course((2.0, 0.0), (5 / 3, 1.0), (1.0, 1.0))]}
    assert mean_difference(bent, second) == pytest.approx(1 / 6 + 2 / 3 - 1 / 4, abs=1e-12)


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


def two_methods(seeds: int = 1, spread: float = 0.0) -> list[Path]:
    """`slow` needs twice the steps to the same place, and forgets as much there; at equal steps it forgets half."""
    paths = []
    for seed in range(seeds):
        more = spread * seed
        paths += [
            run("quick", seed, [0, 10, 20], [2.0, 1.0, 0.5], [[0.0, 0.0], [0.2, 0.6], [0.5, 0.9]]),
            run("slow", seed, [0, 10, 20], [2.0, 1.5, 1.0], [[0.0, 0.0], [0.1 + more, 0.3], [0.2 + more, 0.6]]),
        ]
    return paths


def test_equal_quality_is_not_equal_steps() -> None:
    """By steps `slow` forgets 0.2 less after ten and 0.3 less after twenty; by what it has learned, nothing less."""
    paths = two_methods()
    result = match(paths, "quick", draws=50)
    (drift,) = result.matches
    assert drift.mean_difference is not None
    assert drift.span == (1.0, 2.0)
    assert drift.mean_difference.value == pytest.approx(0.0, abs=1e-12)
    assert [level.target for level in drift.levels] == [1.75, 1.5, 1.25, 1.0]
    np.testing.assert_allclose([level.reference for level in drift.levels], [0.1, 0.2, 0.3, 0.4], atol=1e-12)
    at_steps = [
        theirs["drift"].mean - mine["drift"].mean for mine, theirs in zip(paths[0].points, paths[1].points, strict=True)
    ]
    assert at_steps[1:] == pytest.approx([-0.2, -0.3])


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


def test_intervals_over_seeds() -> None:
    """Rows that are all alike leave nothing to draw, so the whole width comes from the seeds: means of three of
    0.1, 0.2, 0.6 drawn with replacement lie between 0.1 and 0.6, and 0.3 is the one that was measured."""
    paths = []
    for seed, drift in enumerate((0.1, 0.2, 0.6)):
        paths.append(run("a", seed, [0, 1], [2.0, 1.0], [[0.0, 0.0], [drift, drift]]))
        paths.append(run("b", seed, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.0, 0.0]]))
    result = match(paths, "b", draws=500)
    interval = result.matches[0].levels[-1].difference
    assert interval.value == pytest.approx(0.3)
    # The lowest and highest of the 27 draws have 1/27 each, more than 2.5 %.
    assert [interval.low, interval.high] == pytest.approx([0.1, 0.6])
    assert result.seeds == {"a": 3, "b": 3}
    assert match(paths, "b", draws=500) == result
    # One seed: no width at all.
    alone = match(paths[:2], "b", draws=100).matches[0].levels[-1].difference
    assert [alone.low, alone.high] == pytest.approx([0.1, 0.1])


def test_seeds_of_one_learning_rate_do_not_win_by_luck() -> None:
    lucky = run("a", 0, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.01, 0.01]])
    lucky = Path("lucky", lucky.method, 1e-3, lucky.seed, lucky.steps, lucky.points)
    paths = [run("a", seed, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.4, 0.4]]) for seed in range(2)]
    paths += [run("b", seed, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.0, 0.0]]) for seed in range(2)]
    result = match([lucky, *paths], "b", draws=10)
    assert result.learning_rates["a"] == (1e-5,)
    assert result.matches[0].levels[-1].value == pytest.approx(0.4)


def test_curves_that_do_not_overlap_are_said_to() -> None:
    paths = [
        run("a", 0, [0, 1], [2.0, 1.0], [[0.0, 0.0], [0.4, 0.4]]),
        run("b", 0, [0, 1], [2.0, 2.5], [[0.0, 0.0], [0.4, 0.4]]),
    ]
    (only,) = match(paths, "b", draws=10).matches
    assert (only.levels, only.mean_difference, only.span) == ((), None, None)


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
