"""Requests to stop: how they are made, which count, and what a stopped run leaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nemo_eaft import cli, stop
from nemo_eaft.settings import RunSettings


@pytest.fixture(autouse=True)
def _unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (stop.CLEARED, "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_a_request_is_seen_by_who_looks(tmp_path: Path) -> None:
    assert stop.asked(tmp_path, look=True) is None
    stop.request(tmp_path, "maintenance")
    assert os.listdir(tmp_path) == [stop.REQUEST]
    assert stop.asked(tmp_path, look=False) is None
    assert stop.asked(tmp_path, look=True) == "file stop: maintenance"
    (tmp_path / stop.REQUEST).write_text("")  # `touch stop`
    assert stop.asked(tmp_path, look=True) == "file stop"


def test_a_file_system_that_fails_is_no_request_and_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ESTALE of a shared one would be; a request is seen when it works again."""
    broken = tmp_path / (300 * "x")
    assert stop.asked(broken, look=True) is None
    assert stop.asked(broken, look=True) is None
    assert capsys.readouterr().err.count("cannot be looked at: [Errno 36] File name too long") == 1


def test_a_signal_is_a_request(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        stop.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked(tmp_path, look=False) == f"SIGUSR1 to process {os.getpid()}"
    finally:
        signal.signal(signal.SIGUSR1, before)
        stop._signalled.clear()


def test_a_request_from_before_the_job_is_removed_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop.clear(tmp_path)
    assert capsys.readouterr().out == ""
    stop.request(tmp_path, "old")
    stop.clear(tmp_path)
    assert os.listdir(tmp_path) == []
    assert "before this run was started" in capsys.readouterr().out


@pytest.mark.parametrize("name, value", [(stop.CLEARED, "1"), ("TORCHELASTIC_RESTART_COUNT", "1")])
def test_a_request_of_this_job_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Made while the ranks start, or while torchrun starts them again."""
    monkeypatch.setenv(name, value)
    stop.request(tmp_path, "new")
    (tmp_path / stop.STOPPED).write_text("{}")
    stop.clear(tmp_path)
    assert os.listdir(tmp_path) == [stop.REQUEST]


def test_the_note(tmp_path: Path) -> None:
    stop.request(tmp_path, "why")
    stop.write_note(tmp_path, 7, "/runs/a/checkpoints/step=6", "file stop: why")
    assert os.listdir(tmp_path) == [stop.STOPPED]
    note = stop.read_stopped(tmp_path)
    assert note is not None
    assert (note.step, note.checkpoint, note.reason) == (7, "/runs/a/checkpoints/step=6", "file stop: why")
    for text in ("", "[]", '{"step": 1}'):
        (tmp_path / stop.STOPPED).write_text(text)
        assert stop.read_stopped(tmp_path) is None


@pytest.mark.parametrize("key", ["max_restarts", "stall_seconds"])
def test_settings(key: str) -> None:
    with pytest.raises(ValueError, match=rf"run\.{key}=-1 must be 0 or more"):
        RunSettings(dir="r", **{key: -1})  # type: ignore[arg-type]
    assert (RunSettings(dir="r").max_restarts, RunSettings(dir="r").stall_seconds) == (0, 900)
    assert RunSettings(dir="r", stall_seconds=None).stall_seconds is None


def test_it_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"exit code {stop.EXIT_STOPPED}" in told
    assert f"run.dir/{stop.STOPPED}" in told
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert f"{stop.EXIT_STOPPED} stopped on request" in readme
    assert f"`{stop.STOPPED}`" in readme
