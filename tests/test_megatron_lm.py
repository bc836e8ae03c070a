"""examples/megatron_lm.py on a real GPTModel of Megatron-Core.

Megatron-LM's scripts are in no package: `gpt_builders`, `pretrain_gpt` and `megatron.training` are stand-ins here that
give what the example asks them for.
"""

from __future__ import annotations

import argparse
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cpu import models
from tests.examples import load_example
from tests.nemo.ranks import run_ranks

V = models.VOCAB_SIZE


def megatron_lm(*arguments: str, tensor: int = 1, tokenizer_size: int = V) -> Any:
    """The example with stand-ins for Megatron-LM's modules, its arguments parsed."""
    example = load_example("megatron_lm")
    parser = argparse.ArgumentParser()
    parser.add_argument("--calculate-per-token-loss", action="store_true")
    parser.add_argument("--ddp-average-in-collective", action="store_true")
    parser.add_argument("--vocab-size", type=int, default=None)
    args = example.add_arguments(parser).parse_args(arguments)

    def gpt_builder(args: Any, pre_process: bool, post_process: bool, vp_stage: int | None) -> Any:
        config = models.config(tensor, calculate_per_token_loss=args.calculate_per_token_loss)
        model = models.gpt(config, pre_process=pre_process, post_process=post_process)
        model.vp_stage = vp_stage
        return model

    def module(name: str, **members: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(members)

    module("gpt_builders", gpt_builder=gpt_builder)
    module("pretrain_gpt", get_batch=lambda batches, vp_stage: next(batches))
    tokenizer = types.SimpleNamespace(vocab_size=tokenizer_size)
    module("megatron.training", get_args=lambda: args, get_tokenizer=lambda: tokenizer)
    return example


def step(example: Any, model: Any, data: models.Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    batch = (data.tokens, data.labels, data.loss_mask, None, data.positions)
    output, loss_function = example.forward_step(iter([batch]), model)
    return loss_function(output)


def by_definition(model: Any, data: models.Batch, alpha: float) -> tuple[Tensor, dict[str, float]]:
    """The sum of the losses with its graph, and what to report: from the logits of a model without EAFT."""
    z = data.logits(model)[..., :V]
    ce = torch.nn.functional.cross_entropy(z.flatten(0, 1), data.labels.flatten(), reduction="none").view(2, -1)
    q = z.detach().double().topk(20).values.softmax(-1)
    entropy = -(q * q.log()).sum(-1)
    ratio = entropy / math.log(20)
    conflicts = ((-ce).exp() < 0.1) & (ratio < 0.2)
    values = {"lm loss": ratio**alpha * ce, "eaft/cross_entropy": ce, "eaft/entropy": entropy}
    values |= {"eaft/weight": ratio**alpha, "eaft/conflict_fraction": conflicts.double()}
    sums = {name: (value * data.loss_mask).sum() for name, value in values.items()}
    return sums["lm loss"], {name: float(value) for name, value in sums.items()}


def one_rank() -> None:
    models.start()
    example = megatron_lm("--calculate-per-token-loss", "--eaft-alpha", "1.5")
    data = models.batch()
    stock = models.gpt(models.config())
    loss, wanted = by_definition(stock, data, 1.5)
    loss.backward()

    model = example.model_provider()
    for _ in range(2):  # the report is of one micro-batch, not of all so far
        model.zero_grad()
        loss, tokens, report = step(example, model, data)
    loss.backward()
    count = int(data.loss_mask.sum())
    assert tokens == count
    assert tokens.dtype == torch.int
    assert loss.item() == pytest.approx(wanted["lm loss"], rel=1e-6)
    assert {name: float(pair[0]) for name, pair in report.items()} == pytest.approx(wanted, rel=1e-5)
    assert all(pair.shape == (2,) and pair[1] == count for pair in report.values())
    assert wanted["lm loss"] < 0.9 * wanted["eaft/cross_entropy"]
    assert models.largest_difference(models.gradients(model), models.gradients(stock)) < 1e-5

    # A loss at tokens outside the mask would be seen: NaN there is not zeroed by a product.
    model.output_layer.register_forward_hook(
        lambda _, __, out: (out[0].masked_fill(data.loss_mask.T[..., None] == 0, torch.nan), out[1])
    )
    assert step(example, model, data)[0] == loss

    model = example.model_provider()
    model.eval()
    with torch.no_grad():
        loss, _, report = step(example, model, data)
    assert loss.item() == pytest.approx(wanted["eaft/cross_entropy"], rel=1e-6)
    assert set(report) == {"lm loss"}


def test_loss_report_and_gradient_are_by_definition() -> None:
    run_ranks(one_rank, 1)


def refusals() -> list[str]:
    models.start()
    said = []
    for arguments in ((), ("--calculate-per-token-loss", "--ddp-average-in-collective")):
        with pytest.raises(ValueError, match="EAFT needs") as error:
            megatron_lm(*arguments).model_provider()
        said.append(str(error.value))
    for arguments, size in (("--vocab-size", "33"), 29), ((), 33):
        with pytest.raises(ValueError, match="allowed") as error:
            megatron_lm("--calculate-per-token-loss", *arguments, tokenizer_size=size).model_provider()
        said.append(str(error.value))
    return said


def test_arguments_that_would_train_something_else_are_refused() -> None:
    (said,) = run_ranks(refusals, 1)
    assert all(text.startswith("EAFT needs --calculate-per-token-loss") for text in said[:2])
    # The size that was asked for, and the tokenizer's where none was; the model has 32 rows.
    assert all(text.startswith("vocab_size: 33; allowed: 2 to 32") for text in said[2:])


def shard(tensor: int, pipeline: int) -> dict[str, Any]:
    from megatron.core import parallel_state

    from nemo_eaft.megatron import attached

    models.start(tensor, pipeline)
    example = megatron_lm("--calculate-per-token-loss", tensor=tensor)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = example.model_provider(first, last)
    data = models.batch()
    if pipeline > 1:
        return {"attached": attached(model) is not None, "last": last}
    loss, _, report = step(example, model, data)
    loss.backward()
    return {"loss": loss.detach(), "report": report, "gradient": model.output_layer.weight.grad}


def test_tensor_parallel_ranks_report_the_same() -> None:
    (whole,) = run_ranks(shard, 1, 1, 1)
    first, second = run_ranks(shard, 2, 2, 1)
    assert torch.equal(first["loss"], second["loss"])
    assert all(torch.equal(first["report"][name], second["report"][name]) for name in whole["report"])
    for name, pair in whole["report"].items():
        torch.testing.assert_close(first["report"][name].double(), pair.double(), atol=1e-5, rtol=1e-6)
    joined = torch.cat((first["gradient"], second["gradient"]))
    torch.testing.assert_close(joined, whole["gradient"], atol=2e-6, rtol=1e-5)


def test_only_the_last_pipeline_stage_has_a_loss() -> None:
    for rank in run_ranks(shard, 2, 1, 2):
        assert rank["attached"] == rank["last"]
