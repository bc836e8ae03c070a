"""The fused output layer on real Megatron-Core models: what it refuses, and where the weight's gradient goes."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_eaft import EAFTConfig
from nemo_eaft.megatron import attach, detach
from tests.cpu import models
from tests.nemo.ranks import run_ranks

V = models.VOCAB_SIZE
MICRO_BATCHES = 3


def fused(model: Any) -> Any:
    loss = attach(model, EAFTConfig(), vocab_size=V, fused_linear=True)
    assert loss is not None
    return loss


# --- what is refused


def refused_layers() -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear

    models.start()

    def refuse(change: Any, message: str) -> None:
        model = models.gpt(models.config())
        change(model)
        before, layer = dict(model.__dict__), dict(model.output_layer.__dict__)
        with pytest.raises(ValueError, match=rf"^fused_linear: True; allowed: False with this model: .*{message}"):
            fused(model)
        assert model.__dict__ == before
        assert model.output_layer.__dict__ == layer
        # Without the fusion all of them are fine.
        assert attach(model, EAFTConfig(), vocab_size=V) is not None

    class LoRALinear(torch.nn.Module):
        def __init__(self, to_wrap: Any) -> None:
            super().__init__()
            self.to_wrap = to_wrap

    class Capped(ColumnParallelLinear):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            logits, bias = super().forward(*args, **kwargs)
            return torch.tanh(logits), bias

    def lora(model: Any) -> None:
        model.output_layer = LoRALinear(model.output_layer)

    def capped(model: Any) -> None:
        model.output_layer.__class__ = Capped

    def patched(model: Any) -> None:
        model.output_layer.forward = types.MethodType(lambda self, *a, **k: None, model.output_layer)

    def bias(model: Any) -> None:
        model.output_layer.bias = torch.nn.Parameter(torch.zeros(models.PADDED_VOCAB_SIZE))

    def hooked(model: Any) -> None:
        model.output_layer.register_forward_hook(lambda *_: None)

    def gathered(model: Any) -> None:
        model.output_layer.gather_output = True

    def deferred(model: Any) -> None:
        model.config.defer_embedding_wgrad_compute = True

    refuse(lora, r"its output layer is LoRALinear \(LoRA on the output layer\), not megatron-core's")
    refuse(capped, "the forward of its output layer Capped is not ColumnParallelLinear's")
    refuse(patched, "the forward of its output layer ColumnParallelLinear is not")
    refuse(bias, "its output layer has a bias")
    refuse(hooked, "its output layer has forward hooks")
    refuse(gathered, "its output layer has gather_output=True")
    refuse(deferred, "its configuration has defer_embedding_wgrad_compute=True")

    # LoRA that comes after attach.
    model, data = models.gpt(models.config()), models.batch()
    loss = fused(model)
    lora(model)
    assert not loss.in_place()
    with pytest.raises(
        ValueError, match=r"was replaced after attach \(now LoRALinear\); with LoRA on the output layer"
    ):
        data.forward(model)


def test_output_layers_that_do_more_are_refused() -> None:
    run_ranks(refused_layers, 1)


def broken_assumptions() -> None:
    models.start()
    data = models.batch()

    model = models.gpt(models.config())
    fused(model)
    with pytest.raises(RuntimeError, match="the fused output layer was not called before it"):
        model.compute_language_model_loss(data.labels, torch.zeros(8, 2, models.PADDED_VOCAB_SIZE))

    class Elsewhere(type(model)):  # type: ignore[misc]
        def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            logits, _ = self.output_layer(hidden_states)
            return logits.sum()

    other = models.gpt(models.config())
    other.__class__ = Elsewhere
    fused(other)
    with pytest.raises(RuntimeError, match="compute_language_model_loss was not called with them"):
        data.forward(other)

    with pytest.raises(ValueError, match="runtime_gather_output=True with labels"):
        data.forward(model, runtime_gather_output=True)
    # None of it stays behind.
    expected = models.gpt(models.config())
    attach(expected, EAFTConfig(), vocab_size=V)
    torch.testing.assert_close(data.forward(model), data.forward(expected), atol=1e-5, rtol=1.3e-6)


def test_a_model_that_computes_elsewhere_is_an_error() -> None:
    run_ranks(broken_assumptions, 1)


def generation() -> None:
    """Without labels the real layer answers, bit for bit, with and without a loss before it."""
    models.start()
    model, data = models.gpt(models.config(), tied=True), models.batch()
    before = data.logits(model)
    fused(model)
    assert torch.equal(data.logits(model), before)
    data.forward(model)
    # labels given by position (input_ids, position_ids, attention_mask, decoder_input, labels)
    by_position = model(data.tokens, data.positions, None, None, data.labels)
    assert by_position.shape == data.labels.shape
    assert torch.equal(by_position, data.forward(model))
    assert torch.equal(data.logits(model), before)
    detach(model)
    assert torch.equal(data.logits(model), before)


def test_without_labels_the_output_layer_is_megatrons() -> None:
    run_ranks(generation, 1)


def logits_seen() -> list[int]:
    """Largest tensor that each way of training makes, in elements."""
    from tests.loss.recording import Allocations

    models.start()
    found = []
    for fuse in (False, True):
        model = models.gpt(models.config())
        attach(model, EAFTConfig(), vocab_size=V, fused_linear=fuse)
        seen: list[tuple[int, ...]] = []
        model.output_layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(tuple(out[0].shape)))
        data = models.batch()
        with Allocations():
            data.forward(model).sum().backward()
        found.append(seen[0][-1])
    return found


def test_the_layer_gives_hidden_states_and_no_logits() -> None:
    assert run_ranks(logits_seen, 1) == [[models.PADDED_VOCAB_SIZE, 32]]


# --- where the weight's gradient goes


def main_grads(
    fuse: bool, dtype: torch.dtype, distributed: bool, overlap: bool, tied: bool, heads: bool, promise: bool = False
) -> dict[str, Tensor]:
    """Every parameter's main_grad under Megatron's DDP after several micro-batches, two such steps on."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper

    models.start()
    changes: dict[str, Any] = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.5} if heads else {}
    half = dtype == torch.bfloat16
    config = models.config(bf16=half, params_dtype=dtype, **changes)
    core = models.gpt(config, tied=tied)
    if half:
        core = Float16Module(config, core)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap,
        # Puts a forward pre-hook on every module, the output layer too.
        overlap_param_gather=distributed and overlap,
    )
    model = DistributedDataParallel(config, ddp, core)
    loss = attach(model, EAFTConfig(), vocab_size=V, fused_linear=fuse)
    assert loss is not None
    loss.scaled_mask_upstream = promise
    if heads:
        MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    rank = torch.distributed.get_rank()
    for _ in range(2):
        MTPLossLoggingHelper.tracker.clear()
        model.zero_grad_buffer()
        for index in range(MICRO_BATCHES):
            data = models.batch(seed=10 * index + rank)
            last = index == MICRO_BATCHES - 1
            with contextlib.nullcontext() if last else model.no_sync():
                out = data.forward(model, loss_mask=data.loss_mask.clone())
                (out * data.loss_mask).sum().backward()
        finalize_model_grads([model])
    assert all(parameter.grad is None for parameter in model.parameters())
    # A distributed optimizer owns a part of each buffer; only that part is reduced.
    parts = {}
    for name, parameter in model.module.named_parameters():
        parts[name] = parameter.main_grad.detach().clone()
        if distributed:
            bucket = next(bucket for buffer in model.buffers for bucket in buffer.buckets if parameter in bucket.params)
            flat, size = bucket.grad_data, bucket.grad_data.numel() // torch.distributed.get_world_size()
            start = (parameter.main_grad.data_ptr() - flat.data_ptr()) // flat.element_size()
            mine = torch.arange(start, start + parameter.main_grad.numel()) // size == rank
            parts[name] = torch.where(mine.view_as(parameter.main_grad), parameter.main_grad, 0.0)
    return parts


SINGLE, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "dtype, distributed, overlap, tied, heads",
    [
        (SINGLE, False, False, False, False),
        (SINGLE, False, True, True, False),
        (SINGLE, True, False, False, False),
        (SINGLE, True, True, True, False),
        (HALF, False, False, False, False),
        (HALF, True, True, True, False),
        # Prediction heads use the weight through the real layer.
        (SINGLE, False, False, False, True),
        (SINGLE, False, True, True, True),
    ],
)
def test_accumulated_gradients_under_megatrons_ddp(
    dtype: torch.dtype, distributed: bool, overlap: bool, tied: bool, heads: bool
) -> None:
    arguments = (dtype, distributed, overlap, tied, heads)
    expected, found = (run_ranks(main_grads, 2, fuse, *arguments) for fuse in (False, True))
    assert found[0].keys() == expected[0].keys()
    # The parts that the ranks of a distributed optimizer own; otherwise twice the same.
    for name in expected[0]:
        want, got = (ranks[0][name] + ranks[1][name] for ranks in (expected, found))
        assert got.dtype == SINGLE
        apart = float((got - want).abs().max() / want.abs().max())
        # Unfused, the gradients of each micro-batch are rounded to bfloat16 (eps 2 ** -7), layer by layer.
        assert apart < (1e-5 if dtype == SINGLE else 3e-2), name


def test_the_promise_of_one_number_changes_no_gradient() -> None:
    arguments = (torch.float32, False, False, True, False)
    ((expected,), (found,)) = (run_ranks(main_grads, 1, True, *arguments, promise) for promise in (False, True))
    for name, want in expected.items():
        assert float((found[name] - want).abs().max() / want.abs().max()) < 1e-5, name


def broken_promise() -> None:
    models.start()
    model, data = models.gpt(models.config()), models.batch()
    loss = fused(model)
    loss.scaled_mask_upstream = True
    mask = data.loss_mask
    (2.5 * data.forward(model, loss_mask=mask) * mask).sum().backward()
    total = (data.forward(model, loss_mask=mask) * mask * torch.rand(mask.shape)).sum()
    with pytest.raises(RuntimeError, match="is not one number times the loss mask"):
        total.backward()
    # Validation has no gradient to promise anything about.
    model.eval()
    with torch.no_grad():
        data.forward(model, loss_mask=mask)


def test_a_broken_promise_stops() -> None:
    run_ranks(broken_promise, 1)


def frozen() -> None:
    models.start()
    model, data = models.gpt(models.config()), models.batch()
    model.output_layer.weight.requires_grad_(False)
    fused(model)
    data.forward(model).sum().backward()
    assert model.output_layer.weight.grad is None
    assert model.embedding.word_embeddings.weight.grad is not None


def test_a_frozen_weight_gets_no_gradient() -> None:
    run_ranks(frozen, 1)
