"""loss.fused_linear in real NeMo trainings: the same losses, gradients, weights and validation as without it."""

import json
from typing import Any

import pytest
import torch

from tests.nemo import faults, jobs
from tests.nemo.conftest import Run, Workshop, assemble
from tests.nemo.ranks import run_ranks

STEPS = 3

# family, ranks, parallel, trainer. 8 rows a step in micro-batches of 2: 4 of them, or 2 where data are parallel.
LAYOUTS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "tp1": ("llama", 1, {}, {}),
    "tp1-tied": ("qwen3", 1, {}, {}),
    "tp1-recompute": ("llama", 1, {}, {"recompute": "full"}),
    "tp2-sequence": ("llama", 2, {"tensor": 2, "sequence": True}, {}),
    "tp2-tied-distributed-optimizer": ("qwen3", 2, {"tensor": 2}, {"distributed_optimizer": True}),
    "pp2-vpp2": ("llama", 2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "pp2-vpp2-tied": ("qwen2", 2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "tp2-pp2-tied": ("qwen2", 4, {"tensor": 2, "pipeline": 2, "sequence": True}, {}),
    "dp2-distributed-optimizer": ("llama", 2, {}, {"distributed_optimizer": True}),
}


def train(workshop: Workshop, name: str, fused: bool) -> Run:
    family, world, parallel, trainer = LAYOUTS[name]
    return workshop.train(
        f"{'fused' if fused else 'unfused'}-{name}",
        family,
        world=world,
        parallel=parallel,
        loss={"fused_linear": fused},
        trainer={"max_steps": STEPS, "val_every": STEPS} | trainer,
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_fused_training_is_the_unfused_one(workshop: Workshop, name: str) -> None:
    plain, fused = (train(workshop, name, on) for on in (False, True))
    assert [fused.answers(step) for step in range(STEPS)] == [plain.answers(step) for step in range(STEPS)]
    assert len(fused.losses) == STEPS
    assert fused.losses == pytest.approx(plain.losses, rel=1e-5)
    assert fused.ranks[0].gradient_norms == pytest.approx(plain.ranks[0].gradient_norms, rel=1e-5)
    for row, expected in zip(fused.steps, plain.steps, strict=True):
        assert row["tokens"] == expected["tokens"]
        for key in ("loss", "cross_entropy", "entropy", "weight"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5), key
    (validation,), (expected,) = fused.validations, plain.validations
    assert validation["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
    assert fused.ranks[0].val_losses == pytest.approx(plain.ranks[0].val_losses, rel=1e-6)
    before, after, wanted = (
        assemble([getattr(rank, part) for rank in run.ranks])
        for run, part in ((plain, "initial"), (fused, "final"), (plain, "final"))
    )
    assert after.keys() == wanted.keys()
    for key, want in wanted.items():
        moved = (want - before[key]).norm()
        assert moved > 0, key
        assert (after[key] - want).norm() / want.norm() < 1e-5, key
        # Adam divides by the size of the gradient, so entries with hardly any move by rounding errors.
        assert (after[key] - want).norm() / moved < 1e-3, key


@pytest.mark.parametrize("name", ["tp1", "tp1-tied", "dp2-distributed-optimizer", "tp2-sequence"])
def test_gradients_made_in_forward_are_the_same(workshop: Workshop, name: str) -> None:
    """NeMo's loss is the mask times one number, so with one tensor-parallel rank a matrix product is saved."""
    family, world, parallel, trainer = LAYOUTS[name]
    settings = workshop.settings(
        f"early-{name}",
        family,
        parallel=parallel,
        loss={"fused_linear": True},
        trainer={"max_steps": STEPS, "gpus_per_node": world} | trainer,
    )
    plan = jobs.Plan(settings, workshop.nemo(family))
    early, late = (run_ranks(faults.train, world, plan, faults.Fault(late=late)) for late in (False, True))
    forwards = STEPS * 4 // settings.data_parallel
    assert [rank.early for rank in early] == [0 if settings.parallel.tensor > 1 else forwards] * world
    assert [rank.early for rank in late] == [0] * world
    assert early[0].losses[0] == late[0].losses[0]
    assert early[0].losses == pytest.approx(late[0].losses, rel=1e-6)
    assert early[0].gradient_norms == pytest.approx(late[0].gradient_norms, rel=1e-6)
    after, wanted = (assemble([rank.final for rank in ranks]) for ranks in (early, late))
    for key, want in wanted.items():
        assert (after[key] - want).norm() / want.norm() < 1e-6, key


def test_what_is_recorded(workshop: Workshop) -> None:
    for on in (False, True):
        assert json.loads((train(workshop, "tp1", on).dir / "eaft.json").read_text())["fused_linear"] is on


def test_bfloat16(workshop: Workshop) -> None:
    """bfloat16 weights with float32 main_grad: as near as two ways of rounding are."""
    runs = [
        workshop.train(
            f"bf16-{on}",
            "llama",
            world=2,
            parallel={"tensor": 2, "sequence": True},
            loss={"fused_linear": on},
            trainer={"max_steps": STEPS, "precision": "bf16", "distributed_optimizer": True},
        )
        for on in (False, True)
    ]
    plain, fused = runs
    # The forward pass of the first step is the same but for the order of float32 sums inside a product.
    assert fused.losses == pytest.approx(plain.losses, rel=1e-2)
    assert fused.losses[0] == pytest.approx(plain.losses[0], rel=1e-3)
    assert fused.ranks[0].gradient_norms[0] == pytest.approx(plain.ranks[0].gradient_norms[0], rel=1e-2)
    assert torch.tensor(fused.losses).isfinite().all()
