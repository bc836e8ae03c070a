"""reference.py against the formula in float64, and against PyTorch's cross-entropy."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from nemo_eaft import EAFTConfig, eaft_loss
from nemo_eaft.config import GATES
from tests.loss.formulas import expected, pad


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_EAFT_BACKEND", "reference")


CONFIGS = [
    *[EAFTConfig(gate=gate) for gate in GATES],  # type: ignore[arg-type]
    EAFTConfig(alpha=0.5),
    EAFTConfig(top_k=None),
    EAFTConfig(top_k=500),
    EAFTConfig(normalizer=3.0),
    EAFTConfig(top_k=2, normalizer=1.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_float64_is_the_formula(config: EAFTConfig) -> None:
    torch.manual_seed(0)
    logits = pad(torch.randn(4, 5, 61, dtype=torch.float64) * 4, 64, value=30.0).requires_grad_()
    labels = torch.randint(0, 61, (4, 5))
    labels[0, 0] = -100
    mask = torch.ones(4, 5)
    mask[1, 1] = 0
    upstream = torch.randn(4, 5, dtype=torch.float64)
    out = eaft_loss(logits, labels, config, vocab_size=61, loss_mask=mask)
    want = expected(logits, labels, config, 61, mask, upstream)
    (gradient,) = torch.autograd.grad(out.loss, logits, upstream)
    for value, name in zip(out, ("loss", "cross_entropy", "entropy", "weight"), strict=True):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value.detach(), getattr(want, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, want.gradient, rtol=1e-12, atol=1e-12)
    assert (gradient[..., 61:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_gate_is_pytorchs_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 99).to(dtype)
    labels = torch.randint(0, 99, (50,))
    out = eaft_loss(logits, labels, EAFTConfig(gate="none"))
    assert out.loss.dtype == torch.float32
    want = cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(out.loss, want, rtol=1.3e-6, atol=1e-6)


def test_not_finite_masked_and_finite_minus_inf() -> None:
    logits = torch.randn(5, 30, dtype=torch.float64)
    logits[0, 3] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3, 4:] = -torch.inf
    logits.requires_grad_()
    labels = torch.full((5,), 1)
    out = eaft_loss(logits, labels, EAFTConfig())
    assert out.loss[:3].isnan().all()
    assert out.loss[3:].isfinite().all()
    out = eaft_loss(logits, torch.tensor([-100, -100, -100, 1, 1]), EAFTConfig())
    (gradient,) = torch.autograd.grad(out.loss.sum(), logits)
    assert (out.loss[:3] == 0).all()
    assert (gradient[:3] == 0).all()
    assert (gradient[3, 4:] == 0).all()
    assert gradient.isfinite().all()
