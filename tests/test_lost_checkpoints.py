"""A run that has lost its checkpoints is never begun anew in silence, and no line of its metrics is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_eaft import recorder, saved
from nemo_eaft.checkpoints import steps_done
from tests.commands import home, make_checkpoint, run, started

__all__ = ["home", "started"]  # fixtures

SAVE_EVERY = 2


@pytest.fixture
def words(home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The command line of a run of eight steps that was made ready once."""
    command = ["train", str(home / "own.yaml"), "trainer.max_steps=8", f"trainer.save_every={SAVE_EVERY}"]
    assert run(capsys, *command)[0] == 0
    started.clear()
    return command


def train(run_dir: Path, steps: int) -> list[Path]:
    """What that many steps leave in its folder; the checkpoints that were finished."""
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, steps + 1))
    (run_dir / saved.METRICS).write_text(lines)
    made = [
        make_checkpoint(run_dir / "checkpoints" / f"step={step - 1}")
        for step in range(SAVE_EVERY, steps + 1, SAVE_EVERY)
    ]
    for path in made[-1:]:
        saved.write(run_dir / saved.SAVED, saved.Saved(path.name, steps_done(path)))
    return made


def link_to_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.with_name("gone"))


def only_unfinished(folder: Path) -> None:
    for path in folder.iterdir():
        path.with_name(path.name + "-unfinished").touch()


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


LOST: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (shutil.rmtree, "now there is no such folder"),
    "emptied, or not mounted": (emptied, "now there is none"),
    "a link to nothing": (link_to_nothing, "checkpoints is a link to "),
    "a file": (a_file, "checkpoints is not a folder"),
    "only unfinished": (only_unfinished, "only what was not finished: step=1, step=3"),
}


@pytest.mark.parametrize("known_by", [saved.SAVED, saved.METRICS])
@pytest.mark.parametrize("kind", LOST)
def test_lost_checkpoints_are_an_error_and_nothing_changes(
    home: Path,
    words: list[str],
    started: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    kind: str,
    known_by: str,
) -> None:
    """By the note that each save leaves; by the metrics where a version without it began the run."""
    run_dir = home / "run"
    train(run_dir, 5)
    lose, said = LOST[kind]
    lose(run_dir / "checkpoints")
    other = {saved.SAVED: saved.METRICS, saved.METRICS: saved.SAVED}[known_by]
    (run_dir / other).unlink()
    before = (run_dir / known_by).read_bytes()
    code, _, err = run(capsys, *words)
    assert code == 2
    assert said in err
    if said.startswith(("now", "only")):
        assert f"{run_dir / known_by}: " in err
        assert "another run.dir" in err
    assert started == []
    assert (run_dir / known_by).read_bytes() == before
    assert sorted(path.name for path in run_dir.glob("metrics*")) == [known_by] * (known_by == saved.METRICS)


def test_what_was_removed_on_purpose_is_begun_anew(
    home: Path, words: list[str], started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = home / "run"
    train(run_dir, 5)
    shutil.rmtree(run_dir / "checkpoints")
    err = run(capsys, *words)[2]
    for line in err.splitlines():
        if line.startswith("  "):
            Path(line.strip().partition(": ")[0]).unlink()
    assert run(capsys, *words)[0] == 0
    assert len(started) == 1


@pytest.mark.parametrize("marked", [True, False])
def test_a_run_that_died_in_its_first_save_starts_again_by_itself(
    home: Path, words: list[str], started: list[list[str]], capsys: pytest.CaptureFixture[str], marked: bool
) -> None:
    """The line of a step is written before its checkpoint; a full disk leaves not even the mark."""
    run_dir = home / "run"
    (finished,) = train(run_dir, SAVE_EVERY)
    shutil.rmtree(finished)
    (run_dir / saved.SAVED).unlink()
    if marked:
        make_checkpoint(finished, unfinished=True)
    code, out, err = run(capsys, *words)
    assert code == 0
    assert ("starts anew: no checkpoint was ever finished" in err) == marked
    assert "metrics.jsonl: steps after 0 are done again; their lines are now in metrics.1.jsonl" in out
    assert len(started) == 1
    # Begun anew, but what was measured is kept.
    assert recorder.read(run_dir / saved.METRICS) == []
    assert [row["step"] for row in recorder.read(run_dir / "metrics.1.jsonl")] == [1, 2]


def test_lines_of_other_settings_prove_nothing(
    home: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One step without a save, and then a run that saves each step: the old line would be taken for one of its own."""
    run_dir = home / "run"
    train(run_dir, 1)
    every = [*words[:1], "--allow-config-change", *words[1:-1], "trainer.save_every=1"]
    assert run(capsys, *every)[0] == 0
    # Its job died before the first step.
    assert run(capsys, *every)[0] == 0


def test_the_newest_checkpoint_is_gone_and_an_older_one_is_taken(
    home: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    older, newest = train(home / "run", 5)
    shutil.rmtree(newest)
    code, out, err = run(capsys, *words)
    assert code == 0
    assert f"step=3, saved after step 4, is not there any more; the run goes on from {older}" in err
    assert "steps after 2 are done again; their lines are now in metrics.1.jsonl" in out
    assert json.loads((home / "run" / "ready.json").read_text())["resume_from"] == str(older)
    assert [row["step"] for row in recorder.read(home / "run" / "metrics.1.jsonl")] == [3, 4, 5]


def test_a_run_dir_that_is_a_link_to_nothing(
    home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "disk").symlink_to(home / "not-mounted")
    for folder in (home / "disk", home / "disk" / "run"):
        code, _, err = run(capsys, "train", str(home / "own.yaml"), f"run.dir={folder}")
        assert code == 2
        assert f"{home / 'disk'} is a link to {home / 'not-mounted'}, which is not there" in err
    assert started == []
    assert os.readlink(home / "disk") == str(home / "not-mounted")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"steps": 3}',
        "not JSON",
        '{"checkpoint": "step=2", "steps": "3"}',
        '{"checkpoint": "step=2", "steps": true}',
        '{"checkpoint": "step=2", "steps": -1}',
        '{"checkpoint": null, "steps": 3}',
    ],
)
def test_a_note_that_cannot_be_read_is_an_error(
    home: Path, words: list[str], capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (home / "run" / saved.SAVED).write_text(text)
    code, _, err = run(capsys, *words)
    assert code == 2
    assert f"{home / 'run' / saved.SAVED} cannot be read" in err
