"""What the numbers must be: from Hugging Face logits, in float64, by formulas written here and nowhere else."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.nemo.models import TOKENS

Answer = tuple[int, ...]


@dataclass(frozen=True)
class Sums:
    """Sums over the answer tokens of a row."""

    loss: float
    cross_entropy: float
    entropy: float
    weight: float
    conflicts: int
    tokens: int


def read_rows(path: Path) -> dict[Answer, list[int]]:
    """Tokens of each row by its answer, end-of-sequence included: the word t7 is the token 7."""
    rows = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        prompt, answer = ([int(word[1:]) for word in values[key].split()] for key in ("input", "output"))
        answer.append(TOKENS - 1)
        rows[tuple(answer)] = prompt + answer
    return rows


def load_model(folder: Path) -> torch.nn.Module:
    """The Hugging Face model in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def answer_logits(model: torch.nn.Module, tokens: list[int], answer: Answer) -> torch.Tensor:
    """[answer tokens, V], the logits that predict the answer. One row at a time, so there is no padding."""
    logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0]
    return logits[len(tokens) - len(answer) - 1 :]


def token_values(
    logits: torch.Tensor, answer: Answer, alpha: float = 1.0, top_k: int = 20
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, entropy of the top-k and weight of each token (arXiv 2601.02151)."""
    p = torch.softmax(logits, dim=-1)
    cross_entropy = -torch.log(p[torch.arange(len(answer)), torch.tensor(answer)])
    with torch.no_grad():
        top = torch.sort(p, dim=-1, descending=True).values[:, :top_k]
        q = top / top.sum(dim=-1, keepdim=True)
        entropy = -(q * torch.log(q)).sum(dim=-1)
    return cross_entropy, entropy, (entropy / math.log(top_k)) ** alpha


def row_sums(model: torch.nn.Module, rows: dict[Answer, list[int]], alpha: float = 1.0) -> dict[Answer, Sums]:
    """Sums of every row, by its answer."""
    found = {}
    with torch.no_grad():
        for answer, tokens in rows.items():
            cross_entropy, entropy, weight = token_values(answer_logits(model, tokens, answer), answer, alpha)
            conflict = (torch.exp(-cross_entropy) < 0.1) & (entropy / math.log(20) < 0.2)
            found[answer] = Sums(
                loss=float((weight * cross_entropy).sum()),
                cross_entropy=float(cross_entropy.sum()),
                entropy=float(entropy.sum()),
                weight=float(weight.sum()),
                conflicts=int(conflict.sum()),
                tokens=len(answer),
            )
    return found


def means(rows: Iterable[Sums]) -> dict[str, float]:
    """Of a global batch: every sum divided once by the tokens, under the names of metrics.jsonl."""
    rows = list(rows)
    tokens = sum(row.tokens for row in rows)
    names = ("loss", "cross_entropy", "entropy", "weight")
    found = {name: sum(getattr(row, name) for row in rows) / tokens for name in names}
    return found | {"conflict_fraction": sum(row.conflicts for row in rows) / tokens, "tokens": tokens}


def mean_of_means(micro_batches: Sequence[Sequence[Sums]]) -> float:
    """The wrong loss: the mean over micro-batches of each one's mean."""
    return sum(means(rows)["loss"] for rows in micro_batches) / len(micro_batches)


def gradient_norm(model: torch.nn.Module, rows: dict[Answer, list[int]], alpha: float = 1.0) -> float:
    """Norm of the gradient of the rows' loss over all parameters, tied ones once."""
    model.zero_grad()
    total = sum(len(answer) for answer in rows)
    for answer, tokens in rows.items():
        cross_entropy, _, weight = token_values(answer_logits(model, tokens, answer), answer, alpha)
        ((weight * cross_entropy).sum() / total).backward()
    return math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))
