"""`nemo-eaft plan`: what it prints, what it refuses, and the table in the README."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft.cli import main
from nemo_eaft.compose import shipped
from nemo_eaft.plan import command
from nemo_eaft.plan.shape import shipped_models
from tests.plan import readme_table

QWEN_32B = "Qwen/Qwen2.5-32B-Instruct"
EIGHT = ("trainer.gpus_per_node=8", "parallel.tensor=8", "parallel.sequence=true")
# A file of conf/ whose model is written to a folder first, by `make demo`: the model it writes.
WRITTEN = {"demo": "model.hf=HuggingFaceTB/SmolLM2-135M-Instruct"}


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What `nemo-eaft plan --json` gives, alone on stdout."""
    assert main(["plan", *words, "--json"]) == 0
    mapping: dict[str, Any] = json.loads(capsys.readouterr().out)
    return mapping


def test_json_holds_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "qwen3-0.6b", f"model.hf={QWEN_32B}", *EIGHT, "trainer.num_nodes=2", "parallel.pipeline=2")
    assert said["parameters"] == 32_763_876_352
    assert type(said["parameters"]) is int
    assert (said["world_size"], said["data_parallel"]) == (16, 1)
    assert said["layout"] == {
        "num_nodes": 2,
        "gpus_per_node": 8,
        "tensor": 8,
        "pipeline": 2,
        "virtual_pipeline": None,
        "last_stage_layers": None,
        "context": 1,
        "expert": 1,
        "sequence": True,
        "data_parallel": 1,
    }
    assert said["batch"] == {
        "global_batch_size": 128,
        "micro_batch_size": 1,
        "micro_batches": 128,
        "sequence_length": 2048,
        "tokens_per_step": 262144,
    }
    memory = said["memory_per_gpu_gb"]
    assert list(memory) == ["weights", "gradients", "optimizer", "activations", "loss", "overhead", "total"]
    assert memory["total"] == pytest.approx(sum(memory.values()) - memory["total"], abs=1e-5)
    assert memory == said["stages"][said["fullest_stage"]]["memory_gb"]
    assert memory["total"] == max(stage["memory_gb"]["total"] for stage in said["stages"])
    assert [stage["layers"] for stage in said["stages"]] == [32, 32]
    norms = sum(stage["parameters_by_part"]["norms"] for stage in said["stages"])
    assert 8 * (sum(stage["parameters"] for stage in said["stages"]) - norms) + norms == said["parameters"]
    assert said["verdict"] == "fits"
    assert said["nearest_that_fit"] == []
    assert set(said["activations_by_recompute_gb"]) == {"none", "selective", "full"}
    assert set(said["loss_by_path_gb"]) == {"stock_unfused", "stock_fused", "eaft_unfused", "eaft_fused_linear"}
    assert said["loss_collectives_bytes_per_micro_batch"] == {"all_gather_records": 2048 * 23 * 4}
    seconds = said["step_seconds_assumed"]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
    assert said["tokens_per_hour_assumed"] == pytest.approx(262144 / seconds["total"] * 3600, rel=1e-6)
    assert said["checkpoint_gb"] == pytest.approx(14 * 32.763876352, abs=1e-6)


def test_what_does_not_fit_comes_with_layouts_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "qwen3-0.6b", f"model.hf={QWEN_32B}", *EIGHT)
    assert said["verdict"] == "does not fit"
    assert said["nearest_that_fit"]
    for other in said["nearest_that_fit"]:
        again = planned(capsys, "qwen3-0.6b", f"model.hf={QWEN_32B}", *other["overrides"])
        assert again["verdict"] == "fits"
        assert again["memory_per_gpu_gb"]["total"] == other["memory_per_gpu_gb"]


def test_options_change_what_they_name(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("qwen3-0.6b", f"model.hf={QWEN_32B}", *EIGHT, "parallel.pipeline=1")
    usual = planned(capsys, *words)
    assert planned(capsys, *words, "--gpu-memory-gb", "141")["verdict"] == "fits"
    assert planned(capsys, *words, "--attention", "unfused")["attention"] == "unfused"
    half = planned(capsys, *words, "--mfu", "0.25")
    assert half["step_seconds_assumed"]["compute"] == pytest.approx(2 * usual["step_seconds_assumed"]["compute"])
    # Settings may follow an option, and --model is model.hf.
    late = planned(capsys, "--model", QWEN_32B, "qwen3-0.6b", "--mfu", "0.5", *words[2:])
    assert late == usual


def test_search(capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "--gpus", "16", "--model", QWEN_32B, "trainer.seq_length=4096")
    best, layouts = said["best"], said["layouts"]
    assert best["batch"]["sequence_length"] == 4096
    assert (best["layout"], best["verdict"]) == (layouts[0]["layout"], layouts[0]["verdict"])
    assert best["verdict"] == "fits"
    assert all(one["layout"]["num_nodes"] * one["layout"]["gpus_per_node"] == 16 for one in layouts)
    # With a CONF, its settings.
    short = planned(capsys, "qwen3-0.6b", "--gpus", "2")
    assert (short["best"]["model"], short["best"]["world_size"]) == ("Qwen/Qwen3-0.6B", 2)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen3-0.6b", f"model.hf={QWEN_32B}", *EIGHT]) == 0
    said = capsys.readouterr().out
    for text in ("32,763,876,352 parameters", "TP 8 x PP 1", "does not fit", "nearest layouts that fit", "assumed"):
        assert text in said
    assert main(["plan", "--gpus", "8", "--model", "Qwen/Qwen3-8B"]) == 0
    assert "layouts of 8 GPUs, best first" in capsys.readouterr().out


@pytest.mark.parametrize("conf", shipped())
def test_every_file_of_conf_is_planned(conf: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [WRITTEN[conf]] if conf in WRITTEN else []
    said = planned(capsys, conf, *words)
    assert said["parameters"] > 1e8
    if said["gpu_memory_gb"] == 80:
        assert said["verdict"] == "fits", f"{conf}: {said['memory_per_gpu_gb']} GB"


@pytest.mark.parametrize("name", shipped_models())
def test_every_shipped_model_has_a_layout(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "--gpus", "8", "--model", name)["layouts"]


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "plan needs a CONF, or --gpus N with --model NAME"),
        (("one", "two"), "plan takes one CONF, got one and two"),
        (("nowhere",), "nowhere"),
        (("qwen3-0.6b", "parallel.tensor=3"), "must be a multiple of parallel.tensor=3"),
        (("qwen3-0.6b", "trainer.gpus_per_node=16", "parallel.tensor=16"), "key-value heads of Qwen/Qwen3-0.6B"),
        (("qwen3-0.6b", "trainer.gpus_per_node=5", "parallel.pipeline=5"), "must divide the 28 layers"),
        (("qwen3-0.6b", "trainer.gpus_per_node=2", "parallel.expert=2"), "has no experts: allowed is 1"),
        (("qwen3-0.6b", "trainer.global_batch_size=3", "trainer.gpus_per_node=2"), "trainer.global_batch_size=3"),
        (("qwen3-0.6b", "trainer.sequence=1"), "unknown key trainer.sequence"),
        (("qwen3-0.6b", "model.hf=nobody/nothing"), "its sizes are not shipped"),
        (("demo", "model.hf=/nowhere"), "there is no folder /nowhere"),
        (("qwen3-0.6b", "--mfu", "2"), "--mfu=2.0 must be at most 1"),
        (("qwen3-0.6b", "--gpu-memory-gb", "-1"), "--gpu-memory-gb=-1.0 must be a finite number above 0"),
        (("--gpus", "12", "--model", "Qwen/Qwen3-8B"), "--gpus=12 must be 1 to 8, or a multiple of 8"),
        (("--gpus", "0", "--model", "Qwen/Qwen3-8B"), "--gpus=0 must be 1 to 8"),
        (("--gpus", "8"), "--gpus=8 needs --model NAME or a CONF"),
        (
            ("--gpus", "4096", "--model", "Qwen/Qwen3-0.6B", "trainer.global_batch_size=1"),
            "raise trainer.global_batch_size",
        ),
    ],
)
def test_wrong_input_is_code_2_and_one_message(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_a_model_of_too_wide_a_layout_is_refused_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 90,
        "vocab_size": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "qwen3-0.6b", f"model.hf={tmp_path}", "trainer.gpus_per_node=4", "parallel.tensor=4"]) == 2
    assert "parallel.tensor=4 must divide the width 90 of the feed-forward layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("--gpus", "8", "--model", "Qwen/Qwen3-8B", "trainer.seq_length=65536"),
        # Does not fit: other layouts are looked for.
        ("qwen3-8b", "trainer.seq_length=65536", "--gpu-memory-gb", "24"),
    ],
)
def test_a_warning_is_given_once(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert main(["plan", *words]) == 0
    told = [str(warning.message) for warning in given] + capsys.readouterr().err.splitlines()
    assert len([line for line in told if "trainer.seq_length=65536 is longer than the 40960 positions" in line]) == 1


def test_a_rehearsal_is_refused_at_once_where_transformer_engine_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in NVIDIA's images; found, not imported."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["plan", "qwen3-0.6b", "--rehearse"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1
    assert "--rehearse: Transformer Engine is installed here" in said.err


@pytest.mark.parametrize("name, title", [("nemo", "NeMo"), ("megatron.core", "Megatron-Core")])
def test_a_rehearsal_is_refused_at_once_where_nemo_is_not(
    name: str, title: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda other: None if other == name else found(other))
    assert main(["plan", "qwen3-0.6b", "--rehearse"]) == 2
    assert f"--rehearse: {title} is not installed" in capsys.readouterr().err


def test_the_plan_is_shown_before_a_rehearsal_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("the rehearsal failed")

    monkeypatch.setattr(command, "check_environment", lambda: None)
    monkeypatch.setattr(command, "rehearse", breaks)
    with pytest.raises(RuntimeError, match="the rehearsal failed"):
        main(["plan", "qwen3-0.6b", "--rehearse"])
    assert "596,049,920 parameters" in capsys.readouterr().out


def test_planning_imports_neither_torch_nor_nemo() -> None:
    """It runs on a laptop, in well under a second of its own."""
    code = (
        "import sys; from nemo_eaft.cli import main; code = main(['plan', 'qwen3-0.6b', '--json']); "
        "heavy = {'torch', 'nemo', 'megatron', 'transformers', 'lightning'} & set(sys.modules); "
        "print(heavy, file=sys.stderr); sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def test_readme_has_the_current_table() -> None:
    readme = readme_table.README.read_text(encoding="utf-8")
    assert readme == readme_table.expected(readme), "run python -m tests.plan.readme_table"
