"""The step's sums over real gloo ranks: two pipeline stages x two data-parallel ranks.

Ranks are laid out as Megatron-Core does, data parallel innermost: stage 0 is ranks 0 and 1, stage 1 (the
last, the one with a loss) ranks 2 and 3; the pipelines are (0, 2) and (1, 3).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig, TokenLoss
from nemo_eaft.metrics import StepMetrics, reduce_sums, token_sums, zero_sums
from tests.harness import run_ranks

WORLD = 4
DATA_GROUPS = [(0, 1), (2, 3)]
PIPELINES = [(0, 2), (1, 3)]

# Valid tokens of each micro-batch, by data-parallel rank: ragged on purpose.
CASES: dict[str, tuple[list[int], list[int]]] = {
    "ragged": ([1, 17, 3], [64, 2, 30]),
    "one rank has no token": ([0, 0, 0], [5, 9, 1]),
    "no token at all": ([0, 0, 0], [0, 0, 0]),
    "a NaN on one rank": ([4, 4, 4], [6, 6, 6]),
}


def micro_batch(case: str, data_rank: int, index: int) -> tuple[TokenLoss, Tensor]:
    """64 tokens, the first few valid; NaN at every other, and at one valid token in the case that says so."""
    generator = torch.Generator().manual_seed(100 * data_rank + index)
    values = [torch.rand(64, generator=generator) * scale for scale in (2.0, 6.0, 1.0, 1.0)]
    valid = torch.arange(64) < CASES[case][data_rank][index]
    values = [torch.where(valid, value, math.nan) for value in values]
    if case == "a NaN on one rank" and (data_rank, index) == (1, 2):
        values[0][0] = math.nan
    return TokenLoss(*values), valid


def local_sums(case: str, data_rank: int) -> Tensor:
    sums = zero_sums("cpu")
    for index in range(3):
        out, valid = micro_batch(case, data_rank, index)
        sums += token_sums(out, valid, EAFTConfig(), 1000)
    return sums


def expected_sums(case: str) -> list[float]:
    """One loop over the valid tokens of the whole global batch."""
    sums = [0.0] * 6
    for data_rank in (0, 1):
        for index in range(3):
            out, _ = micro_batch(case, data_rank, index)
            for token in range(CASES[case][data_rank][index]):
                loss, cross_entropy, entropy, weight = (value[token].item() for value in out)
                conflict = math.exp(-cross_entropy) < 0.1 and entropy / math.log(20) < 0.2
                for place, value in enumerate((loss, cross_entropy, entropy, weight, conflict, 1)):
                    sums[place] += value
    return sums


def reduce_every_case(rank: int) -> dict[str, Any]:
    # Every rank creates every group, in one order.
    data_groups = {ranks: dist.new_group(list(ranks)) for ranks in DATA_GROUPS}
    pipelines = {ranks: dist.new_group(list(ranks)) for ranks in PIPELINES}
    data_group = next(group for ranks, group in data_groups.items() if rank in ranks)
    pipeline, pipeline_group = next((ranks, group) for ranks, group in pipelines.items() if rank in ranks)

    calls: list[tuple[str, tuple[int, ...], str]] = []
    all_reduce, broadcast = dist.all_reduce, dist.broadcast

    def logged_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(("all_reduce", tuple(tensor.shape), str(tensor.dtype)))
        return all_reduce(tensor, *args, **kwargs)

    def logged_broadcast(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(("broadcast", tuple(tensor.shape), str(tensor.dtype)))
        return broadcast(tensor, *args, **kwargs)

    dist.all_reduce, dist.broadcast = logged_all_reduce, logged_broadcast

    results: dict[str, Any] = {}
    rubbish = torch.full((6,), math.nan, dtype=torch.float64)
    for case in CASES:
        # What the first stage brings must not count, whatever it is.
        sums = local_sums(case, rank % 2) if rank in DATA_GROUPS[1] else rubbish
        before = sums.clone()
        calls.clear()
        total = reduce_sums(sums, data_group, pipeline_group, pipeline[-1])
        assert torch.equal(sums.nan_to_num(-1.0), before.nan_to_num(-1.0)), "the input was written to"
        results[case] = {"total": total, "local": sums, "calls": list(calls)}

    # Without pipelines each stage's ranks stand alone; without data parallelism each pipeline does.
    one = torch.full((6,), float(rank + 1), dtype=torch.float64)
    results["data only"] = {"total": reduce_sums(one, data_group, None, None)}
    results["pipeline only"] = {"total": reduce_sums(one, None, pipeline_group, pipeline[-1])}
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(reduce_every_case, WORLD)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_the_sums_of_the_global_batch(ranks: list[dict[str, Any]], case: str) -> None:
    total = ranks[0][case]["total"]
    expected = torch.tensor(expected_sums(case), dtype=torch.float64)
    # A NaN at a valid token is expected to arrive; only there may it stand.
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12, equal_nan=case == "a NaN on one rank")
    assert torch.equal(total[4:], expected[4:])
    bits = [rank[case]["total"].view(torch.int64) for rank in ranks]
    assert all(torch.equal(other, bits[0]) for other in bits[1:]), "not the same on every rank, bit for bit"
    assert total.isnan().tolist() == [case == "a NaN on one rank"] + [False] * 5
    if total[5] > 0:
        # What a forgotten all-reduce would give must not pass.
        assert not torch.equal(ranks[2][case]["local"][5], total[5])


def test_the_means_are_those_of_all_tokens_and_not_a_mean_of_ranks(ranks: list[dict[str, Any]]) -> None:
    metrics = StepMetrics.from_sums(ranks[0]["ragged"]["total"])
    assert metrics.tokens == 117
    assert metrics.loss == pytest.approx(expected_sums("ragged")[0] / 117, rel=1e-12)
    means = [StepMetrics.from_sums(ranks[rank]["ragged"]["local"]).loss for rank in (2, 3)]
    assert metrics.loss != pytest.approx(sum(means) / 2, rel=1e-3)


def test_the_collectives_do_not_depend_on_the_data(ranks: list[dict[str, Any]]) -> None:
    expected = [("all_reduce", (6,), "torch.float64"), ("broadcast", (6,), "torch.float64")]
    for rank in ranks:
        for case in CASES:
            assert rank[case]["calls"] == expected


def test_a_missing_axis_of_parallelism_sends_nothing_over_it(ranks: list[dict[str, Any]]) -> None:
    assert [rank["data only"]["total"][0].item() for rank in ranks] == [3.0, 3.0, 7.0, 7.0]
    assert [rank["pipeline only"]["total"][0].item() for rank in ranks] == [3.0, 4.0, 3.0, 4.0]
