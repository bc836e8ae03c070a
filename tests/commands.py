"""A run that the tests of the command line start, and what stands in for its ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import cli, launch
from nemo_eaft.convert import MANIFEST
from nemo_eaft.integrity import write_sums
from tests.data.support import chat, make_tokenizer, write_jsonl


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny Llama's configuration and tokenizer, rows, and an import that lies ready."""
    from transformers import LlamaConfig

    model = tmp_path / "model"
    config = LlamaConfig(
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, vocab_size=512
    )
    config.save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    rows = [{"messages": chat(f"Question {n}?", f"Answer {n}.")} for n in range(4)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", rows)
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / MANIFEST).write_text("{}")
    write_sums(tmp_path / "imported")
    (tmp_path / "own.yaml").write_text(
        f"model: {{hf: '{model}', imported: '{tmp_path}/imported'}}\n"
        f"data: {{train: '{tmp_path}/train.jsonl', validation: '{tmp_path}/validation.jsonl'}}\n"
        "trainer: {max_steps: 2, gpus_per_node: 2, global_batch_size: 4, seq_length: 64, histogram_every: 0}\n"
        f"run: {{dir: '{tmp_path}/run', backend: cpu}}\n"
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of every launch, instead of one."""
    calls: list[list[str]] = []

    def record(settings: Any, arguments: list[str]) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(launch, "run_local", record)
    return calls


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main([*arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def make_checkpoint(path: Path, unfinished: bool = False) -> Path:
    for part in ("weights", "context"):
        (path / part).mkdir(parents=True)
    (path / "weights" / "common.pt").write_text("weights")
    if unfinished:
        path.with_name(path.name + "-unfinished").touch()
    else:
        write_sums(path)
    return path
