"""`loss.check_replicas`: ranks that were given other rows than their copy of the model are found and named."""

import re
from typing import Any

import pytest
import torch

from nemo_eaft import replicas
from tests.nemo import faults, jobs
from tests.nemo.conftest import Workshop
from tests.nemo.faults import Fault, Outcome
from tests.nemo.ranks import run_ranks

STEPS = 3


def run(
    workshop: Workshop, name: str, fault: Fault, every: int, world: int = 2, parallel: dict[str, Any] | None = None
) -> list[Outcome]:
    settings = workshop.settings(
        f"replicas-{name}",
        "llama",
        parallel=parallel or {"tensor": 2},
        loss={"check_replicas": every},
        trainer={"max_steps": STEPS, "gpus_per_node": world},
    )
    return run_ranks(faults.train, world, jobs.Plan(settings, workshop.nemo("llama")), fault)


def assert_stopped(outcomes: list[Outcome], step: int) -> str:
    (message,) = {outcome.error for outcome in outcomes}
    assert message is not None
    assert message.startswith(f"RuntimeError: step {step}: global rank ")
    for outcome in outcomes:
        assert len(outcome.losses) == step - 1
        for name, pieces in outcome.before.items():
            for a, b in zip(pieces, outcome.final[name], strict=True):
                assert torch.equal(a.data, b.data), name
    return message


def lines(message: str) -> list[list[int]]:
    """Of both ranks, in order, the lines of the training data that the message names."""
    first, second = re.findall(r"(?:first|second) has (.*?)\. (?=The second|Stopped)", message)
    return [[int(number) for number in re.findall(r"line (\d+)", text)] for text in (first, second)]


@pytest.fixture(scope="module")
def healthy(workshop: Workshop) -> list[Outcome]:
    return run(workshop, "healthy", Fault(), every=2)


def test_equal_batches_pass(workshop: Workshop, healthy: list[Outcome]) -> None:
    off = run(workshop, "off", Fault(), every=0)
    for checked, plain in zip(healthy, off, strict=True):
        assert checked.error is plain.error is None
        # Steps 1 and 3, four micro-batches each.
        assert checked.digests == 8
        assert plain.digests == 0
        assert checked.losses == plain.losses
        for name, pieces in plain.final.items():
            for a, b in zip(pieces, checked.final[name], strict=True):
                assert torch.equal(a.data, b.data), name


@pytest.mark.parametrize("step", [1, 3])
def test_another_order_on_one_tensor_parallel_rank(workshop: Workshop, healthy: list[Outcome], step: int) -> None:
    outcomes = run(workshop, f"step-{step}", Fault(other_rows=(step, 1)), every=2)
    message = assert_stopped(outcomes, step)
    assert "global rank 0 (tensor 0, pipeline 0, data 0, context 0) and global rank 1 (tensor 1," in message
    assert "different tokens, labels, loss_mask in micro-batch 1 of 4" in message
    right, wrong = lines(message)
    numbers = list(workshop.train_rows)
    assert right == [numbers.index(row) + 1 for row in healthy[0].answers[step - 1][0]]
    assert wrong == right[::-1]


def test_it_would_train_on_a_mixture_without_it(workshop: Workshop, healthy: list[Outcome]) -> None:
    """The loss of neither row, and no error: what the option is for."""
    outcomes = run(workshop, "unseen", Fault(other_rows=(1, 1)), every=0)
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert outcomes[0].losses[0] != pytest.approx(healthy[0].losses[0], rel=1e-3)


def test_another_pipeline_stage(workshop: Workshop) -> None:
    """The first stage embeds the tokens of one row, the last has the labels of another."""
    outcomes = run(workshop, "stage", Fault(other_rows=(2, 3)), every=1, world=4, parallel={"pipeline": 2})
    message = assert_stopped(outcomes, 2)
    assert "global rank 1 (tensor 0, pipeline 0, data 1," in message
    assert "global rank 3 (tensor 0, pipeline 1, data 1," in message


def test_another_length_does_not_hang(workshop: Workshop) -> None:
    outcomes = run(workshop, "length", Fault(other_rows=(1, 1), short=True), every=1)
    assert_stopped(outcomes, 1)


def test_digests_see_everything() -> None:
    batch = {
        "tokens": torch.arange(6).view(2, 3),
        "labels": torch.arange(1, 7).view(2, 3),
        "loss_mask": torch.tensor([[0, 1, 1], [0, 0, 1]]),
    }
    (numbers,) = replicas.digests([batch], 1)
    assert torch.equal(numbers, replicas.digests([{key: value.clone() for key, value in batch.items()}], 1)[0])
    assert len(set(numbers.tolist())) == 3
    assert (numbers >= 0).all()
    changed = dict(batch, loss_mask=batch["loss_mask"].flip(1))
    assert (replicas.digests([changed], 1)[0] != numbers).tolist() == [False, False, True]
    assert replicas.digests([dict(batch, tokens=batch["tokens"].view(3, 2))], 1)[0, 0] != numbers[0]
    assert replicas.digests([dict(batch, tokens=batch["tokens"].int())], 1)[0, 0] != numbers[0]
    # A rank whose data ended.
    assert replicas.digests([batch], 2)[1].tolist() == [0, 0, 0]


def test_differences_are_in_order() -> None:
    """Ranks 0, 2 and 1, 3 hold a copy each; rank 3 is the first to differ, by micro-batch."""
    everywhere = torch.zeros(5, 3, 3, dtype=torch.int64)
    everywhere[2, 2, 0] = 1
    everywhere[3, 1, 1:] = 1
    everywhere[1::2] += 7
    found = replicas.differences(torch.tensor([0, 1, 0, 1, 0]), everywhere)
    assert [(item.micro_batch, item.rank, item.reference, item.keys) for item in found] == [
        (1, 3, 1, ("labels", "loss_mask")),
        (2, 2, 0, ("tokens",)),
    ]
