"""Context parallelism at the level of the loss: which tokens a rank holds, and ranks that are TP x CP."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def zigzag(length: int, ranks: int, rank: int) -> Tensor:
    """The positions that a context-parallel rank holds, in its order.

    The sequence is cut into 2 x ranks equal pieces, and a rank gets one from the front and its mirror image from the
    back, so that under causal attention all ranks have the same work.
    """
    assert length % (2 * ranks) == 0
    piece = length // (2 * ranks)
    front = range(rank * piece, (rank + 1) * piece)
    back = range(length - (rank + 1) * piece, length - rank * piece)
    return torch.tensor([*front, *back])


class Place(NamedTuple):
    """One rank of a TP x CP world, tensor parallel innermost as in Megatron."""

    tensor_rank: int
    context_rank: int
    tensor_group: ProcessGroup | None
    context_group: ProcessGroup


def place(rank: int, tensor: int, context: int) -> Place:
    """Every rank makes every group, in one order."""
    found: dict[str, ProcessGroup] = {}
    for c in range(context):
        ranks = [c * tensor + t for t in range(tensor)]
        group = dist.new_group(ranks)
        if rank in ranks:
            found["tensor"] = group
    for t in range(tensor):
        ranks = [c * tensor + t for c in range(context)]
        group = dist.new_group(ranks)
        if rank in ranks:
            found["context"] = group
    return Place(rank % tensor, rank // tensor, found["tensor"] if tensor > 1 else None, found["context"])
