"""eaft_linear_loss: the same loss as on the logits, and gradients of hidden states and weight at every
size."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig, TokenLoss, eaft_linear_loss, eaft_loss
from nemo_eaft.loss import output_layer, output_layer_once, products
from nemo_eaft.loss.linear import output_layer_loss
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


def cut(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """Pieces of logits of so many tokens in forward, and by so many columns in backward."""
    monkeypatch.setattr(products, "_CPU_PIECE_BYTES", 0)
    monkeypatch.setattr(products, "_CPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(products, "_LEAST_ROWS", rows)
    monkeypatch.setattr(products, "_LEAST_COLUMNS", columns)


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


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("kind", ["transposed", "expanded", "slice"])
def test_any_strides_of_hidden_states_and_upstream_gradient(kind: str, once: bool) -> None:
    hidden, weight, labels, upstream = problem()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    seen, given = h, upstream.double()
    if kind == "transposed":
        seen, labels, given = h.transpose(0, 1), labels.t(), given.t()
    elif kind == "slice":
        seen = h[:, ::2]
        labels, given = labels[:, ::2], given[:, ::2]
    if once or kind == "expanded":
        given = torch.tensor(0.7, dtype=torch.float64).expand(labels.shape)
    out = adapter_loss(seen, w, labels, scaled_mask_upstream=once)
    (got_hidden, got_weight) = torch.autograd.grad(out.loss, (seen, w), given)
    _, grad_hidden, grad_weight = by_hand(seen.detach(), weight, labels, EAFTConfig(), given)
    torch.testing.assert_close(got_hidden, grad_hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_weight, grad_weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("once", [False, True])
def test_a_second_backward_gives_the_same_and_a_second_derivative_is_refused(once: bool) -> None:
    hidden, weight, labels, _ = problem(torch.float32)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total = adapter_loss(h, w, labels, scaled_mask_upstream=once).loss.sum()
    first = torch.autograd.grad(total, (h, w), retain_graph=True)
    second = torch.autograd.grad(total, (h, w), retain_graph=True)
    again = torch.autograd.grad(adapter_loss(h, w, labels, scaled_mask_upstream=once).loss.sum(), (h, w))
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c), "not deterministic"
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(total, (h, w), create_graph=True)


# --- what only an adapter may ask for


def adapter_loss(hidden: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any) -> TokenLoss:
    arguments: dict[str, Any] = {"vocab_size": VOCAB, "group": None, "loss_mask": None, "sequence_parallel": False}
    return output_layer_loss(hidden, weight, labels, EAFTConfig(), **(arguments | kwargs))


@pytest.mark.parametrize("piece", [(1, 1), (5, 3), (1000, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_made_in_forward(dtype: torch.dtype, piece: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, *piece)
    hidden, weight, labels, _ = problem(dtype)
    hidden[0] = math.nan  # of tokens that do not count
    upstream = 0.375 * (labels != -100)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = adapter_loss(h, w, labels, scaled_mask_upstream=True)
    out.loss.backward(upstream.to(out.loss.dtype))
    plain = run(hidden, weight, labels, EAFTConfig(), upstream, 1)[0]
    eps = torch.finfo(dtype).eps
    assert all(torch.equal(a.detach(), b) for a, b in zip(out, plain[0], strict=True))
    for got, want in ((h.grad, plain[1]), (w.grad, plain[2])):
        assert got is not None
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want.double(), rtol=2 * eps, atol=8 * eps)


@pytest.mark.parametrize("once", [False, True])
def test_padding_rows_of_the_weight_reach_nothing(once: bool) -> None:
    hidden, weight, labels, _ = problem()
    padded = torch.cat([weight, torch.full((3, weight.shape[1]), math.nan, dtype=weight.dtype)])
    gradients = []
    for part in (weight, padded):
        h, w = hidden.clone().requires_grad_(), part.clone().requires_grad_()
        out = adapter_loss(h, w, labels, vocab_size=len(weight), scaled_mask_upstream=once)
        out.loss.sum().backward()
        gradients.append((h.grad, w.grad))
    (want_h, want_w), (got_h, got_w) = gradients
    assert got_h is not None
    assert got_w is not None
    torch.testing.assert_close(got_h, want_h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_w[: len(weight)], want_w, rtol=1e-12, atol=1e-12)
    assert (got_w[len(weight) :] == 0).all()


def test_gradients_made_in_forward_are_not_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward multiplies no matrices, and without gradients forward makes none."""
    calls: list[str] = []
    original = products.add_product

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append("product")
        original(*args, **kwargs)

    for module in (output_layer, output_layer_once):
        monkeypatch.setattr(module, "add_product", counted)
    hidden, weight, labels, _ = problem()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.no_grad():
        adapter_loss(h, w, labels, scaled_mask_upstream=True)
    assert calls == []
    out = adapter_loss(h, w, labels, scaled_mask_upstream=True)
    assert len(calls) == 2
    out.loss.sum().backward()
    assert len(calls) == 2


def test_gradients_made_in_forward_need_one_number_upstream() -> None:
    hidden, weight, labels, _ = problem(torch.float32)

    def backward(upstream: Tensor, labels: Tensor = labels) -> Tensor:
        h = hidden.clone().requires_grad_()
        adapter_loss(h, weight, labels, scaled_mask_upstream=True).loss.backward(upstream)
        assert h.grad is not None
        return h.grad

    ones = torch.ones(labels.shape)
    for wrong in (1 + 1e-6, 0.0, math.nan, -1.0):
        upstream = ones.clone()
        upstream[3, 1] = wrong
        with pytest.raises(RuntimeError, match="is not one number times the loss mask"):
            backward(upstream)
    # What comes for tokens that do not count is nobody's business.
    upstream = ones.clone()
    upstream[0] = math.nan
    assert torch.equal(backward(upstream), backward(ones))
    assert (backward(ones, torch.full_like(labels, -100)) == 0).all()


def test_gradients_made_in_forward_need_one_rank() -> None:
    hidden, weight, labels, _ = problem()

    def refused(rank: int) -> str:
        with pytest.raises(ValueError, match="scaled_mask_upstream must be False with more than one rank") as caught:
            adapter_loss(hidden, weight.chunk(2)[rank], labels, scaled_mask_upstream=True, group=dist.group.WORLD)
        return str(caught.value)

    assert all("2 ranks" in message for message in run_threads(refused, 2))


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(
    "dtype, main", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
@pytest.mark.parametrize("piece", [(5, 3), (1000, 1000)], ids=str)
def test_main_grad_gets_the_sum_and_autograd_zeros(
    piece: tuple[int, int], dtype: torch.dtype, main: torch.dtype, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, *piece)
    hidden, weight, labels, _ = problem(dtype)
    h = hidden.clone().requires_grad_()
    w: Any = torch.nn.Parameter(weight.clone())
    before = torch.randn(w.shape).to(main)
    w.main_grad, w.grad_added_to_main_grad = before.clone(), False
    out = adapter_loss(h, w, labels, into_main_grad=True, scaled_mask_upstream=once)
    assert torch.equal(w.main_grad, before), "forward wrote to main_grad"
    assert not w.grad_added_to_main_grad
    out.loss.sum().backward()
    assert w.grad_added_to_main_grad
    assert w.grad.dtype == dtype
    assert (w.grad == 0).all()
    wide = weight.float().requires_grad_()
    h_wide = hidden.float().requires_grad_()
    adapter_loss(h_wide, wide, labels).loss.sum().backward()
    assert wide.grad is not None
    if main == torch.float32:
        added = torch.zeros_like(w.main_grad)
        w.main_grad = added
        adapter_loss(h, w, labels, into_main_grad=True, scaled_mask_upstream=once).loss.sum().backward()
        assert torch.equal(added, added.to(dtype).float()) == (dtype == torch.float32), "rounded before it was added"
        w.main_grad = before + added
    # The float32 run has no rounding of logits and of their gradient to bfloat16 (as in test_low_precision).
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(w.main_grad.float(), before.float() + wide.grad, rtol=2 * eps, atol=40 * eps)
    assert torch.equal(w.main_grad[VOCAB:], before[VOCAB:])


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
