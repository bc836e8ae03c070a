"""`nemo-eaft analyze` on a tiny model: against Hugging Face, over ranks, killed and started again, from the shell."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_eaft import cli, compose
from nemo_eaft.analyze import collect, state
from nemo_eaft.analyze.report import write_report
from nemo_eaft.analyze.state import State
from nemo_eaft.analyze.summary import summarise
from nemo_eaft.analyze.tally import SUMS
from nemo_eaft.checkpoints import checkpoints_in
from nemo_eaft.data import prepare
from nemo_eaft.ready import Ready
from nemo_eaft.run_dir import CONFIG
from nemo_eaft.settings import Settings
from nemo_eaft.stop import EXIT_STOPPED, REQUEST, read_stopped, request
from tests.nemo import analyzing, jobs, launched, models, reference
from tests.nemo.conftest import Run, Workshop
from tests.nemo.ranks import run_ranks

ROWS = 27
"""No multiple of a batch: the last one is filled up."""


@pytest.fixture(scope="module")
def bench(workshop: Workshop) -> Bench:
    return Bench(workshop)


class Bench:
    """Analyses of one model on the same rows."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self.rows = workshop.root / "analyze"
        self.rows.mkdir()
        models.write_rows(self.rows / "training.jsonl", ROWS, seed=5)

    def settings(
        self, name: str, *, world: int = 1, hf: Path | None = None, rows: Path | None = None, **changes: Any
    ) -> Settings:
        from transformers import AutoTokenizer

        parallel = changes.get("parallel", {})
        copies = world // math.prod(parallel.values())
        # Over data-parallel ranks each cuts its part of a batch into two micro-batches.
        batch = 2 * copies * (2 if copies > 1 else 1)
        trainer = {"gpus_per_node": world, "micro_batch_size": 2, "global_batch_size": batch}
        trainer |= changes.get("trainer", {})
        hf, run_dir = hf or self.workshop.hf("llama"), self.workshop.root / "runs" / name
        settings = models.run_settings(
            hf, rows or self.rows, run_dir, trainer=trainer, data={"validation": None}, parallel=parallel
        )
        prepare(settings, AutoTokenizer.from_pretrained(hf))
        return settings

    def ready(self) -> Ready:
        return Ready(self.workshop.nemo("llama"), False)

    def analyze(self, name: str, world: int = 1, **changes: Any) -> State:
        settings, ready = self.settings(name, world=world, **changes), self.ready()
        assert run_ranks(analyzing.analyze, world, settings, ready) == [True] * world
        return state.load(settings, ready)


@pytest.fixture(scope="module")
def one(bench: Bench) -> State:
    return bench.analyze("analyze-1")


def by_transformers(model: torch.nn.Module, rows: Path) -> tuple[dict[str, float], np.ndarray]:
    """The sums of the answer tokens and [tokens, 2] of entropy ratio and probability, in float64."""
    sums: dict[str, float] = dict.fromkeys([*SUMS, "tokens", "conflicts"], 0.0)
    places = []
    for answer, tokens in reference.read_rows(rows).items():
        with torch.no_grad():
            logits = reference.answer_logits(model, tokens, answer)
        cross_entropy, entropy, weight = reference.token_values(logits, answer)
        leaf = logits.clone().requires_grad_()
        torch.nn.functional.cross_entropy(leaf, torch.tensor(answer), reduction="sum").backward()
        assert leaf.grad is not None
        gradient = leaf.grad.norm(dim=1)
        conflict = (torch.exp(-cross_entropy) < 0.1) & (entropy / math.log(20) < 0.2)
        for name, value in {
            "cross_entropy": cross_entropy,
            "entropy": entropy,
            "weight": weight,
            "loss": weight * cross_entropy,
            "gradient": gradient,
            "weighted_gradient": weight * gradient,
            "conflict_gradient": conflict * gradient,
            "conflict_weighted_gradient": conflict * weight * gradient,
            "tokens": torch.ones(len(answer)),
            "conflicts": conflict,
        }.items():
            sums[name] += float(value.sum())
        places.append(torch.stack((entropy / math.log(20), torch.exp(-cross_entropy)), 1))
    return sums, torch.cat(places).numpy()


def test_equals_transformers(bench: Bench, one: State) -> None:
    expected, places = by_transformers(bench.workshop.model("llama"), bench.rows / "training.jsonl")
    tally = one.tally
    assert (tally.rows, one.rows_done, tally.not_finite) == (ROWS, ROWS, 0)
    assert (tally.tokens, tally.conflicts) == (expected["tokens"], expected["conflicts"])
    assert tally.conflicts > 5
    for name, value in zip(SUMS, tally.sums, strict=True):
        assert value == pytest.approx(expected[name], rel=1e-5), name
    ratio, probability = places.T
    expected_grid, _, _ = np.histogram2d(ratio, probability, bins=50, range=[[0, 1], [0, 1]])
    assert np.abs(tally.grid - expected_grid).sum() <= 2
    kept = [(row.row, row.conflict_gradient(bench.settings("analyze-1").loss.eaft_config())) for row in tally.top_rows]
    assert [push for _, push in kept] == sorted((push for _, push in kept), reverse=True)
    # A row's ids are the row, so that the page shows what was read.
    rows = list(reference.read_rows(bench.rows / "training.jsonl").values())
    assert all(row.ids == rows[row.row] for row in tally.top_rows)


@pytest.mark.parametrize(
    "world, parallel", [(2, {"tensor": 2}), (2, {}), (2, {"pipeline": 2})], ids=["TP2", "DP2", "PP2"]
)
def test_every_layout_gives_the_same(bench: Bench, one: State, world: int, parallel: dict[str, int]) -> None:
    name = "-".join(["analyze", str(world), *parallel])
    found = bench.analyze(name, world, parallel=parallel).tally
    tally = one.tally
    assert (found.rows, found.tokens, found.conflicts) == (tally.rows, tally.tokens, tally.conflicts)
    assert np.allclose(found.sums, tally.sums, rtol=1e-5)
    assert np.allclose(found.by_alpha, tally.by_alpha, rtol=1e-5)
    assert np.abs(found.grid - tally.grid).sum() <= 2
    assert [row.row for row in found.top_rows] == [row.row for row in tally.top_rows]


def test_in_bf16_as_on_a_gpu(bench: Bench, one: State) -> None:
    """The model is in one wrapper more then, and its weights take two bytes each."""
    found, tally = bench.analyze("analyze-bf16", trainer={"precision": "bf16"}).tally, one.tally
    assert (found.rows, found.tokens, found.not_finite) == (tally.rows, tally.tokens, 0)
    assert np.allclose(found.sums[:5], tally.sums[:5], rtol=0.03)


def test_killed_and_started_again_is_the_same_bit_for_bit(bench: Bench, one: State) -> None:
    settings, ready = bench.settings("analyze-killed"), bench.ready()
    run_ranks(analyzing.analyze, 1, settings, ready, 1, dies=True)
    assert state.load(settings, ready).rows_done == 2 * collect.EVERY
    assert run_ranks(analyzing.analyze, 1, settings, ready) == [True]
    again = state.load(settings, ready)
    assert json.dumps(again.tally.to_json()) == json.dumps(one.tally.to_json())


def test_the_files(bench: Bench, one: State) -> None:
    from PIL import Image
    from transformers import AutoTokenizer

    settings = bench.settings("analyze-1")
    tokenizer = AutoTokenizer.from_pretrained(bench.workshop.hf("llama"))
    content = write_report(settings, one, "tiny", models.VOCAB_SIZE, tokenizer)
    run_dir = Path(settings.run.dir)
    assert json.loads((run_dir / "analysis.json").read_text()) == json.loads(json.dumps(content))
    with Image.open(run_dir / "landscape.png") as picture:
        assert picture.size == (800, 600)
    page = (run_dir / "conflicts.html").read_text()
    row = one.tally.top_rows[0]
    assert f"line {row.row + 1} of training.jsonl" in page


def test_chat_rows_of_the_same_tokens_are_the_same(bench: Bench, one: State) -> None:
    """They come as token ids, through another data set of ours."""
    from transformers import AutoTokenizer

    folder, hf = bench.workshop.root / "analyze-chat", bench.workshop.root / "hf-chat"
    folder.mkdir()
    shutil.copytree(bench.workshop.hf("llama"), hf)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
    )
    tokenizer.save_pretrained(hf)
    with (folder / "training.jsonl").open("w") as file:
        for line in (bench.rows / "training.jsonl").read_text().splitlines():
            row = json.loads(line)
            turns = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    settings = bench.settings("analyze-chat", hf=hf, rows=folder)
    assert run_ranks(analyzing.analyze, 1, settings, bench.ready()) == [True]
    found = state.load(settings, bench.ready()).tally
    assert json.dumps(found.to_json()) == json.dumps(one.tally.to_json())

    # The script of docs/analyze.md, as the page starts it.
    page = (Path(__file__).parents[2] / "docs" / "analyze.md").read_text(encoding="utf-8")
    (folder / "by_hand.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    words = [sys.executable, "by_hand.py", str(hf), str(Path(settings.run.dir) / "data" / "training.jsonl")]
    printed = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120, check=True).stdout
    vocab_size = json.loads((hf / "config.json").read_text())["vocab_size"]
    written = summarise(found, settings, "llama", vocab_size)
    by_hand = json.loads(printed)
    assert by_hand["tokens"] == written["tokens"] > 100
    assert by_hand["conflicts"]["tokens"] == written["conflicts"]["tokens"] > 5
    assert {name: written["mean"][name] for name in by_hand["mean"]} == pytest.approx(by_hand["mean"], rel=1e-5)
    share = "share_of_sft_gradient"
    assert written["conflicts"][share] == pytest.approx(by_hand["conflicts"][share], rel=1e-5)


def test_asked_to_stop_and_started_again_with_other_micro_batches(bench: Bench, one: State) -> None:
    """Rows are counted over all starts, and none twice."""
    ready, done = bench.ready(), 0
    for trainer, asked in (({}, 1), ({"micro_batch_size": 1, "global_batch_size": 1}, 1), ({}, None)):
        settings = bench.settings("analyze-asked", trainer=trainer)
        if asked is None:
            # Too late: it is seen when all rows are counted.
            request(Path(settings.run.dir), "by the test")
        assert run_ranks(analyzing.analyze, 1, settings, ready, None, asked) == [asked is None]
        done += collect.EVERY * settings.trainer.global_batch_size
        if asked is not None:
            note = read_stopped(Path(settings.run.dir))
            assert note is not None
            assert (note.step, state.load(settings, ready).rows_done) == (done, done)
    assert not (Path(settings.run.dir) / REQUEST).exists()
    again = state.load(settings, ready)
    assert again.rows_done == ROWS
    assert again.tally.rows == ROWS
    assert np.allclose(again.tally.sums, one.tally.sums, rtol=1e-6)


@pytest.fixture(scope="module")
def trained(bench: Bench) -> Run:
    """A run of two tensor-parallel ranks; config.yaml says where its import lies."""
    run = bench.workshop.train(
        "saved", world=2, parallel={"tensor": 2}, trainer={"max_steps": 2, "save_every": 2}, plan={"save": True}
    )
    model = dataclasses.replace(run.settings.model, imported=str(bench.workshop.nemo("llama")))
    compose.save(dataclasses.replace(run.settings, model=model), run.dir / CONFIG)
    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_the_shell(
    bench: Bench, one: State, trained: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wrong input is told; a trained run is analysed, stopped by SIGTERM, and goes on to the numbers of its export;
    started again it has nothing left to do."""
    rows, run_dir = str(bench.rows / "training.jsonl"), tmp_path / "run"
    more = [rows, "run.backend=cpu", "trainer.precision=fp32", f"trainer.seq_length={models.SEQ_LENGTH}"]
    more += ["trainer.micro_batch_size=2", f"run.dir={run_dir}"]
    imported = f"model.imported={bench.workshop.nemo('llama')}"
    for wrong, said in (
        (["data.packed=true"], "data.packed=true"),
        (["parallel.context=2", "trainer.gpus_per_node=2"], "parallel.context=2"),
        (["loss.fused_linear=true"], "loss.fused_linear=true"),
        (["trainer.seq_length=4"], "allows no more than that"),
    ):
        assert cli.main(["analyze", str(bench.workshop.hf("llama")), *more, imported, *wrong]) == 2
        assert said in capfd.readouterr().err
        assert not run_dir.exists()

    words = ["analyze", str(trained.dir), *more]
    job = launched.start_command([*words], run_dir)
    job.until(lambda: "CPU backend on" in job.output())
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(200) == EXIT_STOPPED
    done = 2 * collect.EVERY
    assert f"after row {done}, saved in {run_dir / state.FILE}; the same command" in job.last_line()
    assert not (run_dir / "analysis.json").exists()

    assert cli.main(words) == 0
    said = capfd.readouterr().out
    assert f"goes on after {done} of {ROWS} rows" in said
    assert "advice: " in said
    first = (run_dir / "analysis.json").read_bytes()
    found = json.loads(first)
    (checkpoint,) = checkpoints_in(trained.dir)
    assert found["model"] == f"saved/{checkpoint.name}"
    run_ranks(jobs.to_hf, 1, checkpoint, tmp_path / "hf", bench.workshop.nemo("llama") / "hf")
    expected, _ = by_transformers(reference.load_model(tmp_path / "hf"), bench.rows / "training.jsonl")
    assert (found["tokens"], found["conflicts"]["tokens"]) == (expected["tokens"], expected["conflicts"])
    for name, value in found["mean"].items():
        assert value == pytest.approx(expected[name] / expected["tokens"], rel=1e-5), name
    # The training has moved it, so the imported weights would not do.
    before = one.tally.sums[0] / one.tally.tokens
    assert abs(found["mean"]["cross_entropy"] - before) > 1e-3 * before

    os.unlink(run_dir / "analysis.json")
    assert cli.main(words) == 0
    assert "goes on" not in capfd.readouterr().out
    assert (run_dir / "analysis.json").read_bytes() == first
    assert cli.main([*words, "loss.alpha=2"]) == 2
    assert "loss.alpha: 1.0 -> 2.0" in capfd.readouterr().err
