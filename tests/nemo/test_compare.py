"""``nemo-eaft compare`` on what NeMo has trained and our export has written, against ``transformers`` alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import cli, compose, convert
from nemo_eaft.checkpoints import checkpoints_in
from nemo_eaft.ready import CONFIG
from tests.nemo import jobs, reference
from tests.nemo.conftest import Workshop
from tests.nemo.ranks import run_ranks


def exported_in_a_warm_process(arguments: list[str], backend: str | None = None) -> None:
    """``convert.run_in_own_process`` where NeMo is imported already."""
    assert (arguments[0], backend) == ("to-hf", "cpu")
    run_ranks(jobs.to_hf, 1, *map(Path, arguments[1:]))


def test_trained_runs_are_measured_as_exported(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "run_in_own_process", exported_in_a_warm_process)
    trainer = {"max_steps": 4, "save_every": 2, "keep_checkpoints": -1, "learning_rate": 3e-3}
    folders = []
    for name, gate in (("compare-sft", "none"), ("compare-eaft", "eaft")):
        run = workshop.train(name, plan={"save": True}, trainer=trainer, loss={"gate": gate})
        compose.save(run.settings, run.dir / CONFIG)
        folders.append(run.dir)
    output = tmp_path / "output"
    words = ["compare", *map(str, folders), "--output", str(output), "--samples", "4", "--sample-tokens", "12"]
    assert cli.main([*words, "--keep-exports", "--device", "cpu"]) == 0
    found = json.loads((output / "compare.json").read_text())
    assert [run["method"] for run in found["runs"]] == ["sft", "eaft alpha=1"]

    base = workshop.hf("llama")
    samples = json.loads(next((output / "base").glob("samples-*.json")).read_text())
    for run, folder in zip(found["runs"], folders, strict=True):
        assert [point["step"] for point in run["points"]] == [0, 2, 4]
        assert len(checkpoints_in(folder)) == 2
        assert run["points"][0]["target"] == pytest.approx(cross_entropy(workshop, base), rel=1e-5)
        # It has learned, which the exports must show.
        assert run["points"][2]["target"] < run["points"][0]["target"] - 0.1
        assert run["points"][2]["drift"] > 0.01
    last = [{name: run["points"][2][name] for name in ("target", "drift")} for run in found["runs"]]
    measured = [
        {"target": cross_entropy(workshop, folder), "drift": divergence(base, folder, samples)}
        for folder in (output / "exported").iterdir()
    ]
    for figures in last:
        assert any(figures == pytest.approx(other, rel=1e-4) for other in measured)

    shutil.rmtree(output / "exported")
    monkeypatch.setattr(convert, "run_in_own_process", lambda *_: pytest.fail("it was measured before"))
    assert cli.main([*words, "--device", "cpu"]) == 0


def cross_entropy(workshop: Workshop, folder: Path) -> float:
    """Mean over the answer tokens of the held-out rows, float64."""
    sums = reference.row_sums(reference.load_model(folder), workshop.validation_rows).values()
    return sum(each.cross_entropy for each in sums) / sum(each.tokens for each in sums)


def divergence(base: Path, tuned: Path, samples: list[list[int]]) -> float:
    """KL(base || tuned) a token, float64."""
    import torch

    total = 0.0
    models: list[Any] = [reference.load_model(folder) for folder in (base, tuned)]
    with torch.no_grad():
        for ids in samples:
            p, q = (model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for model in models)
            total += (p.exp() * (p - q)).sum().item()
    return total / sum(len(ids) - 1 for ids in samples)
