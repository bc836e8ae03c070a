"""The gradient norm at the logits, over one rank and several, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nemo_eaft.analyze.logit_gradient import LogitGradient, logit_gradient
from tests.harness import run_threads

VOCAB, TOKENS = 50, 40


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits from flat to so sharp that 1 - p has no digit in float32, and a padding of large ones."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(TOKENS, 64, generator=generator) * torch.linspace(0.1, 8.0, TOKENS)[:, None]
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    logits[::4].scatter_(1, labels[::4, None], 40.0)
    logits[:, VOCAB:] = 100.0
    return logits, labels


def by_autograd(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    true = logits[:, :VOCAB].double().requires_grad_()
    torch.nn.functional.cross_entropy(true, labels, reduction="sum").backward()
    assert true.grad is not None
    # Of a label at logit 40 the softmax less 1 has no digits either: the rest of the row has them.
    p = true.detach().softmax(-1)
    others = p.scatter(1, labels[:, None], 0.0)
    exact = (others.sum(1) ** 2 + (others**2).sum(1)).sqrt()
    assert torch.allclose(exact, true.grad.norm(dim=1), rtol=1e-9, atol=1e-15)
    return exact, p


def shard(rank: int, ranks: int) -> LogitGradient:
    logits, labels = problem()
    return logit_gradient(logits.chunk(ranks, 1)[rank], labels, VOCAB, dist.group.WORLD if ranks > 1 else None)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_equals_autograd(ranks: int) -> None:
    """With 8 ranks one holds padding alone."""
    found = run_threads(shard, ranks, ranks) if ranks > 1 else [shard(0, 1)]
    exact, p = by_autograd(*problem())
    for each in found:
        assert torch.allclose(each.norm, exact, rtol=2e-6, atol=0)
        assert torch.equal(each.top, p.argmax(1))
        assert torch.allclose(each.top_probability, p.amax(1), rtol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


def test_the_plain_formula_would_not_pass() -> None:
    """sqrt(sum p^2 - 2 p + 1) in float32 loses a token that the model is sure of."""
    logits, labels = problem()
    p = logits[:, :VOCAB].softmax(-1)
    plain = ((p**2).sum(1) - 2 * p.gather(1, labels[:, None])[:, 0] + 1).clamp(min=0).sqrt()
    assert not torch.allclose(plain.double(), by_autograd(logits, labels)[0], rtol=1e-2, atol=0)


def test_no_token_and_inputs_untouched() -> None:
    logits, labels = problem()
    before = logits.clone()
    assert logit_gradient(logits, labels, VOCAB, None).norm.shape == (TOKENS,)
    assert torch.equal(logits, before)
    assert logit_gradient(logits[:0], labels[:0], VOCAB, None).norm.shape == (0,)
