"""What ranks do in the tests of `nemo-eaft compare`."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback

from nemo_eaft import cli
from nemo_eaft.launch import LAUNCHER
from tests.nemo.ranks import DIES


class _Die(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self._step:
            os._exit(DIES)


def run_rank(words: list[str], launcher: str, dies_in: int | None) -> int:
    """`python -m nemo_eaft.train WORDS` as a rank of that launcher; it dies before it has done step `dies_in`."""
    os.environ[LAUNCHER] = launcher
    if dies_in is not None:
        from nemo.collections import llm

        finetune = llm.finetune

        def doomed(*args: Any, trainer: Any, **kwargs: Any) -> Any:
            trainer.callbacks.append(_Die(dies_in))
            return finetune(*args, trainer=trainer, **kwargs)

        llm.finetune = doomed
    return cli.run_rank(words)
