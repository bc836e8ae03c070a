"""`python -m tests.nemo.sabotage CONF`: a rank of `nemo_eaft.train` to which something happens.

What happens stands in the environment variable SABOTAGE, a JSON object: at which `place`, and there in which `step`, to
which `rank`, in which `attempt` of torchrun (left out: in each). The training itself is the package's own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

NAME = "SABOTAGE"

Deadly = Literal["start", "forward", "collective", "save"]
Place = Literal[Deadly, "slow save", "sleep in forward", "stop in forward", "spin"]


@dataclass(frozen=True)
class Sabotage:
    place: Place
    """`start`: before training, `delay` seconds after the process began. `forward`, `collective`, `save`: killed in a
    micro-batch's forward, inside a collective of Megatron's, while a checkpoint is written. `slow save`: each save
    takes `delay` seconds longer, with its `-unfinished` mark there. `sleep in forward`: never comes back from it.
    `stop in forward`: SIGSTOP to itself. `spin`: holds the interpreter's lock for ever."""
    step: int = 0
    """Of the run, from 1; or the first one that is done after it."""
    rank: int = 0
    attempt: int | None = None
    delay: float = 0.0


def mine() -> Sabotage | None:
    """What happens to this rank, if anything."""
    text = os.environ.get(NAME)
    if not text:
        return None
    plan = Sabotage(**json.loads(text))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    here = plan.place == "slow save" or plan.rank == int(os.environ["RANK"])
    return plan if here and plan.attempt in (None, attempt) else None


def mark() -> None:
    Path(os.environ["SABOTAGE_MARK"]).write_text(str(time.time()))


def die() -> None:
    mark()
    os.kill(os.getpid(), signal.SIGKILL)


def install(plan: Sabotage) -> None:
    """Arrange for it, before training."""
    if plan.place == "start":
        threading.Timer(plan.delay, die).start()
        return
    from nemo.collections import llm
    from nemo.lightning.io.pl import MegatronCheckpointIO

    if plan.place == "slow save":
        save = MegatronCheckpointIO.save_checkpoint

        def slow(*args: Any, **kwargs: Any) -> Any:
            mark()
            time.sleep(plan.delay)
            return save(*args, **kwargs)

        MegatronCheckpointIO.save_checkpoint = slow
        return
    finetune = llm.finetune

    def watched(*args: Any, trainer: Any, **kwargs: Any) -> Any:
        trainer.callbacks.append(_saboteur(plan))
        return finetune(*args, trainer=trainer, **kwargs)

    llm.finetune = watched


def _saboteur(plan: Sabotage) -> Any:
    from lightning.pytorch import Callback

    class Saboteur(Callback):
        done = False

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if self.done or trainer.global_step + 1 < plan.step or plan.place == "save":
                return
            self.done = True
            if plan.place == "collective":
                _die_in_collective()
                return
            chunk = next(iter(trainer.strategy.megatron_parallel))
            layer = next(module for module in chunk.modules() if type(module).__name__ == "TransformerLayer")
            layer.register_forward_pre_hook(lambda *_: _happen(plan))

        def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
            if plan.place == "save" and trainer.global_step >= plan.step:
                threading.Timer(plan.delay, die).start()

    return Saboteur()


def _happen(plan: Sabotage) -> None:
    mark()
    if plan.place == "forward":
        die()
    elif plan.place == "stop in forward":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif plan.place == "spin":
        import ctypes

        ctypes.PyDLL(None).sleep(100_000)  # a PyDLL call keeps the lock
    else:
        forever()


def forever() -> None:
    time.sleep(100_000)


def _die_in_collective() -> None:
    import torch.distributed as dist

    all_reduce = dist.all_reduce

    def deadly(*args: Any, **kwargs: Any) -> Any:
        # It has been sent when the process ends, or is on its way.
        threading.Timer(0.001, die).start()
        work = all_reduce(*args, **kwargs)
        time.sleep(10)
        return work

    dist.all_reduce = deadly


if __name__ == "__main__":
    plan = mine()
    if plan is not None:
        if os.environ.get("SABOTAGE_CPU") == "1":
            import nemo_eaft.cpu

            nemo_eaft.cpu.enable()
        install(plan)
    from nemo_eaft.cli import run_rank

    sys.exit(run_rank(sys.argv[1:]))
