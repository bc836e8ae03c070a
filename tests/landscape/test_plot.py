"""The picture: what is written on it is on it, and true of its axes."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from nemo_eaft.config import EAFTConfig
from nemo_eaft.landscape.counts import GRID
from nemo_eaft.landscape.plot import Picture, draw

ROWS = "123,456,789 answer tokens of 1,234,567 rows"


def picture(note: str, config: EAFTConfig) -> Figure:
    grid = np.zeros((GRID, GRID), dtype=np.int64)
    grid[0, -1], grid[2, 0], grid[30, 20] = 900, 12, 300
    return draw(Picture(grid, config, 50_000, "Confident conflicts: 0.31% of the tokens,\n2 %", note))


@pytest.mark.parametrize(
    "names", ["m on d.jsonl", "WMW" * 12 + "/checkpoint-with-a-long-name on " + "WMW" * 20 + ".jsonl", "iil." * 90]
)
def test_no_text_leaves_the_page(names: str) -> None:
    figure = picture(f"{names}\n{ROWS}", EAFTConfig())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    note = figure.axes[0].get_title(loc="left")
    assert note.endswith(f"\n{ROWS}")
    shown = note.partition("\n")[0]
    # Beginning and end tell names apart.
    assert (shown[:8], shown[-6:]) == (names[:8], names[-6:])
    assert (shown == names) == (len(names) < 20)
    renderer = canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    (written,) = (text for text in texts if text.get_text() == figure.axes[0].get_title(loc="left"))
    assert len(texts) > 10
    for text in texts:
        box = text.get_window_extent(renderer)
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
    # And no shorter than it must be: a character more would not have fitted.
    if shown != names:
        assert written.get_window_extent(renderer).x1 > figure.bbox.x1 - 40


@pytest.mark.parametrize(
    "config, end",
    [(EAFTConfig(), "1"), (EAFTConfig(normalizer=1.0), "3"), (EAFTConfig(normalizer=3.0), "0.999")],
    ids=["ln20", "1nat", "3nats"],
)
def test_the_end_of_the_axis_is_what_it_is_said_to_be(config: EAFTConfig, end: str) -> None:
    figure = picture("note", config)
    below = figure.axes[2]
    assert below.get_xlabel().endswith(f"(0: sure, {end}: undecided)")
    assert below.dataLim.x1 == pytest.approx(float(end), rel=2e-3)
