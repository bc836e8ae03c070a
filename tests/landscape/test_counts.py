"""Histograms and percentiles against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_eaft.config import EAFTConfig
from nemo_eaft.landscape.counts import FINE, GRID, LENGTH, Bins, count, percentile, split
from nemo_eaft.loss import TokenLoss, eaft_loss

VOCAB = 100


def tokens(config: EAFTConfig, number: int = 4000) -> tuple[TokenLoss, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(number, VOCAB, generator=generator) * torch.rand(number, 1, generator=generator) * 12
    labels = torch.randint(0, VOCAB, (number,), generator=generator)
    valid = torch.rand(number, generator=generator) < 0.7
    return eaft_loss(logits, labels, config, loss_mask=valid), valid


@pytest.mark.parametrize("config", [EAFTConfig(), EAFTConfig(alpha=2.0, normalizer=1.0), EAFTConfig(gate="none")])
def test_equals_numpy(config: EAFTConfig) -> None:
    out, valid = tokens(config)
    grid, ratios, weights = split(count(out, valid, config, VOCAB))
    bins = Bins.of(config, VOCAB)
    ratio = (out.entropy / config.entropy_normalizer(VOCAB))[valid].double().numpy()
    probability = torch.exp(-out.cross_entropy)[valid].double().numpy()
    expected, _, _ = np.histogram2d(ratio, probability, bins=GRID, range=np.array([[0, bins.highest_ratio], [0, 1]]))
    # A value on an edge may round to either side.
    assert np.abs(grid - expected).sum() <= 4
    assert grid.sum() == ratios.sum() == weights.sum() == valid.sum()
    for counts, edges, values in (
        (ratios, bins.ratio_edges(), ratio),
        (weights, bins.weight_edges(), out.weight[valid].double().numpy()),
    ):
        for part in (0.01, 0.25, 0.5, 0.9):
            assert percentile(counts, edges, part) == pytest.approx(np.quantile(values, part), rel=5e-3, abs=2e-3)


def test_values_that_are_not_finite_are_left_out() -> None:
    config = EAFTConfig()
    out, valid = tokens(config, 10)
    valid = torch.ones_like(valid)
    cross_entropy = out.cross_entropy.clone()
    cross_entropy[2], cross_entropy[5] = torch.nan, torch.inf
    vector = count(out._replace(cross_entropy=cross_entropy), valid, config, VOCAB)
    assert vector.shape == (LENGTH,)
    assert [int(counts.sum()) for counts in split(vector)] == [8, 8, 8]


def test_percentile_of_known_counts() -> None:
    edges = np.array([0.0, 1.0, 2.0, 4.0])
    assert percentile(np.array([2, 0, 2]), edges, 0.25) == 0.5
    assert percentile(np.array([2, 0, 2]), edges, 0.5) == 1.0
    assert percentile(np.array([2, 0, 2]), edges, 0.75) == 3.0
    assert percentile(np.array([0, 4, 0]), edges, 0.0) == 1.0
    assert percentile(np.array([0, 4, 0]), edges, 1.0) == 2.0
    assert percentile(np.zeros(FINE, dtype=np.int64), np.linspace(0, 1, FINE + 1), 0.5) == 0.0


def test_a_bin_is_as_narrow_as_the_docs_say() -> None:
    """docs/analyze.md: what a quantile is known to."""
    edges = Bins.of(EAFTConfig(), VOCAB).ratio_edges()
    widths = np.diff(edges)
    assert widths.max() < 0.002
    for value, relative in ((0.1, 0.0035), (0.01, 0.0062), (1e-4, 0.0195), (1e-6, 0.062)):
        width = widths[np.searchsorted(edges, value) - 1]
        assert 0.9 * relative < width / value < relative


def test_thresholds_of_a_conflict_lie_on_edges() -> None:
    """So that the frame in the picture cuts through no cell."""
    config = EAFTConfig()
    entropy, probability = Bins.of(config, VOCAB).grid_edges()
    assert np.isclose(entropy, config.conflict_entropy).any()
    assert np.isclose(probability, config.conflict_probability).any()
    assert len(entropy) == GRID + 1
