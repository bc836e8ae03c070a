"""Target quality against forgetting: every checkpoint of every run, and each method's curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_eaft.atomic import replacing
from nemo_eaft.compare.matching import Matching, forgetting
from nemo_eaft.compare.record import MEASURES, QUALITY, Path
from nemo_eaft.compare.statistics import Course, begin, curve_at, reach

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours; marks and dashes differ as well, for grey print.
STYLES: tuple[tuple[str, str, Any], ...] = (
    ("#555555", "o", "-"),
    ("#0072B2", "s", "--"),
    ("#D55E00", "^", "-."),
    ("#009E73", "D", ":"),
    ("#CC79A7", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#E69F00", "P", (0, (8, 2))),
    ("#56B4E9", "X", (0, (3, 3))),
)
MARK: dict[str, Any] = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}

_AXIS = {
    "value": "{title} ({unit})",
    "rise": "rise of {title} ({unit})",
    "fall": "loss in {title} ({unit})",
}
_LINE = 200  # levels of a curve


def write_figures(paths: Sequence[Path], matching: Matching, folder: File, title: str) -> list[File]:
    """One picture for each measure of forgetting, ``<measure>.png`` in ``folder``; 8 x 5 inch at 120 dots per inch.

    Marks are checkpoints (pale at learning rates that do not take part), thin lines runs, and a thick line is the
    method's curve of :mod:`nemo_eaft.compare.statistics`, from where every run of it has a trained checkpoint.
    """
    written = []
    for measure in paths[0].points[0]:
        if MEASURES[measure].forgetting is not None:
            written.append(folder / f"{measure}.png")
            save(draw(paths, matching, measure, title), written[-1])
    return written


def save(figure: Figure, png: File) -> None:
    """Write a picture; the same one gives the same file."""
    with replacing(png) as temporary:
        # Without the version of Matplotlib, which would make another file.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def blank(title: str, across: str, up: str) -> tuple[Figure, Any]:
    """A figure of 8 x 5 inch at 120 dots per inch and its axes; ``across``, ``up``: what they show, with units."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up, fontsize=9)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(axes: Any) -> None:
    """After the lines, long enough that their dashes are told apart."""
    axes.legend(fontsize=9, frameon=False, handlelength=4)


def draw(paths: Sequence[Path], matching: Matching, measure: str, title: str) -> Figure:
    """The picture of one measure of forgetting."""
    shown = MEASURES[measure]
    assert shown.forgetting is not None
    figure, axes = blank(
        f"{title}: forgetting at equal target quality, lower is better",
        "target cross-entropy on held-out rows (nats per token); learned more \N{RIGHTWARDS ARROW}",
        _AXIS[shown.forgetting].format(title=shown.title, unit=shown.unit),
    )
    methods = [matching.reference, *(name for name in matching.seeds if name != matching.reference)]
    for number, method in enumerate(methods):
        colour, mark, dash = STYLES[number % len(STYLES)]
        curve: dict[float | None, list[Course]] = {}
        for path in (path for path in paths if path.method == method):
            course = Course(forgetting(path, QUALITY)[0], forgetting(path, measure)[0])
            axes.plot(course.quality, course.other, color=colour, linewidth=0.6, alpha=0.35)
            takes_part = path.learning_rate in matching.learning_rates[method]
            # Over the thick line, which goes through them where there is one seed.
            axes.plot(
                course.quality,
                course.other,
                linestyle="none",
                marker=mark,
                color=colour,
                **MARK,
                alpha=1.0 if takes_part else 0.35,
                zorder=3,
            )
            if takes_part:
                curve.setdefault(path.learning_rate, []).append(course)
        highest, lowest = float(begin(curve)), float(reach(curve))
        if lowest < highest:
            levels = np.linspace(lowest, highest, _LINE)
            axes.plot(levels, curve_at(curve, levels).value, color=colour, linewidth=2.2, linestyle=dash)
        axes.plot(
            [], [], color=colour, marker=mark, linewidth=2.2, linestyle=dash, markeredgecolor="white", label=method
        )
    axes.invert_xaxis()
    legend(axes)
    return figure
