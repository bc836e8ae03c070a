"""What the base model itself brings in: facts that it surely knows, texts that it writes, its answers to questions.

Made once and kept beside the results, so that every run, whenever and wherever it is made, has the same rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.forgetting import design
from benchmarks.forgetting.facts import CAPITALS, answer, question
from benchmarks.forgetting.results import WrongInput
from nemo_eaft import EAFTConfig, eaft_loss
from nemo_eaft.atomic import replacing
from nemo_eaft.compare.drift import sample
from nemo_eaft.compare.forward import log_probabilities
from nemo_eaft.compare.probe import answer_scores, to_question

FILE = "inputs.json"
_ASKED = 96  # questions for the setting `format`
_ANSWER_TOKENS = 40
_BATCH = 16


@dataclass(frozen=True)
class Inputs:
    """All that depends on the base model's own predictions."""

    known: dict[str, float]
    """Country -> probability that the base model gives its capital, for those above ``design.CERTAIN``."""
    entropy: dict[str, float]
    """The same countries -> its entropy, by the normaliser, where the name of the capital begins."""
    asked: int
    """Countries that it was asked about."""
    samples: list[list[int]]
    """Texts that it writes, for the drift."""
    answers: dict[str, str]
    """Question -> the first sentence of its greedy answer, for the setting ``format``."""


def split(inputs: Inputs) -> tuple[list[str], list[str]]:
    """Countries whose capitals are contradicted in training, all of them surely known, and known ones that are only
    asked about afterwards; by the hash of the name, so that those left over are not the less sure ones."""
    ordered = sorted(inputs.known, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    sure = [name for name in ordered if inputs.entropy[name] < design.SURE]
    contradicted = sure[: design.CONTRADICTED]
    asked = [name for name in ordered if name not in contradicted]
    return sorted(contradicted), sorted(asked[: design.PROBED])


def beginning(tokenizer: Any, country: str) -> str:
    """The conversation up to the city."""
    messages = [{"role": "user", "content": question(country)}]
    asked = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return asked + answer(country, "").removesuffix(" .")


def find_inputs(folder: Path, model: Any, tokenizer: Any, questions: Sequence[str]) -> Inputs:
    """Read them, or make them and keep them.

    Args:
        folder: of the results.
        model: without arguments, gives the base model; called only where nothing is kept.
        tokenizer: of the base model.
        questions: of which the base model answers some.

    Raises:
        WrongInput: it knows too little.
    """
    path = folder / FILE
    if path.is_file():
        return Inputs(**json.loads(path.read_text(encoding="utf-8")))
    base = model()
    end = tokenizer.eos_token_id
    samples = sample(base, tokenizer.bos_token_id, design.SAMPLES, design.SAMPLE_TOKENS, 0, end)
    known = _known(base, tokenizer)
    entropy = _entropy(base, tokenizer, known)
    sure = sum(value < design.SURE for value in entropy.values())
    if sure < design.CONTRADICTED:
        raise WrongInput(f"the base model surely knows {sure} capitals, {design.CONTRADICTED} are needed: {entropy}")
    found = Inputs(known, entropy, len(CAPITALS), samples, _answers(base, tokenizer, questions[:_ASKED]))
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def _known(model: Any, tokenizer: Any) -> dict[str, float]:
    cities = list(CAPITALS.values())
    asked = [
        # A question needs a second answer; it is not looked at.
        to_question(
            {
                "question": beginning(tokenizer, country),
                "answers": [f" {city}", f" {cities[number - 1]}"],
                "right": 0,
            },
            tokenizer,
            "full",
        )
        for number, (country, city) in enumerate(CAPITALS.items())
    ]
    scores = answer_scores(model, asked, "full")
    probabilities = {
        country: float(torch.tensor(each[0]).exp()) for country, each in zip(CAPITALS, scores, strict=True)
    }
    return {country: round(p, 4) for country, p in probabilities.items() if p > design.CERTAIN}


def _entropy(model: Any, tokenizer: Any, countries: Collection[str]) -> dict[str, float]:
    rows = [tokenizer(beginning(tokenizer, each), add_special_tokens=False)["input_ids"] for each in countries]
    predicted = dict(log_probabilities(model, rows, [[len(row) - 1] for row in rows]))
    config = EAFTConfig()
    found = {}
    for number, country in enumerate(countries):
        logits = predicted[number]
        entropy = eaft_loss(logits, logits.argmax(-1), config).entropy
        found[country] = round(float(entropy) / config.entropy_normalizer(logits.shape[-1]), 4)
    return found


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, questions: Sequence[str]) -> dict[str, str]:
    """First sentences of greedy answers; a question is left out whose answer does not end one in time."""
    found = {}
    for start in range(0, len(questions), _BATCH):
        batch = list(questions[start : start + _BATCH])
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": each}], tokenize=False, add_generation_prompt=True
            )
            for each in batch
        ]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        written = model.generate(ids, attention_mask=mask, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
        for each, answered in zip(batch, written[:, ids.shape[1] :], strict=True):
            sentence = re.match(
                r".*?[.!?](?=\s)", tokenizer.decode(answered, skip_special_tokens=True).strip(), re.DOTALL
            )
            if sentence:
                found[each] = sentence[0]
    return found
