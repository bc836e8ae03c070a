"""What shows that a run has had a checkpoint, outside of the folder that may be lost, unmounted or emptied."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_eaft import recorder
from nemo_eaft.atomic import replacing
from nemo_eaft.settings import Settings

SAVED = "saved.json"
"""File in ``run.dir``: a :class:`Saved`, written when a checkpoint has been finished."""

METRICS = "metrics.jsonl"
"""File in ``run.dir`` with a line a step, written before that step is saved."""


@dataclass(frozen=True)
class Saved:
    """The checkpoint that was finished last."""

    checkpoint: str
    """Name of its folder."""
    steps: int
    """Optimizer steps done before it."""


def write(path: Path, saved: Saved) -> None:
    """Leave ``saved.json``; whole or not at all. One rank calls it, after the checkpoint lost its mark of an
    unfinished one: a process that dies between the two leaves a checkpoint that is merely not noted."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(saved), indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Saved | None:
    """What :func:`write` left; None where there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        saved = Saved(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(saved.checkpoint, str) or type(saved.steps) is not int or saved.steps < 0:
        raise ValueError(
            f"{path} cannot be read: checkpoint={saved.checkpoint!r} must be a text and steps={saved.steps!r} a whole "
            f"number, 0 or more"
        )
    return saved


def proofs(run_dir: Path, settings: Settings | None) -> list[str]:
    """What in ``run_dir`` shows that a checkpoint was finished, one line a file, which it begins with.

    Args:
        run_dir: of the run.
        settings: those it was last trained with; None: not known, so its metrics show nothing.

    Raises:
        ValueError: a file cannot be understood.
    """
    found = []
    saved = read(run_dir / SAVED)
    if saved is not None:
        found.append(f"{run_dir / SAVED}: {saved.checkpoint} was saved after step {saved.steps}")
    metrics = run_dir / METRICS
    last = max((row["step"] for row in recorder.read(metrics)), default=0) if metrics.exists() else 0
    if settings is not None:
        first_save = min(settings.trainer.save_every, settings.trainer.max_steps)
        # The line of that very step says nothing: the job may have died in its save.
        if last > first_save:
            found.append(f"{metrics}: the run has done {last} steps, and its first save was after step {first_save}")
    return found


def warn_if_lost(run_dir: Path, goes_on_from: Path | None, steps: int) -> None:
    """Say that the checkpoint which was finished last is neither there nor damaged, and an older one is taken."""
    saved = read(run_dir / SAVED)
    if saved is not None and goes_on_from is not None and saved.steps > steps:
        warnings.warn(
            f"{saved.checkpoint}, saved after step {saved.steps}, is not there any more; the run goes on from "
            f"{goes_on_from}",
            stacklevel=1,
        )
