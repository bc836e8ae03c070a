"""Nothing in the loss: a micro-batch, a data-parallel rank, a whole step, a whole validation. No NaN, no hang."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nemo import faults, jobs, reference
from tests.nemo.conftest import Run, Workshop, assemble
from tests.nemo.faults import Fault, Outcome
from tests.nemo.ranks import run_ranks

STEPS = 4
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "fused": (1, {}, {"fused_linear": True}),
    "dp2": (2, {}, {}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}, {}),
    "vpp2-dp2": (4, {"pipeline": 2, "virtual_pipeline": 2}, {}),
}


def train(workshop: Workshop, name: str, layout: str, fault: Fault, callback: bool = True, **changes: Any) -> Run:
    world, parallel, loss = LAYOUTS[layout]
    settings = workshop.settings(
        f"all-masked-{name}",
        "llama",
        parallel=parallel,
        loss=loss | changes.get("loss", {}),
        trainer={"max_steps": STEPS, "gpus_per_node": world} | changes.get("trainer", {}),
    )
    plan = jobs.Plan(settings, workshop.nemo("llama"), callback=callback)
    return Run(settings, run_ranks(faults.train, world, plan, fault))


@pytest.fixture(scope="module")
def fault(workshop: Workshop) -> Fault:
    """Step 1 a micro-batch, step 2 all rows of a data-parallel rank, step 3 everything; step 4 as ever."""
    single = train(workshop, "undisturbed", "one", Fault()).ranks[0].answers
    two = train(workshop, "undisturbed-dp2", "dp2", Fault()).ranks[1].answers
    masked = [(1, row) for row in single[0][1]]
    masked += [(2, row) for rows in two[1] for row in rows]
    masked += [(3, row) for rows in single[2] for row in rows]
    assert len(masked) == 2 + 4 + 8
    return Fault(masked=frozenset(masked))


@pytest.fixture(scope="module")
def single(workshop: Workshop, fault: Fault) -> Run:
    return train(workshop, "one", "one", fault)


def test_one_rank_follows_the_formula(workshop: Workshop, fault: Fault, single: Run) -> None:
    rank: Outcome = single.ranks[0]
    assert rank.error is None
    assert [len(rows) for rows in rank.answers[0]] == [2, 2, 2, 2]
    assert rank.answers[0][1] == [(), ()]
    counted = [row for rows in rank.answers[0] for row in rows if row]
    expected = reference.means(workshop.sums("llama")[row] for row in counted)
    assert single.losses[0] == pytest.approx(expected["loss"], abs=1e-5)
    assert single.steps[0]["tokens"] == expected["tokens"]
    norm = reference.gradient_norm(workshop.model("llama"), {row: workshop.train_rows[row] for row in counted})
    assert rank.gradient_norms[0] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_every_layout_follows_one_rank(workshop: Workshop, fault: Fault, single: Run, layout: str) -> None:
    run = train(workshop, layout, layout, fault)
    assert [rank.error for rank in run.ranks] == [None] * len(run.ranks)
    if layout == "dp2":
        assert all(row == () for rows in run.ranks[1].answers[1] for row in rows)
    assert run.losses == pytest.approx(single.losses, rel=1e-5)
    for row, expected in zip(run.steps, single.steps, strict=True):
        assert row["tokens"] == expected["tokens"]
        for key in ("loss", "cross_entropy", "entropy", "weight"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5), key
    before, after, wanted = (
        assemble([getattr(rank, part) for rank in ranks])
        for ranks, part in ((single.ranks, "initial"), (run.ranks, "final"), (single.ranks, "final"))
    )
    for key, want in wanted.items():
        assert (after[key] - want).norm() / (want - before[key]).norm() < 1e-3, key


def test_a_step_without_a_token(single: Run) -> None:
    """Loss 0, a warning, and an optimizer that goes on without a gradient, as Megatron's does."""
    rank: Outcome = single.ranks[0]
    assert single.losses[2] == 0.0
    assert rank.gradient_norms[2] == 0.0
    row = single.steps[2]
    assert row["tokens"] == 0
    assert row["loss"] == row["cross_entropy"] == row["entropy"] == row["weight"] == 0.0
    assert any("step 3: no token of the global batch takes part" in text for text in rank.warnings)
    assert not any("step 2: no token" in text for text in rank.warnings)
    betas = single.settings.trainer.adam_beta1, single.settings.trainer.adam_beta2
    decayed = 0
    for old, new in zip(rank.optimizers[1], rank.optimizers[2], strict=True):
        # Both moments of every parameter, and the number of the step.
        if old.dim() and old.any():
            assert any(torch.allclose(new, beta * old, rtol=1e-6, atol=0) for beta in betas)
            decayed += 1
    assert decayed > 10


def test_it_is_what_nemo_does(workshop: Workshop, fault: Fault) -> None:
    """The weights after such steps are those of NeMo without us, bit for bit; its own loss of step 3 is 0 / 0."""
    measured, stock = (
        train(workshop, f"stock-{on}", "one", fault, callback=on, loss={"gate": "stock"}) for on in (True, False)
    )
    assert stock.losses[2] != stock.losses[2]
    assert measured.losses[:2] + [0.0] + measured.losses[3:] == measured.losses
    assert measured.losses[:2] + measured.losses[3:] == stock.losses[:2] + stock.losses[3:]
    ours, theirs = (run.ranks[0].final for run in (measured, stock))
    for name, pieces in ours.items():
        for a, b in zip(pieces, theirs[name], strict=True):
            assert torch.equal(a.data, b.data), name


def test_a_validation_without_a_token(workshop: Workshop) -> None:
    """No number is made up, the run goes on, and the best checkpoint is the one that was validated."""
    fault = Fault(masked_validations=1, monitor=True)
    run = train(workshop, "validation", "dp2", fault, trainer={"val_every": 2})
    assert [rank.error for rank in run.ranks] == [None, None]
    assert len(run.losses) == STEPS
    (line,) = run.validations
    assert line["step"] == 4
    assert line["val_loss"] > 0
    assert "NaN" not in (run.dir / "metrics.jsonl").read_text()
    said = [text for text in run.ranks[0].warnings if "no token of the validation data takes part" in text]
    assert len(said) == 1
    assert "after step 2" in said[0]
    # NeMo counts from 0 here. Its own number of the first validation is 0 / 0, which counts as the worst.
    assert saved(run.dir) == [f"step=3-val_loss={run.ranks[0].val_losses[1]:.2f}"]
    assert run.ranks[0].val_losses[0] != run.ranks[0].val_losses[0]


def saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())
