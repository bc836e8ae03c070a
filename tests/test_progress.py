"""The progress line, its numbers, and the estimate of the rest."""

from __future__ import annotations

import math

import pytest

from nemo_eaft.metrics import StepMetrics
from nemo_eaft.progress import Pace, format_count, format_duration, format_progress

METRICS = StepMetrics(
    loss=0.4123, cross_entropy=0.6709, entropy=1.2149, weight=0.5751, conflict_fraction=0.0186, tokens=4321
)


def test_the_line() -> None:
    line = format_progress(12, 60, METRICS, 812.4, 190.2)
    assert line == ("step 12/60  loss 0.412  ce 0.671  weight 0.58  entropy 1.21  conflicts 1.9%  812 tok/s  ETA 3m10s")


def test_steps_line_up_and_the_unknown_is_said() -> None:
    first = format_progress(1, 1000, METRICS, math.nan, None)
    last = format_progress(1000, 1000, METRICS, 1e4, 0.0)
    assert first.startswith("step    1/1000  loss")
    assert first.endswith("  ? tok/s  ETA ?")
    assert first.index("loss") == last.index("loss")
    assert last.endswith("  10.0k tok/s  ETA 0s")
    assert "\n" not in first


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (190, "3m10s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (7530, "2h06m"),
        (86399, "1d00h"),
        (97200, "1d03h"),
        (1e7, "115d18h"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0.0"),
        (3.44, "3.4"),
        (9.96, "10"),
        (812.4, "812"),
        (999.6, "1.00k"),
        (1234, "1.23k"),
        (12345, "12.3k"),
        (99960, "100k"),
        (999600, "1.00M"),
        (1.239e6, "1.24M"),
        (5e9, "5.00G"),
        (5e13, "50000G"),
        (math.nan, "?"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text


def test_pace_is_not_moved_by_one_slow_step() -> None:
    pace = Pace(window=4)
    assert pace.eta_seconds(0, 10) is None
    pace.add(100.0)
    assert pace.eta_seconds(1, 10) == 900.0
    for _ in range(2):
        pace.add(2.0)
    assert pace.eta_seconds(3, 10) == 14.0
    for _ in range(4):
        pace.add(1.0)
    assert pace.eta_seconds(7, 10) == 3.0, "steps before the window are forgotten"
    assert pace.eta_seconds(12, 10) == 0.0
