"""``analysis.json``: every number of an analysis, from its tally alone, so the same rows give the same file."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from nemo_eaft.analyze.advice import conflict_share, kept, sft_share, suggest
from nemo_eaft.analyze.tally import ALPHAS, SUMS, Tally
from nemo_eaft.landscape.counts import Bins, Floats, Integers, percentile
from nemo_eaft.settings import Settings
from nemo_eaft.settings_mapping import to_mapping

FILE = "analysis.json"
"""File in ``run.dir``."""

PARTS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_PACKAGES = ("nemo-eaft", "torch", "nemo-toolkit", "megatron-core", "transformers")


def summarise(tally: Tally, settings: Settings, model: str, vocab_size: int) -> dict[str, Any]:
    """The content of the file.

    Args:
        tally: of all rows.
        settings: of the analysis.
        model: what was analysed, in words.
        vocab_size: the true vocabulary size.
    """
    config = settings.loss.eaft_config()
    bins = Bins.of(config, vocab_size)
    named = dict(zip(SUMS, tally.sums.tolist(), strict=True))
    tokens = max(tally.tokens, 1)
    entropy_edges, probability_edges = bins.grid_edges()
    weighted = named["weighted_gradient"]
    return {
        "model": model,
        "data": settings.data.train,
        "rows": tally.rows,
        "tokens_read": tally.read,
        "tokens": tally.tokens,
        "tokens_not_finite": tally.not_finite,
        "vocab_size": vocab_size,
        "mean": {name: named[name] / tokens for name in ("cross_entropy", "entropy", "weight", "loss", "gradient")},
        "conflicts": {
            "tokens": tally.conflicts,
            "share_of_tokens": tally.conflicts / tokens,
            "share_of_sft_gradient": sft_share(tally, named),
            "share_of_gated_gradient": named["conflict_weighted_gradient"] / weighted if weighted > 0 else 0.0,
            "probability_below": config.conflict_probability,
            "entropy_below": config.conflict_entropy,
        },
        "by_alpha": [
            {
                "alpha": alpha,
                "conflict_share_of_gradient": conflict_share(tally, alpha),
                "rest_of_gradient_kept": kept(tally, named, alpha),
            }
            for alpha in ALPHAS
        ],
        "entropy_quantiles": _quantiles(tally.ratios, bins.ratio_edges()),
        "weight_quantiles": _quantiles(tally.weights, bins.weight_edges()),
        "weight_by_entropy_quartile": quartile_means(tally.ratios, tally.weight_by_ratio),
        "landscape": {
            "entropy_edges": entropy_edges.tolist(),
            "probability_edges": probability_edges.tolist(),
            "counts": tally.grid.tolist(),
        },
        "advice": suggest(tally, named),
        "settings": to_mapping(settings),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def quartile_means(counts: Integers, sums: Floats) -> list[float]:
    """Mean of a value in each quarter of the tokens, ordered by what `counts` is a histogram of.

    counts, sums: [FINE] tokens and sum of the value in each bin. A bin on a border is shared out as if its tokens were
    alike.
    """
    total = int(counts.sum())
    if total == 0:
        return [0.0] * 4
    ends = np.cumsum(counts)
    added = np.concatenate(([0.0], np.cumsum(sums)))
    borders = np.interp(np.linspace(0.0, total, 5), np.concatenate(([0], ends)), added)
    return [float(value) for value in np.diff(borders) / (total / 4)]


def _quantiles(counts: Integers, edges: Floats) -> dict[str, float]:
    return {f"p{100 * part:g}": percentile(counts, edges, part) for part in PARTS}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
