"""Whatever happens while a checkpoint is written or afterwards: the last whole one is gone on from, or an error names
the file. Real trainings, killed and starved for real."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_eaft.checkpoints import UNFINISHED, is_unfinished
from nemo_eaft.integrity import SUMS, faults
from nemo_eaft.ready import Ready, make_ready
from nemo_eaft.settings import Settings
from tests.nemo import breaking, jobs
from tests.nemo.conftest import Run, Workshop
from tests.nemo.ranks import run_ranks
from tests.nemo.test_resume import assert_equal
from tests.test_integrity import flip

WORLD = 2
STEPS = 6
EVERY = 2
KEEP = 2


def make(workshop: Workshop, name: str) -> Settings:
    settings = workshop.settings(
        name,
        "llama",
        trainer={
            "max_steps": STEPS,
            "save_every": EVERY,
            "keep_checkpoints": KEEP,
            "gpus_per_node": WORLD,
            "distributed_optimizer": True,
        },
    )
    imported = dataclasses.replace(settings.model, imported=str(workshop.nemo("llama")))
    return dataclasses.replace(settings, model=imported)


def plan(settings: Settings, ready: Ready) -> jobs.Plan:
    return jobs.Plan(settings, ready.checkpoint, resume_from=ready.resume_from, save=True)


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop) -> Run:
    """Its checkpoints are those of steps 4 and 6; what is copied from it is a run after that."""
    settings = make(workshop, "broken-undisturbed")
    return Run(settings, run_ranks(jobs.train, WORLD, plan(settings, make_ready(settings))))


@pytest.fixture
def half(workshop: Workshop, undisturbed: Run, request: pytest.FixtureRequest) -> Settings:
    """A run after its fourth step, saved there."""
    settings = make(workshop, f"broken-{request.node.name}")
    make_ready(settings)
    name = "step=3"
    shutil.copytree(undisturbed.dir / "checkpoints" / name, Path(settings.run.dir) / "checkpoints" / name)
    return settings


def listed(settings: Settings) -> list[str]:
    return sorted(os.listdir(Path(settings.run.dir) / "checkpoints"))


def finish(settings: Settings, undisturbed: Run, goes_on_from: str = "step=3") -> None:
    """Go on as the command line does, and end with the weights of the undisturbed run, bit for bit."""
    ready = make_ready(settings)
    assert ready.resume_from is not None
    assert ready.resume_from.name == goes_on_from
    ranks = run_ranks(jobs.train, WORLD, plan(settings, ready))
    done = int(goes_on_from.removeprefix("step=")) + 1
    for rank, expected in zip(ranks, undisturbed.ranks, strict=True):
        assert rank.losses == expected.losses[done:]
        assert_equal(rank.final, expected.final)
    last = Path(settings.run.dir) / "checkpoints" / f"step={STEPS - 1}"
    assert faults(last) == []
    assert (last.parent / f"{last.name}-last").resolve() == last
    assert not list(last.parent.glob(f"*{UNFINISHED}"))
    assert make_ready(settings).finished


def test_what_is_saved_has_sums(undisturbed: Run) -> None:
    assert [name for name in listed(undisturbed.settings) if "last" not in name] == ["step=3", "step=5"]
    for name in ("step=3", "step=5"):
        folder = undisturbed.dir / "checkpoints" / name
        check = subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=folder, capture_output=True, check=False)
        assert check.returncode == 0
        inside = {line.split("  ")[1] for line in (folder / SUMS).read_text().splitlines()}
        needed = {"weights/__0_0.distcp", "weights/__1_0.distcp", "weights/common.pt", "weights/metadata.json"}
        assert needed | {"weights/.metadata", "context/io.json", "context/model.yaml"} <= inside


def test_an_import_has_sums(workshop: Workshop) -> None:
    assert (workshop.nemo("llama") / SUMS).is_file()
    assert faults(workshop.nemo("llama")) == []


def test_a_context_that_cannot_be_written_is_an_error(half: Settings) -> None:
    """NeMo warns, and leaves a checkpoint that cannot be exported."""
    told = run_ranks(breaking.train_with_a_lambda, WORLD, plan(half, make_ready(half)))
    step = Path(half.run.dir) / "checkpoints" / "step=5"
    for text in told:
        assert text.startswith(f"RuntimeError: checkpoint {step} could not be written (")
        assert "rank 0: " in text
    assert is_unfinished(step)
    assert not (step / "weights").exists()


MOMENTS = {
    "context": r"open .*/step=5/context/",
    "a rank's part": r"open .*/step=5/weights/__1_\d+\.distcp",
    "the plan of the parts": r"open .*/step=5/weights/\.metadata",
    "common.pt": r"open .*/step=5/weights/common\.pt",
    "metadata.json": r"open .*/step=5/weights/metadata\.json",
    "sums": r"open .*/step=5/\.SHA256SUMS",
    "sums not yet named": r"os\.rename .*/step=5/\.SHA256SUMS",
    "whole, but not yet said": r"os\.remove .*/step=5-unfinished",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_saves(half: Settings, undisturbed: Run, moment: str) -> None:
    ready = make_ready(half)
    run_ranks(breaking.train_and_be_killed, WORLD, plan(half, ready), MOMENTS[moment], dies=True)
    assert f"step=5{UNFINISHED}" in listed(half)
    with pytest.warns(UserWarning, match=r"step=5 was not finished when its job ended.* goes on from .*step=3"):
        finish(half, undisturbed)


DAMAGE = {
    "a flipped bit of a part": ("weights/__0_0.distcp", lambda path: flip(path, path.stat().st_size // 2)),
    "a part cut short": ("weights/__1_1.distcp", lambda path: os.truncate(path, path.stat().st_size - 1)),
    "common.pt": ("weights/common.pt", lambda path: flip(path, path.stat().st_size // 2)),
    "metadata.json": ("weights/metadata.json", lambda path: path.write_text(path.read_text().replace("1", "2"))),
    "the plan of the parts": ("weights/.metadata", lambda path: flip(path, path.stat().st_size // 2)),
    "the context": ("context/io.json", lambda path: flip(path, path.stat().st_size // 2)),
    "the model's context": ("context/model.yaml", lambda path: path.unlink()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_and_the_one_before_is_taken(half: Settings, undisturbed: Run, kind: str) -> None:
    name, damage = DAMAGE[kind]
    newest = Path(half.run.dir) / "checkpoints" / "step=5"
    shutil.copytree(undisturbed.dir / "checkpoints" / newest.name, newest)
    damage(newest / name)
    with pytest.warns(UserWarning, match="damaged checkpoints are not used; the run goes on from .*step=3") as said:
        ready = make_ready(half)
    assert f"{newest / name}: " in str(said[0].message)
    assert ready.resume_from == newest.with_name("step=3")
    assert not ready.finished
    assert json.loads((Path(half.run.dir) / "ready.json").read_text())["resume_from"] == str(ready.resume_from)
    assert listed(half) == ["step=3", "step=5.damaged"]
    if kind == "a flipped bit of a part":
        finish(half, undisturbed)
        assert (newest.with_name("step=5.damaged") / name).is_file()


def test_none_whole_is_an_error_and_nothing_starts_anew(half: Settings) -> None:
    file = Path(half.run.dir) / "checkpoints" / "step=3" / "weights" / "__0_0.distcp"
    flip(file)
    with pytest.raises(ValueError, match="no checkpoint is whole") as raised:
        make_ready(half)
    assert f"{file}: its bytes are not those that were saved" in str(raised.value)
    assert listed(half) == ["step=3"]


def test_without_the_check_a_flipped_bit_is_trained_on(half: Settings, undisturbed: Run) -> None:
    """Why there are sums: NeMo, Megatron and torch load it, and train."""
    newest = Path(half.run.dir) / "checkpoints" / "step=3"
    part = newest / "weights" / "__0_0.distcp"
    # A high bit of an exponent, in the middle of the largest part: a float32 is stored little-endian.
    content = part.read_bytes()
    flip(part, len(content) // 2, 6)
    unchecked = jobs.Plan(half, Path(str(half.model.imported)), resume_from=newest, save=True)
    ranks = run_ranks(jobs.train, WORLD, unchecked)
    assert len(ranks[0].losses) == STEPS - 4
    with pytest.raises(AssertionError):
        assert_equal(ranks[0].final, undisturbed.ranks[0].final)


# In place of the system's own message where torch.save's writer hides it: which it does depends on the place in the
# file where the disk is full.
CUT_SHORT = r"a file could not be written to its end \(.*unexpected pos \d+ vs \d+\)"


@pytest.fixture
def small_disk(half: Settings, tmp_path: Path) -> Iterator[Path]:
    """The checkpoints of the run on a file system with room for one and a half of them."""
    folder = Path(half.run.dir) / "checkpoints"
    saved = folder / "step=3"
    size = sum(path.stat().st_size for path in saved.rglob("*"))
    aside = saved.rename(tmp_path / saved.name)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        shutil.copytree(aside, saved)
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full(half: Settings, small_disk: Path, undisturbed: Run) -> None:
    told = run_ranks(breaking.train_and_tell, WORLD, plan(half, make_ready(half)))
    for text in told:
        assert text.startswith(f"RuntimeError: checkpoint {small_disk / 'step=5'} could not be written (")
        assert re.search(rf"GB are free on its disk\): (\[Errno 28\] No space left on device|{CUT_SHORT})", text)
    assert faults(small_disk / "step=3") == []
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    with pytest.warns(UserWarning, match=r"step=5 was not finished"):
        finish(half, undisturbed)


def test_a_file_that_cannot_be_written(half: Settings, undisturbed: Run) -> None:
    """As a full disk, where nothing can be mounted: files beyond a size are refused by the system (EFBIG)."""
    largest = max(path.stat().st_size for path in (undisturbed.dir / "checkpoints" / "step=5").rglob("*"))
    told = run_ranks(breaking.train_with_small_files, WORLD, plan(half, make_ready(half)), largest // 2)
    step = Path(half.run.dir) / "checkpoints" / "step=5"
    for text in told:
        assert text.startswith(f"RuntimeError: checkpoint {step} could not be written (")
        assert re.search(rf"GB are free on its disk\): (\[Errno 27\] File too large|{CUT_SHORT})", text)
    with pytest.warns(UserWarning, match=r"step=5 was not finished"):
        finish(half, undisturbed)
