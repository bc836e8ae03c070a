"""What holds between ranks, between runs, and between ways to split the same tokens."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig, TokenLoss, eaft_loss
from tests.harness import run_threads
from tests.loss.formulas import expected, shard
from tests.loss.parallel import bits_equal, run_sharded
from tests.loss.recording import Call, recorded_collectives

CONFIGS = [EAFTConfig(), EAFTConfig(top_k=None), EAFTConfig(alpha=0.3), EAFTConfig(gate="sigmoid")]
configs = pytest.mark.parametrize("config", CONFIGS, ids=["eaft", "full", "small alpha", "sigmoid"])


@configs
@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_weight_are_the_same_bits_on_every_rank(
    config: EAFTConfig, world_size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(40, 1000) * 4).to(dtype)
    logits[0, 3], logits[1, 900] = math.nan, math.inf
    labels = torch.randint(0, 990, (40,))
    run_sharded(logits, labels, config, world_size, vocab_size=990).assert_ranks_identical()


def test_top_k_of_the_local_shard_would_differ_between_ranks() -> None:
    """The mistake this package exists to avoid, and that the test above would see."""
    torch.manual_seed(0)
    logits = torch.randn(40, 1000) * 4
    labels = torch.randint(0, 500, (40,))
    local = [eaft_loss(part, labels, EAFTConfig()).weight for part in logits.chunk(2, dim=-1)]
    assert (local[0] - local[1]).abs().max() > 0.1


@configs
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_size_is_close_to_float64_of_one_process(config: EAFTConfig, world_size: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(30, 4000) * 3
    labels = torch.randint(0, 3993, (30,))
    got = run_sharded(logits, labels, config, world_size, vocab_size=3993)
    one = run_sharded(logits, labels, config, 1, vocab_size=3993)
    want = expected(logits, labels, config, 3993)
    for value, reference in ((got.out.loss, want.loss), (got.out.cross_entropy, want.cross_entropy)):
        torch.testing.assert_close(value.double(), reference, rtol=1.3e-6, atol=1e-5)
    torch.testing.assert_close(got.out.entropy.double(), want.entropy, rtol=0, atol=5e-6)
    torch.testing.assert_close(got.gradient.double(), want.gradient, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.out.loss, one.out.loss, rtol=1.3e-6, atol=1e-5)
    torch.testing.assert_close(got.gradient, one.gradient, rtol=0, atol=1e-6)
    if config.top_k is not None:
        # The K values are the same ones whatever the shards, so the entropy is exact across sizes too.
        assert torch.equal(got.out.entropy, one.out.entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabulary_accuracy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(4, 151936) * 3).to(dtype)
    labels = torch.randint(0, 151936, (4,))
    for config in (EAFTConfig(), EAFTConfig(top_k=None)):
        got = run_sharded(logits, labels, config, 8, vocab_size=151936)
        want = expected(logits, labels, config)
        torch.testing.assert_close(got.out.cross_entropy.double(), want.cross_entropy, rtol=0, atol=5e-6)
        torch.testing.assert_close(got.out.entropy.double(), want.entropy, rtol=0, atol=5e-6)
        torch.testing.assert_close(got.out.weight.double(), want.weight, rtol=0, atol=5e-6)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_same_run_twice_gives_the_same_bits(config: EAFTConfig, world_size: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(30, 1000)
    labels = torch.randint(0, 1000, (30,))
    torch.use_deterministic_algorithms(True)
    first = run_sharded(logits, labels, config, world_size, vocab_size=1000)
    second = run_sharded(logits.clone(), labels.clone(), config, world_size, vocab_size=1000)
    assert all(bits_equal(a, b) for a, b in zip(first.out, second.out, strict=True))
    assert torch.equal(first.gradient, second.gradient)


def batches() -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 40), torch.randint(0, 40, (6,))
    nan = logits.clone()
    nan[0, 1], nan[1, 30], nan[2], nan[3] = math.nan, math.inf, -math.inf, math.nan
    return {
        "ordinary": (logits, labels, None),
        "all masked": (logits, labels, torch.zeros(6)),
        "all ignored": (logits, torch.full((6,), -100), None),
        "nan": (nan, labels, None),
        "labels on one rank": (logits, torch.zeros(6).long(), None),
        "no tokens": (logits[:0], labels[:0], None),
    }


@pytest.mark.parametrize("top_k", [20, 3, None])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", batches())
def test_one_collective_forward_none_backward_whatever_the_values(
    name: str, world_size: int, top_k: int | None
) -> None:
    logits, labels, mask = batches()[name]

    with recorded_collectives() as recorder:

        def rank_loss(rank: int) -> tuple[list[Call], list[Call]]:
            part = shard(logits, rank, world_size)
            config = EAFTConfig(top_k=top_k)
            out = eaft_loss(part, labels, config, vocab_size=40, group=dist.group.WORLD, loss_mask=mask)
            forward = list(recorder.calls)
            out.loss.sum().backward()
            return forward, recorder.calls[len(forward) :]

        results = run_threads(rank_loss, world_size)
    width = 3 + (top_k or 1)
    tokens = len(labels)
    for forward, backward in results:
        assert backward == []
        if world_size == 1:
            assert forward == []
            continue
        assert len(forward) == 1, forward
        called, tensors = forward[0]
        assert called in ("all_gather_into_tensor", "all_gather_single")
        assert tensors == (
            ((world_size * tokens, width), torch.float32),
            ((tokens, width), torch.float32),
        )


def test_the_recorder_sees_a_collective() -> None:
    with recorded_collectives() as recorder:

        def work(rank: int) -> list[Call]:
            dist.all_reduce(torch.ones(2))
            return recorder.calls

        assert run_threads(work, 2) == [[("all_reduce", (((2,), torch.float32),))]] * 2


def step(parts: list[tuple[Tensor, Tensor]], config: EAFTConfig) -> tuple[float, list[Tensor]]:
    """Loss sum over all micro-batches divided once by all counted tokens, and its gradient."""
    leaves = [logits.clone().requires_grad_() for logits, _ in parts]
    outs = [eaft_loss(leaf, labels, config).loss for leaf, (_, labels) in zip(leaves, parts, strict=True)]
    count = sum(int((labels != -100).sum()) for _, labels in parts)
    total = torch.stack([loss.sum() for loss in outs]).sum() / count
    total.backward()
    return total.item(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@configs
def test_any_split_of_the_tokens_gives_the_same_step(config: EAFTConfig) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(24, 50, dtype=torch.float64), torch.randint(0, 50, (24,))
    labels[:7] = -100
    labels[10:12] = -100
    whole, (gradient,) = step([(logits, labels)], config)
    for sizes in ([12, 12], [5, 19], [1] * 24, [7, 1, 16]):
        split, gradients = step(list(zip(logits.split(sizes), labels.split(sizes), strict=True)), config)
        assert split == pytest.approx(whole, rel=1e-12)
        torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-12, atol=1e-14)
        means = [
            eaft_loss(part, target, config).loss.sum() / max(int((target != -100).sum()), 1)
            for part, target in zip(logits.split(sizes), labels.split(sizes), strict=True)
        ]
        # Unequal counts: the mean of means is another number, and this test would see it.
        assert float(torch.stack(means).mean()) != pytest.approx(whole, rel=1e-6)


def test_the_order_of_tokens_changes_nothing() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(32, 300), torch.randint(0, 300, (32,))
    order = torch.randperm(32)
    straight = run_sharded(logits, labels, EAFTConfig(), 2, vocab_size=300)
    mixed = run_sharded(logits[order], labels[order], EAFTConfig(), 2, vocab_size=300)
    picked = TokenLoss(*(value[order] for value in straight.out))
    for a, b in zip(mixed.out, picked, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed.gradient, straight.gradient[order], rtol=0, atol=1e-7)
