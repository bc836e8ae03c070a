"""A run that was killed and goes on is the run that was not killed; and what it exports is what it validated."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_eaft import recorder
from tests.nemo import breaking, jobs, reference
from tests.nemo.conftest import Run, Workshop, assemble
from tests.nemo.ranks import run_ranks

STEPS = 6
SAVED = 3
TIMES = ("seconds", "tokens_per_second")
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp1": (1, {}, {}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2, "sequence": True}, {}),
    "dp2-distributed-optimizer": (2, {}, {"distributed_optimizer": True}),
}


def plan(workshop: Workshop, name: str, layout: str, stop_at: int | None = None) -> jobs.Plan:
    world, parallel, trainer = LAYOUTS[layout]
    settings = workshop.settings(
        name,
        "llama",
        parallel=parallel,
        trainer={"max_steps": STEPS, "save_every": SAVED, "val_every": SAVED, "gpus_per_node": world} | trainer,
    )
    return jobs.Plan(settings, workshop.nemo("llama"), save=True, stop_at=stop_at)


def undisturbed(workshop: Workshop, layout: str) -> Run:
    world, parallel, trainer = LAYOUTS[layout]
    steps = {"max_steps": STEPS, "save_every": SAVED, "val_every": SAVED}
    return workshop.train(
        f"undisturbed-{layout}", world=world, parallel=parallel, trainer=steps | trainer, plan={"save": True}
    )


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in (run_dir / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: path.stat().st_mtime)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(workshop: Workshop, layout: str) -> None:
    world = LAYOUTS[layout][0]
    expected = undisturbed(workshop, layout)

    # Two steps after the checkpoint, in the middle of a step: step 4 is done and written, and has to be done again.
    killed = plan(workshop, f"killed-{layout}", layout, stop_at=SAVED + 2)
    run_ranks(jobs.train, world, killed, dies=True)
    run_dir = Path(killed.settings.run.dir)
    assert [row["step"] for row in recorder.read(run_dir / "metrics.jsonl")] == [1, 2, 3, 3, 4]
    assert len(checkpoints(run_dir)) == 1

    again = plan(workshop, f"killed-{layout}", layout)
    resumed = Run(again.settings, run_ranks(jobs.train, world, again))
    assert resumed.losses == expected.losses[SAVED:]
    assert resumed.ranks[0].val_losses == expected.ranks[0].val_losses[1:]
    for left, right in zip(resumed.ranks, expected.ranks, strict=True):
        assert left.answers == right.answers[SAVED:]
        assert left.gradient_norms == right.gradient_norms[SAVED:]
        assert_equal(left.final, right.final)
        assert len(left.optimizer) == len(right.optimizer) > 0
        assert all(torch.equal(a, b) for a, b in zip(left.optimizer, right.optimizer, strict=True))
        # It went on from the checkpoint, not from the beginning.
        assert not same(left.initial, right.initial)
    lines, expected_lines = (recorder.read(run.dir / "metrics.jsonl") for run in (resumed, expected))
    assert [row["step"] for row in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert without_times(lines) == without_times(expected_lines)


def test_a_validation_that_was_cut_off_is_done_after_the_resume(workshop: Workshop) -> None:
    """NeMo saves first, and would validate next at the next time."""
    expected = undisturbed(workshop, "dp2-distributed-optimizer")
    killed = plan(workshop, "validation-killed", "dp2-distributed-optimizer")
    run_ranks(breaking.train_and_die_before_validation, 2, killed, dies=True)
    run_dir = Path(killed.settings.run.dir)
    assert [row["step"] for row in recorder.read(run_dir / "metrics.jsonl")] == [1, 2, 3]
    assert len(checkpoints(run_dir)) == 1
    resumed = Run(killed.settings, run_ranks(jobs.train, 2, killed))
    assert resumed.ranks[0].val_losses == expected.ranks[0].val_losses
    lines, expected_lines = (recorder.read(run.dir / "metrics.jsonl") for run in (resumed, expected))
    assert without_times(lines) == without_times(expected_lines)
    for left, right in zip(resumed.ranks, expected.ranks, strict=True):
        assert_equal(left.final, right.final)
        assert left.answers == right.answers[SAVED:]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def same(left: dict[str, list[jobs.Piece]], right: dict[str, list[jobs.Piece]]) -> bool:
    pairs = ((a, b) for name in left for a, b in zip(left[name], right[name], strict=True))
    return all(torch.equal(a.data, b.data) for a, b in pairs)


def assert_equal(left: dict[str, list[jobs.Piece]], right: dict[str, list[jobs.Piece]]) -> None:
    assert left.keys() == right.keys()
    assert same(left, right)


def held_out(folder: Path, rows: dict[reference.Answer, list[int]]) -> float:
    """Cross-entropy per answer token of a Hugging Face folder, by transformers alone."""
    return reference.means(reference.row_sums(reference.load_model(folder), rows).values())["cross_entropy"]


@pytest.mark.parametrize(
    "name, family, model, world, parallel",
    [
        ("three-heads", "llama", {"heads": 3}, 3, {"tensor": 3}),
        ("three-copies", "qwen3", {}, 3, {}),
        ("tied-stages", "qwen2", {}, 2, {"pipeline": 2}),
    ],
)
def test_what_is_exported_is_what_was_validated(
    workshop: Workshop,
    tmp_path: Path,
    name: str,
    family: str,
    model: dict[str, Any],
    world: int,
    parallel: dict[str, int],
) -> None:
    """Three ranks save here, too; a tied embedding that lives on two stages comes back as one."""
    run = workshop.train(
        name,
        family,
        world=world,
        model=model,
        parallel=parallel,
        trainer={"max_steps": 4, "save_every": 2, "val_every": 4, "global_batch_size": 6, "micro_batch_size": 1},
        plan={"save": True},
    )
    # val_batches=2 global batches of 6 rows: the first 12 of 16.
    rows = dict(list(workshop.validation_rows.items())[:12])
    before = held_out(workshop.hf(family, **model), rows)
    newest = checkpoints(run.dir)[-1]
    run_ranks(jobs.to_hf, 1, newest, tmp_path / "hf", workshop.nemo(family, **model) / "hf")
    (line,) = run.validations
    assert line["step"] == 4
    assert abs(line["val_loss"] - before) > 1e-2
    assert held_out(tmp_path / "hf", rows) == pytest.approx(line["val_loss"], abs=1e-4)
    assemble([rank.final for rank in run.ranks])
