"""What ranks do in the tests of `nemo-eaft analyze`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from nemo_eaft import stop
from nemo_eaft.analyze import run, state
from nemo_eaft.ready import Ready
from nemo_eaft.settings import Settings
from tests.nemo.ranks import DIES


class _WeightsAlone(Callback):
    """Refuses what only a training needs: gradient buffers, an optimizer, weights of more bytes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        chunks = list(trainer.strategy.megatron_parallel)
        named = [pair for chunk in chunks for pair in chunk.named_parameters()]
        assert {each.dtype for _, each in named} == {self._dtype}
        assert not [name for name, each in named if hasattr(each, "main_grad")]
        assert not trainer.optimizers, trainer.optimizers


def analyze(
    settings: Settings,
    ready: Ready,
    dies_after: int | None = None,
    asked_after: int | None = None,
) -> bool:
    """`run.analyze`, which is to hold weights alone.

    dies_after: every rank dies once so many states are written. asked_after: rank 0 is asked to stop then.
    """
    save, left = state.save, [0]

    def saved(reached: state.State, run_dir: Path) -> None:
        save(reached, run_dir)
        left[0] += 1
        if left[0] == dies_after:
            os._exit(DIES)
        if left[0] == asked_after:
            os.kill(os.getpid(), signal.SIGUSR1)

    build = run._trainer
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.trainer.precision]

    def watched(*args: Any, **kwargs: Any) -> Any:
        trainer = build(*args, **kwargs)
        trainer.callbacks.append(_WeightsAlone(dtype))
        return trainer

    state.save = saved  # type: ignore[assignment]
    run._trainer = watched
    stop.listen()
    return run.analyze(settings, ready)
