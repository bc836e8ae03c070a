"""A gradient that is not finite stops the run on every rank, with one message.

Megatron's own check (`check_for_nan_in_grad`) raises on the ranks that hold the NaN, in the middle of the gradient's
reduction: the others wait for them there until the process group gives up, and what the user sees is the number of a
bucket. Here the same check, at the same place and at the same cost but without waiting for the device, only notes the
norm; the ranks decide together when the step is over, before the optimizer.

Assumed of megatron-core 0.15.3 (distributed/param_and_grad_buffer.py): with `check_for_nan_in_grad` each bucket group
calls its `check_grads(check_for_nan_or_inf, check_for_large)` once a step, before its gradients are communicated, with
or without `overlap_grad_reduce`. The method is shadowed on the instance, and given back by `remove`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_eaft.loss.collectives import gather_objects
from nemo_eaft.place import Place


class GradientWatch:
    """Notes which of this rank's gradients are not finite, before they are mixed with other ranks'.

    Args:
        chunks: this rank's model chunks, wrapped in Megatron's DDP.
    """

    def __init__(self, chunks: list[Any]) -> None:
        self._chunks = chunks
        self._norms: list[Tensor] = []
        self._groups = [group for chunk in chunks for group in bucket_groups(chunk)]
        for group in self._groups:
            group.check_grads = partial(self._note, group, group.check_grads)

    def remove(self) -> None:
        """Give Megatron its check back."""
        for group in self._groups:
            group.__dict__.pop("check_grads", None)
        self._groups = []

    def reset(self) -> None:
        """Start of a step."""
        self._norms = []

    def not_finite(self, device: torch.device) -> Tensor:
        """[1] int32: 1 where a gradient of this rank is not finite in this step. Sends nothing, waits for nothing."""
        mine = torch.zeros(1, dtype=torch.int32, device=device)
        if self._norms:
            mine += (~torch.stack(self._norms).isfinite().all()).to(torch.int32)
        return mine

    def raise_for_gradient(self, step: int, place: Place, device: torch.device) -> None:
        """Gather what all ranks found and end the run. Every rank calls it: they have agreed that one is to.

        Raises:
            RuntimeError: always, with the same message on every rank.
        """
        own = self.not_finite(device).item()
        everywhere = gather_objects((str(place), self._names()) if own else None)
        first, names = next(said for said in everywhere if said is not None)
        ranks = [rank for rank, said in enumerate(everywhere) if said is not None]
        listed = f"{len(names)} parameters, nearest to the loss {names[-1]}" if names else "the norm overflows"
        raise RuntimeError(
            f"step {step}: the loss is finite, but the gradient is not; stopped before the optimizer step, nothing was "
            f"updated. The first rank where backward gave NaN or infinity: {first} ({listed}); in all {len(ranks)} of "
            f"{len(everywhere)} ranks: {', '.join(map(str, ranks))}. A value overflowed in backward, or a hidden state "
            "was not finite at a token outside the loss"
        )

    def _note(self, group: Any, real: Callable[..., None], check_for_nan_or_inf: bool, check_for_large: bool) -> None:
        if check_for_nan_or_inf:
            self._norms += [bucket.grad_data.norm(p=2) for bucket in group.buckets]
        if check_for_large:
            real(check_for_nan_or_inf=False, check_for_large=True)

    def _names(self) -> list[str]:
        """Parameters whose gradient is not finite, in the model's order."""
        return [
            # Megatron's DDP and mixed precision each add a `module.`.
            name.removeprefix("module.").removeprefix("module.")
            for chunk in self._chunks
            for name, parameter in chunk.named_parameters()
            if getattr(parameter, "main_grad", None) is not None and not parameter.main_grad.isfinite().all()
        ]


def bucket_groups(chunk: Any) -> list[Any]:
    """Megatron's groups of gradient buckets of a chunk; none where it is not wrapped in Megatron's DDP."""
    ddp = chunk.module
    groups = [*getattr(ddp, "bucket_groups", []), *getattr(ddp, "expert_parallel_bucket_groups", [])]
    return [group for group in groups if hasattr(group, "check_grads")]
