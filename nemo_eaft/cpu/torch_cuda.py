"""torch.cuda and device="cuda", answered by the host.

Megatron-Core 0.15.3 and NeMo 2.7.3 name the CUDA device in some 150 places: `torch.cuda.current_device()` as a
device, `device="cuda"` as a literal, streams, random state. These patches let each of those mean the CPU.
`torch.cuda.is_available()` stays False, so that code which asks is told the truth.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from nemo_eaft.cpu.patch import Patch

CPU = torch.device("cpu")

# Those that are called with a literal device="cuda" or with pinned memory.
_FACTORIES = ("arange", "empty", "empty_like", "ones", "tensor", "zeros")


class HostStream:
    """Stands for torch.cuda.Stream: work on the host is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def on_host(device: Any) -> Any:
    """`device`, or the CPU where it names CUDA (string, torch.device or None pass through)."""
    if isinstance(device, str) and device.startswith("cuda"):
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


def _factory(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = on_host(kwargs["device"])
        # Pinned memory belongs to an accelerator; without one torch raises.
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapped


def _to(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = on_host(kwargs["device"])
        if args:
            args = (on_host(args[0]), *args[1:])
        return function(self, *args, **kwargs)

    return wrapped


def _type(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        if not args and not kwargs and isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return wrapped


def patches() -> list[Patch]:
    """The patches of torch itself. Applied before Megatron-Core and NeMo are imported."""
    literal = "Megatron-Core 0.15.3 and NeMo 2.7.3 write device='cuda' (pipeline_parallel/schedules.py:573 and 80 more)"
    stream = "torch.cuda streams around DDP (nemo/lightning/megatron_parallel.py:617, core/distributed)"
    found = [Patch(owner=torch, name=n, value=_factory(getattr(torch, n)), reason=literal) for n in _FACTORIES]
    found += [
        Patch(owner=torch.Tensor, name="to", value=_to(torch.Tensor.to), reason=literal),
        Patch(
            owner=torch.Tensor,
            name="cuda",
            value=lambda self, *args, **kwargs: self,
            reason="batches and weights are moved by .cuda() (nemo/collections/llm/gpt/model/base.py:103)",
        ),
        Patch(
            owner=torch.Tensor,
            name="type",
            value=_type(torch.Tensor.type),
            reason="parameters are told apart by the name 'torch.cuda.FloatTensor' (core/optimizer/optimizer.py:667)",
        ),
        Patch(
            owner=torch.cuda,
            name="current_device",
            value=lambda: CPU,
            reason="used as a device argument all over core/tensor_parallel, core/pipeline_parallel, core/distributed",
        ),
        Patch(
            owner=torch.cuda,
            name="synchronize",
            value=lambda *_, **__: None,
            reason="waits before and after checkpoints and p2p (core/pipeline_parallel/p2p_communication.py:398)",
        ),
        Patch(owner=torch.cuda, name="Stream", value=HostStream, reason=stream),
        Patch(owner=torch.cuda, name="stream", value=lambda _: contextlib.nullcontext(), reason=stream),
        Patch(
            owner=torch.cuda,
            name="manual_seed",
            value=torch.manual_seed,
            reason="model_parallel_cuda_manual_seed seeds the device generator (core/tensor_parallel/random.py:370)",
        ),
        Patch(
            owner=torch.cuda,
            name="get_rng_state",
            value=lambda *_, **__: torch.get_rng_state(),
            reason="the generator that init and dropout draw from is the host's (core/tensor_parallel/random.py:196)",
        ),
        Patch(
            owner=torch.cuda,
            name="LongTensor",
            value=torch.LongTensor,
            reason="a counter is made by torch.cuda.LongTensor([1]) (nemo/collections/llm/gpt/data/utils.py:777)",
        ),
    ]
    return found
