"""The checkpoints of a run: which are whole, and which one it goes on from.

One process (the launcher, or rank 0 of a job) calls :func:`choose` and :func:`set_aside`; the others believe it.
Nothing is deleted here. NeMo removes what a killed save left (``-unfinished``) when it starts to train.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_eaft import integrity
from nemo_eaft.convert import MANIFEST

FOLDER = "checkpoints"
"""Folder in ``run.dir``."""

UNFINISHED = "-unfinished"
"""NeMo keeps a file ``<name>-unfinished`` beside a checkpoint until all ranks have written their part of it."""

_DAMAGED = re.compile(r"\.damaged(-\d+)?$")


@dataclass(frozen=True)
class Choice:
    """What :func:`choose` found."""

    checkpoint: Path | None
    """The newest whole checkpoint; None: no checkpoint was ever finished, the run starts from the imported model."""
    damaged: tuple[Path, ...] = ()
    """Newer ones that are not whole."""

    @property
    def steps(self) -> int:
        """Optimizer steps done before the checkpoint."""
        return 0 if self.checkpoint is None else steps_done(self.checkpoint)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a NeMo checkpoint: one converted here, or one that NeMo saved."""
    return (folder / MANIFEST).is_file() or ((folder / "weights").is_dir() and (folder / "context").is_dir())


def is_unfinished(folder: Path) -> bool:
    """Whether a checkpoint is still being written or removed, or the job that did so died."""
    return folder.with_name(folder.name + UNFINISHED).exists()


def checkpoints_in(run_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first; their files may be damaged. Links to them are left out."""
    return [path for path in _folders(run_dir) if is_checkpoint(path)]


def steps_done(checkpoint: Path) -> int:
    """Optimizer steps before a checkpoint, by its name: NeMo counts from 0, so step=3 was saved after the fourth."""
    digits = checkpoint.name.partition("step=")[2].partition("-")[0]
    return int(digits) + 1 if digits.isdigit() else 0


def dangling(path: Path) -> Path | None:
    """The path, or the folder above it, that is a link to nothing: a disk that is not mounted, for one."""
    return next((each for each in (path, *path.parents) if each.is_symlink() and not each.exists()), None)


def choose(run_dir: Path, proofs: Sequence[str] = ()) -> Choice:
    """Read the newest checkpoint of a run, and older ones as long as they are damaged. Warns of each that is not used.

    Args:
        run_dir: of the run.
        proofs: what shows that the run has had a whole checkpoint (:func:`nemo_eaft.saved.proofs`).

    Raises:
        ValueError: there are finished checkpoints but none is whole; names every file and what is wrong with it. Or
            there is none, and one has been there; or their folder is a link to nothing, or no folder.
    """
    folder = run_dir / FOLDER
    link = dangling(folder)
    if link is not None:
        raise ValueError(f"{link} is a link to {os.readlink(link)}, which is not there: is its disk mounted?")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    damaged: dict[Path, list[str]] = {}
    chosen = None
    for path in reversed(_folders(run_dir)):
        found = integrity.faults(path)
        if not found:
            chosen = path
            break
        damaged[path] = found
    listed = "\n  ".join(fault for found in damaged.values() for fault in found)
    if chosen is None and damaged:
        raise ValueError(
            f"run.dir={run_dir}: no checkpoint is whole, so the run cannot go on:\n  {listed}\nPut the files right, or "
            f"choose another run.dir"
        )
    if chosen is None and proofs:
        unfinished = ", ".join(path.name for path in _unfinished(run_dir))
        there = f"only what was not finished: {unfinished}" if unfinished else "none"
        if not folder.is_dir():
            there = "no such folder"
        shown = "\n  ".join(proofs)
        raise ValueError(
            f"run.dir={run_dir}: the run has had checkpoints in {folder}, but now there is {there}; bring them back "
            f"(is the disk mounted?) and start again. To start anew on purpose choose another run.dir, or remove what "
            f"shows that it had them:\n  {shown}"
        )
    choice = Choice(chosen, tuple(damaged))
    if damaged:
        warnings.warn(f"damaged checkpoints are not used; the run goes on from {chosen}:\n  {listed}", stacklevel=1)
    for path in _unfinished(run_dir):
        if steps_done(path) > choice.steps:
            how = f"goes on from {chosen}" if chosen is not None else "starts anew: no checkpoint was ever finished"
            warnings.warn(f"{path} was not finished when its job ended, and is not used; the run {how}", stacklevel=1)
    return choice


def set_aside(choice: Choice) -> None:
    """Rename the damaged checkpoints to ``<name>.damaged``, so that the run can save under their names again."""
    for path in choice.damaged:
        for link in path.parent.iterdir():
            if link.is_symlink() and link.resolve() == path.resolve():
                link.unlink()
        names = (f"{path.name}.damaged{count}" for count in ["", *(f"-{number}" for number in range(2, 1000))])
        path.rename(next(path.with_name(name) for name in names if not path.with_name(name).exists()))


def _folders(run_dir: Path) -> list[Path]:
    """Finished checkpoints by their name and marker alone, oldest first."""
    found = []
    for path in (run_dir / FOLDER).glob("*"):
        if not path.is_dir() or path.is_symlink() or path.name.startswith(".") or _DAMAGED.search(path.name):
            continue
        if not is_unfinished(path):
            found.append((steps_done(path), path.stat().st_mtime_ns, path))
    return [path for *_, path in sorted(found)]


def _unfinished(run_dir: Path) -> list[Path]:
    markers = (run_dir / FOLDER).glob(f"*{UNFINISHED}")
    return sorted(path.with_name(path.name.removesuffix(UNFINISHED)) for path in markers)
