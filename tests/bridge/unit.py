"""The hook and the forward step on one small model of Bridge's, without a training around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_eaft.config import EAFTConfig
from tests.bridge.on_cpu import model_for_the_cpu

VOCAB_SIZE = 250
"""Padded to 252, which is what `AutoBridge` lets it be a multiple of."""


def other(labels: Tensor, logits: Tensor) -> Tensor:
    """A loss that something else puts in the place of ours."""
    return logits.float().mean(-1).transpose(0, 1)


def provider(**changes: Any) -> Any:
    from megatron.bridge import AutoBridge

    made = AutoBridge.from_hf_pretrained("any").to_megatron_provider(load_weights=False)
    model_for_the_cpu(made)
    made.vocab_size, made.should_pad_vocab = VOCAB_SIZE, True
    made.calculate_per_token_loss = True
    for name, value in changes.items():
        setattr(made, name, value)
    made.finalize()
    return made


def build(hook: Any = None, *, average: bool = False, **changes: Any) -> Any:
    """Bridge's model of one rank, in its DDP, built with the hook."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from tests.cpu.models import set_weights

    def named_weights(model: list[Any]) -> list[Any]:
        set_weights(model[0])
        return model

    made = provider(**changes)
    made.register_pre_wrap_hook(named_weights)
    if hook is not None:
        made.register_pre_wrap_hook(hook)
    ddp = DistributedDataParallelConfig(average_in_collective=average)
    (model,) = made.provide_distributed_model(ddp_config=ddp, bf16=False)
    return model


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(0, VOCAB_SIZE, (2, 2, 16), generator=generator)
    mask = (torch.rand(2, 16, generator=generator) > 0.4).long()
    positions = torch.arange(16).expand(2, 16).contiguous()
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}


def state() -> Any:
    """Bridge's state with the recipe's configuration."""
    from megatron.bridge.recipes.qwen import qwen3_8b_sft_config
    from megatron.bridge.training.state import GlobalState

    made = GlobalState()
    made.cfg = qwen3_8b_sft_config()
    return made


def core(model: Any) -> Any:
    return model.module


def refused(do: Callable[[], Any]) -> str:
    try:
        do()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refusals(state: Any) -> dict[str, str]:
    """By name, what is said."""
    from megatron.bridge.training import gpt_step

    from nemo_eaft import bridge

    hook = bridge.pre_wrap_hook(EAFTConfig())
    said: dict[str, str] = {}

    def changed(name: str, **fields: Any) -> None:
        """The hook, called with a model whose configuration was changed after it was built."""
        chunk = core(build())
        for field, value in fields.items():
            setattr(chunk.config, field, value)
        said[name] = refused(lambda: hook([chunk]))

    said["calculate_per_token_loss"] = refused(lambda: build(hook, calculate_per_token_loss=False))
    changed("linear cross-entropy", cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="linear")
    changed("schedule plan", overlap_moe_expert_parallel_comm=True)
    changed("full-iteration graph", cuda_graph_impl="local", cuda_graph_scope=["full_iteration"])
    changed("full-iteration graph, a name", cuda_graph_impl="local", cuda_graph_scope="full_iteration")
    changed("prediction heads", mtp_num_layers=1)
    changed("virtual pipeline", virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=2)
    changed("no vocabulary size", vocab_size=None)
    said["vocabulary too large"] = refused(lambda: build(bridge.pre_wrap_hook(EAFTConfig(), vocab_size=1000)))
    model = build(hook)
    said["hook twice"] = refused(lambda: hook([core(model)]))
    said["average_in_collective in DDP"] = refused(lambda: build(hook, average=True))

    def step(model: Any, which: Any = bridge.forward_step, **changes: Tensor) -> str:
        return refused(lambda: which(state, iter([batch() | changes]), model))

    state.cfg.ddp.average_in_collective = True
    said["average_in_collective"] = step(model)
    state.cfg.ddp.average_in_collective = False
    state.cfg.dist.use_megatron_fsdp = True
    said["FSDP"] = step(model)
    state.cfg.dist.use_megatron_fsdp = False
    model.buffers[0].gradient_scaling_factor = 0.5
    said["averaged gradients"] = step(model)
    said["no hook"] = step(build())
    labels = batch()["labels"].masked_fill(batch()["loss_mask"] != 0, -100)
    model = build(hook)
    said["ignored label under the mask"] = step(model, labels=labels)
    core(model)._postprocess = lambda *_, **__: torch.zeros(2, 16)
    said["never called"] = step(model)
    model = build(hook)
    core(model).compute_language_model_loss = other
    said["replaced"] = step(model)
    said["replaced, Bridge's step"] = step(model, gpt_step.forward_step)
    return said


def micro_batch(state: Any) -> dict[str, Any]:
    """One step of a padded model beside the definition and beside Bridge's own step."""
    from megatron.bridge.training import gpt_step

    from nemo_eaft import bridge
    from tests.cpu.models import largest_relative_difference

    given = batch()
    before = given["labels"].clone()
    seen: dict[str, Any] = {}
    model = build(bridge.pre_wrap_hook(EAFTConfig()))
    seen["padded vocabulary"] = core(model).vocab_size
    output, loss_function = bridge.forward_step(state, iter([given]), model)
    loss, tokens, report = loss_function(output)
    seen |= {"loss": loss.item(), "tokens": int(tokens), "tokens in report": int(report["eaft/weight"][1])}
    seen["labels of the caller unchanged"] = torch.equal(given["labels"], before)

    # The same model without the hook; the weight a constant.
    plain = core(build())
    z = plain(given["tokens"], given["position_ids"], None)[..., :VOCAB_SIZE].float()
    q = z.detach().double().topk(20).values.softmax(-1)
    weight = -(q * q.log()).sum(-1) / math.log(20) * given["loss_mask"]
    ce = torch.nn.functional.cross_entropy(z.flatten(0, 1), given["labels"].flatten(), reduction="none")
    wanted = (ce.double() * weight.flatten()).sum()
    seen["loss by formula"] = wanted.item()
    wanted.backward()
    loss.backward()
    # Where DDP adds them up.
    expected, found = ({name: p.main_grad for name, p in each.named_parameters()} for each in (plain, core(model)))
    seen["gradient, relative difference"] = largest_relative_difference(found, expected)

    ungated = build(bridge.pre_wrap_hook(EAFTConfig(alpha=0.0)))
    output, loss_function = bridge.forward_step(state, iter([given]), ungated)
    seen["alpha 0"] = loss_function(output)[0].item()
    for name, padding in (("bridge", 0.0), ("bridge without padding", -1e4)):
        stock = build()
        core(stock).output_layer.register_forward_hook(lambda _, __, out, p=padding: (_padded(out[0], p), out[1]))
        output, loss_function = gpt_step.forward_step(state, iter([given]), stock)
        seen[name] = loss_function(output)[0].item()
    return seen


def _padded(logits: Tensor, value: float) -> Tensor:
    padding = torch.zeros_like(logits)
    padding[..., VOCAB_SIZE:] = value
    return logits + padding


def unit(folder: Path) -> dict[str, Any]:
    """The job: what was refused, one micro-batch, and the configuration that a run wrote, read back by Bridge."""
    from megatron.bridge.training.config import ConfigContainer

    made = state()
    read = ConfigContainer.from_yaml(str(folder / "one.yaml"))
    return {
        "refused": refusals(made),
        "micro_batch": micro_batch(made),
        "configuration read back": type(read).__name__,
    }
