"""bfloat16 and float16 against float64 on the same values, for every way to cut the work.

What is compared is the loss alone: the reference starts from the rounded logits. The loss is then within two float32
steps or 1e-6 relative, and the gradient within one step of the dtype of the float64 gradient rounded to it.
"""

import functools
import math
from typing import Any, NamedTuple, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig, TokenLoss, eaft_linear_loss, eaft_loss
from nemo_eaft.config import Gate
from tests.harness import run_threads
from tests.loss.context import zigzag
from tests.loss.formulas import Expected, expected, shard
from tests.loss.parallel import bits_equal

LENGTH, ROWS = 16, 3
LOSS: dict[str, Any] = {"rtol": 1e-6, "atol": 2 * torch.finfo(torch.float32).eps}

CONFIGS = {
    **{gate: EAFTConfig(gate=gate) for gate in get_args(Gate)},
    "full": EAFTConfig(top_k=None),
    "half": EAFTConfig(alpha=0.5, top_k=3),
}
CUTS = {
    "whole": [torch.arange(LENGTH)],
    "micro-batches": list(torch.arange(LENGTH).split([1, 3, 12])),
    "context 2": [zigzag(LENGTH, 2, rank) for rank in range(2)],
    "context 4": [zigzag(LENGTH, 4, rank) for rank in range(4)],
}
VOCABULARIES = {"uneven shards": (53, 56), "empty shards": (17, 24)}

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
sizes = pytest.mark.parametrize("world_size", [1, 2, 4, 8])
cuts = pytest.mark.parametrize("cut", CUTS)
configs = pytest.mark.parametrize("name", CONFIGS)
vocabularies = pytest.mark.parametrize("vocabulary", VOCABULARIES)


def steps_between(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers of a 16-bit dtype lie from a to b."""
    assert a.dtype == b.dtype
    bits = [value.contiguous().view(torch.int16).int() for value in (a, b)]
    ordered = [torch.where(value < 0, -(value & 0x7FFF), value) for value in bits]
    return (ordered[0] - ordered[1]).abs()


def tokens(vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """[s, b] labels of which some are ignored, the loss mask, and an upstream gradient with values of every size."""
    labels = torch.randint(0, vocab, (LENGTH, ROWS))
    labels[0, 1] = labels[7] = -100
    mask = torch.ones(LENGTH, ROWS)
    mask[3:5, 2] = mask[12, 0] = 0
    return labels, mask, torch.randn(LENGTH, ROWS) * torch.logspace(-2, 1, LENGTH).unsqueeze(-1)


def problem(vocab: int, padded: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits with NaN where nothing counts, labels, loss mask and upstream gradient.

    No row is so peaked that its entropy is near 0: over the whole vocabulary float32 knows one to 1e-7, not to 1e-6 of
    itself (``test_a_peaked_row_keeps_its_digits``).
    """
    torch.manual_seed(1)
    logits = (torch.randn(LENGTH, ROWS, padded) * 2).to(dtype)
    logits[..., vocab:] = 30.0
    labels, mask, upstream = tokens(vocab)
    logits[mask == 0] = math.nan
    return logits, labels, mask, upstream


@functools.cache
def wanted(vocab: int, padded: int, dtype: torch.dtype, name: str) -> Expected:
    logits, labels, mask, upstream = problem(vocab, padded, dtype)
    return expected(logits, labels, CONFIGS[name], vocab, mask, upstream)


class Whole(NamedTuple):
    """The parts of a cut side by side."""

    out: TokenLoss
    gradient: Tensor


def run_cut(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    upstream: Tensor,
    config: EAFTConfig,
    vocab: int,
    world_size: int,
    cut: str,
    inplace: bool,
) -> Whole:
    def rank_loss(rank: int) -> Whole:
        values = [torch.full((LENGTH, ROWS), math.nan) for _ in TokenLoss._fields]
        width = logits.shape[-1] // world_size
        gradient = torch.full((LENGTH, ROWS, width), math.nan, dtype=logits.dtype)
        for part in CUTS[cut]:
            leaf = shard(logits[part], rank, world_size)
            out = eaft_loss(
                leaf.clone() if inplace else leaf,
                labels[part],
                config,
                vocab_size=vocab,
                group=dist.group.WORLD if world_size > 1 else None,
                loss_mask=mask[part],
                inplace_backward=inplace,
            )
            out.loss.backward(upstream[part])
            assert leaf.grad is not None
            assert all(value.dtype == torch.float32 for value in out)
            gradient[part] = leaf.grad
            for value, whole in zip(out, values, strict=True):
                whole[part] = value.detach()
        return Whole(TokenLoss(*values), gradient)

    results = [rank_loss(0)] if world_size == 1 else run_threads(rank_loss, world_size)
    for result in results[1:]:
        assert all(bits_equal(a, b) for a, b in zip(result.out, results[0].out, strict=True))
    return Whole(results[0].out, torch.cat([result.gradient for result in results], dim=-1))


@dtypes
@sizes
@cuts
@configs
@vocabularies
@pytest.mark.parametrize("inplace", [False, True], ids=["beside", "in place"])
def test_every_cut_of_the_logits(
    dtype: torch.dtype, world_size: int, cut: str, name: str, vocabulary: str, inplace: bool
) -> None:
    vocab, padded = VOCABULARIES[vocabulary]
    logits, labels, mask, upstream = problem(vocab, padded, dtype)
    got = run_cut(logits, labels, mask, upstream, CONFIGS[name], vocab, world_size, cut, inplace)
    want = wanted(vocab, padded, dtype, name)
    torch.testing.assert_close(got.out.loss.double(), want.loss, **LOSS)
    torch.testing.assert_close(got.out.cross_entropy.double(), want.cross_entropy, **LOSS)
    assert got.out.loss.double().sum().item() == pytest.approx(float(want.loss.sum()), rel=1e-6)
    assert steps_between(got.gradient, want.gradient.to(dtype)).max() <= 1
    assert (got.gradient[..., vocab:] == 0).all()


@dtypes
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("top_k", [3, 20, None])
def test_a_peaked_row_keeps_its_digits(dtype: torch.dtype, world_size: int, top_k: int | None) -> None:
    """Entropies from 1 down to 1e-5 nats, of which alpha = 0.5 shows every digit.

    Of the K largest they are right to 1e-6 of themselves. 1 + x for a small x is not, in float32, and that is how a
    record holds the sum over a whole row: there they are right to 3e-7 nats, and the square root of one that is below
    0.1 is not right to 1e-6. That is our record of a shard, not the problem's condition.
    """
    torch.manual_seed(3)
    logits = torch.randn(LENGTH * ROWS, 1, 64)
    logits[:, 0, 5] += torch.linspace(3, 18, LENGTH * ROWS)
    logits = logits.to(dtype)
    labels = torch.randint(6, 64, (LENGTH * ROWS, 1))
    config = EAFTConfig(alpha=0.5, top_k=top_k)
    want = expected(logits, labels, config)
    assert want.entropy.min() < 1e-4
    assert want.entropy.max() > 0.5

    def rank_loss(rank: int) -> TokenLoss:
        group = dist.group.WORLD if world_size > 1 else None
        out = eaft_loss(shard(logits, rank, world_size), labels, config, vocab_size=64, group=group)
        return TokenLoss(*(value.detach() for value in out))

    out = rank_loss(0) if world_size == 1 else run_threads(rank_loss, world_size)[0]
    if top_k is None:
        torch.testing.assert_close(out.entropy.double(), want.entropy, rtol=1e-6, atol=3e-7)
    else:
        for name in ("entropy", "weight", "loss"):
            torch.testing.assert_close(getattr(out, name).double(), getattr(want, name), rtol=1e-6, atol=0)


@dtypes
def test_a_gradient_rounded_before_scaling_would_be_seen(dtype: torch.dtype) -> None:
    logits, labels, mask, upstream = problem(53, 56, dtype)
    want = wanted(53, 56, dtype, "eaft")
    one = expected(logits, labels, CONFIGS["none"], 53, mask).gradient.to(dtype)
    early = (one * want.weight.unsqueeze(-1).to(dtype)) * upstream.unsqueeze(-1).to(dtype)
    assert steps_between(early, want.gradient.to(dtype)).max() > 1


# --- the fused output layer


VOCAB, PADDED, WIDTH = 37, 40, 8


def exact_problem(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states, weight, labels, loss mask and upstream gradient.

    The first two have few digits, so that every logit is exact in the dtype, whatever the order of adding.
    """
    torch.manual_seed(2)
    hidden = (torch.randint(-4, 5, (LENGTH, ROWS, WIDTH)) / 4).to(dtype)
    weight = (torch.randint(-4, 5, (PADDED, WIDTH)) / 2).to(dtype)
    logits = hidden.double() @ weight.double().t()
    assert torch.equal(logits, logits.to(dtype).double())
    assert logits.abs().max() > 3
    return hidden, weight, *tokens(VOCAB)


@functools.cache
def exactly_wanted(dtype: torch.dtype, name: str) -> Expected:
    hidden, weight, labels, mask, upstream = exact_problem(dtype)
    return expected(hidden.double() @ weight.double().t(), labels, CONFIGS[name], VOCAB, mask, upstream)


def step_of(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of the dtype at a value."""
    info = torch.finfo(dtype)
    return (value.abs().clamp(min=info.smallest_normal).log2().floor().exp2() * info.eps).double()


class Bounded(NamedTuple):
    """A float64 value and how far off a result may be."""

    value: Tensor
    bound: Tensor


def product(gradient: Tensor, noise: Tensor, factor: Tensor, dtype: torch.dtype) -> Bounded:
    """``gradient @ factor`` as the fused layer makes it.

    The gradient of the logits is rounded once to the dtype, the sum is in float32, and it is rounded once. The bound
    is one step of the result, and what entries that float32 rounds to the other side than float64 can bring.
    """
    rounded = gradient.to(dtype).double()
    other_side = (gradient + noise).to(dtype).double() - (gradient - noise).to(dtype).double()
    value = rounded @ factor
    summed = rounded.abs() @ factor.abs()
    return Bounded(value, step_of(value, dtype) + other_side.abs() @ factor.abs() + 1e-6 * summed)


@dtypes
@sizes
@cuts
@configs
@pytest.mark.parametrize("sequence", [False, True], ids=["replicated", "sequence parallel"])
def test_every_cut_of_the_hidden_states(
    dtype: torch.dtype, world_size: int, cut: str, name: str, sequence: bool
) -> None:
    parts = CUTS[cut]
    if sequence and any(len(part) % world_size for part in parts):
        # Sequence parallelism needs equal parts: pieces of 8 rows here.
        parts = list(torch.arange(LENGTH).split(8))
    hidden, weight, labels, mask, upstream = exact_problem(dtype)

    def rank_loss(rank: int) -> list[tuple[TokenLoss, Tensor, Tensor]]:
        found = []
        for part in parts:
            rows = part.chunk(world_size)[rank] if sequence else part
            h = hidden[rows].clone().requires_grad_()
            w = weight.chunk(world_size)[rank].clone().requires_grad_()
            out = eaft_linear_loss(
                h,
                w,
                labels[part],
                CONFIGS[name],
                vocab_size=VOCAB,
                group=dist.group.WORLD if world_size > 1 else None,
                loss_mask=mask[part],
                sequence_parallel=sequence,
            )
            out.loss.backward(upstream[part])
            assert h.grad is not None
            assert w.grad is not None
            assert h.grad.dtype == w.grad.dtype == dtype
            found.append((TokenLoss(*(value.detach() for value in out)), h.grad, w.grad))
        return found

    ranks = [rank_loss(0)] if world_size == 1 else run_threads(rank_loss, world_size)
    want = exactly_wanted(dtype, name)
    noise = 2e-6 * want.gradient.abs() + 2e-7 * upstream.double().abs().unsqueeze(-1)
    noise = torch.where(want.gradient == 0, 0.0, noise)
    columns = [slice(rank * PADDED // world_size, (rank + 1) * PADDED // world_size) for rank in range(world_size)]
    for number, part in enumerate(parts):
        results = [found[number] for found in ranks]
        for out, _, _ in results:
            torch.testing.assert_close(out.loss.double(), want.loss[part], **LOSS)
            assert all(bits_equal(a, b) for a, b in zip(out, results[0][0], strict=True))
        grad, near = want.gradient[part], noise[part]
        shares = [product(grad[..., own], near[..., own], weight[own].double(), dtype) for own in columns]
        value = torch.stack([share.value for share in shares]).sum(0)
        # Each rank's share is rounded once, and so is each sum on the way from rank to rank.
        largest = torch.stack([share.value.abs() for share in shares]).sum(0)
        bound = torch.stack([share.bound for share in shares]).sum(0) + (world_size - 1) * step_of(largest, dtype)
        got = torch.cat([h for _, h, _ in results]) if sequence else results[0][1]
        assert ((got.double() - value).abs() <= bound).all()
        for own, (_, h, w) in zip(columns, results, strict=True):
            assert sequence or torch.equal(h, got), "ranks differ"
            by_row = product(
                grad[..., own].flatten(0, 1).t(),
                near[..., own].flatten(0, 1).t(),
                hidden[part].flatten(0, 1).double(),
                dtype,
            )
            assert ((w.double() - by_row.value).abs() <= by_row.bound).all()
            assert (w[max(VOCAB - own.start, 0) :] == 0).all()


@dtypes
def test_the_bound_of_the_fused_layer_is_one_step(dtype: torch.dtype) -> None:
    """What the comparison above allows is small beside the values: a sum in the dtype itself would not pass."""
    hidden, weight, *_ = exact_problem(dtype)
    want = exactly_wanted(dtype, "eaft")
    noise = 2e-6 * want.gradient.abs()
    bounded = product(want.gradient, noise, weight.double(), dtype)
    assert (bounded.bound <= 1.5 * step_of(bounded.value, dtype) + 1e-5).double().mean() > 0.99
    narrow = torch.zeros_like(hidden)
    for column in range(PADDED):
        narrow = narrow + want.gradient[..., column, None].to(dtype) * weight[column]
    assert ((narrow.double() - bounded.value).abs() > bounded.bound).any()
