"""A run that is asked to stop saves that step once, ends cleanly, and goes on as if it had not stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_eaft import recorder
from nemo_eaft.stop import REQUEST, read_stopped
from tests.nemo import jobs, stopping
from tests.nemo.conftest import Workshop
from tests.nemo.launched import assert_same_checkpoint, checkpoints
from tests.nemo.ranks import run_ranks
from tests.nemo.test_resume import without_times

STEPS = 6
EVERY = 3


def plan(workshop: Workshop, name: str) -> jobs.Plan:
    trainer = {"max_steps": STEPS, "save_every": EVERY, "val_every": EVERY, "gpus_per_node": 2}
    settings = workshop.settings(name, "llama", parallel={"pipeline": 2}, trainer=trainer)
    return jobs.Plan(settings, workshop.nemo("llama"), save=True)


@pytest.fixture(scope="session")
def undisturbed(workshop: Workshop) -> Path:
    whole = plan(workshop, "stop-undisturbed")
    seen = run_ranks(stopping.train, 2, whole, None, 0)
    assert [one.saves for one in seen] == [2, 2]
    return Path(whole.settings.run.dir)


@pytest.mark.parametrize(
    "step, validations",
    [
        (2, 0),
        # Saved and validated by schedule: neither twice, nor left out.
        (3, 1),
    ],
)
def test_a_signal_to_one_rank_stops_all(workshop: Workshop, undisturbed: Path, step: int, validations: int) -> None:
    asked = plan(workshop, f"stop-at-{step}")
    run_dir = Path(asked.settings.run.dir)
    seen = run_ranks(stopping.train, 2, asked, step, 1)
    assert [one.saves for one in seen] == [1, 1]
    assert [len(one.recorded.losses) for one in seen] == [step, step]
    assert [len(one.recorded.val_losses) for one in seen] == [validations, validations]
    assert checkpoints(run_dir) == [f"step={step - 1}"]
    note = read_stopped(run_dir)
    assert note is not None
    assert (note.step, note.reason) == (step, "SIGUSR1 to another rank")
    assert Path(note.checkpoint or "").resolve() == (run_dir / "checkpoints" / f"step={step - 1}").resolve()

    seen = run_ranks(stopping.train, 2, asked, None, 0)
    assert [len(one.recorded.losses) for one in seen] == [STEPS - step] * 2
    assert_same_checkpoint(*(folder / "checkpoints" / f"step={STEPS - 1}" for folder in (run_dir, undisturbed)))
    lines, expected = (recorder.read(folder / "metrics.jsonl") for folder in (run_dir, undisturbed))
    assert without_times(lines) == without_times(expected)


def test_a_request_in_the_last_step_stops_nothing(workshop: Workshop, undisturbed: Path) -> None:
    """The run is finished then, and leaves neither a note nor the request."""
    asked = plan(workshop, "stop-at-the-end")
    run_dir = Path(asked.settings.run.dir)
    seen = run_ranks(stopping.train, 2, asked, STEPS, 0)
    assert [one.saves for one in seen] == [2, 2]
    assert read_stopped(run_dir) is None
    assert not (run_dir / REQUEST).exists()
    assert_same_checkpoint(*(folder / "checkpoints" / f"step={STEPS - 1}" for folder in (run_dir, undisturbed)))


def test_agreeing_costs_little() -> None:
    seconds = max(run_ranks(stopping.cost_of_agreeing, 4, 300))
    print(f"agreeing over four ranks takes {seconds * 1e6:.0f} us (median)")
    assert seconds < 0.05
