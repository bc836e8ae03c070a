"""Real launchers and real ranks: one is killed, and the job ends soon and says who, or goes on as if nothing had been.

Every run here is the same six steps on two ranks; `undisturbed` is what all must end with, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import launch
from nemo_eaft.settings import Settings
from tests.nemo.conftest import Workshop
from tests.nemo.launched import Job, assert_same_checkpoint, checkpoints, processes_with, saved_tensors, start
from tests.nemo.sabotage import Sabotage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 6
SAVED = 3
WORLD = 2


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


def nothing_left(job: Job) -> bool:
    return processes_with(str(job.run_dir)) == []


def test_a_killed_rank_is_named_first(workshop: Workshop, undisturbed: Path) -> None:
    """`kill -9` in the forward pass of step 5: its peer fails with a closed connection, and is not blamed."""
    settings = make_settings(workshop, "survival-killed")
    job = start(settings, workshop.nemo("llama"), Sabotage("forward", step=5, rank=1))
    assert job.wait(240) == 1
    assert "nemo-eaft: rank 1 (pid " in job.last_line()
    assert "was killed by SIGKILL" in job.last_line()
    error = json.loads((job.run_dir / launch.ERROR).read_text())
    assert error["rank"] == 0
    assert f"nemo-eaft: rank 0, then: {error['message']}" in job.output()
    assert checkpoints(job.run_dir) == [f"step={SAVED - 1}"]
    same_checkpoint(job.run_dir, undisturbed, SAVED)
    job_ends = job.seconds()
    job.until_gone(10)
    print(f"killed rank: whole job {job_ends:.1f} s, {job_ends - job.seconds_at_step(4):.1f} s after step 4")


def test_torchrun_starts_the_ranks_again_and_the_weights_are_the_same(workshop: Workshop, undisturbed: Path) -> None:
    """`kill -9` inside an all-reduce of step 5, under a plain `torchrun --max-restarts=1`."""
    settings = make_settings(workshop, "survival-restarted")
    job = start(settings, workshop.nemo("llama"), Sabotage("collective", step=5, rank=1, attempt=0), torchrun=1)
    assert job.wait(300) == 0, job.output()[-4000:]
    assert job.output().count("exitcode: -9") == 1
    assert checkpoints(job.run_dir) == [f"step={SAVED - 1}", f"step={STEPS - 1}"]
    same_checkpoint(job.run_dir, undisturbed, STEPS)
    # A wrong variant: the checkpoint before is another one.
    first, last = (saved_tensors(job.run_dir / "checkpoints" / f"step={step - 1}") for step in (SAVED, STEPS))
    assert any((first[name] != last[name]).any() for name in first)
