"""Target quality against forgetting: every checkpoint of every run, and each method's curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as File

import numpy as np

from nemo_eaft.atomic import replacing
from nemo_eaft.compare.matching import Matching, forgetting
from nemo_eaft.compare.record import MEASURES, QUALITY, Path
from nemo_eaft.compare.statistics import Course, curve_at, reach

# Okabe and Ito's colours; marks and dashes differ as well, for grey print.
_STYLES = (
    ("#555555", "o", "-"),
    ("#0072B2", "s", "-"),
    ("#D55E00", "^", "--"),
    ("#009E73", "D", "-."),
    ("#CC79A7", "v", ":"),
    ("#E69F00", "P", "--"),
    ("#56B4E9", "X", "-."),
)
_AXIS = {
    "value": "{title} ({unit})",
    "rise": "rise of {title} ({unit})",
    "fall": "loss in {title} ({unit})",
}
_LINE = 200  # levels of a curve


def write_figures(paths: Sequence[Path], matching: Matching, folder: File, title: str) -> list[File]:
    """One picture for each measure of forgetting, ``<measure>.png`` in ``folder``; 8 x 5 inch at 120 dots per inch.

    Marks are checkpoints, thin lines runs, and a thick line is the method's curve of
    :mod:`nemo_eaft.compare.statistics`.
    """
    written = []
    for measure in paths[0].points[0]:
        if MEASURES[measure].forgetting is not None:
            written.append(folder / f"{measure}.png")
            _write(paths, matching, measure, written[-1], title)
    return written


def _write(paths: Sequence[Path], matching: Matching, measure: str, png: File, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots()
    methods = [matching.reference, *(name for name in matching.seeds if name != matching.reference)]
    for number, method in enumerate(methods):
        colour, mark, dashes = _STYLES[number % len(_STYLES)]
        curve: dict[float | None, list[Course]] = {}
        for path in (path for path in paths if path.method == method):
            course = Course(forgetting(path, QUALITY)[0], forgetting(path, measure)[0])
            axes.plot(*course, color=colour, linewidth=0.6, alpha=0.35, marker=mark, markersize=3, markeredgewidth=0)
            if path.learning_rate in matching.learning_rates[method]:
                curve.setdefault(path.learning_rate, []).append(course)
        base, lowest = next(iter(curve.values()))[0].quality[0], float(reach(curve))
        if lowest < base:
            levels = np.linspace(lowest, base, _LINE)
            axes.plot(levels, curve_at(curve, levels), color=colour, linewidth=2.2, linestyle=dashes)
        axes.plot([], [], color=colour, marker=mark, linewidth=2.2, linestyle=dashes, label=method)
    axes.invert_xaxis()
    axes.set_xlabel("target cross-entropy on held-out rows (nats per token); learned more \N{RIGHTWARDS ARROW}")
    shown = MEASURES[measure]
    assert shown.forgetting is not None
    axes.set_ylabel(_AXIS[shown.forgetting].format(title=shown.title, unit=shown.unit))
    axes.set_title(f"{title}: forgetting at equal target quality, lower is better", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    with replacing(png) as temporary:
        # Without the version of Matplotlib, which would make another file of the same picture.
        figure.savefig(temporary, format="png", metadata={"Software": None})
