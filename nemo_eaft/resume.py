"""A resumed run goes on with the row it stopped at, with every row once, and with the settings it is given.

NeMo 2.7.3 counts the batches before the checkpoint twice. Its batch sampler starts behind the consumed samples and
gives the number of the batches that are left as its length (collections/common/data/data_samplers.py:333); Lightning
2.4 restores how many batches of the epoch were done and compares that with this length
(loops/training_epoch_loop.py:331). So the epoch ends early, and the next one starts at the same consumed samples:
rows come twice and others never. Here the restored count is cleared, which leaves the sampler's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from nemo_eaft import recorder
from nemo_eaft.loss.collectives import gather_objects, on_rank_zero


class KeepDataOrder(Callback):
    """Clears Lightning's count of batches in the epoch after a checkpoint was loaded, before the first batch."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """After the restore; `total`, by which validation is timed, stays."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.current.reset()
        progress.is_last_batch = False


class SameStart(Callback):
    """Every rank goes on from the same checkpoint: ranks that load different ones would train a mixture in silence."""

    def __init__(self, resume_from: Path | None) -> None:
        self._resume_from = resume_from

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Before anything is loaded. RuntimeError on every rank, naming two that differ."""
        told = gather_objects(None if self._resume_from is None else self._resume_from.name)
        for rank, name in enumerate(told):
            if name != told[0]:
                raise RuntimeError(f"rank 0 goes on from {told[0]}, rank {rank} from {name}: start the job again")


class KeepSchedule(Callback):
    """The learning rate, its schedule and Adam's settings are those of this run, not those in the checkpoint.

    Torch and NeMo restore them with the optimizer's state, so a changed learning rate would be ignored in silence.
    Where nothing was changed, the values are equal.
    """

    def __init__(self) -> None:
        self._groups: list[dict[str, Any]] = []
        self._schedules: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Before the restore: what was built from the settings."""
        changing = ("params", "lr", "step")
        self._groups = [
            {key: value for key, value in group.items() if key not in changing} for group in _groups(trainer)
        ]
        counting = ("optimizer", "last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step")
        self._schedules = [
            {key: value for key, value in vars(it.scheduler).items() if key not in counting}
            for it in trainer.lr_scheduler_configs
        ]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """After the restore."""
        if trainer.global_step == 0:
            return
        for group, own in zip(_groups(trainer), self._groups, strict=True):
            group.update(own)
        for it, values in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
            schedule: Any = it.scheduler
            vars(schedule).update(values)
            schedule._get_lr_called_within_step = True  # otherwise it warns
            schedule._last_lr = schedule.get_lr()
            schedule._get_lr_called_within_step = False
            for group, rate in zip(_groups(trainer), schedule._last_lr, strict=True):
                group["lr"] = rate


class RepeatValidation(Callback):
    """A validation that was due at the checkpoint's step and was cut off by the end of the job is done after all.

    NeMo saves before it validates. Comes after `EAFTCallback`, which opens the file that tells and that is written to.
    """

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Before the first step. An error on every rank where rank 0 cannot read the file."""
        step, interval = trainer.global_step, trainer.val_check_interval
        due = step > 0 and isinstance(interval, int) and trainer.limit_val_batches != 0 and step % interval == 0
        # The same on every rank. Rank 0 reads for all: another one may not see the file.
        if not due or on_rank_zero(lambda: self._done(step)):
            return
        # As training_epoch_loop.py:284 does it.
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def _done(self, step: int) -> bool:
        there = recorder.read(self._metrics) if self._metrics.exists() else []
        return any(row["step"] == step and "val_loss" in row for row in there)


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
