"""The first step of a training is that of Hugging Face's logits; test_matrix.py compares the steps after it."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.nemo import reference
from tests.nemo.conftest import Run, Workshop, assemble

STEPS = 10


@dataclass(frozen=True)
class Layout:
    """One way to split a training."""

    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "tp1": Layout(1),
    "tp4": Layout(4, {"tensor": 4}),
    "vpp2-dp2": Layout(4, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2-sequence": Layout(2, {"tensor": 2, "sequence": True}),
    "tp2-recompute": Layout(2, {"tensor": 2, "sequence": True}, {"recompute": "full"}),
}
OTHER_FAMILIES = {
    "qwen2-tp2-pp2": ("qwen2", Layout(4, {"tensor": 2, "pipeline": 2, "sequence": True})),
    "qwen3-tp2": ("qwen3", Layout(2, {"tensor": 2})),
    "mistral-tp2": ("mistral", Layout(2, {"tensor": 2})),
    "qwen3-moe-ep2": ("qwen3_moe", Layout(2, {"expert": 2})),
}


def train(workshop: Workshop, name: str, layout: Layout, family: str = "llama", **trainer: Any) -> Run:
    return workshop.train(
        name,
        family,
        world=layout.world,
        parallel=layout.parallel,
        trainer={"max_steps": STEPS} | layout.trainer | trainer,
    )


def assert_first_step(workshop: Workshop, run: Run, family: str = "llama", **changes: Any) -> None:
    """The first step's loss, gradient and metrics against Hugging Face. Only sums over at most 200 tokens differ."""
    answers = run.answers(0)
    assert len(set(answers)) == len(answers) == run.settings.trainer.global_batch_size
    sums = workshop.sums(family, **changes)
    expected = reference.means(sums[answer] for answer in answers)
    assert run.losses[0] == pytest.approx(expected["loss"], abs=1e-5)
    first = run.steps[0]
    for name in ("loss", "cross_entropy", "entropy", "weight"):
        assert first[name] == pytest.approx(expected[name], abs=1e-5), name
    assert first["tokens"] == expected["tokens"]
    assert first["conflict_fraction"] == pytest.approx(expected["conflict_fraction"], abs=1e-12)
    rows = {answer: workshop.train_rows[answer] for answer in answers}
    norm = reference.gradient_norm(workshop.model(family, **changes), rows)
    # Adam forgives a wrong scale of the gradient, so the losses that follow would not show it.
    assert run.ranks[0].gradient_norms[0] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_first_step_is_hugging_faces(workshop: Workshop, name: str) -> None:
    assert_first_step(workshop, train(workshop, name, LAYOUTS[name]))


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_first_step_of_other_families(workshop: Workshop, name: str) -> None:
    family, layout = OTHER_FAMILIES[name]
    run = train(workshop, name, layout, family, max_steps=2)
    assert_first_step(workshop, run, family)
    # Tied embeddings live on two stages: their copies are compared here.
    assemble([rank.final for rank in run.ranks])


def test_the_rows_can_tell_a_wrong_mean(workshop: Workshop) -> None:
    """A mean of micro-batch means is far from the right loss on these rows, so the tests above would see it."""
    run = train(workshop, "tp1", LAYOUTS["tp1"])
    sums = workshop.sums("llama")
    wrong = reference.mean_of_means([[sums[row] for row in rows] for rows in run.micro_batches(0)])
    assert abs(wrong - run.losses[0]) > 1e-2
    assert reference.means(sums[row] for row in run.answers(0))["conflict_fraction"] > 0


def test_recompute_changes_nothing(workshop: Workshop) -> None:
    assert (
        train(workshop, "tp2-recompute", LAYOUTS["tp2-recompute"]).losses
        == train(workshop, "tp2-sequence", LAYOUTS["tp2-sequence"]).losses
    )


def test_bfloat16_follows_float32(workshop: Workshop) -> None:
    single = train(workshop, "tp1", LAYOUTS["tp1"])
    run = train(workshop, "bf16", Layout(2, {"tensor": 2}), precision="bf16")
    # bfloat16 has 8 bits: each of some 20 layers' results is off by up to 0.4 %, the mean over 100 tokens by less.
    assert run.losses == pytest.approx(single.losses, rel=1e-2)
    assert run.losses != pytest.approx(single.losses, rel=1e-5)
