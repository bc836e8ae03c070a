"""Predictions of a causal model of ``transformers`` at chosen places of rows of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

TOKENS = 2048
"""Tokens of one forward pass, padding included, at most (a longer row goes alone): its logits are held at once."""


def batches(lengths: Sequence[int], tokens: int = TOKENS) -> Iterator[list[int]]:
    """Indices of rows that go through the model together: rows of like length, so that little is padding, and the same
    ones each time, so that a measurement repeats exactly."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and lengths[index] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def log_probabilities(
    model: Any, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Tensor]]:
    """The model's predictions of every row, those of short rows first.

    Args:
        model: a causal model of ``transformers``; put into evaluation mode and back.
        rows: token ids.
        places: of each row the positions whose prediction of the next token is wanted.

    Yields:
        The number of a row and [places, V] float32 log-probabilities on the model's device, whatever its dtype.
    """
    training = model.training
    model.eval()
    try:
        for batch in batches([len(row) for row in rows]):
            longest = max(len(rows[index]) for index in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for line, index in enumerate(batch):
                # Padded on the right: no token of a row sees what follows it.
                ids[line, : len(rows[index])] = torch.tensor(rows[index])
                mask[line, : len(rows[index])] = 1
            # Most tokens of a row are its prompt, of which no logit is wanted.
            wanted = torch.tensor(sorted({place for index in batch for place in places[index]}), device=model.device)
            options = {"logits_to_keep": wanted} if _takes_places(model) else {}
            ids, mask = ids.to(model.device), mask.to(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
            for line, index in enumerate(batch):
                chosen = torch.tensor(places[index], dtype=torch.long, device=logits.device)
                if options:
                    chosen = torch.searchsorted(wanted, chosen)
                yield index, logits[line, chosen].float().log_softmax(-1)
    finally:
        model.train(training)


def _takes_places(model: Any) -> bool:
    """Whether a model computes the logits of chosen places alone, as most of ``transformers`` do."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
