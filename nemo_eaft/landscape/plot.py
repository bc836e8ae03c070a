"""The landscape as a picture, drawn with Matplotlib and no display."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter

from nemo_eaft.config import EAFTConfig
from nemo_eaft.gates import gate_weight
from nemo_eaft.landscape.counts import Bins, Floats, Integers

# Okabe and Ito's colours, as in report.png; cividis is made for colour-blind readers.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#555555"
_READS_ENTROPY_ALONE = ("eaft", "sigmoid", "none")


@dataclass(frozen=True)
class Picture:
    """What is drawn."""

    grid: Integers
    """[GRID, GRID] tokens by entropy ratio and label probability."""
    config: EAFTConfig
    vocab_size: int
    title: str
    """The message, one or two lines of about 75 characters."""
    note: str
    """What the tokens are, below it; a line that is too long loses its middle."""


def draw(picture: Picture) -> Figure:
    """An 8 x 6 inch figure at 100 dots per inch.

    Above, over the entropy of the prediction: the part of the tokens in each column, and the weight that the gate
    gives where it depends on the entropy alone. Below, the tokens by entropy and by the probability of their label,
    on a logarithmic scale of colours; the confident conflicts are framed.
    """
    config, grid = picture.config, picture.grid
    bins = Bins.of(config, picture.vocab_size)
    edges, probabilities = bins.grid_edges()
    figure = Figure(figsize=(8, 6), dpi=100, layout="constrained", facecolor="white")
    figure.suptitle(picture.title, fontsize=12.5, fontweight="bold", parse_math=False)
    axes = figure.subplots(
        2, 2, sharex="col", gridspec_kw={"height_ratios": [1, 2.6], "width_ratios": [40, 1], "wspace": 0.02}
    )
    above, below, bar = axes[0][0], axes[1][0], axes[1][1]
    axes[0][1].axis("off")

    total = max(int(grid.sum()), 1)
    above.stairs(grid.sum(1) / total, edges, fill=True, color="#BBBBBB")
    above.set_ylabel("tokens", color=_GREY)
    above.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    note = above.set_title(picture.note, loc="left", fontsize=10, color=_GREY, parse_math=False)
    if config.gate in _READS_ENTROPY_ALONE:
        weight = above.twinx()
        weight.plot(*_weights(config, edges), color=_BLUE, linewidth=2)
        weight.set_ylim(0, 1.05 * bins.highest_weight)
        weight.set_ylabel(f"weight ({_gate(config)})", color=_BLUE)
        weight.tick_params(axis="y", colors=_BLUE)
        weight.spines[["top"]].set_visible(False)
    above.spines[["top"]].set_visible(False)

    shown = np.ma.masked_equal(grid.T, 0)
    mesh = below.pcolormesh(
        edges, probabilities, shown, cmap="cividis", norm=LogNorm(1, max(int(grid.max()), 2)), rasterized=True
    )
    below.set_facecolor("#F2F2F2")
    ends = f"0: sure, {bins.highest_ratio:.3g}: undecided"
    below.set_xlabel(f"entropy of the prediction / {_normaliser(config)}   ({ends})")
    below.set_ylabel("probability of the label")
    right, top = min(config.conflict_entropy, bins.highest_ratio), config.conflict_probability
    frame = Rectangle((0, 0), right, top, fill=False, edgecolor=_ORANGE, linewidth=2.5, clip_on=False, zorder=3)
    below.add_patch(frame)
    # Above the frame is an empty corner: a sure model gives a label nearly all or nearly nothing.
    below.annotate(
        "confident\nconflicts",
        (0, top),
        xytext=(5, 5),
        textcoords="offset points",
        color=_ORANGE,
        fontsize=11,
        fontweight="bold",
        zorder=4,
    )
    figure.colorbar(mesh, cax=bar, label="tokens in a cell (grey: none)")
    _shorten(note, figure)
    return figure


def _shorten(text: Text, figure: Figure) -> None:
    """Take characters out of the middle of each line until all end on the page."""
    # Where the text begins is known once all is laid out.
    figure.draw_without_rendering()
    lines = text.get_text().split("\n")
    for number, line in enumerate(lines):
        shorter = line
        for kept in range(len(line), 0, -1):
            shorter = line if kept == len(line) else f"{line[: (kept + 1) // 2]}\u2026{line[len(line) - kept // 2 :]}"
            text.set_text(shorter)
            if text.get_window_extent().x1 <= figure.bbox.x1 - 5:
                break
        lines[number] = shorter
    text.set_text("\n".join(lines))


def _weights(config: EAFTConfig, edges: Floats) -> tuple[Floats, Floats]:
    ratios = np.linspace(edges[0], edges[-1], 201)
    values = torch.from_numpy(ratios)
    return ratios, gate_weight(torch.zeros_like(values), values, config).numpy()


def _gate(config: EAFTConfig) -> str:
    return f"alpha {config.alpha:g}" if config.gate == "eaft" else config.gate


def _normaliser(config: EAFTConfig) -> str:
    if config.normalizer is not None:
        return f"{config.normalizer:g} nat{'' if config.normalizer == 1 else 's'}"
    return "ln V" if config.top_k is None else f"ln {config.top_k}"
