"""``nemo-eaft compare``: what it takes, what it refuses before any work, what it writes, and how it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import cli
from nemo_eaft.compare import command
from nemo_eaft.compare.measure import measure
from nemo_eaft.compare.runs import find_sources, method_names
from tests.compare.conftest import Bench

SMALL = ["--device", "cpu", "--samples", "4", "--sample-tokens", "8", "--window-tokens", "16", "--draws", "20"]


def compare(bench: Bench, *words: str) -> int:
    files = ["--text", str(bench.folder / "text.txt"), "--probe", str(bench.folder / "probe.jsonl")]
    return cli.main(["compare", "--output", str(bench.output), *SMALL, *files, *words])


def report(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bench.output / "compare.json").read_text())
    return found


def test_configurations_runs_and_folders_become_one_report(
    bench: Bench, counted: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sft, eaft = bench.conf("sft", gate="stock"), bench.conf("eaft", alpha=0.5)
    assert compare(bench, sft, eaft, "trainer.seed=3") == 0
    assert [words[:3] for words in bench.asked[:2]] == [
        ["train", sft, "trainer.seed=3"],
        ["train", eaft, "trainer.seed=3"],
    ]
    found = report(bench)
    assert [(run["method"], run["seed"], run["learning_rate"]) for run in found["runs"]] == [
        ("sft", 3, 5e-6),
        ("eaft alpha=0.5", 3, 5e-6),
    ]
    places = [f"{bench.folder}/runs/{name}/checkpoints/step={step}" for name in ("sft", "eaft") for step in (1, 3)]
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoint ")]
    assert shown == [f"checkpoint {number} of 4: {place}" for number, place in enumerate(places, start=1)]
    for run in found["runs"]:
        assert [point["step"] for point in run["points"]] == [0, 2, 4]
        assert set(run["points"][0]) >= {"target", "exact", "drift", "text", "probe", "answer"}
        assert run["points"][0]["drift"] == pytest.approx(0.0, abs=1e-6)
        assert 0 < run["points"][1]["drift"] < run["points"][2]["drift"]
    assert found["matching"]["reference"] == "sft"
    page = (bench.output / "compare.md").read_text()
    assert "| base model |" in page
    assert "eaft alpha=0.5" in page
    for name in ("drift", "text", "probe", "answer"):
        assert (bench.output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![{name}.png]({name}.png)" in page
    # The samples' base, the base and four checkpoints; what was exported is not kept.
    assert len(counted) == 6
    assert not (bench.output / "exported").exists()

    # Finished runs by their folders, one with another name, and an exported folder beside them.
    before = bench.asked.copy()
    folder = bench.exported("merged", 0.03)
    # What tools that fine-tune leave in a configuration makes it no other model.
    config = json.loads((Path(folder) / "config.json").read_text())
    left = {"pad_token_id": 1, "_model_name_or_path": "x", "use_cache": False}
    (Path(folder) / "config.json").write_text(json.dumps(config | left))
    assert compare(bench, f"{bench.folder}/runs/sft", f"{bench.folder}/runs/eaft", folder) == 0
    assert bench.asked == before, "nothing is trained or exported again"
    assert [path.name for path in counted[6:]] == ["merged"], "nothing is measured again"
    again = report(bench)
    assert again["runs"][0]["points"] == found["runs"][0]["points"]
    assert again["runs"][2]["method"] == "merged"
    out = capsys.readouterr().out
    assert again["findings"][0] in out
    assert f"checkpoint 4 of 5: {places[3]}\nmeasured before\ncheckpoint 5 of 5: {folder}\n" in out
    assert f"* {again['findings'][0]}" in (bench.output / "compare.md").read_text()


def test_it_goes_on_after_the_last_measured_checkpoint(
    bench: Bench, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third measurement, and started again: the same figures as undisturbed."""
    sft = bench.conf("sft", gate="stock")
    done: list[int] = []

    def stops(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return measure(*arguments)

    monkeypatch.setattr(command, "measure", stops)
    # The pictures take longer than everything else, and another test looks at them.
    monkeypatch.setattr(command, "write_figures", lambda *_: [])
    assert compare(bench, sft) == 1
    assert not (bench.output / "compare.json").exists()
    assert len(list((bench.output / "measured").iterdir())) == 2
    monkeypatch.setattr(command, "measure", measure)
    counted.clear()
    exports = [words for words in bench.asked if words[0] == "export"]
    assert compare(bench, sft) == 0
    assert len(counted) == 1, "only the checkpoint that was not measured"
    assert [words for words in bench.asked if words[0] == "export"] == exports, "its export was there already"
    interrupted = report(bench)
    other = bench.output.rename(bench.folder / "interrupted")
    assert compare(bench, sft) == 0
    assert report(bench) == interrupted
    assert (bench.output / "compare.md").read_bytes() == (other / "compare.md").read_bytes()
    # Other weights under the same name, or other questions, are measured; the rest is not.
    counted.clear()
    checkpoint = bench.folder / "runs" / "sft" / "checkpoints" / "step=3"
    shutil.rmtree(checkpoint)
    bench.checkpoint(checkpoint)
    assert compare(bench, sft) == 0
    assert counted == [], "the same content at another time is the same checkpoint"
    questions = bench.folder / "probe.jsonl"
    questions.write_text("\n".join(questions.read_text().splitlines()[:3]))
    assert compare(bench, sft) == 0
    assert len(counted) == 3


@pytest.mark.parametrize(
    "words, named",
    [
        (["{sft}", "trainer.max_stpes=3"], "did you mean trainer.max_steps?"),
        (["{sft}", "{sft}"], "are one run"),
        (["{exported}"], "only exported folders are given"),
        (["{exported}", "trainer.seed=1"], "trainer.seed=1 has no effect"),
        (["{folder}"], "neither a run.dir"),
        (["nowhere"], "is no shipped configuration"),
        (["{sft}", "{other}"], "differ; only runs from one base model"),
        (["{sft}", "{rebased}"], "only runs with the same base model can be compared"),
        (["{sft}", "{rows}"], "has data.validation="),
        (["{sft}", "data.validation=null"], "held-out rows are needed"),
        (["{sft}", "--reference", "dft"], "--reference dft is none of the methods sft"),
        (["{sft}", "--rows", "0"], "--rows=0 must be 1 or more"),
        (["{sft}", "--probe", "{folder}/text.txt"], "text.txt, line 1"),
        (["{sft}", "--text", "{folder}/nowhere.txt"], "nowhere.txt cannot be read"),
        (["{sft}", "--window-tokens", "1000"], "at least one window of 1000 is needed"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(
    bench: Bench, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.nemo.models import save_tokenizer

    sft = bench.conf("sft", gate="stock")
    other = bench.folder / "other"
    LlamaForCausalLM(LlamaConfig(vocab_size=252, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=8)).save_pretrained(other)  # fmt: skip
    save_tokenizer(other)
    texts = {"rebased": (f"{bench.folder}/base", str(other)), "rows": ("validation.jsonl", "training.jsonl")}
    places = {"sft": sft, "exported": bench.exported("merged", 0.1), "folder": str(bench.folder), "other": str(other)}
    for name, (old, new) in texts.items():
        path = bench.folder / f"{name}.yaml"
        path.write_text(Path(sft).read_text().replace(old, new).replace("runs/sft", f"runs/{name}"))
        places[name] = str(path)
    assert compare(bench, *[word.format(**places) for word in words]) == 2
    assert named in capsys.readouterr().err
    assert bench.asked == []
    assert not bench.output.exists()


def test_a_run_that_is_not_finished(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    sft = bench.conf("sft")
    bench.command("train", sft, "trainer.max_steps=9")
    assert compare(bench, f"{bench.folder}/runs/sft") == 2
    assert "has done 4 of 9 steps" in capsys.readouterr().err


@pytest.mark.parametrize("known", [False, True])
def test_a_probe_that_the_base_model_fails_says_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], known: bool
) -> None:
    monkeypatch.setattr(command, "write_figures", lambda *_: [])
    file = bench.folder / "probe.jsonl"
    questions = [json.loads(line) for line in file.read_text().splitlines()]
    for question in questions:
        question["right"] = bench.likeliest(question["question"], question["answers"])
    if not known:
        for question in questions:
            question["right"] = 1 - question["right"]
    file.write_text("\n".join(map(json.dumps, questions)))
    assert compare(bench, bench.exported("merged", 0.03), bench.conf("sft")) == 0
    said = capsys.readouterr().err.count("the base model has none of 6 questions right")
    assert said == (0 if known else 1)


def test_what_differs_beside_the_loss_is_another_method(bench: Bench) -> None:
    first, second = bench.conf("first", top_k=10), bench.conf("second", top_k=20)
    sources, _ = find_sources([first, second])
    assert method_names(sources) == ["eaft alpha=1 loss.top_k=10", "eaft alpha=1 loss.top_k=20"]
    # Learning rates and seeds are told apart within a method.
    path = Path(second)
    path.write_text(path.read_text().replace('top_k": 20', 'top_k": 10').replace("max_steps", "seed: 4, max_steps"))
    sources, _ = find_sources([first, second])
    assert method_names(sources) == ["eaft alpha=1", "eaft alpha=1"]


def test_a_training_that_is_stopped_stops_the_comparison(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_command", lambda *words: 75)
    assert compare(bench, bench.conf("sft")) == 75
    assert not bench.output.exists()
