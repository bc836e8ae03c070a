"""Histograms of the tokens: the landscape, and fine ones of entropy and weight from which percentiles are read.

Legend:
    entropy_ratio  H / normaliser; up to ``Bins.highest_ratio``, which is 1 with the paper's normaliser
    vector         [LENGTH] float64, all counts of some tokens one after another: what ranks add up
Counts are whole numbers, exact in float64 up to 2**53, so no order of adding changes a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_eaft.config import EAFTConfig
from nemo_eaft.loss import TokenLoss

GRID = 50
"""Bins of the landscape on each axis, of equal width."""
FINE = 2048
"""Bins of a fine histogram. They narrow towards 0, where the tokens of a trained model are."""
LENGTH = GRID * GRID + 2 * FINE
"""Entries of a vector of counts: landscape (entropy first), entropy ratio, weight."""

_POWER = 4

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Bins:
    """Where the bins of a run lie. Values beyond the last edge count in the last bin."""

    highest_ratio: float
    highest_weight: float

    @classmethod
    def of(cls, config: EAFTConfig, vocab_size: int) -> Bins:
        """The bins for a loss over a true vocabulary of `vocab_size`."""
        highest = config.entropy_bound(vocab_size) / config.entropy_normalizer(vocab_size)
        return cls(highest, max(1.0, highest**config.alpha) if config.gate == "eaft" else 1.0)

    def grid_edges(self) -> tuple[Floats, Floats]:
        """[GRID + 1] edges of the landscape: entropy ratio, and probability of the label."""
        return np.linspace(0.0, self.highest_ratio, GRID + 1), np.linspace(0.0, 1.0, GRID + 1)

    def ratio_edges(self) -> Floats:
        """[FINE + 1] edges of the fine histogram of the entropy ratio."""
        return self.highest_ratio * fine_edges()

    def weight_edges(self) -> Floats:
        """[FINE + 1] edges of the fine histogram of the weight."""
        return self.highest_weight * fine_edges()

    def places(self, probability: Tensor, entropy_ratio: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The bin of each token in the landscape (flattened), among the ratios and among the weights, int64."""
        x = _equal(entropy_ratio / self.highest_ratio, GRID)
        y = _equal(probability, GRID)
        return (
            x * GRID + y,
            _equal((entropy_ratio / self.highest_ratio).clamp(min=0.0) ** (1 / _POWER), FINE),
            _equal((weight / self.highest_weight).clamp(min=0.0) ** (1 / _POWER), FINE),
        )


def fine_edges() -> Floats:
    """[FINE + 1] from 0 to 1: the widths grow as the third power, from 6e-14 to 2e-3."""
    return np.linspace(0.0, 1.0, FINE + 1) ** _POWER


def _equal(part: Tensor, bins: int) -> Tensor:
    return (part * bins).floor().clamp(0, bins - 1).to(torch.int64)


@torch.no_grad()
def count(out: TokenLoss, valid: Tensor, config: EAFTConfig, vocab_size: int) -> Tensor:
    """Count one micro-batch. Waits for nothing on a GPU.

    Args:
        out: per-token values, [...] float32 each, identical on every tensor-parallel rank.
        valid: [...] bool, the tokens in the loss. Of them, those with a value that is not finite are left out.
        config: of the loss.
        vocab_size: the true vocabulary size.

    Returns:
        A vector on the device of `out`.
    """
    valid = valid & out.cross_entropy.isfinite() & out.entropy.isfinite() & out.weight.isfinite()
    ratio = out.entropy / config.entropy_normalizer(vocab_size)
    values = [torch.where(valid, value, 0.0).flatten() for value in (torch.exp(-out.cross_entropy), ratio, out.weight)]
    grid, ratios, weights = Bins.of(config, vocab_size).places(*values)
    places = torch.cat((grid, GRID * GRID + ratios, GRID * GRID + FINE + weights))
    # Whole numbers: the order in which a GPU adds them changes nothing.
    counts = torch.zeros(LENGTH, dtype=torch.int64, device=places.device)
    return counts.scatter_add_(0, places, valid.flatten().to(torch.int64).repeat(3)).double()


def split(vector: Tensor) -> tuple[Integers, Integers, Integers]:
    """A vector's three histograms on the host: [GRID, GRID] by entropy and probability, [FINE] ratio, [FINE] weight."""
    assert vector.shape == (LENGTH,), vector.shape
    counts = vector.cpu().numpy().astype(np.int64)
    grid, ratios, weights = np.split(counts, [GRID * GRID, GRID * GRID + FINE])
    return grid.reshape(GRID, GRID), ratios, weights


def percentile(counts: Integers, edges: Floats, part: float) -> float:
    """The value below which `part` (0 to 1) of the counted values lie, within its bin as if they lay evenly there.

    0.0 where nothing was counted.
    """
    total = int(counts.sum())
    if total == 0:
        return 0.0
    below = np.concatenate(([0], np.cumsum(counts)))
    wanted = part * total
    place = min(int(np.searchsorted(below[1:], wanted, side="left")), len(counts) - 1)
    # Of bins without a token the first that has one.
    place = max(place, int(np.flatnonzero(counts)[0]))
    inside = (wanted - below[place]) / max(int(counts[place]), 1)
    return float(edges[place] + min(max(inside, 0.0), 1.0) * (edges[place + 1] - edges[place]))
