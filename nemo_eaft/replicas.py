"""Ranks that hold one copy of the model must train on the same rows: a check that finds and names those that do not.

Ranks of one copy (tensor, pipeline and context parallel) each read the data for themselves, and nothing in Megatron
compares what they read. Different labels on two tensor-parallel ranks give a loss that belongs to neither row, without
an error. Here every rank sends a digest of each micro-batch before the first forward of the step, so that different
lengths are found, too, before they hang a collective.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_eaft.batches import describe
from nemo_eaft.loss.collectives import everywhere, gather_over_world
from nemo_eaft.place import Place

KEYS = ("tokens", "labels", "loss_mask")
"""What is compared of a micro-batch."""


class Difference(NamedTuple):
    """The first micro-batch in which a rank differs from the first rank of its copy of the model."""

    micro_batch: int
    """From 0."""
    rank: int
    reference: int
    """Global rank that it is compared with."""
    keys: tuple[str, ...]
    """Which of `KEYS` differ."""


def digests(batches: list[dict[str, Any]], count: int) -> Tensor:
    """[count, 3] int64, one number for each micro-batch and each of `KEYS`; 0 where there is none.

    A number is 63 bits of BLAKE2b over dtype, shape and values: equal batches agree, and different ones do with a
    probability of 1e-19.
    """
    numbers = torch.zeros(count, len(KEYS), dtype=torch.int64)
    for index, batch in enumerate(batches):
        for place, key in enumerate(KEYS):
            if isinstance(batch.get(key), Tensor):
                numbers[index, place] = _digest(batch[key])
    return numbers


def differences(places: Tensor, everywhere: Tensor) -> list[Difference]:
    """The ranks that were given something else than the first rank of their copy.

    Args:
        places: [ranks] the copy of the model (data-parallel index) that each global rank belongs to.
        everywhere: [ranks, micro-batches, 3] as of `digests`.

    Returns:
        One entry for each such rank, by micro-batch, then by rank.
    """
    found = []
    reference: dict[int, int] = {}
    for rank, copy in enumerate(places.tolist()):
        first = reference.setdefault(copy, rank)
        unequal = everywhere[rank] != everywhere[first]
        rows = unequal.any(dim=1).nonzero()
        if len(rows):
            index = int(rows[0])
            keys = tuple(key for key, differs in zip(KEYS, unequal[index].tolist(), strict=True) if differs)
            found.append(Difference(index, rank, first, keys))
    return sorted(found)


def check_replicas(
    batches: list[dict[str, Any]], count: int, place: Place, device: torch.device, step: int, tokenizer: Any
) -> None:
    """Compare this step's micro-batches over the job. Every rank calls it, whatever it was given.

    One all-gather of `count + 1` times three int64 over the world. Where ranks differ, which all of them see alike,
    what they were given is gathered as well, for the message.

    Args:
        batches: the micro-batches of the coming step, at most `count`; fewer where this rank's data ended.
        count: micro-batches of a step, the same on every rank.
        place: this rank.
        device: where collectives of the job run.
        step: for the message.
        tokenizer: as for `batches.describe`.

    Raises:
        RuntimeError: ranks of one copy of the model differ; on all ranks, naming two of them.
    """
    mine = torch.full((count + 1, len(KEYS)), place.data, dtype=torch.int64)
    mine[1:] = digests(batches, count)
    all_ranks = gather_over_world(mine.to(device)).cpu()
    found = differences(all_ranks[:, 0, 0], all_ranks[:, 1:])
    if not found:
        return
    first = found[0]
    given = batches[first.micro_batch] if first.micro_batch < len(batches) else None
    # What a rank was given may be such that it cannot even be told.
    said = everywhere(lambda: (str(place), "no micro-batch" if given is None else _rows(given, tokenizer)))
    (one, its_rows), (other, other_rows) = said[first.reference], said[first.rank]
    more = f"; {len(found) - 1} more ranks differ from theirs" if len(found) > 1 else ""
    raise RuntimeError(
        f"step {step}: {one} and {other} hold the same copy of the model, but were given different "
        f"{', '.join(first.keys)} in micro-batch {first.micro_batch + 1} of {count}{more}. The first has {its_rows}. "
        f"The second has {other_rows}. Stopped before the forward pass (loss.check_replicas)"
    )


def _rows(batch: dict[str, Any], tokenizer: Any) -> str:
    return "; ".join(describe(batch, row, None, tokenizer) for row in range(len(batch["tokens"])))


def _digest(tensor: Tensor) -> int:
    data = tensor.detach().cpu().contiguous()
    text = f"{data.dtype} {tuple(data.shape)}".encode()
    digest = hashlib.blake2b(data.view(torch.uint8).numpy().tobytes(), key=text[:64], digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1
