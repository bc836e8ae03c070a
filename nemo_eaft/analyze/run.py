"""The forward passes: NeMo validates the model on the training rows, and `collect` looks on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemo_eaft.analyze import state as states
from nemo_eaft.analyze.progress import Progress
from nemo_eaft.analyze.tally import Tally
from nemo_eaft.data import read_prepared
from nemo_eaft.ready import Ready
from nemo_eaft.settings import Settings


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
    kept = _States(settings, so_far, rows)
    collect = CollectTokens(settings.loss.eaft_config(), vocab_size, batches, kept.begin, kept.save)
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
        kept.close(trainer.is_global_zero)
    return True


class _States:
    """Adds up the tallies of all ranks, writes the state, shows it, and looks for a request to stop."""

    def __init__(self, settings: Settings, state: states.State, rows: int) -> None:
        self._settings, self._state, self._rows = settings, state, rows
        self._start, self._read_before = state.rows_done, state.tally.read
        self._progress = Progress(rows, state.rows_done)

    def begin(self) -> None:
        """`CollectTokens.begin`."""
        self._progress.begin()

    def save(self, tallies: list[Tally], batches: int) -> None:
        """`CollectTokens.save`, on every rank."""
        import torch
        import torch.distributed as dist

        from nemo_eaft import stop
        from nemo_eaft.loss.collectives import any_rank

        config, run_dir = self._settings.loss.eaft_config(), Path(self._settings.run.dir)
        for tally in tallies:
            self._state.tally.merge(tally, config)
        done = min(self._start + batches * self._settings.trainer.global_batch_size, self._rows)
        self._state.rows_done = done
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first:
            states.save(self._state, run_dir)
            self._progress.show(done, self._read)
        if done == self._rows:
            if first:
                # As at the end of a training: a request that came too late stops nothing.
                (run_dir / stop.REQUEST).unlink(missing_ok=True)
            return
        reason = stop.asked(run_dir, look=first)
        device = torch.device("cuda") if self._settings.run.backend == "cuda" else torch.device("cpu")
        if any_rank(reason is not None, device):
            if first:
                stop.write_note(run_dir, done, str(run_dir / states.FILE), reason or "SIGUSR1 to another rank")
            raise _Stop

    def close(self, first: bool) -> None:
        """On every rank, at the end or when it is broken off; `first`: on rank 0."""
        if first:
            self._progress.close(self._state.rows_done, self._read)

    @property
    def _read(self) -> int:
        return self._state.tally.read - self._read_before


def _trainer(settings: Settings, batches: int) -> Any:
    import nemo.lightning as nl

    from nemo_eaft.restart import store_of_this_attempt
    from nemo_eaft.train import parallel_sizes, precision_plugins

    # Forward passes alone. NeMo 2.7.3 builds DDP's gradient buffers for every stage but TESTING
    # (lightning/megatron_parallel.py, init_model_parallel), unless DDP is left to torch, which wraps nothing outside
    # of a fit; and the optimizer that a model brings (lightning/pytorch/strategies/megatron_strategy.py,
    # setup_megatron_parallel). Both would take four times the memory of bf16 weights.
    strategy = nl.MegatronStrategy(
        **parallel_sizes(settings), ddp="pytorch", setup_optimizers=False, replace_progress_bar=False
    )
    strategy.store = store_of_this_attempt()
    return nl.Trainer(
        accelerator="cpu" if settings.run.backend == "cpu" else "gpu",
        devices=settings.trainer.gpus_per_node,
        num_nodes=settings.trainer.num_nodes,
        strategy=strategy,
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
