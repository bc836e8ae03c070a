"""Building on torch's meta device: shapes and dtypes of a model, an optimizer and their buffers, and no memory.

The CPU backend makes Megatron's device the host; `on_meta_device` makes it the meta device for a while. Nothing can be
computed there.

    nemo_eaft.cpu.enable()
    with nemo_eaft.cpu.meta.on_meta_device():
        ...
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import nemo_eaft.cpu
from nemo_eaft.cpu.patch import Patch, PatchSet

META = torch.device("meta")

# Factories of torch that the CPU backend replaces, and that make a tensor of no other one.
_FACTORIES = ("arange", "empty", "ones", "tensor", "zeros")


@contextmanager
def on_meta_device() -> Iterator[None]:
    """What is created meanwhile is on the meta device.

    Raises:
        RuntimeError: the CPU backend is off.
    """
    if not nemo_eaft.cpu.is_enabled():
        raise RuntimeError("nemo_eaft.cpu.meta: call nemo_eaft.cpu.enable() first")
    applied = PatchSet()
    try:
        applied.apply(patches())
        with META:
            yield
    finally:
        applied.undo()


def patches() -> list[Patch]:
    """The patches, on top of the CPU backend's (`torch_cuda.py`)."""
    found = [
        Patch(
            owner=torch,
            name=name,
            value=_factory(getattr(torch, name)),
            reason="`with torch.device(...)` knows a factory by its identity (torch 2.13, utils/_device.py), and the "
            "CPU backend has put a function of its own in its place",
        )
        for name in _FACTORIES
    ]
    found += [
        Patch(
            owner=torch.cuda,
            name="current_device",
            value=lambda: META,
            reason="named as the device of weights and of buffers of weights and gradients (megatron-core 0.15.3, "
            "core/tensor_parallel/layers.py:255, core/distributed/param_and_grad_buffer.py:716)",
        ),
        Patch(
            owner=torch.Tensor,
            name="type",
            value=_type(torch.Tensor.type),
            reason="parameters are told apart by the name 'torch.cuda.FloatTensor' (megatron-core 0.15.3, "
            "core/optimizer/distrib_optimizer.py:357), which the CPU backend gives as 'torch.cuda.meta.FloatTensor'",
        ),
        Patch(
            owner=torch.Tensor,
            name="normal_",
            value=lambda self, *_, **__: self,
            reason="every weight is drawn (megatron-core 0.15.3, core/tensor_parallel/layers.py:128), and torch takes "
            "some 2 ms to draw nothing: more than half the time of building a model with experts",
        ),
    ]
    return found


def _factory(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is None:
            kwargs["device"] = META
        return function(*args, **kwargs)

    return wrapped


def _type(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        return result.replace("torch.cuda.meta.", "torch.cuda.") if isinstance(result, str) else result

    return wrapped
