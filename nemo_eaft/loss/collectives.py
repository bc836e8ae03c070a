"""Every torch.distributed call of the package, each as one small named function.

All ranks of a group run each function unconditionally, whatever their data: a branch on values around a
collective hangs the job. ``None`` for a group means one rank, and then nothing is sent.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def sum_over_data_and_broadcast_over_pipeline(
    vector: Tensor, data_group: ProcessGroup | None, pipeline_group: ProcessGroup | None, source: int | None
) -> Tensor:
    """Add a vector over the data-parallel ranks, then give the last pipeline stage's result to every stage.

    Two collectives, in this order, on every rank: all-reduce SUM over ``data_group`` (data x context
    parallel, so each pipeline stage has its own), broadcast over ``pipeline_group`` from ``source``. Same
    shape and dtype on all ranks.

    Args:
        vector: [n] float64, this rank's sums, not written to; dropped on every stage but the last.
        data_group: ranks whose vectors are added. None: one rank.
        pipeline_group: the stages of this rank's pipeline. None: one stage.
        source: global rank of the last stage in ``pipeline_group``; None exactly when that is None.

    Returns:
        [n] float64, new, the same on every rank of both groups.
    """
    assert (pipeline_group is None) == (source is None), "a pipeline group and its source rank come together"
    total = vector.clone()
    if data_group is not None:
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=data_group)
    if pipeline_group is not None:
        dist.broadcast(total, src=source, group=pipeline_group)
    return total


def gather_over_world(part: Tensor) -> Tensor:
    """Give every rank of the job the tensor of every rank: one all-gather over the world, none with one rank.

    Args:
        part: [...] int64, contiguous, of the same shape on every rank.

    Returns:
        [ranks, ...] in the order of global ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part.unsqueeze(0)
    return _gather(part.unsqueeze(0), dist.get_world_size(), None)


def any_over_world(flag: Tensor) -> Tensor:
    """Which flags are set on any rank of the job: one all-reduce MAX over the world, none with one rank.

    Args:
        flag: [n] int32, each 0 or 1, the same n on every rank. Overwritten and returned.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag


def gather_objects(value: Any) -> list[Any]:
    """Give every rank of the job what every rank has to say, by global rank: for error messages.

    Two all-gathers over the world (sizes, then pickled bytes), none with one rank. Only where every rank has decided
    alike to call it, by a value that is the same on all.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def everywhere(action: Callable[[], Any]) -> list[Any]:
    """What `action`, which sends nothing, returned on every rank, by global rank; for what may fail on one of them.

    Every rank of the job calls it, each with an action of its own. The collectives of one `gather_objects`.

    Raises, on every rank, naming the first rank whose action raised an Exception, so that no rank waits for one that is
    gone:
        ValueError: that was a ValueError.
        RuntimeError: it was any other.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    text = None if error is None else f"{error}" if type(error) is ValueError else f"{type(error).__name__}: {error}"
    told = gather_objects((result, text, isinstance(error, ValueError)))
    for rank, (_, text, of_value) in enumerate(told):
        if text is not None:
            raise (ValueError if of_value else RuntimeError)(f"rank {rank}: {text}") from error
    return [result for result, *_ in told]


def on_rank_zero(action: Callable[[], Any]) -> Any:
    """What `action` returned on global rank 0, on every rank: rank 0 reads or writes for all. Otherwise `everywhere`.

    Every rank of the job calls it; only rank 0 runs `action`, and what it raises there is raised on all.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    return everywhere(action if first else lambda: None)[0]


def raise_timeouts(seconds: float) -> None:
    """Let no process group of this rank give up a collective before `seconds`; longer ones stay. Sends nothing.

    A limit holds for collectives that begin after this. torch 2.13 has no public function for it: NCCL's limit is 600 s
    for the world group where nobody sets one (distributed/constants.py), Megatron's own groups have 1800 s.

    Raises:
        RuntimeError: this torch does not let it be read or set.
    """
    if not dist.is_initialized():
        return
    wanted = datetime.timedelta(seconds=seconds)
    try:
        c10d: Any = dist.distributed_c10d
        for group in list(c10d._world.pg_map):
            devices = group._device_types
            if any(group._get_backend(device).options._timeout < wanted for device in devices):
                c10d._set_pg_timeout(wanted, group)
    except (AttributeError, RuntimeError) as error:
        raise RuntimeError(f"torch {torch.__version__}: {error}") from error


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true on any rank of the job: one all-reduce MAX of one int32 over all ranks, none with one
    rank. Every rank gets the same answer, so a branch on it is the same everywhere."""
    return bool(any_over_world(torch.tensor([int(flag)], dtype=torch.int32, device=device)).item())


def group_size(group: ProcessGroup | None) -> int:
    """How many ranks ``group`` has; 1 for None. Sends nothing.

    Raises ``ValueError`` where ``group`` is no process group or this rank is not in it.
    """
    if group is None:
        return 1
    _check_group(group)
    return dist.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    """This rank's place in ``group``; 0 for None. Sends nothing."""
    if group is None:
        return 0
    _check_group(group)
    return dist.get_rank(group)


def all_gather_records(records: Tensor, group: ProcessGroup | None) -> Tensor:
    """Give every rank the loss records of all ranks.

    One all-gather over ``group`` (tensor parallel), unconditional; none with one rank. Zero tokens are sent
    like any other number of them.

    Args:
        records: [tokens, width] float32 or float64, contiguous, of the same shape on every rank.

    Returns:
        [ranks, tokens, width] in rank order, the same bits on every rank.
    """
    ranks = group_size(group)
    if ranks == 1:
        return records.unsqueeze(0)
    return _gather(records, ranks, group).view(ranks, *records.shape)


def sum_over_group(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Add a tensor over the ranks of ``group`` (tensor parallel): one all-reduce SUM in the tensor's dtype,
    none with one rank. Overwrites and returns ``tensor``, a contiguous buffer of ours."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def gather_sequence(part: Tensor, group: ProcessGroup | None) -> Tensor:
    """Join the ranks' parts of a sequence: one all-gather over ``group`` (tensor parallel) in the tensor's
    dtype, none with one rank.

    Args:
        part: [S / ranks, ...], of the same shape on every rank.

    Returns:
        [S, ...] in rank order.
    """
    ranks = group_size(group)
    return part if ranks == 1 else _gather(part.contiguous(), ranks, group)


def reduce_scatter_sequence(whole: Tensor, group: ProcessGroup | None) -> Tensor:
    """Add a tensor over the ranks and keep this rank's part: one reduce-scatter SUM over ``group`` (tensor
    parallel) in the tensor's dtype, none with one rank.

    Args:
        whole: [S, ...], contiguous, of the same shape on every rank, S a multiple of the number of ranks.

    Returns:
        [S / ranks, ...], rank r's being the r-th part.
    """
    ranks = group_size(group)
    if ranks == 1:
        return whole
    part = torch.empty(whole.shape[0] // ranks, *whole.shape[1:], dtype=whole.dtype, device=whole.device)
    # torch 2.13 renamed both of these and warns at the old names.
    reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    reduce_scatter(part, whole, op=dist.ReduceOp.SUM, group=group)
    return part


def _gather(part: Tensor, ranks: int, group: ProcessGroup | None) -> Tensor:
    whole = torch.empty(ranks * part.shape[0], *part.shape[1:], dtype=part.dtype, device=part.device)
    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    all_gather(whole, part, group=group)
    return whole


def _check_group(group: object) -> None:
    if not isinstance(group, ProcessGroup):
        raise ValueError(f"group must be a torch.distributed ProcessGroup or None, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("group must contain this rank, got a group of other ranks")
