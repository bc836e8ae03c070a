"""The real backend: a few runs over gloo, each checking as much as it can for its start-up time."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_eaft import EAFTConfig, TokenLoss, eaft_linear_loss, eaft_loss
from tests.harness import run_ranks
from tests.loss.formulas import expected, pad, shard
from tests.loss.parallel import bits_equal
from tests.loss.test_context_parallel import CASES, Step, assert_uncut, batch, logits_step
from tests.loss.test_invariants import batches


def tensor_parallel(rank: int) -> dict[Any, Any]:
    """Everything one tensor-parallel group does, on this rank."""
    from torch.distributed.tensor.debug import CommDebugMode

    world_size = dist.get_world_size()
    group = dist.group.WORLD
    results: dict[Any, Any] = {"counts": {}}
    for name, (logits, labels, mask) in batches().items():
        for top_k in (20, None):
            part = shard(logits, rank, world_size)
            config = EAFTConfig(top_k=top_k)
            with CommDebugMode() as forward:
                out = eaft_loss(part, labels, config, vocab_size=40, group=group, loss_mask=mask)
            with CommDebugMode() as backward:
                out.loss.sum().backward()
            results[name, top_k] = (TokenLoss(*(value.detach() for value in out)), part.grad)
            counts = tuple(
                {str(op): count for op, count in mode.get_comm_counts().items()} for mode in (forward, backward)
            )
            results["counts"][name, top_k] = counts
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 2, 6).bfloat16(), torch.randn(40, 6).bfloat16()
    labels = torch.randint(0, 40, (8, 2))
    for sequence_parallel in (False, True):
        h = (hidden.chunk(world_size)[rank] if sequence_parallel else hidden).clone().requires_grad_()
        w = weight.chunk(world_size)[rank].clone().requires_grad_()
        out = eaft_linear_loss(
            h, w, labels, EAFTConfig(), vocab_size=40, group=group, sequence_parallel=sequence_parallel
        )
        out.loss.sum().backward()
        results["linear", sequence_parallel] = (out.loss.detach(), h.grad, w.grad)
    with pytest.raises(ValueError, match="local size 40"):
        eaft_loss(torch.randn(6, 40), torch.zeros(6).long(), EAFTConfig(), vocab_size=40, group=group)
    bad = torch.tensor([0, 0, 0, 0, 0, 40])
    with pytest.raises(ValueError, match="got 40 at 1 of 6 tokens"):
        eaft_loss(torch.randn(6, 40 // world_size), bad, EAFTConfig(), vocab_size=40, group=group)
    return results


def two_ranks(rank: int) -> tuple[Any, Any]:
    return tensor_parallel(rank), data_parallel(rank)


def four_ranks(rank: int) -> tuple[Any, Any, Any]:
    return tensor_parallel(rank), two_groups(rank), context_parallel(rank)


Runs = dict[int, tuple[list[Any], ...]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """By world size, the results of each function, a list over ranks: one start-up for several tests."""
    results = {2: run_ranks(two_ranks, 2, timeout=120), 4: run_ranks(four_ranks, 4, timeout=120)}
    return {size: tuple(list(each) for each in zip(*ranks, strict=True)) for size, ranks in results.items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_tensor_parallel_over_gloo(world_size: int, runs: Runs) -> None:
    results = runs[world_size][0]
    for (name, top_k), counts in results[0]["counts"].items():
        assert counts == ({"c10d._allgather_base_": 1}, {}), (name, top_k)
        logits, labels, mask = batches()[name]
        outs = [result[name, top_k][0] for result in results]
        for out in outs[1:]:
            assert all(bits_equal(a, b) for a, b in zip(out, outs[0], strict=True))
        gradient = torch.cat([result[name, top_k][1] for result in results], dim=-1)
        if name == "nan":
            assert outs[0].loss.isnan().tolist() == [True, True, True, True, False, False]
            continue
        want = expected(logits, labels, EAFTConfig(top_k=top_k), 40, mask)
        torch.testing.assert_close(outs[0].loss.double(), want.loss, rtol=1.3e-6, atol=1e-5)
        torch.testing.assert_close(gradient.double(), want.gradient, rtol=0, atol=1e-6)
    assert all(result["counts"] == results[0]["counts"] for result in results)
    # bfloat16 products and sums: both ways to hand over the hidden states round alike, up to the order of
    # adding.
    whole = [result["linear", False] for result in results]
    split = [result["linear", True] for result in results]
    for (loss, h, w), (loss_sp, _, w_sp) in zip(whole, split, strict=True):
        assert torch.equal(loss, loss_sp)
        assert torch.equal(loss, whole[0][0])
        assert torch.equal(h, whole[0][1])
        assert torch.equal(w, w_sp)
    torch.testing.assert_close(torch.cat([h for _, h, _ in split]), whole[0][1], rtol=2 * 2**-7, atol=2 * 2**-7)


DATA_ROWS = [slice(0, 3), slice(3, 8)]
MASKED_RANKS = (None, 0, 1)


def data_parallel(rank: int) -> list[tuple[float, torch.Tensor]]:
    """Two data-parallel ranks with unequal token counts: sums over both, divided once."""
    results = []
    for masked_rank in MASKED_RANKS:
        logits, labels = data_batch(masked_rank)
        leaf = logits[DATA_ROWS[rank]].clone().requires_grad_()
        loss = eaft_loss(leaf, labels[DATA_ROWS[rank]], EAFTConfig()).loss.sum()
        sums = torch.stack([loss.detach(), (labels[DATA_ROWS[rank]] != -100).sum().double()])
        dist.all_reduce(sums)
        (loss / sums[1].clamp(min=1)).backward()
        assert leaf.grad is not None
        results.append((float(sums[0] / sums[1].clamp(min=1)), leaf.grad))
    return results


def data_batch(masked_rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 30, dtype=torch.float64), torch.randint(0, 30, (8,))
    if masked_rank is not None:
        labels[DATA_ROWS[masked_rank]] = -100
        logits[DATA_ROWS[masked_rank]] = math.nan
    return logits, labels


def test_a_data_parallel_rank_without_counted_tokens(runs: Runs) -> None:
    results = runs[2][1]
    for case, masked_rank in enumerate(MASKED_RANKS):
        logits, labels = data_batch(masked_rank)
        want = expected(logits, labels, EAFTConfig())
        count = int((labels != -100).sum())
        for result in results:
            assert result[case][0] == pytest.approx(float(want.loss.sum()) / count, rel=1e-12)
        gradient = torch.cat([result[case][1] for result in results])
        torch.testing.assert_close(gradient, want.gradient / count, rtol=1e-12, atol=1e-12)


def two_groups(rank: int) -> torch.Tensor:
    """TP2 x DP2: each tensor-parallel pair is a group of its own, with its own batch."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    logits, labels = pair_batch(rank // 2)
    part = shard(logits, rank % 2, 2)
    with pytest.raises(ValueError, match="group must"):
        eaft_loss(part, labels, EAFTConfig(), vocab_size=37, group=pairs[1 - rank // 2])
    return eaft_loss(part, labels, EAFTConfig(), vocab_size=37, group=pairs[rank // 2]).loss.detach()


def pair_batch(pair: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(pair)
    return pad(torch.randn(3 + pair, 37), 8), torch.randint(0, 37, (3 + pair,))


def test_the_group_is_the_one_that_is_given(runs: Runs) -> None:
    for rank, loss in enumerate(runs[4][1]):
        logits, labels = pair_batch(rank // 2)
        want = expected(logits, labels, EAFTConfig(), 37)
        torch.testing.assert_close(loss.double(), want.loss, rtol=1.3e-6, atol=1e-5)


def context_parallel(rank: int) -> dict[str, Step]:
    """CP2 x TP2, with unequal counts and with nothing to count on the second half of the ranks."""
    return {case: logits_step(rank, batch(case, 2), EAFTConfig(), 2, 2) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_context_parallel_over_gloo(case: str, runs: Runs) -> None:
    steps = [result[case] for result in runs[4][2]]
    assert_uncut(steps, batch(case, 2), EAFTConfig(), 2, 2)
