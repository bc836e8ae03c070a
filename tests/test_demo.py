"""What the demo may delete, and what it calls the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_eaft import demo
from nemo_eaft.compose import compose, save


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "ready.json").write_text("{}")
    return folder


def test_an_earlier_demo_is_replaced(run_dir: Path) -> None:
    save(compose("demo", ["trainer.max_steps=3", "loss=sft"]), run_dir / "config.yaml")
    demo._start_afresh(run_dir)
    assert not run_dir.exists()
    demo._start_afresh(run_dir)


@pytest.mark.parametrize("override", ["model.hf=mine", "data.train=mine.jsonl"])
def test_another_run_is_not_deleted(run_dir: Path, override: str) -> None:
    save(compose("demo", [override]), run_dir / "config.yaml")
    with pytest.raises(ValueError, match="which is not the demo's and would be deleted"):
        demo._start_afresh(run_dir)
    assert (run_dir / "checkpoints").is_dir()


@pytest.mark.parametrize("text", [None, "", "- [", "model: {hf: x}"])
def test_a_run_of_nobody_is_not_deleted(run_dir: Path, text: str | None) -> None:
    if text is not None:
        (run_dir / "config.yaml").write_text(text)
    with pytest.raises(ValueError):
        demo._start_afresh(run_dir)
    assert (run_dir / "checkpoints").is_dir()


def test_what_a_run_did_not_write_is_not_deleted(run_dir: Path) -> None:
    save(compose("demo"), run_dir / "config.yaml")
    (run_dir / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.txt"):
        demo._start_afresh(run_dir)
    (run_dir / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        demo._start_afresh(run_dir / "file")


def test_rows_of_a_demo_that_did_not_start_stay(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "error.json").write_text("{}")
    demo._start_afresh(tmp_path)
    assert (tmp_path / "data").is_dir()


def test_the_summary_names_the_model_that_was_trained() -> None:
    assert demo.model_name(compose("demo")) == "SmolLM2-135M-Instruct"
    assert demo.model_name(compose("demo", ["model.hf=org/other"])) == "org/other"
