"""The result of the loss."""

from typing import NamedTuple

from torch import Tensor


class TokenLoss(NamedTuple):
    """Per-token values, each with the shape of the labels, identical bit for bit on every rank of the group.

    float32, or float64 for float64 logits. All four are exactly 0 at a token that does not count. A NaN, a
    +Inf, or a row of nothing but -Inf among the logits of a token that counts makes its loss NaN on every
    rank.
    """

    loss: Tensor
    """``weight * cross_entropy``, nats. Differentiable with respect to the logits, the weight held
    constant."""

    cross_entropy: Tensor
    """Cross-entropy of the label over the true vocabulary, nats, at least 0. Detached."""

    entropy: Tensor
    """Entropy of the K largest logits (or of the whole row), nats, in [0, ln K]. Detached."""

    weight: Tensor
    """What the gate made of the two. Detached."""
