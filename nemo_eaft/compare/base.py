"""The base model's side, made once: the texts that it writes, its predictions of them, its own measures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    from safetensors import safe_open
    from safetensors.torch import save_file

    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    key = digest([identity, wanted.count, wanted.length, wanted.seed, start, tokenizer.eos_token_id])[:24]
    texts_file, scores_file = folder / f"samples-{key}.json", folder / f"samples-{key}.safetensors"
    if not texts_file.is_file() or not scores_file.is_file():
        base = model()
        texts = sample(base, start, wanted.count, wanted.length, wanted.seed, tokenizer.eos_token_id)
        scores = {str(number): each for number, each in enumerate(reference(base, texts))}
        with replacing(scores_file) as temporary:
            save_file(scores, temporary)
        with replacing(texts_file) as temporary:
            temporary.write_text(json.dumps(texts) + "\n", encoding="utf-8")
    kept = safe_open(scores_file, framework="pt")

    def read(number: int) -> Tensor:
        found: Tensor = kept.get_tensor(str(number))
        return found

    return json.loads(texts_file.read_text(encoding="utf-8")), read
