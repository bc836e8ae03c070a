"""NaN and infinity in real trainings: where they count they stop every rank with a name, elsewhere they do nothing."""

import math
from typing import Any

import pytest
import torch

from tests.nemo import faults, jobs
from tests.nemo.conftest import Workshop
from tests.nemo.faults import Fault, Outcome, Poison
from tests.nemo.ranks import run_ranks

STEPS = 3
# ranks, parallel, loss, trainer. 8 rows a step in micro-batches of 2.
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}, {}),
    "stock": (1, {}, {"gate": "stock"}, {}),
    "fused": (1, {}, {"fused_linear": True}, {}),
    "dp2": (2, {}, {}, {"distributed_optimizer": True}),
    "tp2": (2, {"tensor": 2}, {}, {}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}, {}, {}),
    "vpp2-dp2": (4, {"pipeline": 2, "virtual_pipeline": 2}, {}, {}),
    "packed": (2, {"tensor": 2}, {}, {"micro_batch_size": 1}),
}


def run(workshop: Workshop, layout: str, fault: Fault, name: str = "") -> tuple[jobs.Plan, list[Outcome]]:
    world, parallel, loss, trainer = LAYOUTS[layout]
    settings = workshop.settings(
        f"nonfinite-{layout}{name}",
        "llama",
        parallel=parallel,
        loss=loss,
        trainer={"max_steps": STEPS, "gpus_per_node": world} | trainer,
        data={"packed": True, "packed_size": 120} if layout == "packed" else {},
    )
    plan = jobs.Plan(settings, workshop.nemo("llama"))
    return plan, run_ranks(faults.train, world, plan, fault)


@pytest.fixture(scope="module")
def healthy(workshop: Workshop) -> dict[str, list[Outcome]]:
    """The undisturbed run of each layout, made when first asked for."""

    class Runs(dict[str, list[Outcome]]):
        def __missing__(self, layout: str) -> list[Outcome]:
            self[layout] = run(workshop, layout, Fault(), "-healthy")[1]
            return self[layout]

    return Runs()


def stage(outcomes: list[Outcome]) -> list[int]:
    """Ranks that computed losses."""
    return [rank for rank, outcome in enumerate(outcomes) if any(any(step) for step in outcome.answers)]


def assert_stopped(outcomes: list[Outcome], step: int) -> str:
    """Every rank stopped in `step` with the same message, and with the weights that it began the step with."""
    messages = {outcome.error for outcome in outcomes}
    assert len(messages) == 1, messages
    (message,) = messages
    assert message is not None
    assert message.startswith(f"RuntimeError: step {step}: the loss is ")
    for outcome in outcomes:
        assert len(outcome.losses) == step - 1
        assert_same(outcome.before, outcome.final)
    return message


def assert_same(left: dict[str, list[jobs.Piece]], right: dict[str, list[jobs.Piece]]) -> None:
    assert left.keys() == right.keys()
    assert left
    for name, pieces in left.items():
        for a, b in zip(pieces, right[name], strict=True):
            assert torch.equal(a.data, b.data), name


def line_of(workshop: Workshop, answer: tuple[int, ...]) -> int:
    return list(workshop.train_rows).index(answer) + 1


@pytest.mark.parametrize(
    "layout, value",
    [(name, math.nan) for name in LAYOUTS if name not in ("packed", "tp2")]
    + [("one", math.inf), ("tp2-pp2", math.inf)],
)
def test_at_a_valid_position(workshop: Workshop, healthy: dict[str, list[Outcome]], layout: str, value: float) -> None:
    before = healthy[layout]
    owners = stage(before)
    last = owners[-1]
    count = len(before[last].answers[1])
    # Step 2, the last micro-batch but one of the last data-parallel rank, second row; and one in the last micro-batch.
    row = before[last].answers[1][count - 2][1]
    later = before[owners[0]].answers[1][-1][0]
    fault = Fault(poison=(Poison(2, row, value=value), Poison(2, later, value=value)), hidden=layout == "fused")
    _, outcomes = run(workshop, layout, fault, f"-valid-{value}")
    message = assert_stopped(outcomes, 2)
    owner = min(rank for rank in owners if row in before[rank].answers[1][count - 2])
    assert f"micro-batch {count - 1} of {count}, row 2 of it" in message
    assert f"global rank {owner} (" in message
    assert f"line {line_of(workshop, row)} of the training data" in message
    prompt = workshop.train_rows[row][: -len(row)]
    # Labels are shifted by one, and it is the second token of the answer.
    assert f"position {len(prompt)}:" in message
    words = " ".join(f"t{token}" for token in prompt)[:40]
    assert words in message
    assert "In all 2 tokens in 2 micro-batches" in message
    assert sum(outcome.poisoned for outcome in outcomes) >= 2


@pytest.mark.parametrize("step", [1, 2])
def test_under_a_mask_of_one_tensor_parallel_rank(
    workshop: Workshop, healthy: dict[str, list[Outcome]], step: int
) -> None:
    """One rank's sums are finite and the other's are not: both end, in the first step and after it."""
    row = healthy["tp2"][0].answers[step - 1][1][1]
    fault = Fault(poison=(Poison(step, row),), masked=frozenset({(step, row)}), masked_on=1)
    _, outcomes = run(workshop, "tp2", fault, f"-one-mask-{step}")
    message = assert_stopped(outcomes, step)
    assert message.startswith(f"RuntimeError: step {step}: the loss is nan (cross-entropy nan)")
    assert "Only 1 of 2 ranks have such a loss: tensor-parallel ranks were given different rows or loss" in message
    assert f"line {line_of(workshop, row)} of the training data" in message
    assert message.endswith("seen by global ranks 0")


@pytest.mark.parametrize("layout", ["one", "fused", "dp2", "tp2-pp2"])
def test_at_a_masked_position(workshop: Workshop, healthy: dict[str, list[Outcome]], layout: str) -> None:
    before = healthy[layout]
    row = next(row for row in before[stage(before)[0]].answers[1][1] if len(workshop.train_rows[row]) > len(row) + 1)
    values = (math.nan, math.inf, -math.inf)
    rows = [row, *before[stage(before)[0]].answers[0][0]]
    fault = Fault(
        poison=tuple(
            Poison(step, answer, "masked", value)
            for (step, answer), value in zip([(2, rows[0]), (1, rows[1]), (1, rows[2])], values, strict=True)
        ),
        hidden=layout == "fused",
    )
    _, outcomes = run(workshop, layout, fault, "-masked")
    assert sum(outcome.poisoned for outcome in outcomes) >= 3
    for outcome, healthy_rank in zip(outcomes, before, strict=True):
        assert outcome.error is None
        assert outcome.losses == healthy_rank.losses
        assert outcome.gradient_norms == healthy_rank.gradient_norms
        assert_same(outcome.final, healthy_rank.final)


def test_a_hidden_state_at_a_masked_position(workshop: Workshop, healthy: dict[str, list[Outcome]]) -> None:
    """Megatron's output layer multiplies it by a gradient of 0, which is NaN: not hidden, unlike in a fused one."""
    row = healthy["one"][0].answers[1][1][1]
    _, (outcome,) = run(workshop, "one", Fault(poison=(Poison(2, row, "masked"),), hidden=True), "-hidden")
    assert outcome.error is not None
    assert outcome.error.startswith("RuntimeError: step 2: the loss is finite, but the gradient is not")
    assert "a hidden state was not finite at a token outside the loss" in outcome.error
    assert "nearest to the loss output_layer.weight" in outcome.error
    assert_same(outcome.before, outcome.final)


def test_the_stock_loss_at_a_masked_position(workshop: Workshop, healthy: dict[str, list[Outcome]]) -> None:
    """NeMo multiplies Megatron's own loss by the mask, so there is no loss: the message says what to do."""
    row = healthy["stock"][0].answers[1][1][1]
    _, outcomes = run(workshop, "stock", Fault(poison=(Poison(2, row, "masked"),)), "-masked")
    message = assert_stopped(outcomes, 2)
    assert f"line {line_of(workshop, row)} of the training data" in message
    assert "Megatron's own loss is also spoilt by a token outside the loss mask; loss.gate=none" in message


def test_packed(workshop: Workshop, healthy: dict[str, list[Outcome]]) -> None:
    before = healthy["packed"]
    pack = before[0].answers[1][1][0]
    _, outcomes = run(workshop, "packed", Fault(poison=(Poison(2, pack),)), "-valid")
    message = assert_stopped(outcomes, 2)
    assert "pack " in message
    assert "the row in it that starts at position 0" in message
    assert "text 't" in message


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2-pp2"])
def test_a_gradient_that_overflows(workshop: Workshop, healthy: dict[str, list[Outcome]], layout: str) -> None:
    world = LAYOUTS[layout][0]
    rank = stage(healthy[layout])[-1]
    _, outcomes = run(workshop, layout, Fault(overflow=(2, rank)), "-overflow")
    messages = {outcome.error for outcome in outcomes}
    assert len(messages) == 1, messages
    (message,) = messages
    assert message is not None
    assert message.startswith("RuntimeError: step 2: the loss is finite, but the gradient is not")
    assert "decoder." in message
    if layout == "dp2":
        assert f"global rank {rank} (" in message
        assert f"in all 1 of {world} ranks: {rank}" in message
    for outcome in outcomes:
        assert len(outcome.losses) == 1
        assert_same(outcome.before, outcome.final)
