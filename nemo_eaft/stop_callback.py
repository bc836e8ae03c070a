"""The callback that ends a training when :mod:`nemo_eaft.stop` was asked to.

trainer.callbacks.append(StopOnRequest("runs/mine"))
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops import _TrainingEpochLoop
from nemo.utils import logging

from nemo_eaft import stop
from nemo_eaft.loss.collectives import any_rank


class StopOnRequest(Callback):
    """At each step boundary all ranks agree whether to stop; then they save that step and end training cleanly.

    Rank 0 looks for the file, every rank for SIGUSR1. Costs one all-reduce of one number and one `stat` a step. A
    validation due at that step is still run, after the save; the one that Lightning adds when it is told to stop is
    not. The last step of a run is no stop: the run is finished then.

    run_dir: folder of `stop` and `stopped.json`, seen by all ranks. Whoever starts the job calls `stop.clear` on it.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self._reason: str | None = None
        self._stopped: tuple[int, str | None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's own handler of SIGUSR1 (SLURM auto-requeue) gives way to one that is there already."""
        if threading.current_thread() is threading.main_thread():
            stop.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step boundary. The step number is the same on every rank, and so is what they agree on."""
        if trainer.global_step >= trainer.max_steps > 0 or self._stopped is not None:
            return
        self._reason = stop.asked(self.run_dir, look=trainer.is_global_zero)
        if not any_rank(self._reason is not None, trainer.strategy.root_device):
            return
        logging.info(f"EAFT: a stop was asked for: saving step {trainer.global_step}, then the run ends")
        self._stopped = trainer.global_step, stop.save_now(trainer)
        if self._stopped[1] is None:
            logging.warning("EAFT: this run keeps no checkpoints, so what it has trained is lost")
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None, "a step was done without a data fetcher"
        # Asked before should_stop is set, which would make the answer yes; and Lightning's own loop, for NeMo's says no
        # in the first step after a resume, until it has ended.
        if not _TrainingEpochLoop._should_check_val_fx(loop.epoch_loop, loop._data_fetcher):
            trainer.limit_val_batches = 0
        trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the note, on rank 0."""
        if self._stopped is not None and trainer.is_global_zero:
            step, checkpoint = self._stopped
            stop.write_note(self.run_dir, step, checkpoint, self._reason or "SIGUSR1 to another rank")
        elif trainer.is_global_zero:
            # Asked for when the last step was done or on its way: there is nothing to stop any more. The next job says
            # so where it cannot be removed now.
            with suppress(OSError):
                (self.run_dir / stop.REQUEST).unlink()
