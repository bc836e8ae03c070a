"""Ranks of a torchrun of one's own, and what is said of how far they are."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import launch, ready, stop
from nemo_eaft.analyze import job, progress
from nemo_eaft.restart import OWN_STORES
from tests.commands import home, run  # noqa: F401, a fixture

RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.fixture
def words(home: Path) -> list[str]:  # noqa: F811
    more = [
        f"model.imported={home / 'imported'}",
        f"run.dir={home / 'run'}",
        "run.backend=cpu",
        "trainer.precision=fp32",
    ]
    return ["analyze", str(home / "model"), str(home / "train.jsonl"), "trainer.seq_length=64", *more]


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process is a rank, whose forward passes are none."""
    from nemo_eaft.analyze import run as passes

    monkeypatch.setattr(passes, "analyze", lambda settings, ready: False)
    monkeypatch.setattr(stop, "listen", lambda: None)
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_restarts_that_would_hang_are_refused(
    words: list[str], rank: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several = {"WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in several.items():
        rank.setenv(name, value)
    code, _, error = run(capsys, *words, "trainer.num_nodes=2")
    assert code == 2
    assert OWN_STORES in error


def test_what_an_older_job_left_is_not_taken_for_this_ones(
    words: list[str],
    home: Path,  # noqa: F811
    rank: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where nothing tells jobs apart: its error is gone before another rank looks, and so is its ready.json."""
    named: list[bool] = []
    from nemo_eaft import restart

    rank.setattr(restart, "name_this_start", lambda: named.append(True))
    (home / "run").mkdir()
    (home / "run" / launch.ERROR).write_text("{}")
    (home / "run" / ready.READY).write_text("{}")
    seen: list[bool] = []
    open_model = ready.open_model

    def opened(settings: Any) -> Any:
        seen.append((home / "run" / ready.READY).exists() or (home / "run" / launch.ERROR).exists())
        return open_model(settings)

    rank.setattr(job, "open_model", opened)
    assert run(capsys, *words)[0] == 0
    assert (named, seen) == ([True], [False])
    assert json.loads((home / "run" / ready.READY).read_text())["finished"] is False


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", said := io.StringIO())
    now = [0.0]
    shown = progress.Progress(rows=100, done=20, clock=lambda: now[0])
    now[0] = 50.0
    shown.begin()
    for seconds, done in ((60.0, 30), (90.0, 40), (95.0, 50), (125.0, 60)):
        now[0] = seconds
        shown.show(done, read=10 * done)
    assert said.getvalue().splitlines() == [
        "analyze: 40/100 rows, 10 tokens/s, 2m00s left",
        "analyze: 60/100 rows, 8 tokens/s, 1m15s left",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", said := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    shown = progress.Progress(rows=8, done=2)
    shown.begin()
    shown.show(8, read=600)
    shown.close(8, read=600)
    assert "8/8" in said.getvalue()
    assert "analyze: 6 rows, 600 tokens in" in capsys.readouterr().out
