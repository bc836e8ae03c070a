"""The rows of each setting: what is trained on, what is held out, and which tokens are planted conflicts.

========================= =============================================================================================
``bfcl``                  function calling as it is (``nemo_eaft.demo_data``); nothing is planted
``conflicts-10|30|50``    the same, but 10, 30 or 50 % of the rows ask for the capital of a country that the base model
                          surely knows, and answer with the capital of another one. Held out are clean rows
``format``                questions of the same data without functions, answered by the first sentence of the base
                          model's own greedy answer in capital letters: what it says is not contradicted, but how it
                          writes, and where it stops
========================= =============================================================================================
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.forgetting import design
from benchmarks.forgetting.facts import CAPITALS, answer, question
from benchmarks.forgetting.inputs import Inputs, beginning, split
from nemo_eaft.compare.probe import Question, to_question
from nemo_eaft.data import Tokens, tokenize_chat

KEPT, OFFERED = 2, 2
"""Wrong answers of a question: cities of other countries that are asked about, and planted ones."""


@dataclass(frozen=True)
class Row:
    """A row for training."""

    tokens: Tokens
    planted: tuple[int, ...] = ()
    """Positions of tokens that contradict what the model surely knows."""


@dataclass(frozen=True)
class Pools:
    """Rows of a setting."""

    clean: list[Row]
    conflicts: list[Row]
    share: float
    """Of the rows of a run, those that are conflicts."""
    held_out: list[Tokens]

    def order(self, count: int, seed: int) -> list[Row]:
        """The rows of a run: clean ones and conflicts, each in passes of random order over all of their kind."""
        generator = random.Random(seed)
        planted = _planted(self.share, count)
        rows = _passes(self.conflicts, planted, generator) + _passes(self.clean, count - planted, generator)
        generator.shuffle(rows)
        return rows


def planted_rows(setting: str, count: int) -> int:
    """Of so many rows of a run, those that are conflicts."""
    return _planted(_share(setting), count)


def _planted(share: float, count: int) -> int:
    return round(share * count)


def _share(setting: str) -> float:
    name, _, share = setting.partition("-")
    return int(share) / 100 if name == "conflicts" else 0.0


def _passes(rows: Sequence[Row], count: int, generator: random.Random) -> list[Row]:
    assert rows or not count
    drawn: list[Row] = []
    while len(drawn) < count:
        drawn += generator.sample(rows, len(rows))
    return drawn[:count]


def user_questions(folder: Path) -> list[str]:
    """What users ask in the training rows of the demo, each once."""
    asked = [row["messages"][1]["content"] for row in _read(folder / "train.jsonl")]
    return list(dict.fromkeys(asked))


def pools(setting: str, folder: Path, tokenizer: Any, inputs: Inputs) -> Pools:
    """The rows of a setting.

    folder: where ``nemo_eaft.demo_data`` has written its rows.
    """
    if setting == "format":
        loud = [
            Row(tokenize_chat(tokenizer, {"messages": _turns(asked, answered.upper())}))
            for asked, answered in inputs.answers.items()
        ]
        return Pools(loud[design.HELD_OUT :], [], 0.0, [row.tokens for row in loud[: design.HELD_OUT]])
    clean = [Row(tokenize_chat(tokenizer, row)) for row in _read(folder / "train.jsonl")]
    # Some questions are asked of several functions; as two rows they would be two draws of the bootstrap.
    once = {row["messages"][1]["content"]: row for row in reversed(_read(folder / "validation.jsonl"))}
    held_out = [tokenize_chat(tokenizer, row) for row in list(once.values())[: design.HELD_OUT]]
    if setting == "bfcl":
        return Pools(clean, [], 0.0, held_out)
    return Pools(clean, conflicts(tokenizer, inputs), _share(setting), held_out)


def conflicts(tokenizer: Any, inputs: Inputs) -> list[Row]:
    """A wrong capital for each country that is contradicted: that of the next one."""
    contradicted, _ = split(inputs)
    rows = []
    for country, other in zip(contradicted, contradicted[1:] + contradicted[:1], strict=True):
        city = CAPITALS[other]
        tokens = tokenize_chat(tokenizer, {"messages": _turns(question(country), answer(country, city))})
        start = len(tokenizer(beginning(tokenizer, country), add_special_tokens=False)["input_ids"])
        stop = start + len(tokenizer(f" {city}", add_special_tokens=False)["input_ids"])
        assert tokenizer.decode(tokens.input_ids[start:stop]) == f" {city}"
        rows.append(Row(tokens, tuple(range(start, stop))))
    return rows


def probe(tokenizer: Any, inputs: Inputs) -> list[Question]:
    """Capitals of the other countries, which no run is trained on. The wrong answers are two cities of the same
    countries and two that are planted as wrong answers of others: what the model learns to say is on offer."""
    contradicted, asked = split(inputs)
    questions = []
    for number, country in enumerate(asked):
        answers = [f" {CAPITALS[country]}"]
        first = {_first(tokenizer, answers[0])}
        # Each question begins its search at another place.
        planted = contradicted[number % len(contradicted) :] + contradicted[: number % len(contradicted)]
        for others, wanted in ((asked[number + 1 :] + asked[:number], KEPT), (planted, OFFERED)):
            full = len(answers) + wanted
            for other in others:
                text = f" {CAPITALS[other]}"
                if len(answers) < full and _first(tokenizer, text) not in first:
                    answers.append(text)
                    first.add(_first(tokenizer, text))
        row = {"question": beginning(tokenizer, country), "answers": answers, "right": 0}
        questions.append(to_question(row, tokenizer, "first"))
    return questions


def _first(tokenizer: Any, text: str) -> int:
    return int(tokenizer(text, add_special_tokens=False)["input_ids"][0])


def _turns(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
