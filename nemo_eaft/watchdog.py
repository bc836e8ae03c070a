"""A thread in each rank that ends the job when nothing moves any more, and says who is stuck.

The training tells it of progress by :meth:`Watchdog.note`: two assignments, no clock, no message, no file. Twenty
times per `stall_seconds`, and at most every ten seconds, the thread looks whether that count has moved, and whether
another rank has noticed a stall. A save has a limit of its own, for nothing in it says that it gets on.

A shared file system may fail for a moment. The thread says so once, and goes on; what it has to say itself goes to
stderr first.
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
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from nemo_eaft import stall
from nemo_eaft.launch import leave_error
from nemo_eaft.threads import start_in_background

_NOTICED = "noticed"
"""File in `stall/`: some rank made no progress for `stall_seconds`, and all of the job that it names are to answer."""

_DUMP_SIGNAL = signal.SIGUSR2
"""To a rank that does not answer: write the stacks of all threads."""


SAVE = "save"
"""What :meth:`Watchdog.note` is told when a save begins."""


def grace(stall_seconds: float) -> float:
    """Seconds that the rank which noticed a stall waits for the answers of the others.

    Long enough for every rank to have looked twice, and for a shared file system to show its file.
    """
    return min(max(stall_seconds / 10, 5.0), 60.0)


def clear(run_dir: Path) -> None:
    """Remove what an earlier job left, so that it is not taken for this one's."""
    shutil.rmtree(run_dir / stall.FOLDER, ignore_errors=True)


def _birth(pid: int) -> str:
    """When a process started, in ticks since the machine did: with its number, it is that process and no other."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class Watchdog:
    """Watches this rank. Not a collective: each rank has its own, and they speak through files in `run_dir`.

    run_dir: folder that all ranks see; rank, ranks: this one's number, and how many there are.
    stall_seconds: without progress for so long, the job ends. save_seconds: the same while :data:`SAVE` was noted last,
        where that is longer; None: no other limit.
    on_gpu: whether collectives run on GPUs, so that who waits for them waits for its GPU.
    job: the same on all ranks that were started together, and new with each start: a network file system may still show
        what an earlier one left.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        ranks: int,
        stall_seconds: float,
        save_seconds: float | None = None,
        *,
        on_gpu: bool = False,
        job: str = "",
    ) -> None:
        self.run_dir = run_dir
        self.rank = rank
        self.ranks = ranks
        self.stall_seconds = stall_seconds
        self.save_seconds = max(stall_seconds, save_seconds or 0.0)
        self.on_gpu = on_gpu
        self.job = job
        self.tick = min(max(stall_seconds / 20, 0.2), 10.0)
        self.grace = grace(stall_seconds)
        self.progress = 0
        self._doing: tuple[str, int, int] = ("start", 0, 0)
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._main_thread = threading.main_thread().ident
        self._dump: TextIO | None = None
        self._said: set[int | None] = set()

    def note(self, what: str, step: int, part: int = 0) -> None:
        """A sign of progress: what begins now, in which step, and which micro-batch of it."""
        self._doing = (what, step, part)
        self.progress += 1

    def start(self) -> None:
        """Begin to watch. Before, :func:`clear` has run on one rank, and a barrier on all."""
        if self._thread is not None:
            return
        try:
            self._leave_way_to_dump()
        except OSError as error:
            self._say_once(error)
        self._thread = start_in_background(self._watch, name="nemo-eaft-watchdog")

    def stop(self) -> None:
        """Watch no longer, and leave nothing in the folder.

        An error of this rank's own ends it, too, while a stall is told; then the error is what counts.
        """
        self._end.set()
        if self._thread is not None:
            # A file system that hangs may keep the thread; the traceback that waits behind this call is worth more.
            self._thread.join(self.grace)
            self._thread = None
        # The thread keeps the event that it was told with: one that is late must not begin to watch again.
        self._end = threading.Event()
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
        end = self._end
        seen, still = self.progress, 0.0
        woke = time.monotonic()
        while not end.wait(self.tick):
            now = time.monotonic()
            # A process that was suspended with the whole job wakes up much later, and has missed nothing.
            still += min(now - woke, 2 * self.tick)
            woke = now
            if self.progress != seen:
                seen, still = self.progress, 0.0
            limit = self.save_seconds if self._doing[0] == SAVE else self.stall_seconds
            if still >= limit or self._others_noticed():
                self._end_job(still, end)

    def _others_noticed(self) -> bool:
        try:
            named = (self.run_dir / stall.FOLDER / _NOTICED).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return False
        except OSError as error:
            # The next look may succeed (ESTALE, EIO); the time without progress is counted all the same.
            self._say_once(error)
            return False
        return named == self.job

    def _say_once(self, error: OSError) -> None:
        if error.errno not in self._said:
            self._said.add(error.errno)
            text = f"nemo-eaft: the watchdog of rank {self.rank} goes on without a file: {error}"
            print(text, file=sys.stderr, flush=True)

    def _leave_way_to_dump(self) -> None:
        """Code outside Python may hold the interpreter's lock for ever, and then this thread never runs again.

        faulthandler's signal handler needs no lock: it writes the stacks where the other ranks find them. Not its
        timer, which reads the frames of threads while they run: after the whole job had been suspended for longer
        than the limit, that ended a healthy process (seen once: a segmentation fault of Python 3.11).
        """
        folder = self.run_dir / stall.FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._dump = (folder / f"rank-{self.rank}.txt").open("w")
        # Before anything else may fail: from here on `stop` gives the signal back.
        faulthandler.register(_DUMP_SIGNAL, file=self._dump, all_threads=True)
        (folder / f"rank-{self.rank}.pid").write_text(f"{os.getpid()} {_birth(os.getpid())} {socket.gethostname()}")

    def _ask_for_dumps(self, silent: Iterable[int]) -> None:
        """Have ranks of this machine that do not answer write their stacks."""
        asked = []
        for rank in silent:
            with suppress(OSError, ValueError):
                pid, birth, host = (self.run_dir / stall.FOLDER / f"rank-{rank}.pid").read_text().split()
                # In another container the number may be another process's.
                if host == socket.gethostname() and birth == _birth(int(pid)):
                    os.kill(int(pid), _DUMP_SIGNAL)
                    asked.append(rank)
        if not asked:
            return
        deadline = time.monotonic() + 5.0
        while not self._dumps().keys() >= set(asked) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)  # for the rest of what has begun to come

    def _end_job(self, still: float, end: threading.Event) -> None:
        """Tell the others, hear them, judge, and end this process: no collective can keep it.

        Unless the main thread meanwhile stops the watch, for it has an error of its own to tell then.
        """
        try:
            what, step, part = self._doing
            doing = f"the {what} of step {step}" + (f", micro-batch {part}" if part else "")
            if what == SAVE:
                doing += " (run.save_seconds is its limit)"
            assert self._main_thread is not None
            mine = stall.answer(
                self.rank, doing, self.progress, still, self._main_thread, on_gpu=self.on_gpu, job=self.job
            )
            said = f"nemo-eaft: rank {self.rank} made no progress for {still:.0f} s after {doing}"
            print(f"{mine.stack}{said}", file=sys.stderr, flush=True)
            try:
                stall.write(self.run_dir, mine)
                # Ranks of one job write the same; who reads between the two steps of it looks again.
                (self.run_dir / stall.FOLDER / _NOTICED).write_text(self.job, encoding="utf-8")
            except OSError as error:
                self._say_once(error)
            deadline = time.monotonic() + self.grace
            while len(self._answers()) < self.ranks and time.monotonic() < deadline:
                if end.wait(self.tick / 2):
                    break
            answers = {self.rank: mine} | self._answers()
            self._ask_for_dumps(set(range(self.ranks)) - answers.keys())
            verdict = stall.judge(answers, self.ranks, self._dumps(), self.on_gpu)
            if end.is_set():
                return
            print(f"nemo-eaft: rank {verdict.rank} {verdict.message}", file=sys.stderr, flush=True)
            leave_error(self.run_dir, verdict.rank, kind="stall", message=verdict.message, text=verdict.stack)
        except Exception:
            traceback.print_exc()
        finally:
            if not end.is_set():
                os._exit(1)

    def _answers(self) -> dict[int, stall.Answer]:
        return stall.read(self.run_dir, self.ranks, self.job)

    def _dumps(self) -> dict[int, str]:
        found = {}
        for rank in range(self.ranks):
            with suppress(OSError):  # one that is not there among them
                text = (self.run_dir / stall.FOLDER / f"rank-{rank}.txt").read_text(errors="replace").strip()
                if text:
                    found[rank] = text + "\n"
        return found
