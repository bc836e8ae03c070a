"""Real launchers and real ranks: one is killed, and the job ends soon and says who, or goes on as if nothing had been.

Every run here is the same six steps on two ranks; `undisturbed` is what all must end with, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import launch
from nemo_eaft.settings import Settings
from nemo_eaft.stop import EXIT_STOPPED, REQUEST, read_stopped, request
from tests.nemo.conftest import Workshop
from tests.nemo.launched import Job, assert_same_checkpoint, checkpoints, start
from tests.nemo.sabotage import Place, Sabotage
from tests.soak.soak import compare, soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 6
SAVED = 3
WORLD = 2
SLACK = 60
"""Seconds for what a busy machine adds; every wait that would go unnoticed here is of half an hour."""


def make_settings(workshop: Workshop, name: str, **run: Any) -> Settings:
    settings = workshop.settings(
        name,
        "llama",
        parallel={"tensor": 2, "sequence": True},
        trainer={"max_steps": STEPS, "save_every": SAVED, "gpus_per_node": WORLD},
    )
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, **run))


@pytest.fixture(scope="session")
def undisturbed(workshop: Workshop) -> Path:
    """The folder of the run that nothing happened to; its ranks were forks, not torchrun's."""
    run = workshop.train(
        "survival-undisturbed",
        "llama",
        world=WORLD,
        parallel={"tensor": 2, "sequence": True},
        trainer={"max_steps": STEPS, "save_every": SAVED},
        plan={"save": True},
    )
    assert checkpoints(run.dir) == [f"step={SAVED - 1}", f"step={STEPS - 1}"]
    return run.dir


def same_checkpoint(run_dir: Path, undisturbed: Path, step: int) -> None:
    name = f"checkpoints/step={step - 1}"
    assert_same_checkpoint(run_dir / name, undisturbed / name)


@pytest.fixture(scope="session")
def killed(workshop: Workshop) -> Job:
    """A run whose rank 1 got `kill -9` in the forward pass of step 5."""
    job = start(make_settings(workshop, "survival-killed"), workshop.nemo("llama"), Sabotage("forward", step=5, rank=1))
    assert job.wait(400) == 1
    # Torchrun gives the other rank 30 s to end; torch's own limit for a collective is half an hour.
    assert job.seconds_since_mark() < 30 + SLACK
    # Megatron's checkpoint writer included, which knows of the death only by looking.
    job.until_gone(SLACK)
    return job


def test_a_killed_rank_is_named_first(killed: Job, undisturbed: Path) -> None:
    """Its peer fails with a closed connection, and is not blamed."""
    assert "nemo-eaft: rank 1 (pid " in killed.last_line()
    assert "was killed by SIGKILL" in killed.last_line()
    if (killed.run_dir / launch.ERROR).exists():  # its peer may have had the time for one before it was ended
        assert json.loads((killed.run_dir / launch.ERROR).read_text())["rank"] == 0
    assert checkpoints(killed.run_dir) == [f"step={SAVED - 1}"]
    same_checkpoint(killed.run_dir, undisturbed, SAVED)


def test_a_run_killed_twice_ends_as_if_nothing_had_been(
    workshop: Workshop, killed: Job, undisturbed: Path, tmp_path: Path
) -> None:
    """`make soak`, short: after the kill in a forward pass one in the last save, then to the end."""
    settings = make_settings(workshop, "survival-killed")
    [kill] = soak(settings, workshop.nemo("llama"), undisturbed, [Sabotage("save", step=STEPS, rank=0)])
    assert kill.done >= STEPS - 1
    # What it compares would not be the same by accident.
    with pytest.raises(AssertionError):
        assert_same_checkpoint(*(killed.run_dir / "checkpoints" / f"step={step - 1}" for step in (SAVED, STEPS)))
    shutil.copytree(undisturbed, tmp_path / "other", symlinks=True)
    metrics = tmp_path / "other" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 4,', '"step": 5,'))
    with pytest.raises(AssertionError, match=r"metrics\.jsonl differs"):
        compare(killed.run_dir, tmp_path / "other")


def test_torchrun_starts_the_ranks_again_and_the_weights_are_the_same(workshop: Workshop, undisturbed: Path) -> None:
    """`kill -9` inside an all-reduce of step 5, under a plain `torchrun --max-restarts=1`."""
    settings = make_settings(workshop, "survival-restarted")
    job = start(settings, workshop.nemo("llama"), Sabotage("collective", step=5, rank=1, attempt=0), torchrun=1)
    assert job.wait(400) == 0, job.output()[-4000:]
    assert job.output().count("exitcode: -9") == 1
    assert checkpoints(job.run_dir) == [f"step={SAVED - 1}", f"step={STEPS - 1}"]
    same_checkpoint(job.run_dir, undisturbed, STEPS)


def test_a_stop_saves_even_if_that_takes_longer_than_torchrun_waits(workshop: Workshop, undisturbed: Path) -> None:
    """Asked for by file while the ranks start; the save takes a minute longer, for which SIGTERM leaves no time, and
    which is more than twice what any other part of a step may take."""
    settings = make_settings(workshop, "survival-stopped", stall_seconds=25)
    job = start(settings, workshop.nemo("llama"), Sabotage("slow save", delay=60.0))
    # The ranks start: what the launcher found there is gone by now.
    job.until(lambda: "CPU backend on" in job.output())
    request(job.run_dir, "by the test")
    assert job.wait(400) == EXIT_STOPPED
    note = read_stopped(job.run_dir)
    assert note is not None
    # The step that was the next to end; on a machine that lets this process wait it may be a later one than the first.
    assert note.step == job.steps() < STEPS
    assert note.reason == "file stop: by the test"
    assert job.seconds_since_mark() > 60
    assert checkpoints(job.run_dir)[-1] == f"step={note.step - 1}" == Path(note.checkpoint or "").name
    assert not (job.run_dir / REQUEST).exists()
    assert f"stopped on request (file stop: by the test) after step {note.step}" in job.last_line()

    # The same command goes on. A request from before is removed, and is not what ends it.
    (job.run_dir / REQUEST).write_text("stale")
    job = start(settings, workshop.nemo("llama"))
    job.until((job.run_dir / "ready.json").exists)
    assert job.wait(400) == 0
    assert "it asked for a stop before this run was started" in job.output()
    assert read_stopped(job.run_dir) is None
    assert checkpoints(job.run_dir)[-1] == f"step={STEPS - 1}"
    same_checkpoint(job.run_dir, undisturbed, STEPS)


@pytest.mark.parametrize(
    "place, told",
    [
        (
            "sleep in forward",
            r"rank 1 is stuck: no progress for \d+ s after the forward of step 5, micro-batch 1; it is in",
        ),
        ("stop in forward", r"rank 1 does not answer: its process is stopped, or its machine is gone"),
    ],
)
def test_a_stalled_rank_is_named_with_its_stack(workshop: Workshop, undisturbed: Path, place: Place, told: str) -> None:
    settings = make_settings(workshop, f"survival-{place}", stall_seconds=25)
    job = start(settings, workshop.nemo("llama"), Sabotage(place, step=5, rank=1))
    assert job.wait(400) == 1
    assert re.search(told, job.last_line()), job.last_line()
    error = json.loads((job.run_dir / launch.ERROR).read_text())
    assert (error["rank"], error["kind"]) == (1, "stall")
    assert "rank 0: the forward of step 5, micro-batch 1, waits in" in error["traceback"]
    assert ("in forever" in error["traceback"]) == (place == "sleep in forward")
    # To notice, to hear the others and their dumps, and until torchrun kills what does not end.
    assert job.seconds_since_mark() < 25 + 5 + 6 + 30 + SLACK
    same_checkpoint(job.run_dir, undisturbed, SAVED)
    job.until_gone(SLACK)
