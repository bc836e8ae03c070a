"""Knowledge probe: questions with several answers, of which the model must find the right one more likely.

A line of the file is ``{"question": text, "answers": [text, ...], "right": number}``, as for the ``choice`` task of
``docs/evaluate.md``, or has ``"messages"`` in place of ``"question"``: turns to which the chat template adds the
beginning of an answer. An answer stands directly behind the question, so it brings its own space. Question and answer
are tokenized apart.

``full``: an answer's score is the log-probability of all of its tokens, so that long answers have a harder stand; give
answers of like length. ``first``: of its first token alone, one forward pass for a question; answers whose first tokens
are equal cannot be told apart and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor

from nemo_eaft.compare.forward import log_probabilities
from nemo_eaft.compare.record import Measures, Sums

Scoring = Literal["full", "first"]


@dataclass(frozen=True)
class Question:
    """One question, tokenized."""

    prompt: list[int]
    answers: list[list[int]]
    right: int


def read_questions(path: Path, tokenizer: Any, scoring: Scoring) -> list[Question]:
    """Read a file of questions.

    Raises:
        ValueError: naming the line.
    """
    questions = []
    try:
        # By line feeds alone: a text may hold other characters that end a line elsewhere.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                questions.append(to_question(json.loads(line), tokenizer, scoring))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def to_question(row: Any, tokenizer: Any, scoring: Scoring) -> Question:
    """Check and tokenize one row.

    Raises:
        ValueError: it is not of the form above.
    """
    if not isinstance(row, dict):
        raise ValueError("a question is an object")
    answers, right = row.get("answers"), row.get("right")
    if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(each, str) and each for each in answers):
        raise ValueError("'answers' must be two texts or more")
    if type(right) is not int or not 0 <= right < len(answers):
        raise ValueError(f"'right' must be a number from 0 to {len(answers) - 1}, got {right!r}")
    prompt = _prompt(row, tokenizer)
    ids = [list(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
    if not prompt or not all(ids):
        raise ValueError("the question or one of its answers has no token")
    if len(set(answers)) < len(answers):
        raise ValueError("two answers are equal, so that none can be the likeliest alone")
    if scoring == "first" and len({each[0] for each in ids}) < len(ids):
        raise ValueError("two answers begin with the same token: their first tokens do not tell them apart")
    return Question(prompt, ids, right)


def _prompt(row: dict[str, Any], tokenizer: Any) -> list[int]:
    if "messages" in row:
        if "question" in row:
            raise ValueError("'question' and 'messages' are both there; give one of them")
        if tokenizer.chat_template is None:
            raise ValueError("'messages' needs a tokenizer with a chat template; give 'question'")
        turns = row["messages"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("'messages' must be a list of turns, each with 'role' and 'content'")
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"the chat template cannot write 'messages': {error}") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    question = row.get("question")
    if not isinstance(question, str) or not question:
        raise ValueError("'question' must be a text, or 'messages' a list of turns")
    return list(tokenizer(question)["input_ids"])


def answer_scores(model: Any, questions: Sequence[Question], scoring: Scoring) -> list[list[float]]:
    """For each question the log-probability of each answer, nats, or of its first token."""
    if scoring == "first":
        rows = [question.prompt for question in questions]
        last = [[len(row) - 1] for row in rows]
        found = dict(log_probabilities(model, rows, last))
        return [
            [found[index][0, answer[0]].item() for answer in question.answers]
            for index, question in enumerate(questions)
        ]
    asked = [(question, answer) for question in questions for answer in question.answers]
    rows = [question.prompt + answer for question, answer in asked]
    places = [range(len(row) - len(answer) - 1, len(row) - 1) for row, (_, answer) in zip(rows, asked, strict=True)]
    sums = {index: _sum(predicted, asked[index][1]) for index, predicted in log_probabilities(model, rows, places)}
    scores = (sums[index] for index in range(len(asked)))
    return [[next(scores) for _ in question.answers] for question in questions]


def _sum(predicted: Tensor, answer: Sequence[int]) -> float:
    labels = torch.tensor(answer, device=predicted.device)
    return float(predicted.gather(1, labels[:, None]).double().sum())


def measure_probe(model: Any, questions: Sequence[Question], scoring: Scoring) -> Measures:
    """``probe``: 1 for each question whose right answer has the highest score of all, alone; else 0. ``answer``: minus
    the score of the right one, nats. The former stays as it is until another answer overtakes and says nothing more
    once one has; the latter moves with every step.
    """
    scores = answer_scores(model, questions, scoring)
    right = [
        float(all(each[question.right] > other for n, other in enumerate(each) if n != question.right))
        for question, each in zip(questions, scores, strict=True)
    ]
    nats = [-each[question.right] for question, each in zip(questions, scores, strict=True)]
    counts = (1,) * len(questions)
    return {"probe": Sums(tuple(right), counts), "answer": Sums(tuple(nats), counts)}
