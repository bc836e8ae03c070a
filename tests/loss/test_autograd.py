"""The loss as one operation among others: inputs untouched, any graph around it, the weight a constant."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

from nemo_eaft import EAFTConfig, eaft_loss
from tests.harness import run_threads
from tests.loss.formulas import expected, pad, shard
from tests.loss.parallel import run_sharded

CONFIG = EAFTConfig()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def batch(dtype: torch.dtype = torch.float32, tokens: int = 6, vocab: int = 40) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (torch.randn(tokens, vocab) * 3).to(dtype), torch.randint(0, vocab, (tokens,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("top_k", [20, None])
def test_inputs_are_never_written(dtype: torch.dtype, world_size: int, top_k: int | None) -> None:
    logits, labels = batch(dtype)
    mask = torch.ones(6)
    mask[2] = 0
    config = EAFTConfig(top_k=top_k)

    def rank_loss(rank: int) -> None:
        part = shard(logits, rank, world_size)
        inputs = [part, labels.clone(), mask.clone()]
        before = [(t.detach().clone(), t._version) for t in inputs]
        group = dist.group.WORLD if world_size > 1 else None
        out = eaft_loss(inputs[0], inputs[1], config, loss_mask=inputs[2], vocab_size=40, group=group)
        out.loss.sum().backward()
        for tensor, (value, version) in zip(inputs, before, strict=True):
            assert torch.equal(tensor, value)
            assert tensor._version == version

    run_threads(rank_loss, world_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_backward_repeats_or_raises(dtype: torch.dtype) -> None:
    logits, labels = batch(dtype)
    logits.requires_grad_()
    loss = eaft_loss(logits, labels, CONFIG).loss.sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_recompute_gives_the_same_bits(use_reentrant: bool) -> None:
    logits, labels = batch()
    plain = logits.clone().requires_grad_()
    eaft_loss(plain * 2, labels, CONFIG).loss.sum().backward()
    again = logits.clone().requires_grad_()
    loss = checkpoint(lambda x: eaft_loss(x * 2, labels, CONFIG).loss.sum(), again, use_reentrant=use_reentrant)
    loss.backward()
    assert plain.grad is not None
    assert again.grad is not None
    assert torch.equal(plain.grad, again.grad)


UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda loss: loss.sum(),
    "scaled": lambda loss: 3.5 * loss.sum(),
    "uneven": lambda loss: (loss * torch.arange(6.0).double()).sum(),
    "squared": lambda loss: (loss**2).sum(),
    "through a product": lambda loss: (loss * loss.detach().roll(1)).sum() / 7,
    "one token": lambda loss: loss[2],
    "transposed": lambda loss: (loss.view(2, 3).t() @ torch.ones(2, 1).double()).sum(),
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_loss_need_not_be_the_last_operation(name: str) -> None:
    logits, labels = batch(torch.float64)
    leaf = logits.clone().requires_grad_()
    UPSTREAM[name](eaft_loss(leaf, labels, CONFIG).loss).backward()
    # The same function of the expected loss gives the upstream gradient that the formula then takes.
    want_loss = expected(logits, labels, CONFIG).loss.requires_grad_()
    (upstream,) = torch.autograd.grad(UPSTREAM[name](want_loss), want_loss)
    want = expected(logits, labels, CONFIG, upstream=upstream).gradient
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, want, rtol=1e-12, atol=1e-12)


def test_gradients_accumulate_and_pass_through_what_comes_before() -> None:
    logits, labels = batch(torch.float64)
    leaf = logits.clone().requires_grad_()
    for _ in range(2):
        eaft_loss(leaf.tanh(), labels, CONFIG).loss.sum().backward()
    want = 2 * expected(logits.tanh(), labels, CONFIG).gradient * (1 - logits.tanh() ** 2)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, want, rtol=1e-12, atol=1e-12)


def test_logits_changed_before_backward_are_noticed() -> None:
    logits, labels = batch()
    source = logits.requires_grad_()
    changed = source * 1
    loss = eaft_loss(changed, labels, CONFIG).loss.sum()
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_the_loss_is_differentiable_and_only_once() -> None:
    logits, labels = batch(torch.float64)
    logits.requires_grad_()
    out = eaft_loss(logits, labels, CONFIG)
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in out[1:])
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(out.loss.sum(), logits, create_graph=True)


def test_without_gradient() -> None:
    logits, labels = batch()
    with torch.no_grad():
        assert not eaft_loss(logits.requires_grad_(), labels, CONFIG).loss.requires_grad
    assert not eaft_loss(logits.detach(), labels, CONFIG).loss.requires_grad


def test_autocast_changes_nothing() -> None:
    logits, labels = batch(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = eaft_loss(logits, labels, CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(inside, eaft_loss(logits, labels, CONFIG), strict=True))


CONFIGS = [EAFTConfig(), EAFTConfig(top_k=None), EAFTConfig(alpha=0.5), EAFTConfig(gate="dft")]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_weight_is_a_constant_for_autograd(
    config: EAFTConfig, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gradcheck passes with the weight held fixed, and fails through it: both, or the semantics are other
    ones."""
    monkeypatch.setenv("NEMO_EAFT_BACKEND", backend)
    logits, labels = batch(torch.float64, tokens=4, vocab=25)
    logits.requires_grad_()
    frozen = eaft_loss(logits, labels, config).weight

    def held(z: Tensor) -> Tensor:
        out = eaft_loss(z, labels, config)
        return out.loss / out.weight * frozen

    assert torch.autograd.gradcheck(held, (logits,))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda z: eaft_loss(z, labels, config).loss, (logits,))


@pytest.mark.parametrize("config", [EAFTConfig(gate="none"), EAFTConfig(alpha=0.0)], ids=str)
def test_plain_cross_entropy_passes_gradcheck_as_it_is(config: EAFTConfig) -> None:
    logits, labels = batch(torch.float64, tokens=4, vocab=25)
    labels[1] = -100
    assert torch.autograd.gradcheck(lambda z: eaft_loss(z, labels, config).loss, (logits.requires_grad_(),))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_local_gradient_is_the_slice_of_the_full_one(world_size: int) -> None:
    """Not the slice times the number of ranks, which is what a differentiable all-reduce would give."""
    torch.manual_seed(0)
    logits = pad(torch.randn(5, 61, dtype=torch.float64), 8)
    labels = torch.randint(0, 61, (5,))
    upstream = torch.randn(5, dtype=torch.float64)
    got = run_sharded(logits, labels, CONFIG, world_size, vocab_size=61, upstream=upstream)
    want = expected(logits, labels, CONFIG, 61, upstream=upstream).gradient
    torch.testing.assert_close(got.gradient, want, rtol=1e-12, atol=1e-12)
    if world_size > 1:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(got.gradient, world_size * want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 4])
def test_inplace_backward_gives_the_same_bits_in_the_logits_storage(dtype: torch.dtype, world_size: int) -> None:
    logits, labels = batch(dtype)
    logits[3] = torch.nan
    labels[3] = -100
    labels.clamp_(max=37)
    vocab_size = 38
    want = run_sharded(logits, labels, CONFIG, world_size, vocab_size=vocab_size)

    def rank_loss(rank: int) -> None:
        leaf = shard(logits, rank, world_size)
        part = leaf * 1
        grads: list[Tensor] = []
        part.register_hook(lambda grad: grads.append(grad))
        group = dist.group.WORLD if world_size > 1 else None
        out = eaft_loss(part, labels, CONFIG, vocab_size=vocab_size, group=group, inplace_backward=True)
        version = part._version
        loss = out.loss.sum()
        loss.backward(retain_graph=True)
        width = part.shape[-1]
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, want.gradient[:, rank * width : (rank + 1) * width])
        assert grads[0].data_ptr() == part.data_ptr()
        assert torch.equal(part, leaf.grad)
        assert part._version > version
        with pytest.raises(RuntimeError, match="inplace_backward=True the first run wrote"):
            loss.backward()

    run_threads(rank_loss, world_size)


def test_inplace_backward_is_noticed_by_whoever_saved_the_logits() -> None:
    logits, labels = batch()
    part = logits.requires_grad_() * 1
    other = (part**2).sum()  # saves part
    eaft_loss(part, labels, CONFIG, inplace_backward=True).loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_backward_refuses_what_it_would_corrupt() -> None:
    logits, labels = batch()
    leaf = logits.requires_grad_()
    with pytest.raises(ValueError, match="inplace_backward must be False for a leaf"):
        eaft_loss(leaf, labels, CONFIG, inplace_backward=True)
    retaining = leaf * 1
    retaining.retain_grad()
    with pytest.raises(ValueError, match="retains its gradient"):
        eaft_loss(retaining, labels, CONFIG, inplace_backward=True)
    row = torch.randn(40, requires_grad=True) * 1
    with pytest.raises(ValueError, match=r"elements share memory, got shape \(6, 40\) with strides \(0, 1\)"):
        eaft_loss(row.expand(6, 40), labels, CONFIG, inplace_backward=True)
    windows = torch.randn(100, requires_grad=True) * 1
    with pytest.raises(ValueError, match="elements share memory"):
        eaft_loss(windows.as_strided((6, 40), (10, 1)), labels, CONFIG, inplace_backward=True)
    # Nothing is written without a gradient, so nothing is refused.
    before = leaf.detach().clone()
    eaft_loss(leaf.detach(), labels, CONFIG, inplace_backward=True)
    assert torch.equal(leaf, before)


def test_inplace_backward_of_a_slice_leaves_its_neighbours_alone() -> None:
    logits, labels = batch()
    wide = torch.cat((logits, torch.ones(6, 8)), dim=-1).requires_grad_() * 1
    eaft_loss(wide[:, :40], labels, CONFIG, inplace_backward=True).loss.sum().backward()
    assert torch.equal(wide[:, 40:], torch.ones(6, 8))
    assert not torch.equal(wide[:, :40], logits)


def compiled_parts(inplace: bool, saved_by_compiled_code: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss between two compiled parts; tanh saves its output for backward, which the loss must then not overwrite."""

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        logits = torch.tanh(x) if saved_by_compiled_code else torch.tanh(x) * 2
        return eaft_loss(logits, labels, EAFTConfig(), inplace_backward=inplace).loss.sum() * 3

    return loss


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_code_around_the_loss(inplace: bool) -> None:
    x, labels = torch.randn(8, 50, requires_grad=True), torch.randint(0, 50, (8,))
    loss = compiled_parts(inplace, saved_by_compiled_code=False)
    (want,) = torch.autograd.grad(loss(x, labels), x)
    torch._dynamo.reset()
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(x, labels), x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_compiled_code_that_needs_overwritten_logits_is_an_error() -> None:
    x, labels = torch.randn(8, 50, requires_grad=True), torch.randint(0, 50, (8,))
    torch._dynamo.reset()
    out = torch.compile(compiled_parts(True, saved_by_compiled_code=True), backend="aot_eager")(x, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_one_graph_through_the_loss_is_refused() -> None:
    x, labels = torch.randn(8, 50), torch.randint(0, 50, (8,))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        torch.compile(compiled_parts(False, False), backend="aot_eager", fullgraph=True)(x, labels)


def test_a_view_of_a_leaf_is_not_overwritten() -> None:
    leaf = torch.randn(6, 40, requires_grad=True)
    kept = torch.randn(6, 40, requires_grad=True) * 2
    kept.retain_grad()
    for logits in (leaf.view(-1, 40), kept.view(-1, 40)):
        with pytest.raises(ValueError, match="inplace_backward must be False for a leaf"):
            eaft_loss(logits, torch.zeros(6, dtype=torch.int64), CONFIG, inplace_backward=True)
