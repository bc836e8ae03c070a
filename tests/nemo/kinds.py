"""What is trained beside a plain model: adapters, and a multi-token-prediction head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nemo_eaft.train
from nemo_eaft.megatron import unwrap

RANK = 4


def lora() -> Any:
    """NeMo's LoRA on all linear layers, however they are split.

    Adapters of one shape start alike, and none at zero, so that all of them move.
    """
    from nemo.collections.llm.peft.lora import LoRA
    from nemo.collections.llm.peft.utils import ParallelLinearAdapter

    init = ParallelLinearAdapter.__init__

    def seeded(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _fill(self.linear_in.weight, axis=1 if self.input_is_parallel else 0, std=0.1)
        # A rank's rows of a gated layer are part of the gate's and part of the rest, not one block.
        blocks = 2 if self.base_linear_name.endswith("linear_fc1") else 1
        _fill(self.linear_out.weight, axis=0, std=0.1, blocks=blocks)

    ParallelLinearAdapter.__init__ = seeded
    return LoRA(dim=RANK, alpha=RANK)


@torch.no_grad()
def _fill(weight: torch.Tensor, axis: int, std: float, blocks: int = 1) -> None:
    """This rank's part of a random matrix of which each of some `blocks` is split along `axis`."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_tensor_model_parallel_world_size()
    shape = list(weight.shape)
    shape[axis] *= ranks
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] * 1000 + shape[1])) * std
    rank = parallel_state.get_tensor_model_parallel_rank()
    weight.copy_(torch.cat([block.chunk(ranks, axis)[rank] for block in whole.chunk(blocks, axis)], axis))


def watch_ties(model: Any, saw: Callable[[float], None]) -> None:
    """Tell `saw` of each training forward of each router by how much the last chosen expert was ahead of the next.

    In logits, the least of all tokens. A choice is not continuous: where this is no more than rounding, one process and
    several may choose differently, and both are right.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    def gap(router: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if router.training:
            with torch.no_grad():
                logits = router.gating(inputs[0]).float().sort(-1, descending=True).values
            chosen = router.topk
            saw(float((logits[..., chosen - 1] - logits[..., chosen]).min()))

    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_pre_hook(gap)


def with_prediction_head(checkpoint: Path, output: Path) -> None:
    """A NeMo checkpoint of the same sizes with one multi-token-prediction head; all its weights are new and random."""
    from nemo.collections.llm.gpt.model.base import gpt_data_step
    from nemo.lightning import io

    model = io.load_context(checkpoint, subpath="model")
    # The head embeds the next tokens, on the last stage, too.
    head = {
        "mtp_num_layers": 1,
        "mtp_loss_scaling_factor": 0.1,
        "data_step_fn": functools.partial(gpt_data_step, use_mtp=True),
    }
    nemo_eaft.train.set_model_config(model, head)
    connector = type(model).importer(f"hf://{checkpoint}")
    trainer = connector.nemo_setup(model)
    with torch.no_grad():
        core: Any = unwrap(model)
        torch.manual_seed(11)
        # A converter's model is not initialised: all weights are to come from elsewhere. These are as sharp as the
        # other models of these tests.
        for name, parameter in core.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.1)
        core.shared_embedding_or_output_weight().mul_(2.0 if core.share_embeddings_and_output_weights else 5.0)
    connector.nemo_save(output, trainer)
