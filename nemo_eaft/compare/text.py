"""Cross-entropy of general text that no run was trained on; its exponential is the perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nemo_eaft.compare.forward import log_probabilities
from nemo_eaft.compare.record import Sums

_CHARACTERS = 16  # of a token, at most, when a long text is cut before it is tokenized


def windows(tokenizer: Any, text: str, count: int, length: int) -> list[list[int]]:
    """The first ``count`` pieces of ``length`` tokens, one after the other, without special tokens; the rest of a text
    that is too short for a whole piece is left out.

    Raises:
        ValueError: the text has less than one piece.
    """
    ids = tokenizer(text[: count * length * _CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [list(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    if not pieces:
        raise ValueError(f"the text has {len(ids)} tokens; at least one window of {length} is needed")
    return pieces[:count]


def measure_text(model: Any, pieces: Sequence[Sequence[int]]) -> Sums:
    """Nats of every token of each piece but its first, which has nothing before it."""
    places = [range(len(piece) - 1) for piece in pieces]
    nats = [0.0] * len(pieces)
    for index, predicted in log_probabilities(model, pieces, places):
        labels = torch.tensor(pieces[index][1:], device=predicted.device)
        nats[index] = -predicted.gather(1, labels[:, None]).double().sum().item()
    return Sums(tuple(nats), tuple(len(piece) - 1 for piece in pieces))
