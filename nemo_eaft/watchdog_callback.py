"""The callback that tells the watchdog of progress.

trainer.callbacks.append(EndStalled("runs/mine", stall_seconds=900))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_eaft.watchdog import Watchdog, clear


class EndStalled(Callback):
    """Ends the job when a rank makes no progress, naming the stuck rank and its stack (:mod:`nemo_eaft.watchdog`).

    From the first step on; before it, each wait has a limit of its own. Progress is: a micro-batch begins or ends, a
    step ends, a validation batch begins, a save begins.

    run_dir: folder that all ranks see. stall_seconds: more than the longest micro-batch or save.
    """

    def __init__(self, run_dir: str | Path, stall_seconds: float = 900) -> None:
        if not stall_seconds > 0:
            raise ValueError(f"stall_seconds={stall_seconds} must be above 0")
        self.run_dir = Path(run_dir)
        self.stall_seconds = stall_seconds
        self._watchdog: Watchdog | None = None
        self._step = 0
        self._part = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Long before the first rank watches: between lie collectives of all ranks."""
        if trainer.is_global_zero:
            clear(self.run_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        self._watchdog = Watchdog(self.run_dir, trainer.global_rank, trainer.world_size, self.stall_seconds)
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

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation batch begins."""
        self._part = 0
        self._note("validation")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A save begins; what ends it is the next step."""
        self._part = 0
        self._note("save")

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
