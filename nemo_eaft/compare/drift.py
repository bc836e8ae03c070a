"""Drift: how far a tuned model has gone from its base, KL(base || tuned) on text that the base model writes itself.

On text sampled from the base model the mean of the divergence over its tokens estimates the divergence of the two
models' texts, token by token, without a corpus of somebody's choice. The direction is that of forgetting: it is large
where the base model gives a continuation and the tuned one has lost it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_eaft.compare.forward import log_probabilities
from nemo_eaft.compare.record import Sums

Reference = Callable[[int], Tensor]
"""Number of a sample -> [tokens, V] float32, the base model's log-probabilities of each of its tokens but the first."""


def sample(model: Any, start: int, count: int, length: int, seed: int, end: int | None) -> list[list[int]]:
    """Texts that the model writes, drawn at temperature 1 from its whole distribution.

    Args:
        model: the base model.
        start: the token that each begins with; it is not drawn.
        count: texts.
        length: tokens of each, with the first, at most.
        seed: of the draws.
        end: token after which a text ends; None: none does.

    Returns:
        Token ids of at least two tokens each. The same on one machine with one seed, dtype and number of threads.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [[start] for _ in range(count)]
    going = list(range(count))
    cache = None
    ids = torch.full((count, 1), start, dtype=torch.long)
    model.eval()
    with torch.no_grad():
        for _ in range(length - 1):
            out = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            # Drawn on the CPU, whose generator is the same on every machine.
            drawn = torch.multinomial(out.logits[:, -1].float().softmax(-1).cpu(), 1, generator=generator)
            for index in going:
                texts[index].append(int(drawn[index]))
            going = [index for index in going if end is None or texts[index][-1] != end]
            if not going:
                break
            ids = drawn
    return texts


def reference(model: Any, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The base model's side: for each text [tokens - 1, V] float32 on the CPU."""
    found = {index: predicted.cpu() for index, predicted in log_probabilities(model, texts, _places(texts))}
    return [found[index] for index in range(len(texts))]


def measure_drift(model: Any, texts: Sequence[Sequence[int]], base: Reference) -> Sums:
    """KL(base || tuned) summed over the tokens of each text, nats, over the whole vocabulary at each token.

    Args:
        model: the tuned model.
        texts: of :func:`sample`.
        base: what :func:`reference` gave for each.
    """
    nats = [0.0] * len(texts)
    for index, tuned in log_probabilities(model, texts, _places(texts)):
        there = base(index).to(tuned.device)
        nats[index] = ((there - tuned) * there.exp()).sum(-1).double().sum().item()
    return Sums(tuple(nats), tuple(len(text) - 1 for text in texts))


def _places(texts: Sequence[Sequence[int]]) -> list[range]:
    return [range(len(text) - 1) for text in texts]
