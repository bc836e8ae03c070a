"""eaft_linear_loss: the same loss as on the logits, and gradients of hidden states and weight at every
size."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig, eaft_linear_loss, eaft_loss
from nemo_eaft.loss import output_layer, products
from tests.harness import run_threads
from tests.loss.linear_problem import PADDED, VOCAB, WIDTH, by_hand, cut, problem, run
from tests.loss.parallel import bits_equal
from tests.loss.recording import Allocations, Call, recorded_collectives

CONFIGS = [EAFTConfig(), EAFTConfig(top_k=None), EAFTConfig(gate="none"), EAFTConfig(alpha=0.5)]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("piece", [(1, 1), (5, 3), (1000, 1000)], ids=str)
def test_values_and_gradients(
    config: EAFTConfig,
    world_size: int,
    sequence_parallel: bool,
    piece: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut(monkeypatch, *piece)
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


@pytest.mark.parametrize("wrong", ["labels forgotten", "ignored rows kept", "first block only"])
def test_wrong_variants_are_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above compare is false for a backward with one line wrong."""
    cut(monkeypatch, 5, 3)
    hidden, weight, labels, upstream = problem()
    _, grad_hidden, grad_weight = by_hand(hidden, weight, labels, EAFTConfig(), upstream)
    if wrong == "labels forgotten":
        monkeypatch.setattr(output_layer, "_targets_in", lambda target, columns: target.clamp(max=-1))
    elif wrong == "ignored rows kept":
        hidden[0] = math.nan
        monkeypatch.setattr(output_layer, "without_ignored", lambda tokens, target: tokens)
    else:
        original = products.add_product
        monkeypatch.setattr(output_layer, "add_product", lambda *a, fresh: original(*a, fresh=True))
    ((_, got_hidden, got_weight),) = run(hidden, weight, labels, EAFTConfig(), upstream, 1)
    close = [
        torch.allclose(got, want, rtol=1e-12, atol=1e-12)
        for got, want in ((got_hidden, grad_hidden), (got_weight, grad_weight))
    ]
    assert not all(close)


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
    """No new storage of tokens x V_local elements, nor of the bytes of one more piece than there is."""
    torch.manual_seed(0)
    tokens, vocab, width = 256, 4096, 8
    piece = 16 * vocab * 4
    monkeypatch.setattr(products, "_CPU_PIECE_BYTES", piece)
    monkeypatch.setattr(products, "_CPU_CHUNK_BYTES", piece)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))

    def made(loss: Any) -> tuple[Allocations, Allocations]:
        with Allocations() as forward:
            total = loss().loss.sum()
        with Allocations() as backward:
            total.backward()
        return forward, backward

    forward, backward = made(lambda: eaft_linear_loss(hidden, weight, labels, EAFTConfig()))
    assert forward.at_least(piece), "the recorder saw nothing"
    assert forward.at_least(piece + 1) == []
    assert backward.at_least(piece), "the recorder saw nothing"
    assert backward.at_least(piece + 1) == []
    # What the bound is for.
    forward, backward = made(lambda: eaft_loss(hidden @ weight.t(), labels, EAFTConfig()))
    assert forward.at_least(tokens * vocab * 4)
    assert backward.at_least(tokens * vocab * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 100, 5000, 10**7])
def test_pieces_cover_everything_and_stay_small(tokens: int, dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    for vocab in (1, 300, 49152, 262144):
        chunks = products.token_chunks(tokens, vocab, like)
        columns, rows = products.vocabulary_tiles(tokens, vocab, like)
        for ranges, size in ((chunks, tokens), (rows, tokens), (columns, vocab)):
            assert (ranges[0].start, ranges[-1].stop) == (0, size)
            assert all(a.stop == b.start for a, b in itertools.pairwise(ranges))
        for height, width in ((chunks[0].stop, vocab), (rows[0].stop, columns[0].stop)):
            assert height * width * 4 <= max(40 << 20, 16 * 4 * vocab)


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


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("piece", [(5, 3), (1000, 1000)], ids=str)
def test_the_gradients_of_bfloat16_are_rounded_once(
    piece: tuple[int, int], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With logits and their gradient exact in bfloat16, only the last rounding is left, whatever the pieces."""
    cut(monkeypatch, *piece)
    torch.manual_seed(3)
    tokens, vocab = 64, 32
    # Every logit is 0, so the softmax is 1/32 and its gradient a multiple of 1/32: all exact.
    hidden = torch.randint(-100, 100, (tokens, 2)).bfloat16() / 16
    hidden = torch.cat((hidden, torch.zeros(tokens, 2).bfloat16()), dim=-1)
    weight = torch.zeros(vocab, 4).bfloat16()
    weight[:, 2:] = torch.randint(-100, 100, (vocab, 2)).bfloat16() / 16
    labels = torch.randint(0, vocab, (tokens,))

    def rank_loss(rank: int) -> tuple[Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.chunk(world_size)[rank].clone().requires_grad_()
        group = dist.group.WORLD if world_size > 1 else None
        eaft_linear_loss(h, w, labels, EAFTConfig(gate="none"), vocab_size=vocab, group=group).loss.sum().backward()
        assert h.grad is not None
        assert w.grad is not None
        return h.grad, w.grad

    results = [rank_loss(0)] if world_size == 1 else run_threads(rank_loss, world_size)
    grad = torch.full((tokens, vocab), 1 / 32, dtype=torch.float64)
    grad[torch.arange(tokens), labels] -= 1
    assert torch.equal(torch.cat([w for _, w in results]), (grad.t() @ hidden.double()).bfloat16())
    if world_size == 1:
        assert torch.equal(results[0][0], (grad @ weight.double()).bfloat16())


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
