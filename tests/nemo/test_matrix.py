"""However a training is split and whatever is trained, it is the training of one process."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import nemo_eaft.loss.vocab_parallel
import nemo_eaft.train
from tests.nemo import matrix_table
from tests.nemo.conftest import Run, Workshop, assemble
from tests.nemo.matrix import LARGE_ROWS, ROWS, Row, legal_rows, pairs

STEPS = 8
NEAREST_TIE = 2e-6
"""Least distance, in a router's logits, between the last expert that a token goes to and the next. The logits of one
process and of eight were seen to be 2.4e-7 apart there."""
FAMILIES = {"dense": "llama", "moe": "qwen3_moe", "mtp": "llama", "lora": "llama"}


def train(workshop: Workshop, row: Row, name: str | None = None, **plan: Any) -> Run:
    return workshop.train(
        name or row.name,
        FAMILIES[row.kind],
        world=row.ranks,
        model={"tied": row.tied},
        plan={"lora": row.kind == "lora"} | plan,
        head=row.kind == "mtp",
        data={"packed": row.packed, "packed_size": 96 if row.packed else None},
        loss={"fused_linear": row.fused},
        parallel={
            "tensor": row.tensor,
            "pipeline": row.pipeline,
            "virtual_pipeline": row.virtual if row.virtual > 1 else None,
            "context": row.context,
            "expert": row.expert,
            "sequence": row.sequence,
        },
        trainer={
            "max_steps": STEPS,
            "micro_batch_size": row.micro_batch,
            "global_batch_size": row.global_batch,
            "distributed_optimizer": row.distributed_optimizer,
            "recompute": "full" if row.recompute else "none",
            # Adam makes steps of a rounding error where a gradient is nearly nothing. Smaller ones, so that no token
            # goes to other experts for it.
            **({"learning_rate": 1e-4} if row.kind == "moe" else {}),
        },
    )


def assert_same(run: Run, single: Run) -> None:
    """Every step's rows, loss, gradient norm and metrics, and the weights at the end."""
    for step in range(STEPS):
        if run.settings.parallel.context == 1:
            assert run.answers(step) == single.answers(step)
        else:
            # A context-parallel rank holds pieces of rows; tensor-parallel ranks, which come first, hold the same.
            ranks = run.ranks[:: run.settings.parallel.tensor]
            held = [row for rank in ranks for micro_batch in rank.answers[step] for row in micro_batch]
            assert words(held) == words(single.answers(step))
    assert len(run.losses) == len(run.steps) == STEPS
    assert run.losses[0] == pytest.approx(single.losses[0], rel=1e-5)
    assert run.losses == pytest.approx(single.losses, rel=1e-4)
    # Adam forgives a wrong scale of the gradient, so the losses that follow would not show it.
    norms, expected_norms = (each.ranks[0].gradient_norms for each in (run, single))
    assert norms[0] == pytest.approx(expected_norms[0], rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-3)
    for line, wanted in zip(run.steps, single.steps, strict=True):
        assert line["step"] == wanted["step"]
        assert line["tokens"] == wanted["tokens"]
        for key in ("loss", "cross_entropy", "entropy", "weight", "learning_rate"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-4), key
    before, after = (assemble([getattr(rank, part) for rank in run.ranks]) for part in ("initial", "final"))
    start, end = (assemble([getattr(single.ranks[0], part)]) for part in ("initial", "final"))
    assert before.keys() == start.keys() == after.keys() == end.keys()
    for key, value in start.items():
        assert torch.equal(before[key], value), key
        moved = (end[key] - value).norm()
        apart = (after[key] - end[key]).norm()
        # Adam divides by the size of the gradient, so entries with hardly any move by rounding errors.
        assert apart <= 1e-3 * moved, key
    assert any(not torch.equal(end[key], value) for key, value in start.items())


def words(answers: list[tuple[int, ...]]) -> Counter[int]:
    return Counter(word for answer in answers for word in answer)


@pytest.mark.parametrize(
    "row", [*ROWS, *(pytest.param(row, marks=pytest.mark.matrix) for row in LARGE_ROWS)], ids=lambda row: row.name
)
def test_a_split_training_is_that_of_one_process(workshop: Workshop, row: Row) -> None:
    assert row.refusal() is None
    assert not row.meaningless()
    single = train(workshop, row.single)
    assert_same(train(workshop, row), single)
    assert single.ranks[0].nearest_tie > NEAREST_TIE


def test_every_pair_of_values_is_in_a_row() -> None:
    wanted = [(row.ranks, pairs(row)) for row in legal_rows()]
    small, large = (set().union(*(pairs(row) for row in rows)) for rows in (ROWS, LARGE_ROWS))
    assert set().union(*(found for ranks, found in wanted if ranks <= 4)) == small
    assert set().union(*(found for _, found in wanted)) == small | large
    assert max(row.ranks for row in ROWS) == 4
    assert len(small) > 300


def entropy_of_the_shard() -> None:
    """The largest logits of this rank's shard, as the authors' Megatron code takes them."""
    module: Any = nemo_eaft.loss.vocab_parallel
    merge = module.merge_records

    def local(records: torch.Tensor, top_k: int) -> Any:
        merged = merge(records, top_k)
        own = merge(records[torch.distributed.get_rank() :][:1], top_k)
        return merged._replace(entropy=own.entropy)

    module.merge_records = local


def mean_of_means() -> None:
    """Each micro-batch's sum is divided by its own tokens, and the means are averaged: NeMo's default."""
    overrides = nemo_eaft.train.model_overrides
    nemo_eaft.train.model_overrides = lambda settings: overrides(settings) | {"calculate_per_token_loss": False}
    # The callback would set it right, and would refuse what it finds otherwise, twice.
    from nemo_eaft import first_step, requirements

    checks: Any = requirements
    checks.set_one_gradient = lambda *_: []
    checks.check_chunk = lambda _: None
    step: Any = first_step.FirstStep
    step.check = lambda *_: None


@pytest.mark.parametrize(
    "row, wrong", [(Row(tensor=2), entropy_of_the_shard), (Row(data=2), mean_of_means)], ids=["tp2", "dp2"]
)
def test_a_wrong_training_is_found(workshop: Workshop, row: Row, wrong: Any) -> None:
    run = train(workshop, row, f"wrong-{row.name}", wrong=wrong)
    with pytest.raises(AssertionError):
        assert_same(run, train(workshop, row.single))


def test_readme_holds_the_table_of_these_rows() -> None:
    readme = matrix_table.README.read_text(encoding="utf-8")
    assert readme == matrix_table.expected(readme), "python -m tests.nemo.matrix_table writes it"
