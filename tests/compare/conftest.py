"""Runs from one tiny base model. What trains and exports them stands in for NeMo: here it only has to leave what they
leave (tests/nemo/test_compare.py has the real ones)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_eaft import compose
from nemo_eaft.compare import command
from nemo_eaft.compare.measure import load_model
from nemo_eaft.data import prepare
from nemo_eaft.integrity import write_sums
from nemo_eaft.run_dir import CONFIG
from tests.compare.models import pair
from tests.nemo.models import save_tokenizer, write_rows


@dataclass
class Bench:
    """A base model, rows, and what was asked of the other commands."""

    folder: Path
    base: Any
    asked: list[list[str]] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def conf(self, name: str, **loss: Any) -> str:
        """A configuration with a run.dir of its own."""
        path = self.folder / f"{name}.yaml"
        path.write_text(
            f"model: {{hf: '{self.folder}/base', imported: '{self.folder}/imported'}}\n"
            f"data: {{train: '{self.folder}/training.jsonl', validation: '{self.folder}/validation.jsonl'}}\n"
            f"loss: {json.dumps(loss)}\n"
            "trainer: {max_steps: 4, save_every: 2, keep_checkpoints: -1, global_batch_size: 4, seq_length: 64}\n"
            f"run: {{dir: '{self.folder}/runs/{name}', backend: cpu}}\n"
        )
        return str(path)

    def command(self, *words: str) -> int:
        """In place of ``train`` and ``export``."""
        from transformers import AutoTokenizer

        self.asked.append([*words])
        if words[0] == "train":
            settings = compose.compose(words[1], words[2:])
            run_dir = Path(settings.run.dir)
            if not (run_dir / CONFIG).is_file():
                prepare(settings, AutoTokenizer.from_pretrained(self.folder / "base"))
                compose.save(settings, run_dir / CONFIG)
                for step in (1, 3):
                    self.checkpoint(run_dir / "checkpoints" / f"step={step}")
            return 0
        assert words[0] == "export"
        self.model(float((Path(words[1]) / "weights" / "w").read_text().split()[0])).save_pretrained(words[2])
        return 0

    def checkpoint(self, path: Path) -> Path:
        """How far it is from the base model stands in its one file."""
        (path / "weights").mkdir(parents=True)
        (path / "context").mkdir()
        (path / "weights" / "w").write_text(f"{0.02 * int(path.name[-1])} of {path}")
        write_sums(path)
        return path

    def model(self, distance: float) -> Any:
        import copy

        model = copy.deepcopy(self.base)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=distance)
        return model

    def likeliest(self, question: str, answers: list[str]) -> int:
        """Which answer, of one token, the base model gives the question."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder / "base")
        ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        assert all(len(each) == 1 for each in ids)
        with torch.no_grad():
            logits = self.base(torch.tensor([tokenizer(question)["input_ids"]])).logits[0, -1]
        return max(range(len(ids)), key=lambda number: logits[ids[number][0]].item())

    def exported(self, name: str, distance: float) -> str:
        folder = self.folder / name
        self.model(distance).save_pretrained(folder)
        save_tokenizer(folder)
        return str(folder)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    base, _ = pair()
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    for part, count, seed in (("training", 8, 1), ("validation", 12, 2)):
        write_rows(tmp_path / f"{part}.jsonl", count, seed)
    (tmp_path / "text.txt").write_text(" ".join(f"t{number * 7 % 200}" for number in range(64)))
    questions = [{"question": f"t{n}", "answers": [f"t{n + 20}", f"t{n + 40}"], "right": n % 2} for n in range(6)]
    (tmp_path / "probe.jsonl").write_text("\n".join(map(json.dumps, questions)))
    bench = Bench(tmp_path, base)
    monkeypatch.setattr(command, "_command", bench.command)
    return bench


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders of the models that were loaded to be measured."""
    loaded: list[Path] = []

    def record(folder: Path, *arguments: Any) -> Any:
        loaded.append(folder)
        return load_model(folder, *arguments)

    monkeypatch.setattr(command, "load_model", record)
    return loaded
