"""Everything that must hold before a rank starts to train: checked, then made.

One process (the launcher, or rank 0 of a job) calls :func:`make_ready`; every other rank calls
:func:`wait_ready`. Both look at the same files, so a second run finds the first one's work done, and no rank
believes what an older job left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_eaft import compose
from nemo_eaft.convert import MANIFEST, hf_folder, run_in_own_process
from nemo_eaft.data import prepare
from nemo_eaft.data.prepare import find_prepared
from nemo_eaft.hf_model import check_model, home, imported_folder
from nemo_eaft.settings import Settings

CONFIG = "config.yaml"
"""File in ``run.dir`` with every setting of the run."""

MAY_DIFFER = (
    "run.resume",
    "run.name",
    "run.wandb_project",
    "trainer.log_every",
    "trainer.keep_checkpoints",
    "data.num_workers",
)
"""Settings that may change when a run goes on: none of them touches a number."""

_PATIENCE = (
    6 * 3600.0
)  # seconds; converting a large model and reading its rows takes long, a dead rank 0 ends the job


@dataclass(frozen=True)
class Model:
    """The Hugging Face model of a run, without its weights."""

    folder: Path
    config: Any
    tokenizer: Any


def open_model(settings: Settings) -> Model:
    """Find the model, read its configuration and tokenizer, and check the settings against them.

    Raises:
        ValueError: naming the key.
    """
    from transformers import AutoConfig, AutoTokenizer

    model = settings.model
    if Path(model.hf).is_absolute() and not Path(model.hf).is_dir():
        hint = (
            " (python -m nemo_eaft.demo_data writes it)" if Path(model.hf).parent == home() / "demo" else ""
        )
        raise ValueError(f"model.hf={model.hf}: no such folder{hint}")
    folder = hf_folder(model.hf, model.trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.hf={model.hf}: config.json cannot be used: {error}") from error
    name = model.tokenizer or folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # tokenizers raise their own, unrelated types for files they cannot read
        raise ValueError(
            f"model.tokenizer={model.tokenizer or model.hf}: no tokenizer to be read: {error}"
        ) from error
    check_model(settings, config, tokenizer)
    return Model(folder, config, tokenizer)


def make_ready(settings: Settings) -> Path:
    """Check everything, then write rows, converted checkpoint and ``config.yaml``, as far as they are not
    there.

    Returns:
        The folder of the converted checkpoint.

    Raises:
        ValueError: what the user can put right. Nothing was written into ``run.dir`` then.
    """
    check_machine(settings)
    check_run_dir(settings)
    model = open_model(settings)
    prepared = prepare(settings, model.tokenizer)
    rows = f"{prepared.train_rows} training rows with {prepared.train_answer_tokens} answer tokens"
    if prepared.validation_rows:
        rows += f", {prepared.validation_rows} validation rows"
    print(f"data: {rows}", flush=True)
    checkpoint = import_model(settings, model)
    compose.save(settings, Path(settings.run.dir) / CONFIG)
    return checkpoint


def wait_ready(settings: Settings) -> Path:
    """Wait until another process has done :func:`make_ready` for these very settings, sources and model.

    Returns:
        The folder of the converted checkpoint.

    Raises:
        ValueError: the settings are wrong, as in the process waited for.
        TimeoutError: it took longer than six hours.
    """
    check_machine(settings)
    model = open_model(settings)
    checkpoint = imported_folder(settings.model, model.folder)
    deadline = time.monotonic() + _PATIENCE
    while not (_holds(settings) and find_prepared(settings, model.tokenizer) and is_checkpoint(checkpoint)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 did not finish preparing {settings.run.dir} within six hours")
        time.sleep(1.0)
    return checkpoint


def _holds(settings: Settings) -> bool:
    try:
        return compose.load(Path(settings.run.dir) / CONFIG) == settings
    except (OSError, ValueError):
        return False


def import_model(settings: Settings, model: Model) -> Path:
    """Convert the model to a NeMo checkpoint unless that was done before.

    Raises:
        ValueError: ``model.imported`` is a folder of something else, or the model cannot be converted.
        RuntimeError: the conversion failed otherwise.
    """
    target = imported_folder(settings.model, model.folder)
    if is_checkpoint(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"model.imported={target} is neither a NeMo checkpoint nor an empty or new folder")
    print(f"import: {settings.model.hf} -> {target}", flush=True)
    arguments = ["to-nemo", str(model.folder), str(target)]
    if settings.model.tokenizer is not None:
        arguments += ["--tokenizer", settings.model.tokenizer]
    if settings.model.trust_remote_code:
        arguments += ["--trust-remote-code"]
    run_in_own_process(arguments, settings.run.backend)
    return target


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a whole NeMo checkpoint: one converted here, or one that NeMo saved."""
    return (folder / MANIFEST).is_file() or ((folder / "weights").is_dir() and (folder / "context").is_dir())


def check_machine(settings: Settings) -> None:
    """Refuse a backend that this machine does not have.

    Raises:
        ValueError: naming ``run.backend`` or ``trainer.gpus_per_node``.
    """
    import torch

    there, wanted = torch.cuda.device_count(), settings.trainer.gpus_per_node
    if settings.run.backend == "cpu":
        if there:
            raise ValueError(
                f"run.backend=cpu is for machines without a GPU, this one has {there}: use run.backend=cuda"
            )
    elif there == 0:
        raise ValueError("run.backend=cuda: no GPU here; run.backend=cpu trains without one")
    elif wanted > there:
        raise ValueError(f"trainer.gpus_per_node={wanted}: this machine has {there}")


def check_run_dir(settings: Settings) -> None:
    """Refuse a ``run.dir`` that belongs to another run.

    Raises:
        ValueError: with the settings that differ.
    """
    folder = Path(settings.run.dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run.dir={folder} is a file")
    checkpoints = checkpoints_in(folder)
    if (folder / CONFIG).is_file():
        different = compose.difference(compose.load(folder / CONFIG), settings, ignore=MAY_DIFFER)
        if different:
            listed = "\n  ".join(different)
            raise ValueError(
                f"run.dir={folder} holds a run with another configuration; choose another run.dir, or go "
                f"back to its settings:\n  {listed}"
            )
    elif checkpoints:
        raise ValueError(
            f"run.dir={folder} holds checkpoints but no {CONFIG}: it is not known what they belong to"
        )
    if checkpoints and not settings.run.resume:
        raise ValueError(
            f"run.resume=false, but run.dir={folder} holds checkpoints: choose another run.dir, or "
            f"run.resume=true"
        )


def checkpoints_in(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for path in (run_dir / "checkpoints").glob("*"):
        # NeMo puts a file `<name>-unfinished` beside a checkpoint until all ranks have written their part.
        unfinished = path.with_name(path.name + "-unfinished").exists()
        if is_checkpoint(path) and not unfinished:
            found.append((_steps_done(path), path.stat().st_mtime_ns, path))
    return [path for *_, path in sorted(found)]


def is_finished(settings: Settings) -> bool:
    """Whether the run's newest checkpoint is that of its last step."""
    checkpoints = checkpoints_in(Path(settings.run.dir))
    return bool(checkpoints) and _steps_done(checkpoints[-1]) >= settings.trainer.max_steps


def _steps_done(checkpoint: Path) -> int:
    """Optimizer steps before a checkpoint, by its name: NeMo counts from 0, so step=3 was saved after the fourth."""
    digits = checkpoint.name.partition("step=")[2].partition("-")[0]
    return int(digits) + 1 if digits.isdigit() else 0
