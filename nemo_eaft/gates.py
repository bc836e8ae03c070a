"""Gates: the weight of a token as a function of its cross-entropy and its normalised entropy.

Legend, for every function here:
    cross_entropy  [...] float, nats, of the label over the true vocabulary
    entropy_ratio  [...] float, H / normaliser, in [0, 1] with the paper's normaliser
    returns        [...] float of the same dtype
The loss treats every weight as a constant: no gradient flows through it. docs/gates.md has them in one table, with
their sources.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_eaft.config import EAFTConfig


def gate_weight(cross_entropy: Tensor, entropy_ratio: Tensor, config: EAFTConfig) -> Tensor:
    """The weight of each token under ``config.gate``.

    A NaN entropy can give a finite weight (``alpha=0``, ``gate="none"``). Nothing is hidden by that: the
    cross-entropy of such a token is NaN too, and so is its loss.
    """
    return _GATES[config.gate](cross_entropy, entropy_ratio, config)


def is_conflict(cross_entropy: Tensor, entropy_ratio: Tensor, config: EAFTConfig) -> Tensor:
    """Where the model is sure and the label disagrees (the paper's confident conflicts), as a bool tensor.

    ``exp(-cross_entropy) < conflict_probability`` and ``entropy_ratio < conflict_entropy``; False for NaN.
    """
    probability = torch.exp(-cross_entropy)
    return (probability < config.conflict_probability) & (entropy_ratio < config.conflict_entropy)


def _eaft(cross_entropy: Tensor, entropy_ratio: Tensor, config: EAFTConfig) -> Tensor:
    """``entropy_ratio ** alpha``, the weight of arXiv 2601.02151. ``x ** 0`` is 1 for every x, so alpha=0 needs no
    case."""
    return entropy_ratio**config.alpha


def _none(cross_entropy: Tensor, entropy_ratio: Tensor, config: EAFTConfig) -> Tensor:
    """1: plain cross-entropy."""
    return torch.ones_like(cross_entropy)


def _dft(cross_entropy: Tensor, entropy_ratio: Tensor, config: EAFTConfig) -> Tensor:
    """``exp(-cross_entropy)``, the label's probability: Dynamic Fine-Tuning (arXiv 2508.05629), for
    comparison."""
    return torch.exp(-cross_entropy)


def _mask(cross_entropy: Tensor, entropy_ratio: Tensor, config: EAFTConfig) -> Tensor:
    """0 at a confident conflict and 1 elsewhere: the hard mask of the pilot study of arXiv 2601.02151."""
    return (~is_conflict(cross_entropy, entropy_ratio, config)).to(cross_entropy.dtype)


def _sigmoid(cross_entropy: Tensor, entropy_ratio: Tensor, config: EAFTConfig) -> Tensor:
    """``sigmoid(gate_slope * (entropy_ratio - gate_centre))``: a soft threshold on the entropy, of this package."""
    return torch.sigmoid(config.gate_slope * (entropy_ratio - config.gate_centre))


_GATES: dict[str, Callable[[Tensor, Tensor, EAFTConfig], Tensor]] = {
    "eaft": _eaft,
    "none": _none,
    "dft": _dft,
    "mask": _mask,
    "sigmoid": _sigmoid,
}
