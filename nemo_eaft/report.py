"""``report.png``: a run on one page, drawn from ``metrics.jsonl`` with Matplotlib and no display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from nemo_eaft.atomic import replacing
from nemo_eaft.progress import format_count, format_duration
from nemo_eaft.recorder import Row, read

# Okabe and Ito's colours: told apart by colour-blind readers and in grey print.
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
_GREY = "#555555"
_SMOOTH_FROM = 100  # steps from which single steps hide the course, and a moving mean is drawn over them
_MARKERS_UNTIL = 40  # steps up to which each step gets its dot; a single step would not show as a line

Values = NDArray[np.float64]


def write_report(metrics_jsonl: Path, png: Path, title: str) -> None:
    """Draw the report of a run.

    Six panels over the optimizer step: loss, cross-entropy and validation loss (nats per token); mean
    weight; mean entropy (nats per token); confident conflicts (% of tokens); throughput (tokens per second);
    learning rate. From 100 steps on, single steps are faint and a moving mean is drawn over them. A value
    that was not finite is a gap, and its step a red cross in the first panel. ``png`` is replaced in one
    rename; its folder is created if missing.

    Args:
        metrics_jsonl: the file of :class:`nemo_eaft.recorder.MetricsFile`; validation rows may be missing.
        png: the picture to write, 13 x 9.5 inch at 120 dots per inch.
        title: name of the run, the first line of the picture; taken literally, ``$`` included.

    Raises:
        FileNotFoundError: there is no ``metrics_jsonl``.
        ValueError: it holds no row of a training step, or a line that is not a row.
    """
    rows = read(metrics_jsonl)
    # By step, the last row wins: a resumed run may validate once more at the step it resumed from.
    training = [row for _, row in sorted({row["step"]: row for row in rows if "val_loss" not in row}.items())]
    validation = [row for _, row in sorted({row["step"]: row for row in rows if "val_loss" in row}.items())]
    if not training:
        raise ValueError(f"{metrics_jsonl}: no row of a training step, nothing to draw")

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(13, 9.5), dpi=120, layout=layout, facecolor="white")
    figure.suptitle(f"{title}\n", fontsize=16, fontweight="bold", parse_math=False)
    figure.text(0.5, 0.955, _summary(training, validation), ha="center", va="top", fontsize=11, color=_GREY)
    panels = list(figure.subplots(3, 2, sharex=True).flat)
    loss, weight, entropy, conflicts, speed, learning_rate = panels

    _draw_loss(loss, training, validation)
    _name(weight, "Mean weight", "weight")
    _curve(weight, training, "weight", _GREEN)
    _name(entropy, "Mean entropy of the prediction", "nats / token")
    _curve(entropy, training, "entropy", _PURPLE)
    _name(conflicts, "Confident conflicts", "% of tokens")
    _curve(conflicts, training, "conflict_fraction", _RED, scale=100.0)
    _name(speed, "Throughput", "tokens / s")
    _curve(speed, training, "tokens_per_second", _GREY)
    _name(learning_rate, "Learning rate", "")
    _curve(learning_rate, training, "learning_rate", _SKY, noisy=False)

    # Quantities that cannot be negative start at zero, so that a small change does not look like a large one.
    for axes in (entropy, conflicts, speed, learning_rate):
        _from_zero(axes)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    # No common factor above the axis: it would stand in the title's place.
    learning_rate.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    weight.set_ylim(0, max(1.0, weight.get_ylim()[1]))

    steps = [row["step"] for row in training + validation]
    margin = max(0.02 * (max(steps) - min(steps)), 0.5)
    for axes in panels:
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
    with replacing(Path(png)) as temporary:
        figure.savefig(temporary, format="png")


def _draw_loss(axes: Axes, training: Sequence[Row], validation: Sequence[Row]) -> None:
    _name(axes, "Loss", "nats / token")
    _curve(axes, training, "cross_entropy", _ORANGE, label="cross-entropy")
    # Without a gate the two are one: dashes leave the line below visible.
    same = all(row.get("loss") == row.get("cross_entropy") for row in training)
    style = "--" if same else "-"
    _curve(axes, training, "loss", _BLUE, label="loss (weight x cross-entropy)", style=style)
    if validation:
        axes.plot(
            [row["step"] for row in validation],
            _column(validation, "val_loss"),
            color="black",
            marker="D",
            markersize=5,
            linestyle=":",
            linewidth=1,
            label="validation cross-entropy",
        )
    _from_zero(axes)
    bad = [row["step"] for row in training if row.get("loss") is None or row.get("cross_entropy") is None]
    if bad:
        # Placed in axes height, not in nats: it has no value.
        place = axes.get_xaxis_transform()
        axes.plot(bad, [0.04] * len(bad), "x", color="red", markersize=8, transform=place, label="not finite")
    # Losses fall, so this corner is the free one in a long run, where looking for the best place takes seconds.
    corner = "best" if len(training) <= _SMOOTH_FROM else "upper right"
    axes.legend(fontsize=9, loc=corner, framealpha=0.8, edgecolor="none")


def _name(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=8, steps=[1, 2, 5, 10]))
    axes.tick_params(labelbottom=True)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(
    axes: Axes,
    rows: Sequence[Row],
    key: str,
    colour: str,
    *,
    scale: float = 1.0,
    label: str | None = None,
    style: str = "-",
    noisy: bool = True,
) -> None:
    steps = np.array([row["step"] for row in rows])
    values = scale * _column(rows, key)
    marker = "o" if len(steps) <= _MARKERS_UNTIL else None
    if noisy and len(steps) >= _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        values = _moving_mean(values, len(steps) // 25)
    axes.plot(steps, values, style, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=label)


def _from_zero(axes: Axes) -> None:
    """Let the height start at 0; a panel without one finite positive value gets the height 1."""
    top = axes.dataLim.y1
    axes.set_ylim(0, 1.08 * top if np.isfinite(top) and top > 0 else 1.0)


def _column(rows: Sequence[Row], key: str) -> Values:
    """[rows] float64; NaN, which is drawn as a gap, where the row holds null or lacks the key."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)


def _moving_mean(values: Values, window: int) -> Values:
    """[n] -> [n]: mean of the ``window`` values around each, fewer at the ends; NaN is left out and stays."""
    known = np.isfinite(values)
    total = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    count = np.concatenate(([0], np.cumsum(known)))
    places = np.arange(len(values))
    start = np.maximum(places - window // 2, 0)
    stop = np.minimum(places + window // 2 + 1, len(values))
    number = np.maximum(count[stop] - count[start], 1)
    return np.where(known, (total[stop] - total[start]) / number, np.nan)


def _summary(training: Sequence[Row], validation: Sequence[Row]) -> str:
    """The line under the title: how far, how much, how long, and where cross-entropy ended."""
    tokens = sum(row.get("tokens") or 0 for row in training)
    seconds = sum(row.get("seconds") or 0.0 for row in training)
    count = len(training)
    steps = f"{count} step{'s' if count != 1 else ''}"
    parts = [steps, f"{_count(tokens)} tokens", f"{format_duration(seconds)} in steps"]
    first, last = training[0].get("cross_entropy"), training[-1].get("cross_entropy")
    if count > 1 and first is not None and last is not None:
        parts.append(f"cross-entropy {first:.3f} \N{RIGHTWARDS ARROW} {last:.3f}")
    losses = [row["val_loss"] for row in validation if row["val_loss"] is not None]
    if len(losses) > 1:
        parts.append(f"validation {losses[0]:.3f} \N{RIGHTWARDS ARROW} {losses[-1]:.3f}")
    elif losses:
        parts.append(f"validation {losses[0]:.3f}")
    return "   \N{MIDDLE DOT}   ".join(parts)


def _count(tokens: int) -> str:
    return f"{tokens:,}" if tokens < 1_000_000 else format_count(tokens)
