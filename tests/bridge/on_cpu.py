"""Real Megatron-Bridge 0.3.1 and Megatron-Core 0.16.1 on the CPU, in a process of their own.

They lie in a folder of their own (`make test` puts them there), which comes first on PYTHONPATH: the environment's
Megatron-Core is the older one that NeMo needs. `nemo_eaft.cpu` is written for that, so only its patches of torch are
used here; what Bridge assumes beside them is answered below.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_eaft.cpu import torch_cuda
from nemo_eaft.cpu.patch import PatchSet

# Imported by modules of Bridge that no text model needs: multimodal data (recipes/__init__.py imports all families).
_ENERGON = (
    "megatron.energon",
    "megatron.energon.flavors",
    "megatron.energon.flavors.base_dataset",
    "megatron.energon.task_encoder",
    "megatron.energon.task_encoder.cooking",
)
# Names of Transformer Engine that Bridge mentions while it is imported (peft/lora_layers.py,
# models/gpt_full_te_layer_autocast_spec.py); nothing here calls them.
_TRANSFORMER_ENGINE = ("Linear", "LayerNormLinear", "TransformerLayer")


class _Stream(torch_cuda.HostStream):
    def wait_stream(self, other: Any) -> None:
        pass


class _Placeholders(types.ModuleType):
    """A module that has any class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        members = {"__init__": lambda *_, **__: None, "__class_getitem__": classmethod(lambda cls, _: cls)}
        return type(name, (), members)


def import_bridge() -> None:
    """Import Megatron-Bridge for a process without a GPU."""
    assert not any(name.startswith("megatron") for name in sys.modules)
    PatchSet().apply(torch_cuda.patches())
    # Bridge takes the number of devices for the question whether to seed Megatron's generators
    # (training/initialize.py), and DDP waits for streams (models/model_provider.py).
    torch.cuda.device_count = lambda: 8
    torch.cuda.set_device = torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.Stream = _Stream  # type: ignore[misc, assignment]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: _Stream()  # type: ignore[assignment]
    torch.cuda.memory_stats = lambda *_: {}
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    # Megatron-Core before the placeholders: it has plain layers of its own where Transformer Engine is not installed.
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.transformer.attention
    from megatron.core.tensor_parallel import random

    assert megatron.core.__version__ == "0.16.1"
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    with _placeholders():
        import megatron.bridge.recipes
    from megatron.bridge import __version__ as version
    from megatron.bridge.training import initialize, setup

    assert version == "0.3.1"
    assert not megatron.core.transformer.attention.HAVE_TE
    real = initialize.initialize_megatron
    initialize.compile_helpers = lambda: None  # a C++ index of pretraining data, with a makefile that the wheel lacks
    setup.initialize_megatron = lambda **kwargs: real(**kwargs, allow_no_cuda=True)
    setup.set_jit_fusion_options = lambda *_: None  # warms up fused kernels


@contextmanager
def _placeholders() -> Iterator[None]:
    engine, layers = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    for name in _TRANSFORMER_ENGINE:
        setattr(layers, name, type(name, (torch.nn.Module,), {}))
    layers.ops = types.SimpleNamespace(Sequential=torch.nn.Sequential)  # type: ignore[attr-defined]
    engine.pytorch = layers  # type: ignore[attr-defined]
    added = {module.__name__: module for module in (engine, layers, *map(_Placeholders, _ENERGON))}
    sys.modules |= added
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def model_for_the_cpu(provider: Any) -> None:
    """Float32 and Megatron's plain layers, before the provider is finalised."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    provider.transformer_layer_spec = local_layer_spec
    provider.bf16, provider.params_dtype, provider.pipeline_dtype = False, torch.float32, torch.float32
    for field in (
        "apply_rope_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "cross_entropy_loss_fusion",
        "deallocate_pipeline_outputs",
        "gradient_accumulation_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
    ):
        setattr(provider, field, False)
    provider.sequence_parallel = False  # Megatron's plain norm refuses it


def settings_for_the_cpu(cfg: Any) -> None:
    """A whole configuration for gloo in float32."""
    model_for_the_cpu(cfg.model)
    cfg.mixed_precision = None
    cfg.optimizer.bf16, cfg.optimizer.params_dtype = False, torch.float32
    cfg.optimizer.use_distributed_optimizer = cfg.ddp.use_distributed_optimizer = False
    cfg.dist.distributed_backend = "gloo"
