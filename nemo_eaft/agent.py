"""``torchrun`` that also says why it ended: ``python -m nemo_eaft.agent REPORT LAUNCHER [torchrun's argument ...]``.

A rank that was killed leaves no traceback, and its peers each leave one about a closed connection. Only the agent, as
the parent of the ranks, knows who went first and by what signal. REPORT is left alone if no signal was the cause.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from nemo_eaft.orphans import AGENT, end_with_parent

_CONSEQUENCES = (signal.SIGABRT, signal.SIGTERM)
"""Signals that a rank may also get because of another one: NCCL's watchdog aborts, and the agent terminates."""


class Failure(Protocol):
    """What is used of torch's ``ProcessFailure``."""

    pid: int
    exitcode: int
    timestamp: int


@dataclass(frozen=True)
class Killed:
    """A rank that a signal ended before anything else failed."""

    rank: int
    pid: int
    signal: str
    time: float
    """When the agent saw it, seconds since the epoch."""

    def __str__(self) -> str:
        text = f"rank {self.rank} (pid {self.pid}) was killed by {self.signal}"
        if self.signal == "SIGKILL":
            text += "; if nobody did, it was the kernel, for want of memory: `dmesg` or the batch system tells"
        return text


def first_killed(failures: Mapping[int, Failure], patience: float) -> Killed | None:
    """The rank whose death by a signal began it, if that is how it began.

    Args:
        failures: by global rank, in the order in which the agent saw them: first those that made it act, then those
            that it ended itself with SIGTERM and, after ``patience`` seconds, SIGKILL. Ranks without an error file
            have the time at which the agent looked.
        patience: torchrun's ``--shutdown-timeout``, seconds.
    """
    if not failures:
        return None
    began = min(failure.timestamp for failure in failures.values())
    found: list[tuple[bool, int, Killed]] = []
    for order, (rank, failure) in enumerate(failures.items()):
        if failure.exitcode >= 0:
            continue
        number = -failure.exitcode
        if number == signal.SIGTERM and order > 0:
            continue
        if number == signal.SIGKILL and failure.timestamp >= began + patience - 1:
            continue
        killed = Killed(rank, failure.pid, _name(number), failure.timestamp)
        found.append((number in _CONSEQUENCES, order, killed))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def read_report(path: Path) -> Killed | None:
    """What :func:`main` left; None if it left nothing."""
    try:
        return Killed(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def main(argv: list[str]) -> int:
    """Run ``torchrun`` in this process; 0, or 1 when a rank failed."""
    report, launcher, *words = argv
    # A launcher that was killed leaves no ranks behind: torchrun ends its own when it gets SIGTERM. Before torch, whose
    # import takes seconds, in which the launcher may be killed as well.
    end_with_parent(int(launcher), lambda: os.kill(os.getpid(), signal.SIGTERM))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments: Any = run.parse_args(words)
    os.environ[AGENT] = str(os.getpid())
    try:
        run.run(arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        # Older than torch 2.9: no such option, and 30 s.
        killed = first_killed(error.failures, float(getattr(arguments, "shutdown_timeout", None) or 30))
        if killed is not None:
            Path(report).write_text(json.dumps(asdict(killed)), encoding="utf-8")
        return 1
    return 0


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
