"""Which checkpoint a run goes on from."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from nemo_eaft.checkpoints import FOLDER, checkpoints_in, choose, set_aside, steps_done
from nemo_eaft.integrity import SUMS, write_sums


def save(run_dir: Path, step: int, *, unfinished: bool = False) -> Path:
    path = run_dir / FOLDER / f"step={step}"
    for name in ("weights/__0_0.distcp", "context/io.json"):
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text(f"{name} of step {step}")
    if unfinished:
        path.with_name(f"{path.name}-unfinished").touch()
    else:
        write_sums(path)
        link = path.with_name(f"{path.name}-last")
        link.symlink_to(path.name)
    return path


def damage(path: Path) -> Path:
    file = path / "weights/__0_0.distcp"
    os.truncate(file, 3)
    return file


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    good = [save(tmp_path, step) for step in (1, 9, 10)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = choose(tmp_path)
    assert choice.checkpoint == good[-1]
    assert choice.steps == 11
    assert choice.damaged == ()
    assert checkpoints_in(tmp_path) == good


def test_nothing_there_is_a_new_run(tmp_path: Path) -> None:
    assert choose(tmp_path).checkpoint is None
    assert choose(tmp_path).steps == 0


def test_a_damaged_one_is_named_and_passed_over(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 3), save(tmp_path, 5)
    file = damage(bad)
    with pytest.warns(UserWarning, match=r"the run goes on from .*step=3") as said:
        choice = choose(tmp_path)
    assert f"{file}: 3 bytes, but" in str(said[0].message)
    assert (choice.checkpoint, choice.damaged, choice.steps) == (good, (bad,), 4)
    set_aside(choice)
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["step=3", "step=3-last", "step=5.damaged"]
    # The next save of this step takes its name, is damaged in turn, and goes aside as well.
    damage(save(tmp_path, 5))
    with pytest.warns(UserWarning, match="damaged"):
        set_aside(choose(tmp_path))
    there = ["step=3", "step=3-last", "step=5.damaged", "step=5.damaged-2"]
    assert sorted(os.listdir(tmp_path / FOLDER)) == there
    assert checkpoints_in(tmp_path) == [good]


def test_no_whole_one_is_an_error_that_names_every_file_and_moves_nothing(tmp_path: Path) -> None:
    bad = [save(tmp_path, 3), save(tmp_path, 5)]
    cut = damage(bad[0])
    (bad[1] / SUMS).unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole") as raised:
        choose(tmp_path)
    assert f"{cut}: 3 bytes" in str(raised.value)
    assert f"{bad[1] / SUMS}: is missing" in str(raised.value)
    assert checkpoints_in(tmp_path) == bad


def test_an_unfinished_one_is_named(tmp_path: Path) -> None:
    good = save(tmp_path, 3)
    save(tmp_path, 1, unfinished=True)  # was being removed: nothing is lost
    save(tmp_path, 5, unfinished=True)
    with pytest.warns(
        UserWarning, match=r"step=5 was not finished when its job ended, .* goes on from .*step=3"
    ) as said:
        assert choose(tmp_path).checkpoint == good
    assert len(said) == 1


def test_nothing_was_ever_finished(tmp_path: Path) -> None:
    save(tmp_path, 3, unfinished=True)
    with pytest.warns(UserWarning, match=r"step=3 was not finished .* starts anew: no checkpoint was ever finished"):
        assert choose(tmp_path).checkpoint is None


def test_a_folder_without_its_context_is_damaged(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 3), save(tmp_path, 5)
    for path in (bad / "context").iterdir():
        path.unlink()
    (bad / "context").rmdir()
    with pytest.warns(UserWarning, match=r"step=5/context/io\.json: is missing"):
        assert choose(tmp_path).checkpoint == good


@pytest.mark.parametrize("name, steps", [("step=3", 4), ("step=3-last", 4), ("step=3-v1", 4), ("other", 0)])
def test_steps_by_name(name: str, steps: int) -> None:
    assert steps_done(Path(name)) == steps
