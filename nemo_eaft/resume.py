"""A resumed run goes on with the row it stopped at, and with every row once.

NeMo 2.7.3 counts the batches before the checkpoint twice. Its batch sampler starts behind the consumed samples and
gives the number of the batches that are left as its length (collections/common/data/data_samplers.py:333); Lightning
2.4 restores how many batches of the epoch were done and compares that with this length
(loops/training_epoch_loop.py:331). So the epoch ends early, and the next one starts at the same consumed samples:
rows come twice and others never. Here the restored count is cleared, which leaves the sampler's.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer


class KeepDataOrder(Callback):
    """Clears Lightning's count of batches in the epoch after a checkpoint was loaded, before the first batch."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """After the restore; `total`, by which validation is timed, stays."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.current.reset()
        progress.is_last_batch = False
