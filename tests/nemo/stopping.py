"""What ranks do in `test_stop.py`."""

from __future__ import annotations

import dataclasses
import os
import signal
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback

from tests.nemo import jobs


@dataclasses.dataclass
class Seen:
    """What one rank saw of a training that was asked to stop."""

    recorded: jobs.Recorded
    saves: int
    """Whole checkpoints that were written."""


class _Ask(Callback):
    def __init__(self, step: int, rank: int) -> None:
        self._step, self._rank = step, rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_step + 1, trainer.global_rank) == (self._step, self._rank):
            os.kill(os.getpid(), signal.SIGUSR1)


def train(plan: jobs.Plan, step: int | None, rank: int) -> Seen:
    """`jobs.train`, in which one rank gets SIGUSR1 in a step."""
    from nemo.collections import llm
    from nemo.lightning.io.pl import MegatronCheckpointIO

    finetune, save = llm.finetune, MegatronCheckpointIO.save_checkpoint
    saves = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves
        saves += 1
        return save(*args, **kwargs)

    def asked(*args: Any, trainer: Any, **kwargs: Any) -> Any:
        if step is not None:
            trainer.callbacks.append(_Ask(step, rank))
        return finetune(*args, trainer=trainer, **kwargs)

    MegatronCheckpointIO.save_checkpoint = counted
    llm.finetune = asked
    return Seen(jobs.train(plan), saves)


def cost_of_agreeing(times: int) -> float:
    """Median seconds of one `any_rank` that says no; and that it says yes where one rank does."""
    from nemo_eaft.loss.collectives import any_rank

    torch.distributed.init_process_group("gloo")
    cpu = torch.device("cpu")
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    assert any_rank(last, cpu)
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        assert not any_rank(False, cpu)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
