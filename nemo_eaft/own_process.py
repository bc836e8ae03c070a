"""A process of its own for work that sets up what may not stay: waited for, and ended with who started it.

Asked to end, or left alone, it removes what it was writing before it goes; it has a minute for that.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

from nemo_eaft.orphans import end_with_parent

_PATIENCE = 60.0  # seconds for a process to remove what it has written

_AGAIN = 1.0  # seconds until a process that has not ended is asked once more

_JOB_VARIABLES = (
    "GROUP_", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "RANK", "ROLE_", "SLURM_", "TORCHELASTIC_", "WORLD_SIZE",
)  # fmt: skip
"""Variables, or the beginnings of their names, by which Lightning would take a process for one rank of a job."""


def run_to_its_end(
    command: list[str], changed: Mapping[str, str] | None = None, *, silent: bool = False
) -> tuple[int, str]:
    """Exit code and standard error of a process outside any job. `subprocess.run` would kill it a quarter of a second
    after Ctrl-C, before it has removed what it was writing.

    changed: variables of its environment that are not ours.
    silent: what it prints is dropped; otherwise it goes where ours goes.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_JOB_VARIABLES)}
    out = subprocess.DEVNULL if silent else None
    with subprocess.Popen(
        command, env=inherited | dict(changed or {}), stdout=out, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            said = child.communicate()[1]
        except BaseException:
            _end(child)
            raise
    return child.returncode, said


def _end(child: subprocess.Popen[str]) -> None:
    """Ask it to end, and wait; after `_PATIENCE` it is killed."""
    last = time.monotonic() + _PATIENCE
    while child.poll() is None:
        # Again and again: of two signals at once, Ctrl-C and this one, a thread of some library may be given both,
        # which wakes no main thread that waits (nemo_eaft.threads).
        child.terminate() if time.monotonic() < last else child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=_AGAIN)  # what it says while it ends has to go somewhere


def end_cleanly_with(parent: int) -> None:
    """In such a process: leave by an exception when it is asked to end, or when `parent`, which started it, is gone."""

    def leave(number: int, _: object) -> None:
        # The parent's signal and the one for its end may both come: the second must not break into the removal.
        for each in ends:
            signal.signal(each, signal.SIG_IGN)
        # Megatron's writers would go on writing into the folder, and be waited for.
        for child in multiprocessing.active_children():
            child.kill()
        sys.exit(128 + number)

    # Where nohup has a hang-up ignored, or a shell Ctrl-C for what it started with `&`, it stays so.
    ends = [
        each for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN
    ]
    for each in ends:
        signal.signal(each, leave)
    end_with_parent(parent, _terminate)


def _terminate() -> None:
    last = time.monotonic() + _PATIENCE
    while time.monotonic() < last:
        os.kill(os.getpid(), signal.SIGTERM)  # again and again, as in `_end`
        time.sleep(_AGAIN)
    # The exception was lost, where somebody catches everything, or the removal takes too long.
    os._exit(128 + signal.SIGTERM)
