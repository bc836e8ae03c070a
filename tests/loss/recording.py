"""Recording what the loss does: its collectives and the tensors it allocates."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = [
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "irecv",
    "isend",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "send",
]

Call = tuple[str, tuple[tuple[tuple[int, ...], torch.dtype], ...]]


class Recorder:
    """The collectives of each thread, in order: (name, ((shape, dtype) of each tensor argument))."""

    def __init__(self) -> None:
        self._calls: dict[int, list[Call]] = {}

    @property
    def calls(self) -> list[Call]:
        return self._calls.setdefault(threading.get_ident(), [])


@contextlib.contextmanager
def recorded_collectives() -> Iterator[Recorder]:
    """Wrap every collective of ``torch.distributed``; patch before the ranks start, read inside each rank."""
    recorder = Recorder()

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            recorder.calls.append((name, tuple((tuple(t.shape), t.dtype) for t in tensors)))
            return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            if hasattr(dist, name):  # some names came with later versions of torch
                stack.enter_context(mock.patch.object(dist, name, wrap(name, getattr(dist, name))))
        yield recorder


class Allocations(TorchDispatchMode):
    """Every new storage made by operations under it, as (dtype, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = [*args, *(kwargs or {}).values()]
        known = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.made.append((tensor.dtype, tensor.untyped_storage().nbytes()))
        return result

    def at_least(self, nbytes: int) -> list[tuple[torch.dtype, int]]:
        return [made for made in self.made if made[1] >= nbytes]
