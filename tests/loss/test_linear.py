"""eaft_linear_loss: the same loss as on the logits, and gradients of hidden states and weight at every
size."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig, TokenLoss, eaft_linear_loss
from nemo_eaft.loss import linear
from tests.harness import run_threads
from tests.loss.formulas import expected
from tests.loss.parallel import bits_equal
from tests.loss.recording import Allocations, Call, recorded_collectives

VOCAB, PADDED, WIDTH = 37, 40, 12
CONFIGS = [EAFTConfig(), EAFTConfig(top_k=None), EAFTConfig(gate="none"), EAFTConfig(alpha=0.5)]


def problem(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (8, 3)) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(*shape, WIDTH).to(dtype)
    weight = torch.randn(PADDED, WIDTH).to(dtype)
    labels = torch.randint(0, VOCAB, shape)
    labels[0] = -100
    return hidden, weight, labels, torch.randn(shape)


def by_hand(hidden: Tensor, weight: Tensor, labels: Tensor, config: EAFTConfig, upstream: Tensor) -> Any:
    """Expected values, and the gradients of hidden and weight, in float64."""
    h, w = hidden.double().flatten(0, -2), weight.double()
    want = expected((h @ w.t()).view(*labels.shape, -1), labels, config, VOCAB, upstream=upstream)
    grad = want.gradient.flatten(0, -2)
    return want, (grad @ w).view(hidden.shape), grad.t() @ h


def run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    config: EAFTConfig,
    upstream: Tensor,
    world_size: int,
    sequence_parallel: bool = False,
) -> list[tuple[TokenLoss, Tensor, Tensor]]:
    """Per rank: values, the gradient of its hidden states, the gradient of its rows."""

    def rank_loss(rank: int) -> tuple[TokenLoss, Tensor, Tensor]:
        h = (hidden.chunk(world_size)[rank] if sequence_parallel else hidden).clone().requires_grad_()
        w = weight.chunk(world_size)[rank].clone().requires_grad_()
        out = eaft_linear_loss(
            h,
            w,
            labels,
            config,
            vocab_size=VOCAB,
            group=dist.group.WORLD if world_size > 1 else None,
            sequence_parallel=sequence_parallel,
        )
        out.loss.backward(upstream.to(out.loss.dtype))
        assert h.grad is not None
        assert w.grad is not None
        return TokenLoss(*(value.detach() for value in out)), h.grad, w.grad

    return [rank_loss(0)] if world_size == 1 else run_threads(rank_loss, world_size)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_values_and_gradients(
    config: EAFTConfig, world_size: int, sequence_parallel: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(linear, "_LEAST_CHUNK", chunk)
    hidden, weight, labels, upstream = problem()
    results = run(hidden, weight, labels, config, upstream, world_size, sequence_parallel)
    want, grad_hidden, grad_weight = by_hand(hidden, weight, labels, config, upstream)
    tight = {"rtol": 1e-12, "atol": 1e-12}
    for out, _, _ in results:
        for value, mine, name in zip(out, results[0][0], out._fields, strict=True):
            torch.testing.assert_close(value, getattr(want, name), rtol=1e-12, atol=1e-12)
            assert bits_equal(value, mine)
    parts = [h for _, h, _ in results]
    for got in [torch.cat(parts)] if sequence_parallel else parts:
        torch.testing.assert_close(got, grad_hidden, rtol=tight["rtol"], atol=tight["atol"])
    torch.testing.assert_close(torch.cat([w for _, _, w in results]), grad_weight, rtol=1e-12, atol=1e-12)
    assert (torch.cat([w for _, _, w in results])[VOCAB:] == 0).all()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, world_size: int) -> None:
    hidden, weight, labels, upstream = problem(dtype)
    want, grad_hidden, grad_weight = by_hand(hidden, weight, labels, EAFTConfig(), upstream)
    results = run(hidden, weight, labels, EAFTConfig(), upstream, world_size)
    # Logits are rounded to the dtype before the loss sees them, so two roundings of the largest logit (about
    # 10) bound the loss, and the products that follow round again: loose by nature, unlike the loss on given
    # logits.
    eps = torch.finfo(dtype).eps
    for out, h, w in results:
        assert h.dtype == dtype
        assert w.dtype == dtype
        assert out.loss.dtype == torch.float32
        torch.testing.assert_close(out.cross_entropy.double(), want.cross_entropy, rtol=0, atol=20 * eps)
        torch.testing.assert_close(h.double(), grad_hidden, rtol=0, atol=20 * eps)
    got = torch.cat([w for _, _, w in results]).double()
    torch.testing.assert_close(got, grad_weight, rtol=0, atol=40 * eps)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_hidden_states_of_masked_tokens_reach_nothing(poison: float, sequence_parallel: bool) -> None:
    hidden, weight, labels, upstream = problem()
    clean = run(hidden, weight, labels, EAFTConfig(), upstream, 2, sequence_parallel)
    hidden[0] = poison
    upstream[0] = math.nan
    dirty = run(hidden, weight, labels, EAFTConfig(), upstream, 2, sequence_parallel)
    for (out, h, w), (other, other_h, other_w) in zip(clean, dirty, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(out, other, strict=True))
        assert torch.equal(h, other_h)
        assert torch.equal(w, other_w)
    assert (clean[0][1][0] == 0).all()


def test_a_nan_at_a_counted_token_is_nan_on_every_rank() -> None:
    hidden, weight, labels, upstream = problem()
    hidden[2, 1, 0] = math.nan
    for out, h, _ in run(hidden, weight, labels, EAFTConfig(), upstream, 2):
        assert out.loss[2, 1].isnan()
        assert out.loss.isnan().sum() == 1
        assert h[2, 1].isnan().any()


@pytest.mark.parametrize("kind", ["ordinary", "all masked", "no tokens", "nan"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_collectives_are_the_same_for_every_batch(kind: str, sequence_parallel: bool, world_size: int) -> None:
    hidden, weight, labels, _ = problem()
    if kind == "all masked":
        labels = torch.full_like(labels, -100)
    if kind == "no tokens":
        hidden, labels = hidden[:, :0], labels[:, :0]
    if kind == "nan":
        hidden[3] = math.nan

    with recorded_collectives() as recorder:

        def rank_loss(rank: int) -> list[Call]:
            h = (hidden.chunk(world_size)[rank] if sequence_parallel else hidden).clone().requires_grad_()
            w = weight.chunk(world_size)[rank].clone().requires_grad_()
            out = eaft_linear_loss(
                h,
                w,
                labels,
                EAFTConfig(),
                vocab_size=VOCAB,
                group=dist.group.WORLD,
                sequence_parallel=sequence_parallel,
            )
            recorder.calls.append(("backward", ()))
            out.loss.sum().backward()
            return recorder.calls

        results = run_threads(rank_loss, world_size)
    gathers, reduces = "all_gather", "reduce_scatter"
    want = {
        (1, False): ["backward"],
        (1, True): ["backward"],
        (2, False): [gathers, "backward", "all_reduce"],
        (2, True): [gathers, gathers, "backward", gathers, reduces],
    }[world_size, sequence_parallel]
    for calls in results:
        names = [name.removesuffix("_single").removesuffix("_into_tensor").removesuffix("_tensor") for name, _ in calls]
        assert names == want


def test_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tokens, vocab, width, chunk = 256, 1024, 8, 16
    monkeypatch.setattr(linear, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(linear, "_LEAST_CHUNK", chunk)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    with Allocations() as forward:
        out = eaft_linear_loss(hidden, weight, torch.randint(0, vocab, (tokens,)), EAFTConfig())
    total = out.loss.sum()
    with Allocations() as backward:
        total.backward()
    logits_of_a_chunk = chunk * vocab * 4
    assert forward.at_least(logits_of_a_chunk), "the recorder saw nothing"
    assert forward.at_least(logits_of_a_chunk + 1) == []
    assert backward.at_least(max(logits_of_a_chunk, vocab * width * 4) + 1) == []


def test_only_what_is_asked_for_is_computed() -> None:
    hidden, weight, labels, _ = problem()
    only_hidden = eaft_linear_loss(hidden.requires_grad_(), weight, labels, EAFTConfig(), vocab_size=VOCAB)
    only_hidden.loss.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    weight.requires_grad_()
    eaft_linear_loss(hidden.detach(), weight, labels, EAFTConfig(), vocab_size=VOCAB).loss.sum().backward()
    assert weight.grad is not None


def test_the_weight_of_a_token_is_a_constant() -> None:
    hidden, weight, labels, _ = problem(shape=(3,))
    hidden.requires_grad_()
    weight.requires_grad_()

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return eaft_linear_loss(h, w, labels, EAFTConfig(gate="none"), vocab_size=VOCAB).loss

    assert torch.autograd.gradcheck(plain, (hidden, weight))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.randn(PADDED, WIDTH + 1)}, r"weight must have shape \[V_local, 12\] to fit hidden"),
        ({"weight": torch.randn(WIDTH)}, "weight must have at least 2 dimensions"),
        ({"weight": torch.randn(PADDED, WIDTH).half()}, "weight must have hidden's dtype and device"),
        ({"labels": torch.zeros(3, 8).long()}, r"labels must have the shape of the tokens, \(8, 3\)"),
        ({"vocab_size": 41}, "vocab_size must be at most"),
        ({"labels": torch.full((8, 3), 38)}, r"labels must be in \[0, vocab_size=37\)"),
        ({"config": None}, "config must be an EAFTConfig"),
        ({"hidden": torch.zeros(8, 3, WIDTH).long()}, "hidden.dtype must be"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    hidden, weight, labels, _ = problem(torch.float32)
    arguments: dict[str, Any] = {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "config": EAFTConfig(),
        "vocab_size": VOCAB,
    }
    with pytest.raises(ValueError, match=message):
        eaft_linear_loss(**{**arguments, **change})
