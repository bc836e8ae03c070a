"""Who is stuck: what ranks that make no progress tell each other through files, and what follows from it.

Each rank that notices a stall, and each that sees that another did, writes `stall/rank-<n>.json` into the run's folder
(:class:`Answer`). A rank that waits in a collective waits for somebody else; so the stuck ranks are those that do not
answer at all (stopped, or their machine is gone), else those that are somewhere else. Imports neither torch nor NeMo.

Over NCCL a collective does not block the host: a rank that waits for others waits for its GPU, wherever it next needs a
result. It cannot be told from one whose GPU hangs; so it counts as waiting, and where all do, nobody is blamed.
"""

from __future__ import annotations

import json
import linecache
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_eaft.atomic import replacing

FOLDER = "stall"
"""Folder in `run.dir` of the answers."""

_LIBRARIES = ("/megatron/core/", "/nemo/lightning/", "/nemo/collections/", "/torch/")

_COPIES_TO_HOST = re.compile(
    r"""\.(?:item|tolist|cpu|numpy|nonzero|synchronize)\(|\.to\(\s*["']cpu|(?<![.\w])(?:bool|float|int)\("""
)
"""In a source line: what waits for the GPU. The truth of a tensor in a bare `if` is not to be seen in the line."""


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
    """Whether it waits for other ranks, in `torch.distributed`, or for its GPU where that waits for them."""
    where: str
    """The place in the code where it is."""
    stack: str
    job: str = ""
    """The start of the ranks that it belongs to; what an earlier one left is no answer."""


def answer(
    rank: int, doing: str, progress: int, still: float, main_thread: int, *, on_gpu: bool = False, job: str = ""
) -> Answer:
    """What this rank has to say, about its main thread and, while that runs a backward pass, the pass's threads.

    on_gpu: whether its collectives run on a GPU, so that they do not block the host.
    """
    frames = sys._current_frames()
    main = frames[main_thread]
    found = main
    if main.f_code.co_name == "_engine_run_backward":
        # On a GPU the backward pass has threads of its own.
        others = [frame for thread, frame in frames.items() if thread != main_thread and is_waiting(frame, on_gpu)]
        found = others[0] if others else main
    place = next((frame for frame in _outwards(found) if "/torch/" not in frame.f_code.co_filename), found)
    name = "waits in" if is_waiting(found) else "waits for its GPU in" if is_waiting(found, on_gpu) else "is in"
    where = f"{name} {found.f_code.co_qualname}, from {place.f_code.co_filename}:{place.f_lineno}"
    stack = "".join(traceback.format_stack(found))
    return Answer(rank, doing, progress, still, is_waiting(found, on_gpu), where, stack, job)


def is_waiting(frame: FrameType, on_gpu: bool = False) -> bool:
    """Whether a thread whose innermost frame this is waits for other ranks, or with `on_gpu` for its GPU."""
    file = frame.f_code.co_filename
    if "/torch/distributed/" in file:
        return True
    # Megatron waits for what it has sent or reduced in its own files: `handle.wait()`.
    line = linecache.getline(file, frame.f_lineno)
    if any(name in file for name in _LIBRARIES) and ".wait(" in line:
        return True
    if not on_gpu:
        return False
    in_synchronize = "/torch/cuda/" in file and frame.f_code.co_name == "synchronize"
    return in_synchronize or _COPIES_TO_HOST.search(line) is not None


def write(run_dir: Path, mine: Answer) -> None:
    """Leave an answer in `run_dir`, whole."""
    with replacing(run_dir / FOLDER / f"rank-{mine.rank}.json") as temporary:
        temporary.write_text(json.dumps(asdict(mine), indent=1), encoding="utf-8")


def read(run_dir: Path, ranks: int, job: str = "") -> dict[int, Answer]:
    """The answers of this job that are there, by rank."""
    found = {}
    for rank in range(ranks):
        try:
            content: dict[str, Any] = json.loads((run_dir / FOLDER / f"rank-{rank}.json").read_text(encoding="utf-8"))
            said = Answer(**content)
        except (OSError, ValueError, TypeError):
            continue
        if said.job == job:
            found[rank] = said
    return found


@dataclass(frozen=True)
class Verdict:
    """Who is stuck."""

    rank: int
    """The lowest, where several are alike."""
    message: str
    """Follows the words `rank <n>`."""
    stack: str


def judge(answers: Mapping[int, Answer], ranks: int, dumps: Mapping[int, str], on_gpu: bool = False) -> Verdict:
    """Who is stuck, of `ranks` ranks. Of those that wait for nobody it is the one that got least far, if it is one.

    answers: of the ranks that answered, one at least. dumps: by rank, stacks written without the interpreter's lock.
    on_gpu: whether collectives run on GPUs.
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
        alike = _listed(one.rank for one in away[1:] if one.progress == stuck.progress)
        ahead = _listed(one.rank for one in away[1:] if one.progress > stuck.progress)
        also = f" (ranks {ahead} do not wait for others either, but got further)" if ahead else ""
        since = f"no progress for {stuck.still:.0f} s after {stuck.doing}"
        message = f"is stuck{also}: {since}; it {stuck.where}"
        if alike:
            # On a GPU the host may stand in any operation: the queue is full.
            what = "a GPU, the network or a file system" if on_gpu else "the network or a file system"
            message = (
                f"and ranks {alike} stand still, none behind another{also}: {what} may hang, and no rank can be "
                f"singled out; {since}; rank {stuck.rank} {stuck.where}"
            )
        return Verdict(stuck.rank, message, _report(stuck.stack, others))
    first = min(answers)
    others_too = _listed(rank for rank in sorted(answers) if rank != first)
    whom, what = ("each other or their GPUs", "a GPU or the network hangs") if on_gpu else ("each other", "")
    message = (
        f"and ranks {others_too} wait for {whom}, no progress for {answers[first].still:.0f} s: they are in different "
        f"collectives, or {what or 'the network is gone'}; no rank can be singled out"
    )
    if not others_too:
        message = f"waits, no progress for {answers[first].still:.0f} s, and there is no other: its GPU hangs"
    return Verdict(first, message, _report(answers[first].stack, others))


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


def _report(stack: str, others: list[str]) -> str:
    return stack + "\nEvery rank that answered:\n  " + "\n  ".join(others) + "\n"


def _outwards(frame: FrameType | None) -> Any:
    while frame is not None:
        yield frame
        frame = frame.f_back
