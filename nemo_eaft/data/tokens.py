"""Token ids of a row and which of them are the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nemo_eaft.data.rows import RowError


@dataclass(frozen=True)
class Tokens:
    """One tokenized row."""

    input_ids: list[int]
    """The whole sequence."""
    answers: list[tuple[int, int]]
    """Half-open ranges of ``input_ids`` that the model must produce: the only tokens in the loss."""

    @property
    def loss_mask(self) -> list[int]:
        """1 where the token is in the loss, else 0; as long as ``input_ids``, not shifted."""
        mask = [0] * len(self.input_ids)
        for start, end in self.answers:
            mask[start:end] = [1] * (end - start)
        return mask


def tokenize_pair(tokenizer: Any, template: str, values: dict[str, Any]) -> Tokens:
    """Tokenize an ``input``/``output`` row as NeMo 2.7.3 does (``GPTSFTDataset`` in
    ``llm/gpt/data/core.py``).

    NeMo tokenizes the rows itself while training; this exists to know their lengths beforehand, for NeMo
    shortens a long prompt without a word, and to pack them. NeMo cuts the template before each placeholder
    (spaces go with the placeholder), tokenizes the pieces one by one without special tokens, and appends the
    end-of-sequence token.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: holds ``{input}`` and ends with ``{output}``.
        values: the row.

    Raises:
        RowError: no text, or no answer.
    """
    texts = {}
    for key in ("input", "output"):
        value = values.get(key)
        if not isinstance(value, str):
            raise RowError(f"{key!r} must be text, got {type(value).__name__}" if key in values else f"no {key!r}")
        texts[key] = value.strip(" ")
    if not texts["output"].strip():
        raise RowError("'output' is empty: there is no answer to learn")
    space_sensitive = tokenizer.tokenize("x y") != tokenizer.tokenize("x") + tokenizer.tokenize("y")
    pieces = []
    for part in filter(None, re.split(r"( *?{.+?})", template)):
        if not space_sensitive and part[0] == " ":
            part = part[1:]
        bare = part.lstrip(" ")
        text = texts.get(bare[1:-1], bare) if bare.startswith("{") else bare
        pieces.append(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(" " * (len(part) - len(bare)) + text)))
    prompt = [token for piece in pieces[:-1] for token in piece]
    input_ids = [*prompt, *pieces[-1], tokenizer.eos_token_id]
    return Tokens(input_ids, [(len(prompt), len(input_ids))])
