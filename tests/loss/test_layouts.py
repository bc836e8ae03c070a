"""Logits of any size, shape and strides, in place and out of place."""

import math
import resource

import pytest
import torch
from torch import Tensor

from nemo_eaft import EAFTConfig, eaft_loss
from tests.loss.parallel import GRADIENT, LOSS, assert_matches, layouts, run_sharded

sizes = pytest.mark.parametrize("world_size", [1, 2, 4, 8])


def test_offsets_above_two_to_the_31() -> None:
    """The only counted token lies past element 2**31. Untouched pages of the allocation cost no memory."""
    vocab = 151936
    tokens = 2**31 // vocab + 8
    try:
        logits = torch.empty(tokens, vocab, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("this machine does not promise 4.3 GB of address space")
    assert (tokens - 1) * vocab > 2**31
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = torch.randn(vocab).to(torch.bfloat16)
    logits[tokens - 1] = row
    labels = torch.full((tokens,), -100)
    labels[tokens - 1] = vocab - 1
    out = eaft_loss(logits, labels, EAFTConfig())
    want = eaft_loss(row.unsqueeze(0), labels[tokens - 1 :], EAFTConfig())
    assert out.loss[tokens - 1] == want.loss[0] > 0
    assert out.loss[: tokens - 1].count_nonzero() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB: a quarter of the logits


@pytest.mark.gpu
def test_offsets_above_two_to_the_31_with_gradient_on_a_gpu() -> None:
    vocab = 151936
    tokens = 2**31 // vocab + 8
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free device memory")
    logits = torch.zeros(tokens, vocab, dtype=torch.bfloat16, device="cuda").requires_grad_()
    row = torch.randn(vocab, device="cuda").to(torch.bfloat16)
    with torch.no_grad():
        logits[tokens - 1] = row
    labels = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    out = eaft_loss(logits, labels, EAFTConfig())
    out.loss.sum().backward()
    small = row.unsqueeze(0).requires_grad_()
    want = eaft_loss(small, labels[:1], EAFTConfig())
    want.loss.sum().backward()
    assert logits.grad is not None
    assert small.grad is not None
    torch.testing.assert_close(out.loss[tokens - 1], want.loss[0], **LOSS)
    torch.testing.assert_close(logits.grad[tokens - 1], small.grad[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(out.loss[tokens - 2].item(), math.log(vocab), **LOSS)


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_numbers() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(64, 3000), torch.randint(0, 2990, (64,))
    labels[::5] = -100
    logits[5] = math.nan
    host = run_sharded(logits, labels, EAFTConfig(), 1, vocab_size=2990)
    device = run_sharded(logits.cuda(), labels.cuda(), EAFTConfig(), 1, vocab_size=2990)
    torch.testing.assert_close(device.out.loss.cpu(), host.out.loss, **LOSS)
    torch.testing.assert_close(device.gradient.cpu(), host.gradient, **GRADIENT)


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_any_strides(name: str, dtype: torch.dtype, inplace: bool) -> None:
    base = layouts()["contiguous"]
    labels = torch.randint(0, 37, (6, 4))
    labels[2, 1] = -100
    upstream = torch.randn(4, 6).t()
    leaf = base.to(dtype).requires_grad_()
    eaft_loss(leaf, labels, EAFTConfig(), vocab_size=37).loss.backward(upstream)

    def same_strides(logits: Tensor) -> Tensor:
        source = layouts()[name]
        out = torch.empty_strided(source.shape, source.stride(), dtype=dtype)
        return out.copy_(logits)

    start = base.to(dtype).requires_grad_()
    logits = _Restride.apply(start, same_strides)
    assert logits.stride() == layouts()[name].stride()
    # Labels that are not contiguous either.
    scattered = labels.t().contiguous().t()
    out = eaft_loss(logits, scattered, EAFTConfig(), vocab_size=37, inplace_backward=inplace)
    out.loss.backward(upstream)
    assert start.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(start.grad, leaf.grad, rtol=0, atol=0 if dtype == torch.bfloat16 else 1e-7)


class _Restride(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, restride):
        return restride(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(), None


def test_expanded_logits() -> None:
    row = torch.randn(40, requires_grad=True)
    labels = torch.tensor([1, 2, 3])
    eaft_loss(row.expand(3, 40), labels, EAFTConfig()).loss.sum().backward()
    copies = row.detach().repeat(3, 1).requires_grad_()
    eaft_loss(copies, labels, EAFTConfig()).loss.sum().backward()
    assert row.grad is not None
    assert copies.grad is not None
    torch.testing.assert_close(row.grad, copies.grad.sum(0))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3), (0,), (0, 4), (3, 0, 2)])
@sizes
def test_any_number_of_token_dimensions(shape: tuple[int, ...], world_size: int) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(*shape, 40), torch.randint(0, 40, shape)
    got = run_sharded(logits, labels, EAFTConfig(), world_size, vocab_size=40)
    assert all(value.shape == shape for out in got.outs for value in out)
    assert got.gradient.shape == logits.shape
    assert_matches(got, logits, labels, EAFTConfig(), 40)
