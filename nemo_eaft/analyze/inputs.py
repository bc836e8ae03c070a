"""From MODEL, DATA and overrides to settings and weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemo_eaft import compose
from nemo_eaft.checkpoints import checkpoints_in, is_checkpoint, is_unfinished
from nemo_eaft.ready import CONFIG
from nemo_eaft.settings import Settings
from nemo_eaft.settings_checks import warn

START = Path(__file__).with_name("start.yaml")
"""What an analysis starts from."""

WITHOUT_EFFECT = (
    "data.validation_split",
    "data.validation_rows",
    "loss.check_replicas",
    "trainer.max_steps",
    "trainer.learning_rate",
    "trainer.min_learning_rate",
    "trainer.warmup_steps",
    "trainer.weight_decay",
    "trainer.adam_beta1",
    "trainer.adam_beta2",
    "trainer.clip_grad",
    "trainer.recompute",
    "trainer.distributed_optimizer",
    "trainer.val_batches",
    "trainer.save_every",
    "trainer.keep_checkpoints",
    "trainer.log_every",
    "trainer.histogram_every",
    "trainer.seed",
    "run.name",
    "run.wandb_project",
    "run.stall_seconds",
    "run.save_seconds",
)
"""Settings that only a training reads. They are checked like all others, and warned of where they are given.
`data.packed_size` and `trainer.val_every` are not here: without packing and validation rows the settings warn of them
themselves."""

_BATCH = "trainer.global_batch_size"
# Divisible by every number of rows and ranks that is likely; only until the real one is known.
_ANY_BATCH = 2**16 * 3**4 * 5**2 * 7


def settings_of(model: str, data: str, overrides: Sequence[str]) -> tuple[Settings, Path | None]:
    """The settings of an analysis, and the checkpoint of a run that is analysed; None: the imported model.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    for name, word in (("MODEL", model), ("DATA", data)):
        if not word.strip():
            raise ValueError(f"{name} is empty")
        if re.match(r"\w+\.\w+=", word):
            raise ValueError(f"{name} is {word}: MODEL and DATA come before settings")
    weights = _run_checkpoint(Path(model).expanduser())
    given = [f"data.train={data}", f"run.dir={Path('runs') / f'analyze-{_slug(model)}'}"]
    if weights is None:
        given.append(f"model.hf={model}")
    else:
        trained = compose.load(_run_of(weights) / CONFIG).model
        named = {"hf": trained.hf, "imported": trained.imported, "tokenizer": trained.tokenizer}
        given += [f"model.{key}={value}" for key, value in named.items() if value is not None]
        given.append(f"model.trust_remote_code={str(trained.trust_remote_code).lower()}")
    own_batch = any(word.startswith(f"{_BATCH}=") for word in overrides)
    given += [] if own_batch else [f"{_BATCH}={_ANY_BATCH}"]
    settings = compose.compose(str(START), [*given, *overrides])
    if not own_batch:
        batch = settings.trainer.micro_batch_size * settings.data_parallel
        settings = replace(settings, trainer=replace(settings.trainer, global_batch_size=batch))
    _check(settings)
    return settings, weights


def warn_without_effect(overrides: Sequence[str]) -> None:
    """Warn of settings on the command line that an analysis does not read.

    The keys are what counts, not values other than the default: only words of the user name one of these settings.
    """
    given = {word.partition("=")[0].lstrip("+") for word in overrides}
    named = [key for key in WITHOUT_EFFECT if key in given]
    if named:
        warn(
            f"{', '.join(named)} {'has' if len(named) == 1 else 'have'} no effect: analyze reads the rows once, in "
            f"their order; it does not train, saves no checkpoints and does not end a stalled job"
        )


def _check(settings: Settings) -> None:
    parallel = settings.parallel
    for key, value, wrong, allowed in (
        ("data.packed", "true", settings.data.packed, "false"),
        ("parallel.context", parallel.context, parallel.context > 1, 1),
        ("parallel.virtual_pipeline", parallel.virtual_pipeline, parallel.virtual_pipeline is not None, "null"),
    ):
        if wrong:
            raise ValueError(f"{key}={value}: analyze takes rows one by one and whole; allowed is {allowed}")
    if settings.loss.fused_linear is True:
        raise ValueError("loss.fused_linear=true: analyze needs the logits; allowed are false and auto")
    if settings.data.validation is not None:
        raise ValueError(f"data.validation={settings.data.validation}: analyze reads DATA alone; allowed is null")


def _slug(model: str) -> str:
    path = Path(model).expanduser()
    checkpoint = _run_checkpoint(path)
    name = path.resolve().name if path.exists() else model.rpartition("/")[2]
    if checkpoint is not None and not (path / CONFIG).is_file():
        name = f"{_run_of(checkpoint).name}-{name}"
    return re.sub(r"[^A-Za-z0-9.=_]+", "-", name).strip("-") or "model"


def _run_checkpoint(path: Path) -> Path | None:
    """The checkpoint that MODEL means, if it is a run of ours or one of its checkpoints."""
    if not path.is_dir():
        return None
    if (path / CONFIG).is_file():
        there = checkpoints_in(path)
        if not there:
            raise ValueError(f"MODEL {path}: a run without a finished checkpoint")
        return there[-1].resolve()
    if not is_checkpoint(path):
        return None
    if is_unfinished(path.resolve()):
        raise ValueError(f"MODEL {path} was not finished: a file {path.name}-unfinished is beside it")
    _run_of(path.resolve())
    return path.resolve()


def _run_of(checkpoint: Path) -> Path:
    for folder in checkpoint.parents:
        if (folder / CONFIG).is_file():
            return folder
    raise ValueError(f"MODEL {checkpoint}: a checkpoint without the {CONFIG} of its run above it; give the run.dir")
