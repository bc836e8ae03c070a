"""Target quality: cross-entropy and exact match of the answers of held-out rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_eaft.compare.forward import log_probabilities
from nemo_eaft.compare.record import Measures, Sums
from nemo_eaft.data import Tokens, tokenize_pair


def read_rows(prepared: Path, tokenizer: Any, template: str, limit: int) -> list[Tokens]:
    """The first ``limit`` rows of a file that :func:`nemo_eaft.data.prepare` wrote, so that tokens and answers are
    those of the training.

    Args:
        prepared: ``run.dir/data/validation.jsonl``, or another file of its form.
        tokenizer: the Hugging Face tokenizer of the run; rows of text are tokenized by it.
        template: ``data.prompt_template``, for rows of text.
        limit: rows.
    """
    rows = []
    for line in prepared.read_text(encoding="utf-8").splitlines()[:limit]:
        row = json.loads(line)
        if "input_ids" in row:
            rows.append(Tokens(row["input_ids"], [(start, end) for start, end in row["answers"]]))
        else:
            rows.append(tokenize_pair(tokenizer, template, row))
    return rows


def measure_target(model: Any, rows: Sequence[Tokens]) -> Measures:
    """``target``: cross-entropy of every answer token, nats; ``exact``: whether the answer is what the model writes.

    Greedy decoding writes an answer to its last token, the end token included, exactly if each of its tokens is the
    most likely one after the true tokens before it: the first that is not is where it would go another way. So no text
    is generated. Where a row has several answers, each is judged after the true ones before it, and all must match.
    """
    places = [[place - 1 for start, end in row.answers for place in range(max(start, 1), end)] for row in rows]
    nats, right = [0.0] * len(rows), [0.0] * len(rows)
    for index, predicted in log_probabilities(model, [row.input_ids for row in rows], places):
        labels = torch.tensor([rows[index].input_ids[place + 1] for place in places[index]], device=predicted.device)
        nats[index] = -predicted.gather(1, labels[:, None]).double().sum().item()
        right[index] = float((predicted.argmax(-1) == labels).all().item())
    counts = tuple(len(each) for each in places)
    return {"target": Sums(tuple(nats), counts), "exact": Sums(tuple(right), (1,) * len(rows))}
