"""Patches of Megatron-Core 0.15.3, one for each assumption that a GPU and its fused kernels are there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import megatron.core
import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_eaft.cpu import MEGATRON_VERSION
from nemo_eaft.cpu.attention import with_packed_sequences, with_window
from nemo_eaft.cpu.context_parallel import allowing_context_parallel, over_whole_sequence
from nemo_eaft.cpu.experts import splits_as_numbers, use_plain_experts, with_own_norm
from nemo_eaft.cpu.norm import build_norm
from nemo_eaft.cpu.optimizer import keeping_step, with_own_steps, with_states, without_step
from nemo_eaft.cpu.patch import Patch

# Fields of TransformerConfig that select a CUDA, Apex or torch.compile kernel.
_FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)
# Frees a stage's output once it is sent; gloo may still be reading it then (pipeline_parallel/schedules.py).
_ASYNCHRONOUS = ("deallocate_pipeline_outputs",)
# Layers whose local form writes other checkpoint names than Transformer Engine's: neither could read the other's.
_REFUSED = ("multi_latent_attention",)


def _for_the_host(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    def wrapped(self: TransformerConfig) -> None:
        for field in _REFUSED:
            if getattr(self, field, None):
                raise ValueError(
                    f"{field}: {getattr(self, field)}; the CPU backend has none, because Megatron's local layers of "
                    "this kind write other checkpoint names than Transformer Engine's (gpt_layer_specs.py)"
                )
        if self.num_moe_experts:
            use_plain_experts(self)
        for field in _FUSIONS + _ASYNCHRONOUS:
            if hasattr(self, field):
                setattr(self, field, False)
        post_init(self)

    return wrapped


@contextlib.contextmanager
def _fork(
    self: megatron_random.CudaRNGStatesTracker, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME
) -> Iterator[None]:
    """Draw from the tracked stream `name`, then return to the stream that was in use."""
    if name not in self.states_:
        raise RuntimeError(f"random state {name!r} was not added; it is seeded when NeMo sets up model parallelism")
    before = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(before)


def patches() -> list[Patch]:
    """The patches of Megatron-Core. RuntimeError where its version is not the one that was read."""
    if not megatron.core.__version__.startswith(f"{MEGATRON_VERSION}."):
        raise RuntimeError(
            f"the CPU backend was written for megatron-core {MEGATRON_VERSION}.x, found {megatron.core.__version__}"
        )
    return [
        Patch(
            owner=TransformerConfig,
            name="__post_init__",
            value=_for_the_host(TransformerConfig.__post_init__),
            reason="fused kernels are the default (transformer/transformer_config.py) and need a GPU or a compiler",
        ),
        Patch(
            owner=WrappedTorchNorm,
            name="__new__",
            value=staticmethod(build_norm),
            reason="torch norms refuse sequence parallelism and lack TE's extra state (transformer/torch_norm.py)",
        ),
        Patch(
            owner=DotProductAttention,
            name="forward",
            value=over_whole_sequence(with_packed_sequences(DotProductAttention.forward)),
            reason="packed sequences and context parallelism are left to Transformer Engine "
            "(transformer/dot_product_attention.py:143)",
        ),
        Patch(
            owner=DotProductAttention,
            name="__init__",
            value=with_window(allowing_context_parallel(DotProductAttention.__init__)),
            reason="refuses context parallelism, and a list as window (transformer/dot_product_attention.py:58, 94)",
        ),
        Patch(
            owner=gpt_layer_specs,
            name="get_gpt_layer_local_spec",
            value=with_own_norm(gpt_layer_specs.get_gpt_layer_local_spec),
            reason="names the norm before experts as if it were fused with them (models/gpt/gpt_layer_specs.py:306)",
        ),
        Patch(
            owner=MoEAlltoAllTokenDispatcher,
            name="_maybe_dtoh_and_synchronize",
            value=splits_as_numbers,
            reason="copies sizes from the GPU on a stream of its own (transformer/moe/token_dispatcher.py:822)",
        ),
        Patch(
            owner=moe_utils,
            name="te_general_gemm",
            value=None,
            reason="is asked for where Transformer Engine was not imported, too (transformer/moe/moe_utils.py:958)",
            adds=True,
        ),
        Patch(
            owner=megatron_random,
            name="_get_cuda_rng_state",
            value=lambda *_, **__: torch.get_rng_state(),
            reason="activation recompute saves the device's random state (tensor_parallel/random.py:41)",
        ),
        Patch(
            owner=megatron_random,
            name="_set_cuda_rng_state",
            value=lambda state, *_, **__: torch.set_rng_state(state),
            reason="as _get_cuda_rng_state (tensor_parallel/random.py:72)",
        ),
        Patch(
            owner=megatron_random.CudaRNGStatesTracker,
            name="fork",
            value=_fork,
            reason="fork() warns when the host generator moves, which it does here (tensor_parallel/random.py:204)",
        ),
        Patch(
            owner=DistributedOptimizer,
            name="state_dict",
            value=with_states(DistributedOptimizer.state_dict),
            reason="a resume asks a fresh optimizer for torch's step (optimizer/distrib_optimizer.py:637)",
        ),
        Patch(
            owner=DistributedOptimizer,
            name="_get_main_param_and_optimizer_states",
            value=without_step(DistributedOptimizer._get_main_param_and_optimizer_states),
            reason="FusedAdam has no step tensor; torch's is taken for a shard (optimizer/distrib_optimizer.py:952)",
        ),
        Patch(
            owner=DistributedOptimizer,
            name="_set_main_param_and_optimizer_states",
            value=keeping_step(DistributedOptimizer._set_main_param_and_optimizer_states),
            reason="copies every state of the optimizer, torch's step too (optimizer/distrib_optimizer.py:927)",
        ),
        Patch(
            owner=DistributedOptimizer,
            name="load_state_dict",
            value=with_own_steps(DistributedOptimizer.load_state_dict),
            reason="gives all parameters one step tensor (optimizer/distrib_optimizer.py:821)",
        ),
    ]
