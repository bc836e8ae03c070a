"""The roofline: how fast each contender gets through the bytes that must be moved, beside a plain copy."""

from __future__ import annotations

from pathlib import Path

from benchmarks.contenders import CONTENDERS
from benchmarks.memory import Memory
from benchmarks.results import Row


def draw(rows: list[Row], bandwidth: float, device: str, path: Path) -> None:
    """PNG, one column for each type and entropy; above GB/s of necessary traffic, below bytes held per logit.

    Only cases that start from logits: an output layer is bound by its matrix products.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row.case.hidden is None and (row.rounds or isinstance(row.memory, Memory))]
    panels = list(dict.fromkeys((row.case.dtype, row.case.top_k) for row in rows)) or [("float32", 20)]
    figure, axes = plt.subplots(
        2, len(panels), figsize=(4.6 * len(panels) + 1, 8), squeeze=False, sharex=True, sharey="row"
    )
    for column, (dtype, top_k) in enumerate(panels):
        here = [row for row in rows if (row.case.dtype, row.case.top_k) == (dtype, top_k)]
        above, below = axes[0][column], axes[1][column]
        above.axhline(bandwidth / 1e9, color="black", linestyle="--", label="copy, measured in this run")
        for number, contender in enumerate(CONTENDERS):
            mine = sorted((row for row in here if row.contender == contender.name), key=lambda row: row.case.width)
            style = {"label": contender.label, "color": f"C{number % 10}", "marker": "o" if contender.ours else "x"}
            timed = [(row.case.width, _rate(row)) for row in mine if row.rounds]
            if timed:
                above.plot(*zip(*timed, strict=True), linestyle="none", **style)
            held = [
                (row.case.width, row.memory.total / row.case.logits) for row in mine if isinstance(row.memory, Memory)
            ]
            if held:
                below.plot(*zip(*held, strict=True), linestyle="none", **style)
        above.set_title(f"{dtype}, {'full entropy' if top_k is None else f'top-{top_k}'}")
        above.set_yscale("log")
        above.set_xscale("log")
        below.set_ylim(bottom=0)
        below.set_xlabel("columns of the shard, V / TP")
    axes[0][0].set_ylabel("GB/s of the bytes that must be moved")
    axes[1][0].set_ylabel("peak bytes held per logit")
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(f"{device}: forward and backward of the loss")
    figure.tight_layout(rect=(0, 0.04 + 0.013 * len(handles), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rate(row: Row) -> float:
    """GB/s: necessary bytes over the time taken, which counts against whoever moves more than that."""
    total = row.time()
    assert total is not None
    return row.case.limit_bytes * row.case.logits / (total.median / 1e3) / 1e9
