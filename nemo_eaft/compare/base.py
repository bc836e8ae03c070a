"""The base model's side, made once: the texts that it writes, its predictions of them, its own measures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_eaft.atomic import replacing
from nemo_eaft.compare.cache import digest
from nemo_eaft.compare.drift import Reference, reference, sample


@dataclass(frozen=True)
class Samples:
    """Texts of the base model, and what they depend on."""

    count: int
    length: int
    seed: int


def texts_of_base(
    folder: Path, model: Any, tokenizer: Any, wanted: Samples, identity: dict[str, Any]
) -> tuple[list[list[int]], Reference]:
    """The base model's texts and its log-probabilities of them, from ``folder`` where an earlier call left them.

    Args:
        folder: for both files. The log-probabilities take 4 bytes a token and entry of the vocabulary.
        model: without arguments, gives the base model; called only where something is missing.
        tokenizer: whose beginning token (end token, where there is none) every text starts with.
        wanted: how many, how long, which seed.
        identity: plain values of the weights, dtype and device.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    key = digest([identity, wanted.count, wanted.length, wanted.seed, start, tokenizer.eos_token_id])[:24]
    texts_file, scores_file = folder / f"samples-{key}.json", folder / f"samples-{key}.npz"
    if not texts_file.is_file() or not scores_file.is_file():
        base = model()
        texts = sample(base, start, wanted.count, wanted.length, wanted.seed, tokenizer.eos_token_id)
        scores = {str(number): each.numpy() for number, each in enumerate(reference(base, texts))}
        with replacing(scores_file) as temporary, open(temporary, "wb") as file:
            np.savez(file, **scores)
        with replacing(texts_file) as temporary:
            temporary.write_text(json.dumps(texts) + "\n", encoding="utf-8")
    kept = np.load(scores_file, allow_pickle=False)  # reads an array when it is asked for

    def read(number: int) -> Tensor:
        return torch.from_numpy(kept[str(number)])

    return json.loads(texts_file.read_text(encoding="utf-8")), read
