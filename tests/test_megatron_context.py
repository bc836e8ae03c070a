"""Context parallelism with Megatron's own groups, slices and model: CP2, CP4 and CP2 x TP2 against one rank.

Megatron's attention on a CPU knows no context parallelism, so the layers here are perceptrons: each token is for
itself, and whatever differs from one rank comes from the loss.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig
from nemo_eaft.megatron import attach
from nemo_eaft.metrics import StepMetrics, reduce_sums
from tests.cpu import models
from tests.loss.context import zigzag
from tests.nemo.ranks import run_ranks

V = models.VOCAB_SIZE
LENGTH = 16
CASES = ("ragged", "one rank masked")


def model_without_attention(context: int, tensor: int) -> Any:
    """A GPTModel whose layers keep their norm and their perceptron."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, context_parallel_size=context)
    dist.barrier()  # a rank that ends early would close connections that others are still making
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm, layer.self_attention, layer.self_attn_bda = IdentityOp, IdentityOp, IdentityFuncOp
    model = GPTModel(
        models.config(tensor, context_parallel_size=context),
        spec,
        vocab_size=models.PADDED_VOCAB_SIZE,
        max_sequence_length=64,
        share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
    )
    models.set_weights(model)
    return model


def batch(case: str) -> dict[str, Tensor]:
    """Two rows [b, s]; the second context rank of two holds fewer tokens that count, or none."""
    data = models.batch(2, LENGTH)
    mask = torch.zeros(2, LENGTH)
    mask[0, 1:11] = 1
    mask[1, 13:] = 1
    if case == "one rank masked":
        mask[:, LENGTH // 4 : -LENGTH // 4] = 0
    return {"tokens": data.tokens, "labels": data.labels, "loss_mask": mask, "position_ids": data.positions.clone()}


def steps(context: int, tensor: int, fused: bool) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    model = model_without_attention(context, tensor)
    data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    rank = parallel_state.get_context_parallel_rank()
    loss = attach(model, EAFTConfig(), vocab_size=V, fused_linear=fused)
    assert loss is not None
    results: dict[str, Any] = {}
    for case in CASES:
        whole = batch(case)
        part = get_batch_on_this_cp_rank(dict(whole))
        if context > 1:
            mine = zigzag(LENGTH, context, rank)
            assert all(torch.equal(part[name], whole[name][:, mine]) for name in whole), "not Megatron's slices"
            straight = torch.arange(LENGTH).chunk(context)[rank]
            assert not torch.equal(part["labels"], whole["labels"][:, straight])
        model.zero_grad()
        loss.reset()
        mask = part["loss_mask"]
        out = model(part["tokens"], part["position_ids"], None, labels=part["labels"], loss_mask=mask)
        (out * mask).sum().backward()
        assert loss.sums is not None
        total = reduce_sums(loss.sums, data_group, None, None)
        # finalize_model_grads: gradients are summed over data x context, and divided once by all tokens.
        summed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        biased = {name: gradient / mask.sum().clamp(min=1) / context for name, gradient in summed.items()}
        for gradients in (summed, biased):
            for gradient in gradients.values():
                dist.all_reduce(gradient, group=data_group)
        results[case] = {
            "sums": total,
            "own": int(mask.sum()),
            "gradients": {name: gradient / total[5] for name, gradient in summed.items()},
            "biased": biased,
        }
    axes = {
        name: parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        for name, parameter in model.named_parameters()
    }
    return {"steps": results, "axes": axes, "tensor_rank": parallel_state.get_tensor_model_parallel_rank()}


def whole_gradients(ranks: list[dict[str, Any]], case: str, kind: str) -> dict[str, Tensor]:
    """Of the tensor-parallel group of the first context rank."""
    group = ranks[: 1 + max(rank["tensor_rank"] for rank in ranks)]
    joined = {}
    for name, axis in group[0]["axes"].items():
        parts = [rank["steps"][case][kind][name] for rank in group]
        if axis is None:
            joined[name] = parts[0]
        elif "linear_fc1" in name:
            halves = [part.chunk(2) for part in parts]
            joined[name] = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        else:
            joined[name] = torch.cat(parts, dim=axis)
    return joined


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    (result,) = run_ranks(steps, 1, 1, 1, False)
    return result


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("context, tensor", [(2, 1), (2, 2), (4, 1)])
def test_megatrons_slices_give_the_step_of_one_rank(
    context: int, tensor: int, fused: bool, one_rank: dict[str, Any]
) -> None:
    ranks = run_ranks(steps, context * tensor, context, tensor, fused)
    for case in CASES:
        want = one_rank["steps"][case]
        own = [rank["steps"][case]["own"] for rank in ranks[::tensor]]
        assert len(set(own)) > 1, own
        assert (0 in own) == (case == "one rank masked")
        for rank in ranks:
            sums = rank["steps"][case]["sums"]
            assert torch.equal(sums, ranks[0]["steps"][case]["sums"])
            torch.testing.assert_close(sums[:4], want["sums"][:4], rtol=1.3e-6, atol=0)
            assert torch.equal(sums[4:], want["sums"][4:])
            assert StepMetrics.from_sums(sums).tokens == int(batch(case)["loss_mask"].sum())
        found = models.largest_relative_difference(whole_gradients(ranks, case, "gradients"), want["gradients"])
        # Parameters, not logits: products of float32 summed in another order.
        assert found < 1e-5, found
        biased = models.largest_relative_difference(whole_gradients(ranks, case, "biased"), want["gradients"])
        assert biased > 1e-2, "a mean of the ranks' means would pass"
