"""NaN and infinity in a step: where they came from, for the message that ends the run before the optimizer step.

Nothing here waits for the device in a step that is finite. The loss leaves one mask for each micro-batch on the device;
whether to look at them is decided by the step's loss, after all ranks have agreed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemo_eaft.batches import describe
from nemo_eaft.loss.collectives import everywhere
from nemo_eaft.metrics import StepMetrics
from nemo_eaft.place import Place


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The tokens of one rank whose loss is not finite."""

    place: Place
    micro_batch: int
    """The first with such a token, from 0, of this rank's micro-batches."""
    row: int
    position: int
    """The first such token of it, from 0, in the whole sequence."""
    sample: str
    """The row in words."""
    tokens: int
    """All such tokens of the step on this rank."""
    micro_batches: int
    """That hold them."""


def find(
    bad: list[Tensor], batches: list[dict[str, Any]], place: Place, context_size: int, tokenizer: Any
) -> Finding | None:
    """What this rank knows; None on a rank whose losses are all finite, or that computes none.

    Args:
        bad: for each micro-batch [b, s] bool, True where the loss that is trained on is not finite.
        batches: what `StepBatches` kept of the same micro-batches.
        place: this rank.
        context_size: ranks that share a sequence, each holding two of its pieces.
        tokenizer: as for `batches.describe`.
    """
    masks = [mask.cpu() for mask in bad]
    held = [index for index, mask in enumerate(masks) if mask.any()]
    if not held:
        return None
    first = held[0]
    row, local = (int(number) for number in masks[first].nonzero()[0])
    position = whole_position(local, masks[first].shape[1], place.context, context_size)
    batch = batches[first] if first < len(batches) else {}
    return Finding(
        place=place,
        micro_batch=first,
        row=row,
        position=position,
        sample=describe(batch, row, position, tokenizer),
        tokens=sum(int(mask.sum()) for mask in masks),
        micro_batches=len(held),
    )


def whole_position(local: int, length: int, rank: int, size: int) -> int:
    """Where a token of a context-parallel rank stands in the sequence.

    Megatron cuts a sequence into 2 x size pieces and gives rank r the pieces r and 2 x size - 1 - r, so that causal
    attention costs every rank the same (megatron-core 0.15.3, utils.py, get_batch_on_this_cp_rank).

    Args:
        local: position in this rank's part. length: of this rank's part.
    """
    if size == 1:
        return local
    half = length // 2
    piece = rank if local < half else 2 * size - 1 - rank
    return piece * half + local % half


def raise_for_loss(
    step: int, metrics: StepMetrics, finding: Callable[[], Finding | None], micro_batches: int, hint: str
) -> None:
    """Gather what all ranks found and end the run. Every rank calls it: they have agreed that a loss is not finite.

    Args:
        metrics: as this rank has them. Finite where only tensor-parallel ranks with other rows or loss masks than this
            one see what is wrong.
        finding: what this rank knows. An error in it is everybody's.
        micro_batches: of one rank in one step.
        hint: a last sentence, or nothing.

    Raises:
        RuntimeError: always, with the same message on every rank.
    """
    told = everywhere(lambda: (finding(), metrics.loss, metrics.cross_entropy))
    findings = [value for value, _, _ in told if value is not None]
    losses = [loss for _, loss, _ in told if not math.isfinite(loss)]
    loss, cross_entropy = next((one[1:] for one in told if not math.isfinite(one[1])), told[0][1:])
    said = (
        f"step {step}: the loss is {loss} (cross-entropy {cross_entropy}); stopped before the optimizer step, nothing "
        "was updated"
    )
    if len(losses) < len(told):
        said += (
            f". Only {len(losses)} of {len(told)} ranks have such a loss: tensor-parallel ranks were given different "
            "rows or loss masks, which loss.check_replicas=1 finds"
        )
    if findings:
        first = min(findings, key=lambda value: (value.micro_batch, value.place.rank))
        # Ranks of a tensor-parallel group have the same tokens; one of them counts.
        counted = [value for value in findings if value.place.tensor == first.place.tensor]
        tokens, batches = (sum(getattr(value, name) for value in counted) for name in ("tokens", "micro_batches"))
        ranks = ", ".join(str(value.place.rank) for value in findings)
        said += (
            f". The first loss that is not finite: {first.place}, micro-batch {first.micro_batch + 1} of "
            f"{micro_batches}, row {first.row + 1} of it, position {first.position}: {first.sample}. In all {tokens} "
            f"tokens in {batches} micro-batches, seen by global ranks {ranks}"
        )
    raise RuntimeError(f"{said}. {hint}" if hint else said)
