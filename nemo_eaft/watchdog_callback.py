"""The callback that tells the watchdog of progress.

trainer.callbacks.append(EndStalled("runs/mine", stall_seconds=900, save_seconds=3600))
"""

from __future__ import annotations

import uuid
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.utils import logging

from nemo_eaft.loss.collectives import on_rank_zero, raise_timeouts
from nemo_eaft.watchdog import SAVE, Watchdog, clear, grace

_SAVE_SECONDS = 3600.0


class RaiseTimeouts(Callback):
    """Lets no collective be given up before `seconds` have passed, from the first step on: in a save ranks may wait for
    one that writes longer than the backend's limits are. For runs without `EndStalled`, which does it itself."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All process groups exist now."""
        _raise_timeouts(self.seconds, "it may end a job in a long save")


class EndStalled(Callback):
    """Ends the job when a rank makes no progress, naming the stuck rank and its stack (:mod:`nemo_eaft.watchdog`).

    From the first step on; before it, when a checkpoint is loaded, each wait has a limit of its own. Progress is: a
    micro-batch begins or ends, a step ends, a validation begins or ends, a batch of it begins, a save begins.

    The backend must not end a collective before that, without a name: NCCL's limit for the world group is 600 s where
    the environment sets no other (NeMo 2.7.3 takes TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC for it), Megatron-Core 0.15.3 gives
    its own groups 1800 s. From the first step on all limits are raised to what the verdict needs.

    run_dir: folder that all ranks see. stall_seconds: more than the longest micro-batch. save_seconds: more than the
        longest save, with what follows it until a validation or the next step; `stall_seconds` where that is longer.
    """

    def __init__(self, run_dir: str | Path, stall_seconds: float = 900, save_seconds: float = _SAVE_SECONDS) -> None:
        for name, value in (("stall_seconds", stall_seconds), ("save_seconds", save_seconds)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        if save_seconds < stall_seconds and save_seconds != _SAVE_SECONDS:
            warnings.warn(
                f"save_seconds={save_seconds} has no effect below stall_seconds={stall_seconds}", stacklevel=2
            )
        self.run_dir = Path(run_dir)
        self.stall_seconds = stall_seconds
        self.save_seconds = save_seconds
        self._watchdog: Watchdog | None = None
        self._step = 0
        self._part = 0

    @property
    def backend_seconds(self) -> float:
        """How long a collective may take, so that the verdict comes first: the longest limit; a step by which the host
        is ahead of its GPU, as NCCL counts from when a collective was asked for; the answers; a minute to spare."""
        return max(self.save_seconds, self.stall_seconds) + self.stall_seconds + grace(self.stall_seconds) + 60

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Long before the first rank watches: between lie collectives of all ranks."""
        if trainer.is_global_zero:
            clear(self.run_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        _raise_timeouts(self.backend_seconds, "it may end a stalled job before the stuck rank is named")
        self._watchdog = Watchdog(
            self.run_dir,
            trainer.global_rank,
            trainer.world_size,
            self.stall_seconds,
            self.save_seconds,
            on_gpu=trainer.strategy.root_device.type != "cpu",
            job=on_rank_zero(lambda: uuid.uuid4().hex),
        )
        self._step = trainer.global_step + 1
        self._watchdog.note("start", self._step)
        self._watchdog.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self._step, self._part = trainer.global_step + 1, 0
        self._note("start")

    def on_megatron_microbatch_start(self, step: Any, batch: Any, forward_callback: Any) -> None:
        """A forward pass begins."""
        self._part += 1
        self._note("forward")

    def on_megatron_microbatch_end(self, step: Any, batch: Any, forward_callback: Any, output: Any) -> None:
        """A forward pass has ended; backward or the next one comes."""
        self._note("backward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step has ended."""
        self._part = 0
        self._note("end")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation begins: its data was prepared."""
        self._part = 0
        self._note("start of the validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation has ended."""
        self._note("end of the validation")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation batch begins."""
        self._part = 0
        self._note("validation")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A save begins; what ends it is what comes next: a validation or a step."""
        self._part = 0
        self._note(SAVE)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An error of its own ends the job."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After the last save."""
        self._stop()

    def _note(self, what: str) -> None:
        if self._watchdog is not None:
            self._watchdog.note(what, self._step, self._part)

    def _stop(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None


def _raise_timeouts(seconds: float, otherwise: str) -> None:
    try:
        raise_timeouts(seconds)
    except RuntimeError as error:
        logging.warning(
            f"EAFT: the backend's limits for collectives could not be raised ({error}); where one is shorter than "
            f"{seconds:.0f} s, {otherwise}"
        )
