"""Who is stuck: what ranks that make no progress tell each other through files, and what follows from it.

Each rank that notices a stall, and each that sees that another did, writes `stall/rank-<n>.json` into the run's folder
(:class:`Answer`). A rank that waits in a collective waits for somebody else; so the stuck ranks are those that do not
answer at all (stopped, or their machine is gone), else those that are somewhere else. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import json
import linecache
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_eaft.atomic import replacing

FOLDER = "stall"
"""Folder in `run.dir` of the answers."""

_LIBRARIES = ("/megatron/core/", "/nemo/lightning/", "/nemo/collections/", "/torch/")


@dataclass(frozen=True)
class Answer:
    """What one rank says when a stall was noticed."""

    rank: int
    doing: str
    """Its last sign of progress, in words."""
    progress: int
    """How many signs of progress it has given; the rank that all wait for has given fewest."""
    still: float
    """Seconds since then."""
    waits: bool
    """Whether it waits for other ranks, in `torch.distributed`."""
    where: str
    """The place in the code where it is."""
    stack: str


def answer(rank: int, doing: str, progress: int, still: float, main_thread: int) -> Answer:
    """What this rank has to say, about its main thread and, while that runs a backward pass, the pass's threads."""
    frames = sys._current_frames()
    main = frames[main_thread]
    found = main
    if main.f_code.co_name == "_engine_run_backward":
        # On a GPU the backward pass has threads of its own.
        others = [frame for thread, frame in frames.items() if thread != main_thread and is_waiting(frame)]
        found = others[0] if others else main
    place = next((frame for frame in _outwards(found) if "/torch/" not in frame.f_code.co_filename), found)
    name = "waits in" if is_waiting(found) else "is in"
    where = f"{name} {found.f_code.co_qualname}, from {place.f_code.co_filename}:{place.f_lineno}"
    stack = "".join(traceback.format_stack(found))
    return Answer(rank, doing, progress, still, is_waiting(found), where, stack)


def is_waiting(frame: FrameType) -> bool:
    """Whether a thread whose innermost frame this is waits for other ranks."""
    file = frame.f_code.co_filename
    if "/torch/distributed/" in file:
        return True
    # Megatron waits for what it has sent or reduced in its own files: `handle.wait()`.
    line = linecache.getline(file, frame.f_lineno)
    return any(name in file for name in _LIBRARIES) and ".wait(" in line


def write(run_dir: Path, mine: Answer) -> None:
    """Leave an answer in `run_dir`, whole."""
    with replacing(run_dir / FOLDER / f"rank-{mine.rank}.json") as temporary:
        temporary.write_text(json.dumps(asdict(mine), indent=1), encoding="utf-8")


def read(run_dir: Path, ranks: int) -> dict[int, Answer]:
    """The answers that are there, by rank."""
    found = {}
    for rank in range(ranks):
        try:
            content: dict[str, Any] = json.loads((run_dir / FOLDER / f"rank-{rank}.json").read_text(encoding="utf-8"))
            found[rank] = Answer(**content)
        except (OSError, ValueError, TypeError):
            continue
    return found


@dataclass(frozen=True)
class Verdict:
    """Who is stuck."""

    rank: int
    message: str
    """Follows the words `rank <n>`."""
    stack: str


def judge(answers: Mapping[int, Answer], ranks: int, dumps: Mapping[int, str]) -> Verdict:
    """Who is stuck, of `ranks` ranks.

    answers: of the ranks that answered, one at least. dumps: by rank, stacks written without the interpreter's lock.
    """
    silent = [rank for rank in range(ranks) if rank not in answers]
    away = sorted((one for one in answers.values() if not one.waits), key=lambda one: (one.progress, one.rank))
    others = [f"rank {one.rank}: {one.doing}, {one.where}" for _, one in sorted(answers.items())]
    if silent:
        first = silent[0]
        also = f" (nor do ranks {', '.join(map(str, silent[1:]))})" if silent[1:] else ""
        message = (
            f"does not answer{also}: its process is stopped, or its machine is gone, or it is stuck outside Python; "
            f"no progress for {max(one.still for one in answers.values()):.0f} s"
        )
        return Verdict(first, message, _report(dumps.get(first) or f"rank {first} left no stack\n", others))
    if away:
        stuck = away[0]
        more = ", ".join(str(one.rank) for one in away[1:])
        also = f" (ranks {more} do not wait for others either, but got further)" if more else ""
        message = f"is stuck{also}: no progress for {stuck.still:.0f} s after {stuck.doing}; it {stuck.where}"
        return Verdict(stuck.rank, message, _report(stuck.stack, others))
    first = min(answers)
    message = (
        f"and every other rank wait for each other, no progress for {answers[first].still:.0f} s: they are in "
        f"different collectives, or the network is gone"
    )
    return Verdict(first, message, _report(answers[first].stack, others))


def _report(stack: str, others: list[str]) -> str:
    return stack + "\nEvery rank that answered:\n  " + "\n  ".join(others) + "\n"


def _outwards(frame: FrameType | None) -> Any:
    while frame is not None:
        yield frame
        frame = frame.f_back
