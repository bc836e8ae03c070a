"""From MODEL, DATA and overrides to settings and weights, and whether a folder may hold their analysis."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_eaft import compose
from nemo_eaft.atomic import replacing
from nemo_eaft.checkpoints import checkpoints_in, is_checkpoint, is_unfinished
from nemo_eaft.run_dir import CONFIG, LAYOUT, MAY_DIFFER, check_place
from nemo_eaft.saved import METRICS
from nemo_eaft.settings import ParallelSettings, Settings, TrainerSettings
from nemo_eaft.settings_checks import warn
from nemo_eaft.settings_mapping import difference

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

MAY_CHANGE = frozenset((*WITHOUT_EFFECT, *MAY_DIFFER, *LAYOUT, _BATCH))
"""Settings that may be others when an analysis goes on: it does not read them, or they say how the work is cut."""

PATHS = ("model.hf", "model.imported", "model.tokenizer", "data.train")
"""Settings that may be paths, which can be written in several ways: compared by what they lead to."""

INPUTS = "analyze.inputs.json"
"""File in ``run.dir``: what is analysed there. The settings do not name a checkpoint, and their relative paths are of
the folder that they were given in."""


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
    given = [f"data.train={data}", f"run.dir={Path('runs') / f'analyze-{_slug(model)}-{_slug_of_data(data)}'}"]
    if weights is None:
        given.append(f"model.hf={model}")
    else:
        trained = compose.load(_run_of(weights) / CONFIG).model
        named = {"hf": trained.hf, "imported": trained.imported, "tokenizer": trained.tokenizer}
        given += [f"model.{key}={value}" for key, value in named.items() if value is not None]
        given.append(f"model.trust_remote_code={str(trained.trust_remote_code).lower()}")
    own_batch = any(word.lstrip("+").startswith(f"{_BATCH}=") for word in overrides)

    def finish(groups: dict[str, Any]) -> dict[str, Any]:
        _check(groups)
        return groups if own_batch else groups | {"trainer": _one_pass(groups["trainer"], groups["parallel"])}

    return compose.compose(str(START), [*given, *overrides], finish=finish), weights


def check_folder(settings: Settings, model: str, weights: Path | None) -> None:
    """Refuse a ``run.dir`` that holds a training, or another analysis unless ``run.resume=false`` gives it up.

    Paths are the same if they lead to the same place. A newer checkpoint of the run that MODEL is, is no other
    analysis: its numbers replace the older ones, as those of a file do that was changed.

    Args:
        settings, weights: of :func:`settings_of`.
        model: MODEL, as it was given.

    Raises:
        ValueError: with the settings that differ, and MODEL if that does.
    """
    folder = Path(settings.run.dir)
    check_place(folder)
    if checkpoints_in(folder) or (folder / METRICS).exists():
        raise ValueError(f"run.dir={folder} holds a training: choose another run.dir for its analysis")
    if not settings.run.resume or not (folder / CONFIG).is_file():
        return
    old = compose.load(folder / CONFIG)
    before, now = _read_inputs(folder), _inputs(settings, model, weights)
    if before is None:
        before = {key: now[key] for key in ("MODEL", "weights")} | {key: _place(_value(old, key)) for key in PATHS}
    # Of a model that is no run of ours the weights are None, and model.hf says which it is.
    keys = ["MODEL"] if before["weights"] != now["weights"] else []
    different = [
        f"{key}: {json.dumps(before[key], ensure_ascii=False)} -> {json.dumps(now[key], ensure_ascii=False)}"
        for key in (*keys, *PATHS)
        if not _same(before[key], now[key])
    ] + difference(old, settings, ignore={*MAY_CHANGE, *PATHS, "run.dir"})
    if different:
        listed = "\n  ".join(different)
        raise ValueError(
            f"run.dir={folder} holds another analysis; choose another run.dir, go back to its settings, or replace it "
            f"with run.resume=false:\n  {listed}"
        )


def save_inputs(settings: Settings, model: str, weights: Path | None) -> None:
    """Leave in ``run.dir`` what is analysed there, for :func:`check_folder` of a later start."""
    with replacing(Path(settings.run.dir) / INPUTS) as temporary:
        temporary.write_text(json.dumps(_inputs(settings, model, weights), indent=1) + "\n", encoding="utf-8")


def _inputs(settings: Settings, model: str, weights: Path | None) -> dict[str, str | None]:
    found = {"MODEL": _place(model), "weights": None if weights is None else str(weights)}
    return found | {key: _place(_value(settings, key)) for key in PATHS}


def _read_inputs(folder: Path) -> dict[str, str | None] | None:
    """None: there is no such file, or it cannot be read."""
    try:
        found = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
        return {key: found[key] for key in ("MODEL", "weights", *PATHS)}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _value(settings: Settings, key: str) -> str | None:
    group, _, name = key.partition(".")
    value: str | None = getattr(getattr(settings, group), name)
    return value


def _same(before: str | None, now: str | None) -> bool:
    # What is not there now is told later, by what reads it: that it is another one is not known.
    return before == now or (now is not None and before == os.path.realpath(Path(now).expanduser()))


def _place(value: str | None) -> str | None:
    """Where a path leads to, as :func:`os.path.realpath`; a name of the hub, which is no path, as it is."""
    if value is None:
        return None
    path = Path(value).expanduser()
    return os.path.realpath(path) if path.exists() else value


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


def _one_pass(trainer: TrainerSettings, parallel: ParallelSettings) -> TrainerSettings:
    """With a global batch of one forward pass of every copy of the model."""
    # No copy at all: the check of the ranks, which comes next, says so.
    copies = max(1, trainer.num_nodes * trainer.gpus_per_node // parallel.model_ranks)
    return replace(trainer, global_batch_size=trainer.micro_batch_size * copies)


def _check(groups: dict[str, Any]) -> None:
    data, loss, parallel = groups["data"], groups["loss"], groups["parallel"]
    for key, value, wrong, allowed in (
        ("data.packed", "true", data.packed, "false"),
        ("parallel.context", parallel.context, parallel.context > 1, 1),
        ("parallel.virtual_pipeline", parallel.virtual_pipeline, parallel.virtual_pipeline is not None, "null"),
    ):
        if wrong:
            raise ValueError(f"{key}={value}: analyze takes rows one by one and whole; allowed is {allowed}")
    if loss.fused_linear is True:
        raise ValueError("loss.fused_linear=true: analyze needs the logits; allowed are false and auto")
    if data.validation is not None:
        raise ValueError(f"data.validation={data.validation}: analyze reads DATA alone; allowed is null")


def _slug(model: str) -> str:
    path = Path(model).expanduser()
    checkpoint = _run_checkpoint(path)
    name = path.resolve().name if path.exists() else model.rpartition("/")[2]
    if checkpoint is not None and not (path / CONFIG).is_file():
        name = f"{_run_of(checkpoint).name}-{name}"
    return _plain(name) or "model"


def _slug_of_data(data: str) -> str:
    name = Path(data).expanduser().resolve().name
    return _plain(name.removesuffix(".jsonl").removesuffix(".json")) or "data"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_]+", "-", name).strip("-")


def spoken(model: str, checkpoint: Path | None) -> str:
    """A name of what is analysed, for titles: ``<run>/<checkpoint>``, or the model; of a folder the last two parts,
    which say more than one.

    checkpoint: of a run of ours; None: `model`, which is ``model.hf``.
    """
    if checkpoint is not None:
        return f"{_run_of(checkpoint).name}/{checkpoint.name}"
    path = Path(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


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
