"""A run that was made longer is the long run, bit for bit, where the learning rate is; and the seed orders the rows."""

import dataclasses
import json
from pathlib import Path

import pytest

from nemo_eaft import recorder, saved
from nemo_eaft.ready import make_ready
from nemo_eaft.settings import Settings
from tests.nemo import jobs
from tests.nemo.conftest import Run, Workshop
from tests.nemo.ranks import run_ranks
from tests.nemo.test_resume import assert_equal, without_times

SHORT, LONG = 5, 8  # steps of 8 of 32 rows: NeMo's own order of the fifth step depends on how many steps there are
WORLD = 2


def make(workshop: Workshop, name: str, max_steps: int, seed: int = 7) -> Settings:
    settings = workshop.settings(
        name,
        "llama",
        trainer={
            "max_steps": max_steps,
            "save_every": SHORT,
            "gpus_per_node": WORLD,
            "distributed_optimizer": True,
            # The cosine of a longer run is another one; this one is a constant.
            "min_learning_rate": 1e-3,
            "seed": seed,
        },
    )
    imported = dataclasses.replace(settings.model, imported=str(workshop.nemo("llama")))
    return dataclasses.replace(settings, model=imported)


def train(settings: Settings, allow: bool = False) -> Run:
    ready = make_ready(settings, allow)
    plan = jobs.Plan(settings, ready.checkpoint, resume_from=ready.resume_from, save=True)
    return Run(settings, run_ranks(jobs.train, WORLD, plan))


def test_a_run_that_was_made_longer_is_the_long_run(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    expected = train(make(workshop, "extended-never", LONG))
    # NeMo takes every "-last" out of a path to tell whether a step is saved, and saved a second time instead of a link.
    name = "extended-last"
    short = train(make(workshop, name, SHORT))
    folder = short.dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step=4", "step=4-last"]
    assert (folder / "step=4-last").is_symlink()
    assert saved.read(short.dir / saved.SAVED) == saved.Saved("step=4", SHORT)
    capsys.readouterr()

    long = train(make(workshop, name, LONG), allow=True)
    said = capsys.readouterr().out
    assert f"trainer.max_steps: {SHORT} -> {LONG}" in said
    assert f"step {SHORT + 1} follows with these; the order of rows goes on after {SHORT} batches" in said
    # NeMo names the last step so where `save_every` does not divide it.
    assert saved.read(long.dir / saved.SAVED) == saved.Saved("step=7-last", LONG)
    assert len(long.losses) == LONG - SHORT
    assert long.losses == expected.losses[SHORT:]
    for before, after, whole in zip(short.ranks, long.ranks, expected.ranks, strict=True):
        assert before.answers + after.answers == whole.answers
        assert after.gradient_norms == whole.gradient_norms[SHORT:]
        assert_equal(after.final, whole.final)
        assert all(left.equal(right) for left, right in zip(after.optimizer, whole.optimizer, strict=True))
    lines, expected_lines = (recorder.read(run.dir / "metrics.jsonl") for run in (long, expected))
    assert without_times(lines) == without_times(expected_lines)
    rows = [row for step in range(LONG) for row in expected.answers(step)]
    assert sorted(rows[:32]) == sorted(workshop.train_rows)


def test_the_seed_orders_the_rows_of_every_layout_alike(workshop: Workshop) -> None:
    def rows(world: int, seed: int, **parallel: int) -> list[list[tuple[int, ...]]]:
        name = f"extended-seed-{seed}-" + "-".join(f"{key}{value}" for key, value in parallel.items())
        trainer = {"max_steps": 2, "seed": seed}
        run = workshop.train(name, world=world, parallel=parallel, trainer=trainer)
        return [run.answers(step) for step in range(2)]

    assert rows(2, 7, tensor=2) == rows(2, 7) == rows(2, 7, pipeline=2)
    assert rows(2, 8) != rows(2, 7)


def test_another_seed_is_said_to_draw_rows_in_another_order(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """No training: the checkpoint is not even loaded."""
    from tests.commands import make_checkpoint

    name = "extended-other-seed"
    make_ready(make(workshop, name, LONG))
    make_checkpoint(workshop.root / "runs" / name / "checkpoints" / "step=2")
    capsys.readouterr()
    ready = make_ready(make(workshop, name, LONG, seed=8), allow_change=True)
    assert ready.resume_from is not None
    said = capsys.readouterr().out
    assert "the order of rows is another one and starts after 3 batches: rows may come again, or not at all" in said
    assert json.loads((Path(ready.resume_from).parents[1] / "ready.json").read_text())["finished"] is False
