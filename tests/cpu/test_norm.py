"""The norms that Megatron's local specification gets: right by value, and right under sequence parallelism."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cpu import models
from tests.nemo.ranks import run_ranks


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm (no bias) and LayerNorm (bias), as their papers write them."""
    if bias is None:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def norms_and_formula() -> dict[str, float]:
    """Largest differences from the float64 formula, of output and gradients."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    models.start()
    found = {}
    for kind in ("RMSNorm", "LayerNorm"):
        norm = WrappedTorchNorm(models.config(normalization=kind), 32, eps=1e-3)
        assert type(norm).__name__ == f"Local{kind}"
        torch.manual_seed(0)
        x = torch.randn(5, 3, 32, requires_grad=True)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.normal_()
        upstream = torch.randn(5, 3, 32)
        norm(x).backward(upstream)
        inputs = [x, norm.weight] + ([] if kind == "RMSNorm" else [norm.bias])
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        expected = formula(exact[0], exact[1], exact[2] if len(exact) > 2 else None, 1e-3)
        expected.backward(upstream.double())
        found[f"{kind} output"] = float((norm(x) - expected).abs().max())
        for index, (tensor, reference) in enumerate(zip(inputs, exact, strict=True)):
            assert tensor.grad is not None
            assert reference.grad is not None
            found[f"{kind} gradient {index}"] = float((tensor.grad - reference.grad).abs().max())
    return found


def test_norms_are_the_formula() -> None:
    (found,) = run_ranks(norms_and_formula, 1)
    assert len(found) == 7
    assert max(found.values()) < 1e-5, found


def refusals() -> list[str]:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    models.start()
    said = []
    for name, value in (
        ("normalization", "L2Norm"),
        ("layernorm_zero_centered_gamma", True),
        ("memory_efficient_layer_norm", True),
    ):
        config = models.config()
        setattr(config, name, value)
        with pytest.raises(ValueError) as error:
            WrappedTorchNorm(config, 32)
        said.append(str(error.value))
    return said


def test_a_norm_that_torch_lacks_is_refused_by_name() -> None:
    (said,) = run_ranks(refusals, 1)
    names = ("normalization", "layernorm_zero_centered_gamma", "memory_efficient_layer_norm")
    for name, message in zip(names, said, strict=True):
        assert message.startswith(f"{name}: ")


def norm_gradients(tensor: int, sequence: bool, marked: bool = True) -> dict[str, Tensor]:
    """Gradients of every norm after Megatron's own finalize, and its marks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    models.start(tensor)
    config = models.config(tensor, sequence_parallel=sequence, qk_layernorm=True, bias_dropout_fusion=False)
    model = models.gpt(config)
    norms = {name: p for name, p in model.named_parameters() if "norm" in name}
    for name, parameter in norms.items():
        assert parameter.sequence_parallel is sequence, name
        if not marked:
            del parameter.sequence_parallel
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    ddp.zero_grad_buffer()
    data = models.batch(length=8)
    (data.forward(ddp) * data.loss_mask).sum().backward()
    finalize_model_grads([ddp])
    found: dict[str, Any] = {name: p.main_grad.clone() for name, p in norms.items()}
    return found


def test_gradients_under_sequence_parallelism_are_those_without() -> None:
    (whole,) = run_ranks(norm_gradients, 1, 1, False)
    assert len(whole) == 9
    assert min(float(gradient.abs().max()) for gradient in whole.values()) > 1e-2
    for found in run_ranks(norm_gradients, 2, 2, True) + run_ranks(norm_gradients, 2, 2, False):
        # Each gradient is a sum over 16 tokens, rounded relative to its largest terms.
        assert models.largest_relative_difference(found, whole) < 2e-6

    wrong = run_ranks(norm_gradients, 2, 2, True, False)[0]
    assert models.largest_difference(wrong, whole) > 1e-2, "norms without the mark went unnoticed"
    # Megatron sums the gradients of query and key norms by their name, marked or not.
    assert {n for n in whole if (wrong[n] - whole[n]).abs().max() > 1e-2} == {n for n in whole if "_layernorm" in n} - {
        n for n in whole if "q_layernorm" in n or "k_layernorm" in n
    }
