"""Ratios, spreads and figures to reach: what `benchmarks` makes of what it measured."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cases import Case, Inputs
from benchmarks.contenders import BY_NAME, contenders_of
from benchmarks.memory import Memory
from benchmarks.plan import plan
from benchmarks.results import Row, memory_ratio, time_ratio
from benchmarks.targets import TARGETS, evaluate
from benchmarks.timing import Round, paired_ratio, spread
from tests.test_benchmarks import CPU, LINEAR, SMALL


def row(contender: str, rounds: list[tuple[float, float]], extra: int | None = None, case: Case = SMALL) -> Row:
    size = case.logits * case.torch_dtype.itemsize
    held = None if extra is None else Memory(inputs=size, extra=extra, gradients=size, method="test")
    return Row(case=case, contender=contender, rounds=[Round(*each) for each in rounds], memory=held)


def test_a_ratio_is_of_the_same_round() -> None:
    # The machine became ten times slower after the second round; both medians alone would say 0.1 or 10.
    ours = [(1.0, 1.0), (1.0, 1.0), (10.0, 10.0)]
    theirs = [(2.0, 2.0), (2.0, 2.0), (20.0, 20.0)]
    rows = [row("eaft", ours), row("megatron", theirs), row("liger", [])]
    assert time_ratio(rows, SMALL, "eaft", "megatron") == (0.5, 0.5, 0.5)
    assert time_ratio(rows, SMALL, "eaft", "liger") is None
    assert time_ratio(rows, LINEAR, "eaft", "megatron") is None
    assert paired_ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == (2.0, 1.5, 2.5)
    assert spread([3.0]) == (3.0, 3.0, 3.0)


def test_a_memory_ratio_counts_the_logits() -> None:
    size = SMALL.logits * 4
    # float32: Megatron works in the caller's logits; ours out of place adds a gradient, the peers two copies.
    rows = [row("eaft", [], size), row("megatron", [], 0), row("peers-eaft", [], 2 * size)]
    assert memory_ratio(rows, SMALL, "eaft", "megatron") == 2.0
    assert memory_ratio(rows, SMALL, "eaft", "peers-eaft") == pytest.approx(2 / 3)
    beyond = [each.memory.beyond_gradients for each in rows if isinstance(each.memory, Memory)]
    assert beyond == [0, 0, size]
    # What forward takes is not paid for by gradients that backward makes.
    assert (
        Memory(inputs=size, extra=size, gradients=size, method="test", forward=size // 2).beyond_gradients == size // 2
    )


def test_bytes_per_logit() -> None:
    assert (Case(tokens=1, vocab=8, dtype="bfloat16").limit_bytes, SMALL.limit_bytes) == (6, 12)
    mine = row("eaft", [(1.0, 2.0)], 0)
    plain = mine.as_json(bandwidth=12 * SMALL.logits / 1e-3)
    # 3 ms where the limit is 1 ms.
    assert mine.limit_ms(12 * SMALL.logits / 1e-3) == pytest.approx(1.0)
    assert plain["bytes_per_logit"]["time_as_bytes"] == pytest.approx(36.0)
    assert plain["bytes_per_logit"]["held"] == 4


def test_every_contender_starts_from_the_same_logits() -> None:
    seen: list[float] = []

    def forward(inputs: Inputs, case: Case) -> Tensor:
        (logits,) = inputs.tensors
        seen.append(float(logits.detach().sum()))
        loss = logits.sum(-1)
        with torch.no_grad():
            logits.zero_()
        return loss

    spoiler = dataclasses.replace(BY_NAME["megatron"], name="spoiler", forward=forward)
    other = dataclasses.replace(spoiler, name="other")
    result = timing.time_contenders([spoiler, other], SMALL, CPU, rounds=2)
    assert [len(rounds) for rounds in result.values()] == [2, 2]
    assert len(seen) == 6
    assert len(set(seen)) == 1
    assert seen[0] != 0.0


def test_who_fails_drops_out_with_the_reason() -> None:
    def forward(inputs: Inputs, case: Case) -> Tensor:
        raise RuntimeError("no such kernel")

    broken = dataclasses.replace(BY_NAME["megatron"], name="broken", forward=forward)
    result = timing.time_contenders([broken, BY_NAME["eaft"]], SMALL, CPU, rounds=1)
    assert result["broken"] == "did not run: RuntimeError: no such kernel"
    assert len(result["eaft"]) == 1


# --- figures to reach ---

# (where, tokens, columns, D, type, ours, part, quantity, theirs) -> bound, row by row as the issue has them.
LISTED = {
    ("CPU", 512, 151936, None, "bfloat16", "eaft", "sum", "time ratio", "megatron"): 1.0,
    ("CPU", 512, 151936, None, "float32", "eaft", "sum", "time ratio", "megatron"): 1.6,
    ("CPU", 512, 151936, None, "float32", "eaft-inplace", "sum", "time ratio", "megatron"): 1.0,
    ("CPU", 512, 151936, None, "bfloat16", "eaft", "sum", "time ratio", "peers-eaft"): 0.55,
    ("CPU", 512, 151936, None, "float32", "eaft", "sum", "time ratio", "peers-eaft"): 0.7,
    ("CPU", 512, 151936, None, "float32", "eaft-inplace", "sum", "time ratio", "peers-eaft"): 0.45,
    ("CPU", 512, 151936, None, "bfloat16", "eaft", "sum", "memory ratio", "megatron"): 0.75,
    ("CPU", 512, 151936, None, "bfloat16", "eaft", "sum", "memory ratio", "peers-eaft"): 0.5,
    ("CPU", 512, 151936, None, "float32", "eaft", "sum", "memory ratio", "megatron"): 2.05,
    ("CPU", 512, 151936, None, "float32", "eaft-inplace", "sum", "memory ratio", "megatron"): 1.02,
    ("CPU", 512, 151936, None, "float32", "eaft", "sum", "memory ratio", "peers-eaft"): 0.7,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "forward", "ms", None): 0.95,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "backward", "ms", None): 1.8,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "sum", "ms", None): 2.8,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "sum", "time ratio", "liger"): 0.35,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "sum", "time ratio", "megatron-fused"): 0.16,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "sum", "time ratio", "megatron"): 0.14,
    ("H100", 8192, 18992, None, "bfloat16", "eaft", "sum", "ms", None): 0.4,
}
LINEAR_LISTED = {
    ("CPU", 1024, 49152, 576, "MB beyond inputs and gradients"): {64.0},
    ("CPU", 1024, 49152, 576, "time ratio"): {1.3},
    ("H100", 8192, 151936, 5120, "MB beyond inputs and gradients"): {400.0},
    ("H100", 8192, 151936, 5120, "time ratio"): {1.05, 1.1},
}


def test_the_targets_are_the_listed_ones() -> None:
    found: dict[tuple, float] = {}
    linear: dict[tuple, set[float]] = {}
    for target in TARGETS:
        case = target.case
        assert case.top_k == 20
        if case.hidden is not None:
            key = (target.where, case.tokens, case.width, case.hidden, target.quantity)
            linear.setdefault(key, set()).add(target.bound)
            continue
        size = (target.where, case.tokens, case.width, case.hidden, case.dtype)
        found[(*size, target.ours, target.part, target.quantity, target.theirs)] = target.bound
    assert found == LISTED
    assert linear == LINEAR_LISTED


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_target_is_in_the_plan(kind: str, quick: bool) -> None:
    cases = {step.case for step in plan(torch.device(kind), quick)}
    wanted = {target.case for target in TARGETS if (target.where == "CPU") == (kind == "cpu")}
    assert wanted <= cases
    for target in TARGETS:
        if target.unmeasured is None:
            names = [each.name for each in contenders_of(target.case)]
            assert {target.ours, target.theirs} - {None} <= set(names)
    if not quick:
        swept = {(case.vocab, case.shards, case.dtype, case.top_k) for case in cases}
        for vocab in (32000, 49152, 151936, 262144):
            for shards in (1, 2, 4, 8):
                assert {(vocab, shards, dtype, k) for dtype in ("float32", "bfloat16") for k in (20, None)} <= swept


def test_reached_missed_and_not_measured() -> None:
    target = TARGETS[0]
    assert target.theirs is not None
    names = (target.ours, target.theirs)

    def status(a: float, device_type: str = "cpu") -> str:
        rows = [row(name, [(t, 0.0)], case=target.case) for name, t in zip(names, (a, 1.0), strict=True)]
        (outcome,) = evaluate((target,), rows, device_type, "some device")
        assert (outcome.value is None) == (outcome.status == "not measured")
        return outcome.status

    assert status(target.bound) == "reached"
    assert status(target.bound * 1.01) == "missed"
    assert status(target.bound, "cuda") == "not measured"
    away = evaluate(TARGETS, [], "cpu", "some device")
    assert all(each.status == "not measured" and each.value is None for each in away)
    assert {each.reason for each in away if each.target.where == "H100" and not each.target.unmeasured} == {
        "no H100 here"
    }
