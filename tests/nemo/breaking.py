"""Ranks that break while they save, and what changes between a run and its resume."""

import dataclasses
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import nemo_eaft.nemo
import nemo_eaft.resume
import nemo_eaft.train
from nemo_eaft.config import EAFTConfig
from tests.nemo import jobs


def train_and_be_killed(plan: jobs.Plan, moment: str) -> None:
    """Train; SIGKILL ends this rank and its writers at the first call to the system that `moment` describes.

    moment: regular expression for `<event> <path>`, with the names of Python's audit events: `open`, `os.remove`,
        `os.rename`, `shutil.rmtree`. Nothing of the call has happened yet.
    """
    expression = re.compile(moment)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.remove", "os.rename", "shutil.rmtree"):
            said = f"{event} {os.fspath(arguments[0])!s}" if isinstance(arguments[0], (str, os.PathLike)) else event
            if expression.search(said):
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(watch)
    jobs.train(plan)


def train_with_small_files(plan: jobs.Plan, largest: int) -> str:
    """Train where no file may grow beyond `largest` bytes; the error that ended it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    try:
        return train_and_tell(plan)
    finally:
        # What the rank has to say is written to files, too.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def train_and_tell(plan: jobs.Plan) -> str:
    """Train; the error that ended it, or nothing."""
    try:
        jobs.train(plan)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def train_as_a_script(plan: jobs.Plan, alpha: float, allow: bool) -> str:
    """As somebody's script with `EAFTCallback(EAFTConfig(alpha=alpha), allow_config_change=allow)`."""

    class OfAScript(nemo_eaft.nemo.EAFTCallback):
        def __init__(self, config: EAFTConfig, **keywords: Any) -> None:
            super().__init__(EAFTConfig(alpha=alpha), **keywords | {"allow_config_change": allow})

    nemo_eaft.nemo.EAFTCallback = OfAScript  # type: ignore[assignment, misc]
    return train_and_tell(plan)


def train_from_different(plan: jobs.Plan, checkpoints: list[Path]) -> str:
    """Each rank goes on from another checkpoint; the error that ended it."""
    return train_and_tell(dataclasses.replace(plan, resume_from=checkpoints[int(os.environ["RANK"])]))


def train_and_show_groups(plan: jobs.Plan) -> list[dict[str, Any]]:
    """Train; the optimizer's settings by group of parameters, as they were at the end."""
    groups: list[dict[str, Any]] = []

    class Watch(nemo_eaft.resume.KeepDataOrder):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            for optimizer in trainer.optimizers:
                groups.extend({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)

    nemo_eaft.resume.KeepDataOrder = Watch  # type: ignore[misc]
    jobs.train(plan)
    return groups


def train_and_die_before_validation(plan: jobs.Plan) -> None:
    """Train; this rank is killed when its first validation starts, after the checkpoint of that step."""

    class Dies(nemo_eaft.resume.KeepDataOrder):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            os.killpg(0, signal.SIGKILL)

    nemo_eaft.resume.KeepDataOrder = Dies  # type: ignore[misc]
    jobs.train(plan)


def train_with_a_lambda(plan: jobs.Plan) -> str:
    """Train a model whose configuration holds what no context can; the error that ended it."""
    build = nemo_eaft.train.build_model

    def with_lambda(*arguments: Any) -> Any:
        model = build(*arguments)
        model.__io__.config.activation_func = lambda x: x
        return model

    nemo_eaft.train.build_model = with_lambda  # type: ignore[assignment]
    return train_and_tell(plan)
