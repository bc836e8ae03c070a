"""What EAFT did in one step: masked sums on every rank, divided once by the tokens of the whole global batch.

The way of a number, and why it has this shape::

    token_sums               [6] float64, one micro-batch of this rank; the caller adds up those of a step
    reduce_sums              [6] float64, the global batch, identical on every rank of every pipeline stage
    StepMetrics.from_sums    Python numbers, each sum divided once by the global number of valid tokens

Only sums travel, so no result depends on how the batch was split: a mean of micro-batch means would weigh a
token by the length of its neighbours (arXiv 2601.02151 averages over tokens). float64 keeps token counts
exact up to 2**53 and one addition order as good as another to about 1e-15 relative.

Nothing here waits for the device except ``StepMetrics.from_sums``, once a step.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_eaft.config import EAFTConfig
from nemo_eaft.gates import is_conflict
from nemo_eaft.loss import TokenLoss
from nemo_eaft.loss.collectives import sum_over_data_and_broadcast_over_pipeline

METRIC_SUMS = ("loss", "cross_entropy", "entropy", "weight", "conflicts", "tokens")
"""Entries of the summed vector, in order: four sums over the valid tokens, then two counts."""


def zero_sums(device: torch.device | str) -> Tensor:
    """The sums of no token: [6] float64 zeros on ``device``.

    Where a step's addition starts, and what a rank without the loss (any but the last pipeline stage) brings
    to :func:`reduce_sums`.
    """
    return torch.zeros(len(METRIC_SUMS), dtype=torch.float64, device=device)


@torch.no_grad()
def token_sums(out: TokenLoss, valid: Tensor, config: EAFTConfig, vocab_size: int) -> Tensor:
    """Sum one micro-batch's per-token values over its valid tokens.

    Args:
        out: per-token ``loss``, ``cross_entropy``, ``entropy`` (nats) and ``weight``, each [...] float32,
            identical on every rank of the tensor-parallel group.
        valid: [...] bool, True where the token counts (loss mask 1 and a label that is not ``ignore_index``).
        config: thresholds of a confident conflict: probability ``exp(-cross_entropy)`` below
            ``conflict_probability`` and entropy divided by the normaliser below ``conflict_entropy``.
        vocab_size: the true vocabulary size V, before padding; the normaliser may depend on it.

    Returns:
        [6] float64 in the order of ``METRIC_SUMS``, on the device of ``out``, identical on every
        tensor-parallel rank. Detached. A value at a position that is not valid never takes part, not even a
        NaN; a NaN at a valid position makes its sum NaN and is never hidden.

    Raises:
        ValueError: ``valid`` is not bool (a float loss mask must be compared first), or its shape differs
            from the tokens' (broadcasting would count tokens twice without a word).
    """
    if valid.dtype != torch.bool:
        raise ValueError(f"valid must have dtype torch.bool, got {valid.dtype}; pass loss_mask != 0")
    if valid.shape != out.loss.shape:
        shapes = f"{tuple(out.loss.shape)}, got {tuple(valid.shape)}"
        raise ValueError(f"valid must have the shape of the tokens, {shapes}")
    values = (out.loss, out.cross_entropy, out.entropy, out.weight)
    # Select before any arithmetic: NaN * 0 is NaN, where() drops it.
    sums = [torch.where(valid, value.double(), 0.0).sum() for value in values]
    entropy_ratio = out.entropy / config.entropy_normalizer(vocab_size)
    conflicts = is_conflict(out.cross_entropy, entropy_ratio, config) & valid
    counts = [mask.sum(dtype=torch.int64).double() for mask in (conflicts, valid)]
    return torch.stack(sums + counts)


def sums_and_counts(sums: Tensor) -> dict[str, Tensor]:
    """Name to [2] float64, sum and number of tokens, for a framework that adds up such pairs and divides by itself.

    Args:
        sums: [6] float64 in the order of ``METRIC_SUMS``, as returned by :func:`token_sums`.

    Returns:
        the means of :class:`StepMetrics` but the loss, which such a framework sums anyway.
    """
    _check(sums)
    of = dict(zip(METRIC_SUMS, sums, strict=True))
    named = {
        "cross_entropy": "cross_entropy",
        "entropy": "entropy",
        "weight": "weight",
        "conflict_fraction": "conflicts",
    }
    return {name: torch.stack((of[entry], of["tokens"])) for name, entry in named.items()}


def reduce_sums(
    sums: Tensor,
    data_group: ProcessGroup | None,
    pipeline_group: ProcessGroup | None,
    last_stage: int | None,
) -> Tensor:
    """Turn every rank's sums into those of the global batch, the same on every rank. Every rank must call it.

    Args:
        sums: [6] float64, this rank's sums over the micro-batches of the step. Ranks that are not on the last
            pipeline stage bring :func:`zero_sums`; what they bring is replaced.
        data_group: ranks with different tokens and the same place in the pipeline and in the tensor-parallel
            group: data parallel x context parallel. None: one rank.
        pipeline_group: the stages of this rank's pipeline. None: one stage.
        last_stage: global rank of the last stage in ``pipeline_group``; None exactly when that is None.

    Returns:
        [6] float64, a new tensor, replicated on all ranks.
    """
    _check(sums)
    return sum_over_data_and_broadcast_over_pipeline(sums, data_group, pipeline_group, last_stage)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """Means over the valid tokens of one step's global batch, as Python numbers on the host.

    A value is NaN or infinite only when a valid token's value was. A step with no valid token at all has 0.0
    in every mean and 0 tokens: it had no loss and no gradient.
    """

    loss: float
    """EAFT loss, weight x cross-entropy, nats per token: what was minimised."""
    cross_entropy: float
    """Plain cross-entropy, nats per token: comparable with any other run."""
    entropy: float
    """Entropy of the prediction as the gate sees it (over the top K), nats, mean per token."""
    weight: float
    """Mean weight; with the default normaliser in [0, 1]."""
    conflict_fraction: float
    """Part of the tokens that are confident conflicts, in [0, 1]."""
    tokens: int
    """Valid tokens of the global batch, exact."""

    @classmethod
    def from_sums(cls, sums: Tensor, *, step: int | None = None) -> StepMetrics:
        """Divide global sums once by the global number of valid tokens.

        Copies ``sums`` to the host, the only wait for the device in this file.

        Args:
            sums: [6] float64 in the order of ``METRIC_SUMS``, as returned by :func:`reduce_sums`.
            step: named in the warning about a step with no valid token. Pass it on the rank that logs; None,
                for the other ranks, gives no warning.
        """
        _check(sums)
        loss, cross_entropy, entropy, weight, conflicts, tokens = sums.tolist()
        assert tokens >= 0, f"tokens must be a count, got {tokens}"
        assert tokens == math.floor(tokens), f"tokens must be a count, got {tokens}"
        if tokens == 0 and step is not None:
            warnings.warn(
                f"step {step}: no token of the global batch takes part in the loss (every loss mask is 0); "
                "the step has loss 0 and no gradient",
                RuntimeWarning,
                stacklevel=2,
            )
        denominator = max(tokens, 1.0)
        return cls(
            loss=loss / denominator,
            cross_entropy=cross_entropy / denominator,
            entropy=entropy / denominator,
            weight=weight / denominator,
            conflict_fraction=conflicts / denominator,
            tokens=int(tokens),
        )

    def as_dict(self) -> dict[str, float | int]:
        """Name to value, in the order of the fields: the keys of ``metrics.jsonl``."""
        return asdict(self)


def _check(sums: Tensor) -> None:
    assert sums.shape == (len(METRIC_SUMS),), sums.shape
    assert sums.dtype == torch.float64, sums.dtype
