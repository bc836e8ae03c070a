"""report.png: what is drawn, read back from the figure, and a picture in every case a run can leave."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from nemo_eaft import report
from nemo_eaft.report import write_report

Row = dict[str, Any]


def step_row(step: int, **changes: Any) -> Row:
    row: Row = {
        "step": step,
        "loss": 0.5 / step,
        "cross_entropy": 1.0 / step,
        "entropy": 1.5,
        "weight": 0.5,
        "conflict_fraction": 0.02,
        "tokens": 1000,
        "tokens_per_second": 812.0,
        "learning_rate": 1e-5,
        "seconds": 2.0,
    }
    return row | changes


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def lines(figure: Figure, panel: int) -> dict[str, Any]:
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in figure.axes[panel].lines
    }


def test_the_picture_shows_the_rows(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [step_row(step) for step in range(1, 6)]
    rows.insert(0, {"step": 0, "val_loss": 1.75})
    rows.append({"step": 5, "val_loss": 0.25})
    png = tmp_path / "new" / "report.png"
    write_report(write_rows(tmp_path / "m.jsonl", rows), png, r"run $\nope$")

    figure = drawn[0]
    steps = [1, 2, 3, 4, 5]
    loss = lines(figure, 0)
    assert loss["cross-entropy"] == (steps, [1.0 / step for step in steps])
    assert loss["loss (weight x cross-entropy)"] == (steps, [0.5 / step for step in steps])
    assert loss["validation cross-entropy"] == ([0, 5], [1.75, 0.25])
    assert "not finite" not in loss
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "Loss",
        "Mean weight",
        "Mean entropy of the prediction",
        "Confident conflicts",
        "Throughput",
        "Learning rate",
    ]
    units = [axes.get_ylabel() for axes in figure.axes]
    assert units == ["nats / token", "weight", "nats / token", "% of tokens", "tokens / s", ""]
    heights = [np.asarray(axes.lines[0].get_ydata()).tolist() for axes in figure.axes[1:]]
    assert heights == [[0.5] * 5, [1.5] * 5, [2.0] * 5, [812.0] * 5, [1e-5] * 5]
    assert all(axes.get_xlabel() == "step" for axes in figure.axes)
    texts = [text.get_text() for text in figure.texts]
    assert r"run $\nope$" in texts[0]
    assert "5 steps" in texts[1]
    assert "5,000 tokens" in texts[1]
    assert "10s in steps" in texts[1]
    assert "1.000 \N{RIGHTWARDS ARROW} 0.200" in texts[1]
    assert "1.750 \N{RIGHTWARDS ARROW} 0.250" in texts[1]

    pixels = matplotlib.image.imread(png)
    assert pixels.shape[:2] == (1140, 1560)
    assert pixels[..., :3].min() < 0.2, "something dark is drawn"
    assert os.listdir(png.parent) == ["report.png"]


def test_one_step_without_validation(tmp_path: Path, drawn: list[Figure]) -> None:
    write_report(write_rows(tmp_path / "m.jsonl", [step_row(1)]), tmp_path / "r.png", "one")
    figure = drawn[0]
    assert set(lines(figure, 0)) == {"cross-entropy", "loss (weight x cross-entropy)"}
    for axes in figure.axes:
        assert axes.lines[0].get_marker() == "o", "a line of one point cannot be seen"
        ticks = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
        assert ticks == [1.0]
    assert "1 step " in figure.texts[1].get_text()
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_gaps_where_values_were_not_finite(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [step_row(step) for step in range(1, 5)]
    rows[2] |= {"loss": None, "cross_entropy": None, "weight": None}
    write_report(write_rows(tmp_path / "m.jsonl", rows), tmp_path / "r.png", "gap")
    loss = lines(drawn[0], 0)
    assert [math.isnan(value) for value in loss["cross-entropy"][1]] == [False, False, True, False]
    assert loss["not finite"][0] == [3]


def test_a_run_of_nothing_but_nulls_is_still_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    nothing = dict.fromkeys(step_row(1), None) | {"tokens": 0}
    rows = [nothing | {"step": step} for step in (1, 2)] + [{"step": 2, "val_loss": None}]
    write_report(write_rows(tmp_path / "m.jsonl", rows), tmp_path / "r.png", "null")
    assert lines(drawn[0], 0)["not finite"][0] == [1, 2]


def test_rows_with_the_promised_keys_only(tmp_path: Path) -> None:
    row = step_row(1)
    del row["seconds"]
    write_report(write_rows(tmp_path / "m.jsonl", [row]), tmp_path / "r.png", "short")
    assert (tmp_path / "r.png").exists()


def test_without_a_gate_both_losses_stay_visible(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [step_row(step, loss=1.0 / step, weight=1.0) for step in range(1, 4)]
    write_report(write_rows(tmp_path / "m.jsonl", rows), tmp_path / "r.png", "sft")
    styles = {str(line.get_label()): line.get_linestyle() for line in drawn[0].axes[0].lines}
    assert styles == {"cross-entropy": "-", "loss (weight x cross-entropy)": "--"}


def test_a_step_recorded_twice_is_drawn_once_with_its_last_value(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [step_row(1), {"step": 1, "val_loss": 3.0}, {"step": 1, "val_loss": 2.0}, step_row(2)]
    write_report(write_rows(tmp_path / "m.jsonl", rows), tmp_path / "r.png", "twice")
    assert lines(drawn[0], 0)["validation cross-entropy"] == ([1], [2.0])


def test_a_long_run_is_smoothed_but_not_its_learning_rate(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [step_row(step, entropy=1.0 + step % 2) for step in range(1, 201)]
    rows[50]["entropy"] = None
    write_report(write_rows(tmp_path / "m.jsonl", rows), tmp_path / "r.png", "long")
    raw, smooth = (np.array(line.get_ydata()) for line in drawn[0].axes[2].lines)
    assert np.nanmax(raw) == 2.0
    # Nine steps around each: four or five of each height.
    assert np.nanmax(np.abs(smooth[10:40] - 1.5)) == pytest.approx(0.5 / 9)
    assert np.flatnonzero(np.isnan(smooth)).tolist() == [50]
    assert len(drawn[0].axes[5].lines) == 1


def test_the_moving_mean_is_that_of_the_loop() -> None:
    values = np.random.default_rng(0).normal(size=37)
    values[[3, 4, 20]] = np.nan
    for window in (1, 2, 5, 100):
        smooth = report._moving_mean(values, window)
        for place, value in enumerate(values):
            around = values[max(place - window // 2, 0) : place + window // 2 + 1]
            around = around[~np.isnan(around)]
            expected = math.nan if math.isnan(value) else sum(around) / len(around)
            assert smooth[place] == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("rows", [[], [{"step": 0, "val_loss": 1.0}]])
def test_no_training_step_is_an_error_and_writes_nothing(tmp_path: Path, rows: list[Row]) -> None:
    with pytest.raises(ValueError, match=r"m\.jsonl: no row of a training step"):
        write_report(write_rows(tmp_path / "m.jsonl", rows), tmp_path / "r.png", "none")
    assert not (tmp_path / "r.png").exists()


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png = tmp_path / "r.png"
    png.write_bytes(b"old")

    def fail(figure: Figure, path: Path, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(write_rows(tmp_path / "m.jsonl", [step_row(1)]), png, "fail")
    assert png.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["m.jsonl", "r.png"]
