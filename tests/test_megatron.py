"""`nemo_eaft.megatron` on real GPTModels of Megatron-Core: where the loss stands, what it is, and how it goes away."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_eaft import EAFTConfig
from nemo_eaft.megatron import attach, attached, detach, unwrap
from tests.cpu import models
from tests.cpu.models import model_and_data
from tests.nemo.ranks import run_ranks

V = models.VOCAB_SIZE


def formula(logits: Tensor, labels: Tensor, config: EAFTConfig) -> dict[str, Tensor]:
    """EAFT by its definition, in float64; logits [b, s, padded V], labels [b, s]."""
    z = logits.detach().double()[..., :V]
    ce = z.logsumexp(-1) - z.gather(-1, labels[..., None])[..., 0]
    k = V if config.top_k is None else min(config.top_k, V)
    q = z.topk(k).values.softmax(-1)
    entropy = -(q * q.log()).sum(-1)
    weight = (entropy / math.log(k)) ** config.alpha
    return {"loss": weight * ce, "cross_entropy": ce, "entropy": entropy, "weight": weight}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=1e-5, rtol=1.3e-6)


def training_and_validation(fused: bool) -> None:
    model, data = model_and_data()
    config = EAFTConfig(alpha=1.5)
    megatron = data.forward(model).detach()
    expected = formula(data.logits(model), data.labels, config)
    loss = attach(model, config, vocab_size=V, fused_linear=fused)
    assert loss is not None
    model.train()
    out = data.forward(model)
    close(out, expected["loss"])
    assert out.is_contiguous()
    assert out.dtype == torch.float32
    assert (out - expected["cross_entropy"]).abs().max() > 0.1, "the gate is not in the loss"

    with torch.no_grad():
        model.eval()
        close(data.forward(model), expected["cross_entropy"])
        # Megatron's own counts the padding columns, which have weights here.
        assert (megatron - expected["cross_entropy"]).abs().min() > 1e-3
        model.train()
    # Without a mask every token counts.
    assert loss.calls == 2
    assert loss.sums is not None
    counted = [expected["loss"].sum() + expected["cross_entropy"].sum(), 2 * expected["cross_entropy"].sum()]
    close(loss.sums[:2], torch.stack(counted))
    assert loss.sums[5] == 2 * data.labels.numel()


@pytest.mark.parametrize("fused", [False, True])
def test_training_is_gated_and_validation_is_plain(fused: bool) -> None:
    run_ranks(training_and_validation, 1, fused)


def gradient(fused: bool) -> None:
    """The model's gradient is that of the formula with the weight held fixed; the logits are not written to."""
    model, data = model_and_data()
    config = EAFTConfig()
    mask = data.loss_mask
    logits = data.logits(model)
    exact = formula(logits, data.labels, config)
    ce = torch.nn.functional.cross_entropy(logits[..., :V].flatten(0, 1), data.labels.flatten(), reduction="none")
    (ce * (exact["weight"] * mask).flatten().float()).sum().backward()
    expected = models.gradients(model)
    model.zero_grad()
    attach(model, config, vocab_size=V, fused_linear=fused)
    (data.forward(model, loss_mask=mask) * mask).sum().backward()
    assert models.largest_difference(models.gradients(model), expected) < 1e-5
    assert max(float(g.abs().max()) for g in expected.values()) > 1


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_reaches_every_parameter(fused: bool) -> None:
    run_ranks(gradient, 1, fused)


def masks(fused: bool) -> None:
    model, data = model_and_data()
    config = EAFTConfig()
    mask = data.loss_mask
    expected = formula(data.logits(model), data.labels, config)["loss"] * mask
    assert 0 < mask.sum() < mask.numel()
    loss = attach(model, config, vocab_size=V, fused_linear=fused)
    assert loss is not None

    def check(out: Tensor, by: Tensor) -> None:
        close(out, expected if by is mask else formula(data.logits(model), data.labels, config)["loss"] * by)
        assert (out[by == 0] == 0).all()
        assert loss is not None
        assert loss.sums is not None
        assert loss.sums[5] == by.sum()
        loss.reset()

    everything = torch.ones_like(mask)
    check(data.forward(model, loss_mask=mask), mask)
    check(data.forward(model), everything)
    loss.set_loss_mask(mask)
    check(data.forward(model), mask)
    check(data.forward(model), everything)
    # The caller of forward knows best.
    loss.set_loss_mask(everything)
    check(data.forward(model, loss_mask=mask), mask)
    # A forward without a loss, and one that fails, use the mask up too.
    loss.set_loss_mask(mask)
    data.logits(model)
    check(data.forward(model), everything)
    loss.set_loss_mask(mask)
    with pytest.raises(TypeError):
        model(None, None, None, labels=data.labels)
    check(data.forward(model), everything)

    loss.requires_loss_mask = True
    with pytest.raises(RuntimeError, match="EAFT got no loss mask for this micro-batch"):
        data.forward(model)
    assert loss.calls == 0
    check(data.forward(model, loss_mask=mask), mask)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_mask_holds_for_one_forward(fused: bool) -> None:
    run_ranks(masks, 1, fused)


def ignored_labels(fused: bool) -> None:
    model, data = model_and_data()
    config = EAFTConfig()
    expected = formula(data.logits(model), data.labels, config)["loss"]
    attached_loss = attach(model, config, vocab_size=V, fused_linear=fused)
    assert attached_loss is not None
    ignored = torch.zeros(data.labels.shape, dtype=torch.bool)
    ignored[0, 2] = ignored[1, :3] = True
    data.labels = data.labels.masked_fill(ignored, -100)

    # Labels alone decide where there is no mask.
    out = data.forward(model)
    close(out, expected.masked_fill(ignored, 0))
    assert (out[ignored] == 0).all()
    assert attached_loss.sums is not None
    assert attached_loss.sums[5] == (~ignored).sum()
    attached_loss.reset()

    for mask in (torch.ones(ignored.shape), (~ignored).float().index_fill(0, torch.tensor([1]), 1.0)):
        with pytest.raises(ValueError, match=r"^labels: -100 \(ignore_index\) where the loss mask is 1.*of 16"):
            data.forward(model, loss_mask=mask)
    assert attached_loss.calls == 0

    mask = (~ignored).float()
    mask[0, 5] = 0
    close(data.forward(model, loss_mask=mask), expected * mask)
    assert attached_loss.sums is not None
    assert attached_loss.sums[5] == mask.sum()


@pytest.mark.parametrize("fused", [False, True])
def test_an_ignored_label_under_the_mask_is_an_error_and_elsewhere_nothing(fused: bool) -> None:
    run_ranks(ignored_labels, 1, fused)


def measuring() -> None:
    """measure_only: Megatron's loss and gradient bit for bit, though it overwrites float32 logits, and EAFT's sums."""
    model, data = model_and_data()
    config = EAFTConfig()
    mask = data.loss_mask
    expected = formula(data.logits(model), data.labels, config)
    before = data.forward(model)
    (before * mask).sum().backward()
    gradients = models.gradients(model)
    model.zero_grad()

    loss = attach(model, config, vocab_size=V, measure_only=True)
    assert loss is not None
    out = data.forward(model, loss_mask=mask)
    (out * mask).sum().backward()
    assert torch.equal(out, before)
    after = models.gradients(model)
    assert all(torch.equal(after[name], gradients[name]) for name in gradients)
    assert loss.sums is not None
    for index, name in enumerate(("loss", "cross_entropy", "entropy", "weight")):
        close(loss.sums[index], (expected[name] * mask).sum())
    assert loss.sums[5] == mask.sum()
    model.eval()
    with torch.no_grad():
        close(data.forward(model, loss_mask=mask), expected["cross_entropy"] * mask)


def test_measuring_changes_no_bit() -> None:
    run_ranks(measuring, 1)


def heads(number: int, fused: bool) -> None:
    """Multi-token prediction: Megatron's own loss and gradient for the heads, EAFT for the main call alone."""
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper

    model, data = model_and_data(mtp_num_layers=number, mtp_loss_scaling_factor=0.1)
    assert model.mtp_process
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    mask = data.loss_mask

    def run(weight: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        model.zero_grad()
        MTPLossLoggingHelper.tracker.clear()
        out = data.forward(model, loss_mask=mask.clone())
        (weight * out * mask).sum().backward()
        return out.detach(), models.gradients(model), MTPLossLoggingHelper.tracker["values"].clone()

    # Weight 0: what is left is the gradient of the heads.
    megatron, theirs, tracked = run(0.0)
    assert max(float(g.abs().max()) for g in theirs.values()) > 1e-2
    expected = formula(data.logits_of_main(model), data.labels, EAFTConfig())
    loss = attach(model, EAFTConfig(), vocab_size=V, fused_linear=fused)
    assert loss is not None
    out, ours, tracked_after = run(0.0)
    assert tracked.numel() == number
    assert torch.equal(tracked, tracked_after)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    close(out, expected["loss"] * mask)
    assert (out - megatron).abs().max() > 0.1
    assert loss.calls == 1
    assert loss.sums is not None
    close(loss.sums[0], (expected["loss"] * mask).sum())
    assert loss.sums[5] == mask.sum()
    run(1.0)
    assert loss.calls == 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_prediction_heads_stay_megatrons(number: int, fused: bool) -> None:
    run_ranks(heads, 1, number, fused)


def recomputed(granularity: str, fused: bool) -> dict[str, Any]:
    method = {"recompute_method": "uniform", "recompute_num_layers": 1} if granularity == "full" else {}
    model, data = model_and_data(recompute_granularity=granularity, **method)
    loss = attach(model, EAFTConfig(), vocab_size=V, fused_linear=fused)
    assert loss is not None
    for micro_batch in range(3):
        out = data.forward(model, loss_mask=data.loss_mask)
        (out * data.loss_mask).sum().backward()
        assert loss.calls == micro_batch + 1
    assert loss.sums is not None
    assert loss.sums[5] == 3 * data.loss_mask.sum()
    return models.gradients(model)


def plain_gradients(fused: bool) -> dict[str, Tensor]:
    model, data = model_and_data()
    attach(model, EAFTConfig(), vocab_size=V, fused_linear=fused)
    for _ in range(3):
        (data.forward(model, loss_mask=data.loss_mask) * data.loss_mask).sum().backward()
    return models.gradients(model)


@pytest.mark.parametrize("fused", [False, True])
def test_recompute_calls_the_loss_once(fused: bool) -> None:
    (expected,) = run_ranks(plain_gradients, 1, fused)
    for granularity in ("full", "selective"):
        (found,) = run_ranks(recomputed, 1, granularity, fused)
        assert all(torch.equal(found[name], expected[name]) for name in expected), granularity


def shard(tensor: int, sequence: bool, fused: bool, tied: bool) -> dict[str, Any]:
    models.start(tensor)
    model = models.gpt(models.config(tensor, sequence_parallel=sequence), tied=tied)
    data = models.batch()
    loss = attach(model, EAFTConfig(), vocab_size=V, fused_linear=fused)
    assert loss is not None
    out = data.forward(model, loss_mask=data.loss_mask)
    (out * data.loss_mask).sum().backward()
    axes = {
        name: parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        for name, parameter in model.named_parameters()
    }
    return {"loss": out.detach(), "sums": loss.sums, "gradients": models.gradients(model), "axes": axes}


@pytest.mark.parametrize("fused, tied", [(False, False), (True, False), (True, True)])
def test_tensor_parallel_is_the_same_loss(fused: bool, tied: bool) -> None:
    # One rank and no fusion is what the others are compared with.
    (whole,) = run_ranks(shard, 1, 1, False, False, tied)
    for sequence in (False, True):
        first, second = run_ranks(shard, 2, 2, sequence, fused, tied)
        assert torch.equal(first["loss"], second["loss"])
        assert torch.equal(first["sums"], second["sums"])
        close(first["loss"], whole["loss"])
        close(first["sums"], whole["sums"])
        joined = {}
        for name, axis in first["axes"].items():
            a, b = first["gradients"][name], second["gradients"][name]
            if axis is None:
                torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
                joined[name] = a
            elif "linear_fc1" in name:
                joined[name] = torch.cat([a.chunk(2)[0], b.chunk(2)[0], a.chunk(2)[1], b.chunk(2)[1]])
            else:
                joined[name] = torch.cat([a, b], dim=axis)
        # Parameters, not logits: two layers of float32 products are summed in another order (measured: 3.4e-6).
        assert models.largest_relative_difference(joined, whole["gradients"]) < 1e-5


def wrapped() -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    models.start()
    config = models.config(bf16=True, params_dtype=torch.bfloat16)
    core = models.gpt(config)
    half = Float16Module(config, core)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), half)
    assert unwrap(model) is unwrap(half) is core
    loss = attach(model, EAFTConfig(), vocab_size=V)
    assert loss is not None
    assert attached(model) is attached(core) is loss
    data = models.batch()
    logits = data.logits(model).float()
    out = data.forward(model, loss_mask=data.loss_mask)
    assert out.dtype == torch.float32
    # The same bfloat16 logits in float64: only the loss itself differs.
    close(out, formula(logits, data.labels, EAFTConfig())["loss"] * data.loss_mask)
    assert loss.calls == 1
    detach(model)
    assert attached(core) is None


def test_wrappers_are_looked_through() -> None:
    run_ranks(wrapped, 1)
