"""Patches of NeMo 2.7.3, one for each assumption that a GPU and Transformer Engine are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nemo
from megatron.core import tensor_parallel
from megatron.core.parallel_state import get_pipeline_model_parallel_rank
from nemo.collections.llm.peft import lora
from nemo.collections.llm.peft import utils as lora_utils
from nemo.lightning import io, megatron_init
from nemo.lightning.io import pl as io_pl
from nemo.lightning.io import state as io_state
from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

from nemo_eaft.cpu import NEMO_VERSION
from nemo_eaft.cpu.patch import Patch

# Norm weights as Transformer Engine's fused layers name them -> as the local specification does.
_LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
# Weights of experts as Transformer Engine's grouped layers name them, all in one layer -> as the local layers do.
_LOCAL_EXPERTS = {
    f"mlp.experts.{name}.weight*": f"mlp.experts.local_experts.*.{name}.weight" for name in ("linear_fc1", "linear_fc2")
}


def _local_name(name: str) -> str:
    for fused, local in (_LOCAL_NAMES | _LOCAL_EXPERTS).items():
        name = name.replace(fused, local)
    return name


def _local_keys(keys: Any) -> Any:
    """The same for the keys of a transform: one, or several in a tuple."""
    return tuple(map(_local_name, keys)) if isinstance(keys, tuple) else _local_name(keys)


def _with_local_names(apply_transforms: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(
        source: Any,
        target: Any,
        mapping: dict[str, str],
        transforms: list[Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Megatron's side is the source of an export and the target of an import; Hugging Face names hold no match.
        local = {_local_name(key): _local_name(value) for key, value in mapping.items()}
        for transform in transforms or []:
            transform.source_key = _local_keys(transform.source_key)
            transform.target_key = _local_keys(transform.target_key)
        return apply_transforms(source, target, local, transforms, *args, **kwargs)

    return wrapped


class _NoTransformerEngine:
    """Stands for the module where it is not installed: `Linear` is a class that no layer is of."""

    class Linear:
        """Transformer Engine's."""


def _with_model_parallel_seed(set_random_seed: Callable[[int], None]) -> Callable[[int], None]:
    def wrapped(seed: int) -> None:
        set_random_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * get_pipeline_model_parallel_rank())

    return wrapped


def patches() -> list[Patch]:
    """The patches of NeMo. RuntimeError where its version is not the one that was read."""
    if not nemo.__version__.startswith(f"{NEMO_VERSION}."):
        raise RuntimeError(f"the CPU backend was written for nemo_toolkit {NEMO_VERSION}.x, found {nemo.__version__}")
    transforms = _with_local_names(io.apply_transforms)
    names = "Hugging Face import and export use Transformer Engine's names (collections/llm/gpt/model/*.py)"
    return [
        # Where it is defined, and where the models call it.
        Patch(owner=io_state, name="apply_transforms", value=transforms, reason=names),
        Patch(owner=io, name="apply_transforms", value=transforms, reason=names),
        Patch(
            owner=lora,
            name="te",
            value=_NoTransformerEngine,
            reason="asks every layer whether it is Transformer Engine's Linear, also where that is not installed "
            "(collections/llm/peft/lora.py:703)",
        ),
        Patch(
            owner=lora_utils,
            name="HAVE_TE",
            value=False,
            reason="takes Transformer Engine to be there, because Megatron-Core then defines its layers as None "
            "(collections/llm/peft/utils.py:54)",
        ),
        Patch(
            owner=io_pl,
            name="_fix_tensors_device",
            value=lambda checkpoint: checkpoint,
            reason="asserts that CUDA is initialised before it moves tensors to the GPU (lightning/io/pl.py:493)",
        ),
        Patch(
            owner=megatron_init,
            name="_set_random_seed",
            value=_with_model_parallel_seed(megatron_init._set_random_seed),
            reason="seeds the model-parallel generators only where a GPU is counted (lightning/megatron_init.py:238)",
        ),
        Patch(
            owner=ProgressPrinter,
            name="log_megatron_timers",
            value=lambda self, timers: None,
            reason="rank 0 alone gathers timers over all ranks (callbacks/progress_printer.py:155); gloo then hangs "
            "in the next collective, the checkpoint's file_exists",
        ),
    ]
