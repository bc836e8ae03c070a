"""At a local start the launcher reads everything through, and its ranks believe it; after a restart they look again."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_eaft import cli, integrity, launch, train
from nemo_eaft.convert import MANIFEST
from tests.commands import home, make_checkpoint, run, started

__all__ = ["home", "started"]  # fixtures


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are hashed."""
    paths: list[Path] = []
    original = integrity._sum

    def count(path: Path, sync: bool = False) -> integrity.Sum:
        paths.append(path)
        return original(path, sync)

    monkeypatch.setattr(integrity, "_sum", count)
    return paths


def be_a_rank(monkeypatch: pytest.MonkeyPatch, rank: int, attempt: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in (names | {"TORCHELASTIC_RESTART_COUNT": attempt}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/of-this-torchrun/attempt_{attempt}/{rank}/error.json")
    monkeypatch.setenv(launch.LAUNCHER, launch.PROCESS)


def test_the_newest_checkpoint_is_hashed_once(
    home: Path,
    started: list[list[str]],
    read: list[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[Path | None] = []
    monkeypatch.setattr(train, "run_training", lambda settings, imported, resume_from: trained.append(resume_from))
    conf = str(home / "own.yaml")
    assert run(capsys, "train", conf)[0] == 0
    first = make_checkpoint(home / "run" / "checkpoints" / "step=0")
    read.clear()
    assert run(capsys, "train", conf)[0] == 0
    everything = [first / "weights" / "common.pt", home / "imported" / MANIFEST]
    assert read == everything
    for rank in (0, 1):
        be_a_rank(monkeypatch, rank, attempt=0)
        assert cli.run_rank([conf]) == 0
    assert trained == [first, first]
    assert read == everything

    # Meanwhile the run has gone on, and torchrun starts its ranks again.
    second = make_checkpoint(home / "run" / "checkpoints" / "step=00")
    read.clear()
    for rank in (0, 1):
        be_a_rank(monkeypatch, rank, attempt=1)
        assert cli.run_rank([conf]) == 0
    assert trained[2:] == [second, second]
    assert second / "weights" / "common.pt" in read


def test_what_another_launcher_has_made_ready_does_not_count(
    home: Path,
    started: list[list[str]],
    read: list[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "run_training", lambda *_: None)
    conf = str(home / "own.yaml")
    assert run(capsys, "train", conf)[0] == 0
    newest = make_checkpoint(home / "run" / "checkpoints" / "step=0")
    be_a_rank(monkeypatch, 0, attempt=0)
    monkeypatch.setenv(launch.LAUNCHER, "another")
    read.clear()
    assert cli.run_rank([conf]) == 0
    assert newest / "weights" / "common.pt" in read


def test_a_run_without_any_landscape_is_said_once(
    home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "run_training", lambda *_: None)
    words = [str(home / "own.yaml"), "trainer.histogram_every=3"]
    said = run(capsys, "train", *words)[2].splitlines()
    assert [line for line in said if "no step has a landscape" in line] == said
    assert len(said) == 1
    assert "trainer.histogram_every=3 has no effect beyond trainer.max_steps=2" in said[0]
    assert run(capsys, "train", words[0], "trainer.histogram_every=2")[2] == ""
    # The launcher has said it.
    assert run(capsys, "train", *words)[0] == 0
    be_a_rank(monkeypatch, 0, attempt=0)
    assert run(capsys, "train", *words)[2] == ""
