"""``nemo-eaft compare`` on what NeMo has trained and our export has written, against ``transformers`` alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import cli, compose, convert, launch
from nemo_eaft.checkpoints import checkpoints_in
from nemo_eaft.recorder import read
from nemo_eaft.settings import Settings
from tests.nemo import comparing, jobs, models, reference
from tests.nemo.conftest import Workshop
from tests.nemo.ranks import run_ranks


def exported_in_a_warm_process(arguments: list[str], backend: str | None = None) -> None:
    """``convert.run_in_own_process`` where NeMo is imported already."""
    assert (arguments[0], backend) == ("to-hf", "cpu")
    run_ranks(jobs.to_hf, 1, *map(Path, arguments[1:]))


def configuration(workshop: Workshop, folder: Path, name: str, gate: str) -> str:
    """A file for a run of four steps that keeps two checkpoints if all are kept."""
    trainer = {"max_steps": 4, "save_every": 2, "learning_rate": 3e-3}
    settings = models.run_settings(
        workshop.hf("llama"), workshop.rows, folder / "runs" / name, trainer=trainer, loss={"gate": gate}
    )
    model = dataclasses.replace(settings.model, imported=str(workshop.nemo("llama")))
    compose.save(dataclasses.replace(settings, model=model), folder / f"{name}.yaml")
    return str(folder / f"{name}.yaml")


def test_configurations_are_trained_and_measured_as_exported(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second training is killed; the same command goes on with it, and the figures are those of `transformers`."""
    dies_in: dict[str, int] = {}
    started: list[str] = []

    def start_warm(settings: Settings, words: list[str]) -> int:
        name = Path(settings.run.dir).name
        started.append(name)
        step = dies_in.pop(name, None)
        ended = run_ranks(comparing.run_rank, 1, words, launch.PROCESS, step, dies=step is not None)
        return ended[0] if ended else 1

    monkeypatch.setattr(launch, "run_local", start_warm)
    monkeypatch.setattr(convert, "run_in_own_process", exported_in_a_warm_process)
    files = [configuration(workshop, tmp_path, name, gate) for name, gate in (("sft", "none"), ("eaft", "eaft"))]
    folders = [tmp_path / "runs" / name for name in ("sft", "eaft")]
    output = tmp_path / "output"
    words = ["compare", *files, "trainer.keep_checkpoints=-1", "--output", str(output)]
    words += ["--samples", "4", "--sample-tokens", "12", "--device", "cpu"]
    dies_in["eaft"] = 4
    assert cli.main(words) == 1
    assert not output.exists()
    assert cli.main([*words, "--keep-exports"]) == 0
    assert started == ["sft", "eaft", "eaft"], "what is finished is not trained again"
    assert [row["step"] for row in read(folders[1] / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["step"] for row in read(folders[1] / "metrics.1.jsonl")] == [3], "it went on from its checkpoint"
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
    assert cli.main(words) == 0
    assert len(started) == 3


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
