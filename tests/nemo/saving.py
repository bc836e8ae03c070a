"""What a save holds in memory: the tensors that live while Megatron gathers the optimizer's state."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.nemo import jobs


@dataclasses.dataclass
class Gathered:
    """One gathering of the optimizer's state on one rank, for a save. In bytes for each of the model's parameters."""

    held: float
    """In what is handed on to the writer."""
    peak: float
    """The most that was there at once of what the gathering itself made."""
    on_device: bool
    """Whether the collective runs on the group of the devices, and not on gloo's for the host."""


class LiveBytes(TorchDispatchMode):
    """Counts the storages that begin while it is entered, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def leave_out(self, *trees: Any) -> None:
        """The tensors in nested dicts and lists, which are there already."""
        leaves = [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]
        self._known.update(tensor.untyped_storage().data_ptr() for tensor in leaves)

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._known:
            return
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, address, size)

    def _end(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def train(plan: jobs.Plan) -> list[Gathered]:
    """`jobs.train`; every gathering of a save on this rank."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    kind: Any = DistributedOptimizer
    gather = kind.get_parameter_state_dp_zero
    found: list[Gathered] = []

    def measured(self: Any, use_gloo_comm: bool = True, empty_data: bool = False, **kwargs: Any) -> Any:
        if empty_data:  # a load
            return gather(self, use_gloo_comm=use_gloo_comm, empty_data=True, **kwargs)
        live = LiveBytes()
        live.leave_out(self.optimizer.state_dict(), list(self.model_param_gbuf_map))
        with live:
            state = gather(self, use_gloo_comm=use_gloo_comm, empty_data=False, **kwargs)
        parameters = sum(buffer.numel_unpadded for buffer in self.buffers)
        held = sum(tensor.nbytes for tensor in jobs.tensors(state or {}))
        found.append(Gathered(held / parameters, live.peak / parameters, not use_gloo_comm))
        return state

    kind.get_parameter_state_dp_zero = measured
    jobs.train(plan)
    return found
