"""Made-up tokens with known values."""

from __future__ import annotations

import numpy as np

from nemo_eaft.analyze.tokens import RowTokens, Tokens


def row(number: int, tokens: list[tuple[float, float, float]], prompt: int = 2) -> RowTokens:
    """A row of `prompt` tokens and one answer token for each (probability, entropy ratio, gradient)."""
    values = np.array(tokens, dtype=np.float64).reshape(-1, 3)
    probability, ratio, gradient = values.T
    count = len(tokens)
    found = Tokens(
        position=np.arange(prompt, prompt + count),
        cross_entropy=-np.log(probability),
        entropy=ratio * np.log(20),
        entropy_ratio=ratio,
        weight=ratio.copy(),
        gradient=gradient,
        top=np.full(count, 7),
        top_probability=np.full(count, 0.9),
    )
    return RowTokens(number, 0, list(range(prompt + count)), found)


CONFLICT = (0.01, 0.05, 1.3)
SURE = (0.99, 0.02, 0.01)
OPEN = (0.3, 0.8, 0.8)
