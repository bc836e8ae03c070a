"""The landscape of single training steps: to TensorBoard, and as counts to ``landscape.jsonl``.

Every rank counts the tokens of its micro-batches and adds up with the others one vector of fixed size, in steps that
all ranks know alike. Rank 0 writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_eaft.config import EAFTConfig
from nemo_eaft.landscape.counts import LENGTH, Bins, Floats, Integers, count, percentile, split
from nemo_eaft.loss.collectives import sum_over_data_and_broadcast_over_pipeline
from nemo_eaft.megatron import AttachedLoss, Observed
from nemo_eaft.metrics import StepMetrics
from nemo_eaft.recorder import drop_after

_log = logging.getLogger(__name__)

FILE = "landscape.jsonl"
"""File in ``run.dir``: one object for each step with a landscape."""
PERCENTILES = (5, 25, 50, 75, 95)
# TensorBoard takes each name for a regular expression and shows all that begins so: p5 would be p50 as well.
_LAYOUT = {
    "EAFT": {
        "loss: what is trained on, and plain": ["Multiline", ["eaft/loss$", "eaft/cross_entropy$"]],
        "confident conflicts": ["Multiline", ["eaft/conflict_fraction$"]],
        "entropy / normaliser, percentiles": ["Multiline", [f"eaft/entropy_p{part}$" for part in PERCENTILES]],
        "weight, percentiles": ["Multiline", [f"eaft/weight_p{part}$" for part in PERCENTILES]],
    }
}


class TrainingLandscape:
    """Counts the tokens of every `every`-th step.

    Args:
        config: of the loss.
        vocab_size: the true vocabulary size.
        every: steps between landscapes; 0: never.
    """

    def __init__(self, config: EAFTConfig, vocab_size: int, every: int) -> None:
        self._config, self._vocab_size, self._every = config, vocab_size, every
        self._counts: Tensor | None = None
        self._due = self._laid_out = False
        self._path: Path | None = None

    def open(self, run_dir: Path, step: int) -> None:
        """Rank 0 will write there. What a lost part of the run wrote of steps after `step` is taken out."""
        self._path = run_dir / FILE
        drop_after(self._path, step)

    def start_step(self, number: int, loss: AttachedLoss | None) -> None:
        """Begin step `number` (from 1). loss: this rank's, None where it has none."""
        self._due = bool(self._every) and number % self._every == 0
        self._counts = None
        if loss is not None:
            loss.observer = self._see if self._due else None

    def _see(self, seen: Observed) -> None:
        if not self._due:
            return  # a validation after the step
        counts = count(seen.out, seen.valid, self._config, self._vocab_size)
        self._counts = counts if self._counts is None else self._counts + counts

    def end_step(
        self, device: torch.device, data_group: Any, pipeline_group: Any, last_stage: int | None
    ) -> Tensor | None:
        """The counts of the global batch, the same on every rank; None in a step that is not counted.

        Every rank calls it. Collectives as of `metrics.reduce_sums`, in counted steps alone.
        """
        if not self._due:
            return None
        self._due = False
        counts = torch.zeros(LENGTH, dtype=torch.float64, device=device) if self._counts is None else self._counts
        return sum_over_data_and_broadcast_over_pipeline(counts, data_group, pipeline_group, last_stage)

    def write(self, vector: Tensor, step: int, metrics: StepMetrics, loggers: Sequence[Any], logged: int) -> None:
        """On rank 0: the line of `landscape.jsonl`, and what each logger takes.

        Args:
            vector: of `end_step`.
            step: as in `metrics.jsonl`, from 1.
            metrics: of the step.
            loggers: Lightning's.
            logged: the step that the loggers have the loss under: Lightning counts from 0.
        """
        grid, ratios, weights = split(vector)
        bins = Bins.of(self._config, self._vocab_size)
        percentiles = {}
        for part in PERCENTILES:
            percentiles[f"entropy_p{part}"] = percentile(ratios, bins.ratio_edges(), part / 100)
            percentiles[f"weight_p{part}"] = percentile(weights, bins.weight_edges(), part / 100)
        if self._path is not None:
            line = {"step": step, "tokens": int(grid.sum()), "conflict_fraction": metrics.conflict_fraction}
            line |= percentiles
            line |= {"highest_entropy": bins.highest_ratio, "counts": grid.tolist()}
            with open(self._path, "ab", buffering=0) as file:
                file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        for logger in loggers:
            logger.log_metrics({f"eaft/{name}": value for name, value in percentiles.items()}, step=logged)
            board = getattr(logger, "experiment", None)
            if hasattr(board, "add_histogram_raw") and hasattr(board, "add_image"):
                try:
                    self._to_tensorboard(board, logged, metrics, grid, ratios, weights)
                except Exception as error:
                    # A picture must not end a training, nor keep its other ranks waiting.
                    _log.error("the landscape of step %d could not be drawn: %s", step, error)

    def _to_tensorboard(
        self, board: Any, step: int, metrics: StepMetrics, grid: Integers, ratios: Integers, weights: Integers
    ) -> None:
        from nemo_eaft.landscape.plot import Picture, draw

        bins = Bins.of(self._config, self._vocab_size)
        if not self._laid_out:
            board.add_custom_scalars(_LAYOUT)
            self._laid_out = True
        for name, counts, edges in (
            ("entropy", ratios, bins.ratio_edges()),
            ("weight", weights, bins.weight_edges()),
        ):
            if counts.sum():
                _add_histogram(board, f"eaft/{name}", counts, edges, step)
        # TensorBoard itself says which step it is.
        title = f"{100 * metrics.conflict_fraction:.2g} % of the tokens are confident conflicts"
        note = f"{metrics.tokens:,} tokens of one global batch"
        figure = draw(Picture(grid, self._config, self._vocab_size, title, note))
        board.add_image("eaft/landscape", _pixels(figure), step, dataformats="HWC")


def _add_histogram(board: Any, tag: str, counts: Integers, edges: Floats, step: int) -> None:
    """Counts as TensorBoard's histogram; its sums are those of the middles of the bins."""
    middles = (edges[1:] + edges[:-1]) / 2
    held = np.flatnonzero(counts)
    first, last = int(held[0]), int(held[-1])
    board.add_histogram_raw(
        tag,
        min=float(edges[first]),
        max=float(edges[last + 1]),
        num=int(counts.sum()),
        sum=float(counts @ middles),
        sum_squares=float(counts @ middles**2),
        bucket_limits=edges[first + 1 : last + 2].tolist(),
        bucket_counts=counts[first : last + 1].tolist(),
        global_step=step,
    )


def _pixels(figure: Any) -> Any:
    """[height, width, 3] uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
