"""The forward passes: NeMo validates the model on the training rows, and `collect` looks on."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from nemo_eaft.analyze import state as states
from nemo_eaft.analyze.tally import Tally
from nemo_eaft.data import read_prepared
from nemo_eaft.progress import format_duration
from nemo_eaft.ready import Ready
from nemo_eaft.settings import Settings

_SAY_EVERY = 60.0
"""Seconds between lines where nobody watches a terminal: in a file a bar is there only when it has ended."""


class _Stop(Exception):
    """All ranks agreed to stop."""


def analyze(settings: Settings, ready: Ready) -> bool:
    """Go through the rows that are not done yet. Every rank of the job calls it, with the same arguments.

    Returns:
        Whether all rows are done; False when a stop was asked for.
    """
    if settings.run.backend == "cpu":
        import torch

        import nemo_eaft.cpu

        nemo_eaft.cpu.enable()
        # Ranks share the cores: more threads than that wait for each other.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.trainer.gpus_per_node))

    from nemo.collections import llm

    from nemo_eaft.analyze.collect import CollectTokens
    from nemo_eaft.analyze.rows import build_rows
    from nemo_eaft.nemo import true_vocab_size
    from nemo_eaft.train import build_model, imported_vocab_size

    run_dir = Path(settings.run.dir)
    so_far = states.load(settings, ready)
    rows, batch = read_prepared(run_dir / "data").train_samples, settings.trainer.global_batch_size
    batches = -(-(rows - so_far.rows_done) // batch)
    if batches == 0:
        return True
    model = build_model(settings, ready.checkpoint)
    vocab_size = imported_vocab_size(ready.checkpoint) or true_vocab_size(model)
    progress = _Progress(settings, so_far, rows)
    collect = CollectTokens(settings.loss.eaft_config(), vocab_size, batches, progress.begin, progress.save)
    data = build_rows(settings, run_dir / "data", model.tokenizer, so_far.rows_done)
    trainer = _trainer(settings, batches)
    trainer.callbacks.append(collect)
    try:
        llm.validate(
            model=model,
            data=data,
            trainer=trainer,
            log=_logger(run_dir),
            resume=_weights(ready),
            tokenizer="model",
        )
    except _Stop:
        return False
    finally:
        progress.close()
    return True


class _Progress:
    """Adds up the tallies of all ranks, writes the state, says how far it is, and looks for a request to stop."""

    def __init__(self, settings: Settings, state: states.State, rows: int) -> None:
        self._settings, self._state, self._rows = settings, state, rows
        self._first, self._started = state.tally.read, time.perf_counter()
        self._start = state.rows_done
        self._bar: Any = None
        self._task: Any = None
        self._said: float | None = None

    def begin(self) -> None:
        """The model is there: from now on it is timed."""
        self._started = time.perf_counter()

    def save(self, tallies: list[Tally], batches: int) -> None:
        """`CollectTokens.save`, on every rank."""
        import torch
        import torch.distributed as dist

        from nemo_eaft import stop
        from nemo_eaft.loss.collectives import any_rank

        config, run_dir = self._settings.loss.eaft_config(), Path(self._settings.run.dir)
        for tally in tallies:
            self._state.tally.merge(tally, config)
        self._state.rows_done = min(self._start + batches * self._settings.trainer.global_batch_size, self._rows)
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first:
            states.save(self._state, run_dir)
            self._show()
        if self._state.rows_done == self._rows:
            return
        reason = stop.asked(run_dir, look=first)
        device = torch.device("cuda") if self._settings.run.backend == "cuda" else torch.device("cpu")
        if any_rank(reason is not None, device):
            if first:
                stop.write_note(run_dir, batches, str(run_dir / states.FILE), reason or "SIGUSR1 to another rank")
            raise _Stop

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        now = time.perf_counter()
        seconds, rows = now - self._started, self._state.rows_done - self._start
        rate = f"{(self._state.tally.read - self._first) / seconds:.0f} tokens/s"
        console = Console(stderr=True)
        if not console.is_terminal:
            if self._said is None or now - self._said >= _SAY_EVERY:
                left = format_duration(seconds / rows * (self._rows - self._state.rows_done))
                done = f"{self._state.rows_done} of {self._rows} rows"
                print(f"analyze: {done}, {rate}, {left} left", file=sys.stderr, flush=True)
                self._said = now
            return
        if self._bar is None:
            columns = ("analyze", BarColumn(), MofNCompleteColumn(), "rows", TextColumn("{task.fields[rate]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("", total=self._rows, completed=self._start, rate="")
            self._bar.start()
        self._bar.update(self._task, completed=self._state.rows_done, rate=rate)

    def close(self) -> None:
        """Leave the bar as it is, and say how fast it went."""
        if self._bar is not None:
            self._bar.stop()
        elif self._said is None:
            return
        seconds, read = time.perf_counter() - self._started, self._state.tally.read - self._first
        rows, rate = self._state.rows_done - self._start, read / seconds
        print(f"analyze: {rows} rows, {read} tokens in {seconds:.1f} s: {rate:.0f} tokens/s", flush=True)


def _trainer(settings: Settings, batches: int) -> Any:
    import nemo.lightning as nl

    from nemo_eaft.train import build_strategy, precision_plugins

    return nl.Trainer(
        accelerator="cpu" if settings.run.backend == "cpu" else "gpu",
        devices=settings.trainer.gpus_per_node,
        num_nodes=settings.trainer.num_nodes,
        strategy=build_strategy(settings),
        plugins=precision_plugins(settings),
        limit_val_batches=batches,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )


def _logger(run_dir: Path) -> Any:
    """NeMo's own log files, and nothing else."""
    import nemo.lightning as nl

    folder = str(run_dir / "nemo")
    return nl.NeMoLogger(name="analyze", log_dir=folder, use_datetime_version=False, explicit_log_dir=folder)


def _weights(ready: Ready) -> Any:
    """The weights alone, of a checkpoint of a run or of the imported model."""
    import nemo.lightning as nl

    return nl.AutoResume(
        resume_if_exists=False,
        resume_ignore_no_checkpoint=True,
        restore_config=nl.RestoreConfig(path=str(ready.resume_from or ready.checkpoint)),
    )
