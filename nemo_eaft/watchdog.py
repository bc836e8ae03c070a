"""A thread in each rank that ends the job when nothing moves any more, and says who is stuck.

The training tells it of progress by :meth:`Watchdog.note`: two assignments, no clock, no message, no file. Twenty
times per `stall_seconds`, and at most every ten seconds, the thread looks whether that count has moved, and whether
another rank has noticed a stall.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from nemo_eaft import stall
from nemo_eaft.launch import leave_error

_NOTICED = "noticed"
"""File in `stall/`: some rank made no progress for `stall_seconds`, and all are to answer."""

_DUMP_SIGNAL = signal.SIGUSR2
"""To a rank that does not answer: write the stacks of all threads."""


def clear(run_dir: Path) -> None:
    """Remove what an earlier job left, so that it is not taken for this one's."""
    shutil.rmtree(run_dir / stall.FOLDER, ignore_errors=True)


def _birth(pid: int) -> str:
    """When a process started, in ticks since the machine did: with its number, it is that process and no other."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class Watchdog:
    """Watches this rank. Not a collective: each rank has its own, and they speak through files in `run_dir`.

    run_dir: folder that all ranks see; rank, ranks: this one's number, and how many there are.
    stall_seconds: without progress for so long, the job ends.
    """

    def __init__(self, run_dir: Path, rank: int, ranks: int, stall_seconds: float) -> None:
        self.run_dir = run_dir
        self.rank = rank
        self.ranks = ranks
        self.stall_seconds = stall_seconds
        self.tick = min(max(stall_seconds / 20, 0.2), 10.0)
        # Long enough for every rank to have looked twice, and for a shared file system to show its file.
        self.grace = min(max(stall_seconds / 10, 5.0), 60.0)
        self.progress = 0
        self._doing: tuple[str, int, int] = ("start", 0, 0)
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._main_thread = threading.main_thread().ident
        self._dump: TextIO | None = None

    def note(self, what: str, step: int, part: int = 0) -> None:
        """A sign of progress: what begins now, in which step, and which micro-batch of it."""
        self._doing = (what, step, part)
        self.progress += 1

    def start(self) -> None:
        """Begin to watch. Before, :func:`clear` has run on one rank, and a barrier on all."""
        if self._thread is not None:
            return
        self._leave_way_to_dump()
        self._thread = threading.Thread(target=self._watch, name="nemo-eaft-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer, and leave nothing in the folder."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._end.clear()
        if self._dump is not None:
            faulthandler.unregister(_DUMP_SIGNAL)
            self._dump.close()
            self._dump = None
            folder = self.run_dir / stall.FOLDER
            with suppress(OSError):  # the last rank removes the folder
                (folder / f"rank-{self.rank}.txt").unlink()
                (folder / f"rank-{self.rank}.pid").unlink()
                folder.rmdir()

    def _watch(self) -> None:
        seen, still = self.progress, 0.0
        woke = time.monotonic()
        while not self._end.wait(self.tick):
            now = time.monotonic()
            # A process that was suspended with the whole job wakes up much later, and has missed nothing.
            still += min(now - woke, 2 * self.tick)
            woke = now
            if self.progress != seen:
                seen, still = self.progress, 0.0
            if still >= self.stall_seconds or (self.run_dir / stall.FOLDER / _NOTICED).exists():
                self._end_job(still)

    def _leave_way_to_dump(self) -> None:
        """Code outside Python may hold the interpreter's lock for ever, and then this thread never runs again.

        faulthandler's signal handler needs no lock: it writes the stacks where the other ranks find them. Not its
        timer, which reads the frames of threads while they run: after the whole job had been suspended for longer
        than the limit, that ended a healthy process (seen once: a segmentation fault of Python 3.11).
        """
        folder = self.run_dir / stall.FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._dump = (folder / f"rank-{self.rank}.txt").open("w")
        faulthandler.register(_DUMP_SIGNAL, file=self._dump, all_threads=True)
        (folder / f"rank-{self.rank}.pid").write_text(f"{os.getpid()} {_birth(os.getpid())} {socket.gethostname()}")

    def _ask_for_dumps(self, silent: Iterable[int]) -> None:
        """Have ranks of this machine that do not answer write their stacks."""
        asked = False
        for rank in silent:
            with suppress(OSError, ValueError):
                pid, birth, host = (self.run_dir / stall.FOLDER / f"rank-{rank}.pid").read_text().split()
                # In another container the number may be another process's.
                if host == socket.gethostname() and birth == _birth(int(pid)):
                    os.kill(int(pid), _DUMP_SIGNAL)
                    asked = True
        if asked:
            time.sleep(1.0)

    def _end_job(self, still: float) -> None:
        """Tell the others, hear them, judge, and end this process: no collective can keep it."""
        try:
            what, step, part = self._doing
            doing = f"the {what} of step {step}" + (f", micro-batch {part}" if part else "")
            assert self._main_thread is not None
            mine = stall.answer(self.rank, doing, self.progress, still, self._main_thread)
            stall.write(self.run_dir, mine)
            (self.run_dir / stall.FOLDER / _NOTICED).touch()
            deadline = time.monotonic() + self.grace
            while len(stall.read(self.run_dir, self.ranks)) < self.ranks and time.monotonic() < deadline:
                time.sleep(self.tick / 2)
            answers = {self.rank: mine} | stall.read(self.run_dir, self.ranks)
            self._ask_for_dumps(set(range(self.ranks)) - answers.keys())
            verdict = stall.judge(answers, self.ranks, self.stall_seconds, self._dumps())
            text = f"{mine.stack}nemo-eaft: rank {self.rank} made no progress for {still:.0f} s after {doing}\n"
            print(f"{text}nemo-eaft: rank {verdict.rank} {verdict.message}", file=sys.stderr, flush=True)
            leave_error(self.run_dir, verdict.rank, kind="stall", message=verdict.message, text=verdict.stack)
        finally:
            os._exit(1)

    def _dumps(self) -> dict[int, str]:
        found = {}
        for rank in range(self.ranks):
            path = self.run_dir / stall.FOLDER / f"rank-{rank}.txt"
            if path.is_file() and (text := path.read_text(errors="replace").strip()):
                found[rank] = text + "\n"
        return found
