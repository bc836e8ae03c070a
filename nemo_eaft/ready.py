"""Everything that must hold before a rank starts to train: checked, then made.

One process (the launcher, or rank 0 of a job) calls :func:`make_ready` and, at its end, leaves ``ready.json`` in
``run.dir``; every other rank calls :func:`wait_ready`, which believes that file alone. It bears the identity of the
job, so what an older one left is not taken for this one's.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_eaft import compose
from nemo_eaft.atomic import replacing
from nemo_eaft.checkpoints import Choice, choose, is_checkpoint, set_aside
from nemo_eaft.convert import hf_folder, run_in_own_process
from nemo_eaft.data import prepare
from nemo_eaft.data.prepare import PreparedData, is_prepared, order_of
from nemo_eaft.hf_model import check_model, home, imported_folder
from nemo_eaft.integrity import SUMS, faults
from nemo_eaft.launch import LAUNCHER, PROCESS, error_of_this_job, job_identity
from nemo_eaft.machine import check_machine
from nemo_eaft.recorder import drop_after
from nemo_eaft.run_dir import CONFIG, check_data, check_run_dir, save_config
from nemo_eaft.saved import METRICS, proofs, warn_if_lost
from nemo_eaft.settings import Settings
from nemo_eaft.settings_checks import warn

READY = "ready.json"
"""File in ``run.dir`` that :func:`make_ready` leaves: a :class:`Ready`, and the job it was made in."""

PATIENCE = "NEMO_EAFT_WAIT_SECONDS"
"""Environment variable: how long a rank waits for rank 0 to read the rows and convert the model. Default: one hour."""

_PATIENCE = 3600.0  # seconds
_SAY_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Ready:
    """What the ranks of a job need to know before they train."""

    checkpoint: Path
    """Folder of the converted checkpoint."""
    finished: bool
    """Whether the run's last step was done before."""
    resume_from: Path | None = None
    """The checkpoint of this run to go on from, read through and found whole; None: a new run."""


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
        hint = " (python -m nemo_eaft.demo_data writes it)" if Path(model.hf).parent == home() / "demo" else ""
        raise ValueError(f"model.hf={model.hf}: no such folder{hint}")
    folder = hf_folder(model.hf)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.hf={model.hf}: config.json cannot be used: {error}") from error
    name = model.tokenizer or folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # tokenizers raise their own, unrelated types for files they cannot read
        raise ValueError(f"model.tokenizer={model.tokenizer or model.hf}: no tokenizer to be read: {error}") from error
    check_model(settings, config, tokenizer)
    return Model(folder, config, tokenizer)


def make_ready(settings: Settings, allow_change: bool = False) -> Ready:
    """Check everything, then write rows, converted checkpoint, ``config.yaml`` and ``ready.json``, as far as they are
    not there. A rank 0 whose launcher has just done so does not read everything through a second time.

    Args:
        settings: the run.
        allow_change: go on from checkpoints that were made with another configuration or other data.

    Raises:
        ValueError: what the user can put right. Nothing was written into ``run.dir`` then.
    """
    check_machine(settings)
    changed = check_run_dir(settings, allow_change)
    run_dir = Path(settings.run.dir)
    by_launcher = made_by_launcher(run_dir)
    if by_launcher is not None and not missing_of(settings, by_launcher):
        leave(by_launcher, run_dir)
        return by_launcher
    (run_dir / READY).unlink(missing_ok=True)
    model = open_model(settings)
    choice = choose(run_dir, proofs(run_dir, _trained_with(run_dir)))
    if not choice.damaged:
        warn_if_lost(run_dir, choice.checkpoint, choice.steps)
    if choice.checkpoint is not None:
        changed += check_data(settings, model.tokenizer, allow_change)
    if changed:
        listed = "\n  ".join(changed)
        print(f"run.dir={run_dir}: --allow-config-change accepts\n  {listed}", flush=True)
    before = order_of(run_dir / "data")
    prepare_rows(settings, model)
    if changed and choice.checkpoint is not None:
        same_seed = not any(line.startswith("trainer.seed:") for line in changed)
        _say_order(choice, same_seed and before == order_of(run_dir / "data"))
    checkpoint = import_model(settings, model, weights=choice.checkpoint is None)
    set_aside(choice)
    finished = choice.steps >= settings.trainer.max_steps
    # Before config.yaml, which tells what the lines in it prove.
    if not finished and (aside := drop_after(run_dir / METRICS, choice.steps)) is not None:
        print(f"{run_dir / METRICS}: steps after {choice.steps} are done again; their lines are now in {aside.name}")
    save_config(settings)
    resume_from = None if choice.checkpoint is None else choice.checkpoint.absolute()
    ready = Ready(checkpoint.absolute(), finished, resume_from)
    trainer = settings.trainer
    if not finished and trainer.histogram_every > trainer.max_steps:
        # Here, and not where settings are read: once for a job, and not for the config.yaml of a folder.
        warn(
            f"trainer.histogram_every={trainer.histogram_every} has no effect beyond trainer.max_steps="
            f"{trainer.max_steps}: no step has a landscape; 0 says never"
        )
    leave(ready, run_dir)
    return ready


def _say_order(choice: Choice, goes_on: bool) -> None:
    done = choice.steps
    order = f"the order of rows goes on after {done} batches"
    if not goes_on:
        order = f"the order of rows is another one and starts after {done} batches: rows may come again, or not at all"
    print(f"  step {done + 1} follows with these; {order}", flush=True)


def _trained_with(run_dir: Path) -> Settings | None:
    path = run_dir / CONFIG
    return compose.load(path) if path.is_file() else None


def leave(ready: Ready, run_dir: Path) -> None:
    """Write ``ready.json``, which the other ranks of this job wait for."""
    with replacing(run_dir / READY) as temporary:
        content = asdict(ready) | {"job": _job(), "process": PROCESS}
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def made_by_launcher(run_dir: Path) -> Ready | None:
    """What the launcher of this rank left, for the first attempt: after that there may be newer checkpoints."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return None
    return read_ready(run_dir, process=launcher)


def _job() -> str:
    """The job; on one machine also how often ``torchrun`` has restarted its ranks (several may count differently)."""
    environment = os.environ
    alone = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
    restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return f"{job_identity()} restart={restart}".strip()


def prepare_rows(settings: Settings, model: Model) -> PreparedData:
    """Write the rows of the run unless that was done before, and print how many there are.

    Raises:
        ValueError: rows or tokenizer cannot be used.
    """
    prepared = prepare(settings, model.tokenizer)
    rows = f"{prepared.train_rows} training rows with {prepared.train_answer_tokens} answer tokens"
    if prepared.validation_rows:
        rows += f", {prepared.validation_rows} validation rows"
    print(f"data: {rows}", flush=True)
    return prepared


def wait_ready(settings: Settings) -> Ready:
    """Wait until rank 0 of this job has done :func:`make_ready` for these very settings, and its files are seen here.

    Every minute a line says what is waited for.

    Raises:
        ValueError: this machine lacks the backend, or ``NEMO_EAFT_WAIT_SECONDS`` is no number; or another rank of this
            job refused the user's input.
        RuntimeError: another rank of this job failed otherwise.
        TimeoutError: it took longer than ``NEMO_EAFT_WAIT_SECONDS``; what was missing is named.
    """
    check_machine(settings)
    started, patience = time.monotonic(), _patience()
    said = started
    while True:
        ready = read_ready(Path(settings.run.dir), _job())
        missing = missing_of(settings, ready)
        if ready is not None and not missing:
            return ready
        if (error := error_of_this_job(Path(settings.run.dir))) is not None:
            # On another machine torchrun ends this rank late, or not at all.
            kind = ValueError if error["kind"] == "input" else RuntimeError
            raise kind(f"rank {error['rank']} failed: {error['message']}")
        now = time.monotonic()
        if now - started > patience:
            raise TimeoutError(f"waited {patience:.0f} s for {missing}; {PATIENCE} is how long to wait, in seconds")
        if now - said >= _SAY_EVERY:
            print(f"waiting for {missing}, {now - started:.0f} s so far", flush=True)
            said = now
        time.sleep(1.0)


def _patience() -> float:
    text = os.environ.get(PATIENCE, str(_PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds < float("inf"):
        raise ValueError(f"{PATIENCE}={text} must be a number of seconds, 0 or more")
    return seconds


def missing_of(settings: Settings, ready: Ready | None) -> str:
    """What a rank still waits for, in words; empty if nothing is missing."""
    run_dir = Path(settings.run.dir)
    if ready is None:
        return f"rank 0 to make {run_dir} ready"
    if not _holds(settings):
        return f"the settings of rank 0 in {run_dir / CONFIG}, which are not those of this rank"
    if not is_prepared(run_dir / "data"):
        return f"the rows in {run_dir / 'data'}"
    if not ready.finished and ready.resume_from is not None and not is_checkpoint(ready.resume_from):
        return f"the checkpoint {ready.resume_from}"
    return "" if is_checkpoint(ready.checkpoint) else f"the converted checkpoint {ready.checkpoint}"


def read_ready(run_dir: Path, job: str | None = None, process: str | None = None) -> Ready | None:
    """What :func:`make_ready` left in ``run_dir``: in the job and the process of that identity, or with None in any;
    else None."""
    try:
        content = json.loads((run_dir / READY).read_text(encoding="utf-8"))
        resume_from = content["resume_from"]
        ready = Ready(
            Path(content["checkpoint"]), content["finished"], None if resume_from is None else Path(resume_from)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    wanted = {"job": job, "process": process}
    return ready if all(value in (None, content.get(key)) for key, value in wanted.items()) else None


def _holds(settings: Settings) -> bool:
    try:
        return compose.load(Path(settings.run.dir) / CONFIG) == settings
    except (OSError, ValueError):
        return False


def import_model(settings: Settings, model: Model, weights: bool = True) -> Path:
    """Convert the model to a NeMo checkpoint unless that was done before; then check that its files are as they were.

    Args:
        settings: the run.
        model: of :func:`open_model`.
        weights: whether its weights are going to be used, so they are to be read through as well.

    Raises:
        ValueError: ``model.imported`` is a folder of something else, or damaged, or the model cannot be converted.
        RuntimeError: the conversion failed otherwise.
    """
    target = imported_folder(settings.model, model.folder)
    if is_checkpoint(target):
        _check_imported(target, weights)
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"model.imported={target} is neither a NeMo checkpoint nor an empty or new folder")
    print(f"import: {settings.model.hf} -> {target}", flush=True)
    arguments = ["to-nemo", str(model.folder), str(target)]
    if settings.model.tokenizer is not None:
        arguments += ["--tokenizer", settings.model.tokenizer]
    if settings.model.trust_remote_code:
        arguments += ["--trust-remote-code"]
    run_in_own_process(arguments)
    return target


def _check_imported(folder: Path, weights: bool) -> None:
    if not (folder / SUMS).is_file():
        warnings.warn(f"{folder} has no {SUMS}: it is not known whether its files are whole", stacklevel=1)
        return
    found = faults(folder, lambda name: weights or not name.startswith("weights/"))
    if found:
        listed = "\n  ".join(found)
        raise ValueError(f"the converted checkpoint {folder} is damaged; remove it to convert anew:\n  {listed}")
