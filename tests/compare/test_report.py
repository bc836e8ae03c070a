"""What a reader of ``compare.md`` sees: tables that are tables, and pictures whose methods can be told apart."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from nemo_eaft.compare.matching import match
from nemo_eaft.compare.plot import draw
from nemo_eaft.compare.record import Path, Sums
from nemo_eaft.compare.report import by_chance, findings, markdown

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


def test_a_sentence_for_each_comparison() -> None:
    """Seeds are counted for each pair; a sign that changes is said with its levels, and so is an empty range."""

    def made(method: str, seed: int, target: tuple[float, ...], drift: tuple[float, ...]) -> Path:
        points = [{"target": Sums((t,), (1,)), "drift": Sums((d,), (1,))} for t, d in zip(target, drift, strict=True)]
        return Path(f"{method}{seed}", method, 1e-5, seed, tuple(range(len(points))), tuple(points))

    falling = (2.0, 1.75, 1.5, 1.25, 1.0)
    paths = [made("sft", seed, falling, (0.0, 0.25, 0.5, 0.75, 1.0)) for seed in range(3)]
    paths += [made("less", seed, falling, (0.0, 0.05, 0.1, 0.15, 0.2)) for seed in range(3)]
    paths += [made("turns", 0, falling, (0.0, 0.125, 0.5, 1.125, 2.0))]
    paths += [made("coarse", 0, (2.0, 0.9), (0.0, 1.0)), made("never", 0, (2.0, 2.1), (0.0, 1.0))]
    matching = match(paths, "sft", draws=50)
    less, turns, coarse, never = findings(matching)
    assert less.startswith("less forgets less than sft by drift, KL(base || tuned): mean difference at equal target ")
    assert less.endswith("nats per token (from 1.750 to 1.000 nats of target cross-entropy; over rows and 3 seeds).")
    assert turns.startswith("turns forgets more than sft by drift")
    assert "over rows and seeds: 1 of turns, 3 of sft); the sign changes along the way: -0.1250 [" in turns
    assert turns.endswith("] at 1.562.")
    assert "no common range of target cross-entropy between trained checkpoints, for coarse is at 0.9000 nats" in coarse
    assert "for never never got below the base model's target cross-entropy" in never
    page = "\n".join(markdown(paths, matching))
    assert by_chance(2, 1) in page
    assert "about 0.1 of them would be on one side of 0 by chance. 1 of them is of one seed" in page
    assert by_chance(40, 0).endswith("about 2.0 of them would be on one side of 0 by chance.")
    assert "by chance" not in "\n".join(markdown(paths, match(paths[:6], "sft", draws=50)))


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
