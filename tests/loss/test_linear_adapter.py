"""The fused output layer as an adapter calls it: gradients made in forward, ``main_grad``, any strides."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig
from nemo_eaft.loss import output_layer, output_layer_once, products
from tests.harness import run_threads
from tests.loss.linear_problem import VOCAB, adapter_loss, by_hand, cut, problem, run


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
