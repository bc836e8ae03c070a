"""lm-eval reads what `nemo-eaft export` writes: the command of docs/evaluate.md, with the local tasks of examples/."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data import support
from tests.nemo.recipes import Recipes

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = {"mmlu", "ifeval", "gsm8k"}
TEXT = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every lm_eval command of the page."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("lm_eval ")]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Judge:
    """Scores by the model alone, without lm-eval."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def log_probability(self, question: str, answer: str) -> float:
        asked, whole = self.tokenizer(question).input_ids, self.tokenizer(question + answer).input_ids
        scores = self.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(scores[place - 1, whole[place]]) for place in range(len(asked), len(whole)))

    @torch.no_grad()
    def answer(self, question: str) -> str:
        asked = torch.tensor([self.tokenizer(question).input_ids])
        written = self.model.generate(asked, do_sample=False, max_new_tokens=16)[0, asked.shape[1] :]
        return str(self.tokenizer.decode(written, skip_special_tokens=True)).split("\n")[0]


def test_local_tasks_give_the_scores_of_the_model(made: Recipes, tmp_path: Path) -> None:
    """Of a run at TP2 x PP2, exported."""
    exported = made.export("qwen3-32b")
    shutil.copytree(ROOT / "examples" / "evaluate", tmp_path / "examples" / "evaluate")
    files = tmp_path / "examples" / "evaluate"
    judge = Judge(exported)
    choices = read(files / "choice.jsonl")
    for number, row in enumerate(choices):
        scores = [judge.log_probability(row["question"], answer) for answer in row["answers"]]
        # Some are right and some wrong, whatever this model believes.
        row["right"] = (scores.index(max(scores)) + (number % 3 == 0)) % len(scores)
    support.write_jsonl(files / "choice.jsonl", choices)
    answers = read(files / "answer.jsonl")
    for number, row in enumerate(answers):
        if number % 4:
            row["answer"] = judge.answer(row["question"])
    support.write_jsonl(files / "answer.jsonl", answers)

    (command,) = (words for words in commands() if "--include_path" in words)
    words = [word.replace("pretrained=exported", f"pretrained={exported}") for word in command[1:]]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = (tmp_path / "evaluation").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    assert results["choice"]["acc,none"] == pytest.approx(4 / 6)
    assert results["answer"]["exact_match,none"] == pytest.approx(3 / 4)


def test_the_benchmarks_of_the_page_exist() -> None:
    """Their questions come from the hub, so they are only looked up."""
    from lm_eval import tasks
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Reading all of lm-eval's tasks takes some twenty seconds. That no example is taken for one of them is seen above:
    # the scores are those of the local files.
    folders = [Path(tasks.__file__).parent / name for name in BENCHMARKS]
    known = set(TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False).all_tasks)
    for words in commands():
        start = words.index("--tasks") + 1
        named = words[start : next(i for i in range(start, len(words)) if words[i].startswith("--"))]
        assert "--include_path" in words or (set(named) == BENCHMARKS and set(named) <= known)
    assert {"dtype", "parallelize", "think_end_token"} <= set(inspect.signature(HFLM.__init__).parameters)
