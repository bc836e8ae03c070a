"""Who was killed first, from what torchrun's agent saw."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from nemo_eaft.agent import Killed, first_killed, read_report
from nemo_eaft.launch import _explain

KILL, TERM, ABORT, SEGV = (-int(number) for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGABRT, signal.SIGSEGV))


@dataclasses.dataclass
class Seen:
    exitcode: int
    timestamp: int = 1000
    pid: int = 77


@pytest.mark.parametrize(
    "seen, rank",
    [
        # A peer that noticed was seen in the same look, or has an error file from the second before.
        ({0: Seen(1), 2: Seen(KILL)}, 2),
        ({0: Seen(1, 999), 2: Seen(KILL)}, 2),
        # The agent ended the others.
        ({1: Seen(KILL), 0: Seen(TERM), 2: Seen(TERM)}, 1),
        ({1: Seen(SEGV), 0: Seen(TERM, 1001), 2: Seen(KILL, 1030)}, 1),
        # An exception came first; who did not end at SIGTERM was killed by the agent.
        ({1: Seen(1), 0: Seen(KILL, 1030)}, None),
        ({1: Seen(1), 0: Seen(TERM)}, None),
        ({1: Seen(1), 0: Seen(1)}, None),
        # Somebody terminated one rank.
        ({1: Seen(TERM), 0: Seen(TERM)}, 1),
        # NCCL's watchdog aborts whoever waits for a rank that is gone.
        ({0: Seen(ABORT), 3: Seen(KILL)}, 3),
        ({0: Seen(1), 3: Seen(ABORT)}, 3),
        ({}, None),
    ],
)
def test_the_first_killed(seen: dict[int, Seen], rank: int | None) -> None:
    found = first_killed(seen, patience=30.0)
    assert (found and found.rank) == rank
    assert found is None or found.pid == 77


def test_what_it_says() -> None:
    said = str(first_killed({4: Seen(SEGV)}, 30.0))
    assert said == "rank 4 (pid 77) was killed by SIGSEGV"
    assert "for want of memory" in str(first_killed({4: Seen(KILL)}, 30.0))
    assert "signal 99" in str(first_killed({4: Seen(-99)}, 30.0))


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"rank": 1}'])
def test_no_report(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "report").write_text(text)
    assert read_report(tmp_path / "report") is None


@pytest.mark.parametrize("earlier, last", [(0.1, "was killed by SIGKILL"), (60.0, "rank 0 failed first: OSError: x")])
def test_an_error_well_before_the_kill_was_the_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], earlier: float, last: str
) -> None:
    error = f'{{"kind": "failure", "rank": 0, "message": "OSError: x", "traceback": "T", "time": {1000 - earlier}}}'
    (tmp_path / "error.json").write_text(error)
    assert _explain(tmp_path / "error.json", 1, Killed(3, 77, "SIGKILL", 1000.0)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert last in lines[-1]
    assert lines[0] == "T"
