"""Processes that end when the one that started them does, however that happened."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from nemo_eaft.threads import start_in_background

AGENT = "NEMO_EAFT_AGENT"
"""Environment variable: the process that started this rank, a `nemo_eaft.agent`."""


def end_with_parent(parent: int, end: Callable[[], object]) -> None:
    """Look every second whether `parent` is still the parent of this process, and call `end`, in a thread, when not.

    The number is given, not asked for: the parent may be gone before the first instruction of this process.
    """
    start_in_background(_watch, parent, end)


def end_with_agent() -> None:
    """In a rank that the launcher's agent started: end at once when the agent is gone.

    torchrun gives each rank a session of its own, so a SIGKILL to the process group of launcher and agent reaches no
    rank. It would train on beside those of the next start, in the same `run.dir`.
    """
    agent = os.environ.get(AGENT)
    if agent is not None:
        end_with_parent(int(agent), lambda: _end(agent))


def _end(agent: str) -> None:
    os.write(2, f"nemo-eaft: process {agent}, which started this rank ({AGENT}), is gone: the rank ends\n".encode())
    os._exit(1)


def _watch(parent: int, end: Callable[[], object]) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    end()
