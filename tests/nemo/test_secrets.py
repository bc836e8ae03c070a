"""A training writes no secret of its environment anywhere, and converts models without running their code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.nemo import jobs
from tests.nemo.conftest import Workshop
from tests.nemo.ranks import run_ranks
from tests.test_hostile import asking_for_code

SECRETS = {name: f"hush-{name.lower()}-hush" for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")}


def set_secrets() -> None:
    os.environ.update(SECRETS)


def train_with_secrets(plan: jobs.Plan) -> bytes:
    """What the rank printed."""
    jobs.train(plan)
    return Path(os.readlink("/proc/self/fd/1")).read_bytes()


def test_no_secret_is_written(workshop: Workshop) -> None:
    settings = workshop.settings("secrets", "llama", trainer={"max_steps": 2, "save_every": 2, "val_every": 2})
    plan = jobs.Plan(settings, workshop.nemo("llama"), save=True, wrong=set_secrets)
    (printed,) = run_ranks(train_with_secrets, 1, plan)
    files = [path for path in Path(settings.run.dir).rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"metrics.jsonl", "eaft.json", "report.png", "common.pt", "model.yaml"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert b"EAFT step 2/2" in printed
    for secret in SECRETS.values():
        assert secret.encode() not in printed
        for path in files:
            assert secret.encode() not in path.read_bytes(), path


def test_a_conversion_runs_no_code_of_the_model(workshop: Workshop, tmp_path: Path) -> None:
    source = shutil.copytree(workshop.hf("llama"), tmp_path / "hf")
    mark = tmp_path / "mark"
    asking_for_code(source, mark)
    run_ranks(jobs.to_nemo, 1, source, tmp_path / "nemo")
    run_ranks(jobs.to_hf, 1, tmp_path / "nemo", tmp_path / "back", tmp_path / "nemo" / "hf")
    assert (tmp_path / "back" / "config.json").is_file()
    assert not mark.exists()
