"""What a reader of ``compare.md`` sees: tables that are tables, and pictures whose methods can be told apart."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from nemo_eaft.compare.matching import match
from nemo_eaft.compare.plot import draw
from nemo_eaft.compare.record import Path, Sums
from nemo_eaft.compare.report import markdown

TARGET = (2.0, 1.5, 1.0)


def runs(*methods: str) -> list[Path]:
    """A run of three points for each method; the later ones forget more."""
    return [
        Path(
            f"a|{method}.yaml",
            method,
            1e-5,
            1,
            (0, 10, 20),
            tuple(
                {"target": Sums((target,), (1,)), "drift": Sums((number * (0.2 + 0.1 * step),), (1,))}
                for step, target in enumerate(TARGET)
                for number in [step * (1 + place)]
            ),
        )
        for place, method in enumerate(methods)
    ]


def test_every_row_of_a_table_has_the_cells_of_its_head() -> None:
    """GitHub's tables: a bar that is not escaped begins a cell, and a head that does not fit its rule is no table."""
    paths = runs("sft", "eaft alpha=1")
    tables = [
        block
        for block in "\n".join(markdown(paths, match(paths, "sft", draws=5))).split("\n\n")
        if block.startswith("|")
    ]
    assert len(tables) == 2
    for table in tables:
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
        assert {len(row) for row in cells} == {len(cells[0])}, table
    # Each name is one cell, whole.
    assert re.search(r"\| drift, KL\(base \\\|\\\| tuned\) \|", tables[0])
    assert re.search(r"\| a\\\|sft.yaml \| sft \| 1e-05 \| 1 \| 10 \|", tables[1])


def test_checkpoints_are_seen_and_methods_differ_in_grey_print() -> None:
    methods = ["sft", "eaft alpha=1", "dft", "mask", "sigmoid", "eaft alpha=2", "eaft alpha=0.33"]
    paths = runs(*methods)
    figure = draw(paths, match(paths, "sft", draws=0), "drift", "model")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    assert axes.get_xlabel().startswith("target cross-entropy on held-out rows (nats per token)")
    assert axes.get_ylabel() == "drift, KL(base || tuned) (nats per token)"
    legend = axes.get_legend()
    assert legend is not None
    keys = dict(zip([text.get_text() for text in legend.get_texts()], legend.get_lines(), strict=True))
    assert list(keys) == methods
    # Pairs of mark and dashes, so that no colour is needed; the dashes of a line are not public.
    assert len({(line.get_marker(), str(line._unscaled_dash_pattern)) for line in keys.values()}) == len(methods)  # type: ignore[attr-defined]
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    for path in paths:
        for target, point in zip(TARGET[1:], path.points[1:], strict=True):
            x, y = axes.transData.transform((target, point["drift"].mean))
            there = pixels[pixels.shape[0] - 1 - int(y), int(x)]
            assert np.abs(there - 255 * np.array(to_rgb(keys[path.method].get_color()))).max() <= 2, path.method
    # A mark is wider than the line: what stands beside the centre is white edge or mark, not the line alone.
    x, y = axes.transData.transform((TARGET[1], paths[0].points[1]["drift"].mean))
    column = pixels[pixels.shape[0] - 1 - int(y) - 7 : pixels.shape[0] - 1 - int(y) + 8, int(x)]
    assert (np.abs(column - 255 * np.array(to_rgb("#555555"))).max(axis=1) <= 2).sum() >= 8
