"""The landscape live in training: counted over ranks, in TensorBoard and in landscape.jsonl, and safe to resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
from torch.utils.tensorboard import SummaryWriter

from nemo_eaft.config import EAFTConfig
from nemo_eaft.landscape.counts import GRID, count
from nemo_eaft.landscape.training import FILE, PERCENTILES, TrainingLandscape
from nemo_eaft.loss import TokenLoss
from nemo_eaft.metrics import StepMetrics
from tests.nemo import reference
from tests.nemo.conftest import Run, Workshop


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Run:
    """Three steps on two data-parallel ranks, with a landscape of each and a validation after it."""
    trainer = {"max_steps": 3, "histogram_every": 1, "val_every": 1, "micro_batch_size": 2, "learning_rate": 1e-5}
    return workshop.train("landscape", world=2, trainer=trainer)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_counts_are_those_of_the_global_batch(workshop: Workshop, run: Run) -> None:
    """Of the first step, whose model is known, against Hugging Face in float64; validation is not counted."""
    by_answer = reference.read_rows(workshop.rows / "training.jsonl")
    model = workshop.model("llama")
    places = []
    for answer in run.answers(0):
        with torch.no_grad():
            logits = reference.answer_logits(model, by_answer[answer], answer)
        cross_entropy, entropy, _ = reference.token_values(logits, answer)
        places.append(torch.stack((entropy / math.log(20), torch.exp(-cross_entropy)), 1))
    ratio, probability = torch.cat(places).numpy().T
    expected, _, _ = np.histogram2d(ratio, probability, bins=GRID, range=[[0, 1], [0, 1]])
    found = lines(run.dir)
    assert [line["step"] for line in found] == [1, 2, 3]
    assert np.abs(np.array(found[0]["counts"]) - expected).sum() <= 2
    assert [line["tokens"] for line in found] == [step["tokens"] for step in run.steps]
    assert [line["conflict_fraction"] for line in found] == [step["conflict_fraction"] for step in run.steps]
    for part in PERCENTILES:
        assert found[0][f"entropy_p{part}"] == pytest.approx(np.percentile(ratio, part), rel=0.02, abs=0.01)


def test_tensorboard_has_it(run: Run) -> None:
    board = EventAccumulator(str(run.dir / "tensorboard"), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    board.Reload()
    tags = board.Tags()
    assert "eaft/landscape" in tags["images"]
    assert {"eaft/entropy", "eaft/weight"} <= set(tags["histograms"])
    # One numbering for all: that of the loss, NeMo's own included.
    names = [f"entropy_p{part}" for part in PERCENTILES] + [f"weight_p{part}" for part in PERCENTILES]
    for tag in ("reduced_train_loss", "eaft/loss", *(f"eaft/{name}" for name in names)):
        assert [event.step for event in board.Scalars(tag)] == [0, 1, 2], tag
    assert [event.step for event in board.Images("eaft/landscape")] == [0, 1, 2]
    for tag in ("eaft/entropy", "eaft/weight"):
        assert [event.step for event in board.Histograms(tag)] == [0, 1, 2], tag
    picture = board.Images("eaft/landscape")[0]
    assert (picture.width, picture.height) == (800, 600)
    for event, line in zip(board.Histograms("eaft/weight"), lines(run.dir), strict=True):
        assert event.histogram_value.num == line["tokens"]
    for name in ("entropy_p50", "weight_p95"):
        values = [event.value for event in board.Scalars(f"eaft/{name}")]
        assert values == pytest.approx([line[name] for line in lines(run.dir)], rel=1e-6)
    # What is trained on and the plain loss, in one chart.
    assert {"eaft/loss", "eaft/cross_entropy", "eaft/conflict_fraction"} <= set(tags["scalars"])


def test_tensorboards_custom_scalars_show_the_curves_that_their_titles_name(run: Run) -> None:
    """By the code of TensorBoard that fills the charts of the tab *custom scalars*."""
    folder = str(run.dir / "tensorboard")
    multiplexer = EventMultiplexer({"run": folder})
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, folder)
    plugins: dict[str, Any] = {}
    board = TBContext(logdir=folder, multiplexer=multiplexer, data_provider=provider, plugin_name_to_instance=plugins)
    plugins["scalars"] = ScalarsPlugin(board)
    custom, request = CustomScalarsPlugin(board), RequestContext()
    (category,) = json.loads(custom.layout_impl(request, ""))["category"]
    shown: dict[str, dict[str, list[float]]] = {}
    for chart in category["chart"]:
        curves = shown[chart["title"]] = {}
        for pattern in chart["multiline"]["tag"]:
            found = custom.scalars_impl(request, "run", pattern, "")["tag_to_events"]
            assert len(found) == 1, f"{pattern} shows {sorted(found)}"
            curves |= {tag: [value for _, _, value in events] for tag, events in found.items()}
    names = {
        "loss: what is trained on, and plain": ["loss", "cross_entropy"],
        "confident conflicts": ["conflict_fraction"],
        "entropy / normaliser, percentiles": [f"entropy_p{part}" for part in PERCENTILES],
        "weight, percentiles": [f"weight_p{part}" for part in PERCENTILES],
    }
    assert list(shown) == list(names)
    for title, wanted in names.items():
        # The curves of each step, from the files that no TensorBoard wrote.
        written = run.steps if wanted[0] in run.steps[0] else lines(run.dir)
        expected = {f"eaft/{name}": [step[name] for step in written] for name in wanted}
        assert list(shown[title]) == list(expected)
        for tag, values in expected.items():
            assert shown[title][tag] == pytest.approx(values, rel=1e-6), tag


def test_only_every_nth_step_and_a_resume_repeats_none(tmp_path: Path) -> None:
    config = EAFTConfig()
    out = TokenLoss(*(torch.tensor([0.5, 2.0, 3.0]) for _ in range(4)))
    landscape = TrainingLandscape(config, 100, every=2)
    landscape.open(tmp_path, 0)

    def steps(numbers: range) -> None:
        for number in numbers:
            landscape.start_step(number, None)
            landscape._counts = count(out, torch.ones(3, dtype=torch.bool), config, 100)
            vector = landscape.end_step(torch.device("cpu"), None, None, None)
            assert (vector is not None) == (number % 2 == 0)
            if vector is not None:
                metrics = StepMetrics(
                    loss=1.0, cross_entropy=1.0, entropy=1.0, weight=1.0, conflict_fraction=0.0, tokens=3
                )
                landscape.write(vector, number, metrics, [], number - 1)

    steps(range(1, 7))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    landscape.open(tmp_path, 3)
    steps(range(4, 7))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]


def test_never_and_without_a_token(tmp_path: Path) -> None:
    config = EAFTConfig()
    never = TrainingLandscape(config, 100, every=0)
    never.start_step(100, None)
    assert never.end_step(torch.device("cpu"), None, None, None) is None
    always = TrainingLandscape(config, 100, every=1)
    always.open(tmp_path, 0)
    always.start_step(1, None)
    vector = always.end_step(torch.device("cpu"), None, None, None)
    assert vector is not None
    metrics = StepMetrics(loss=0.0, cross_entropy=0.0, entropy=0.0, weight=0.0, conflict_fraction=0.0, tokens=0)

    class Logger:
        experiment = SummaryWriter(str(tmp_path))

        def log_metrics(self, values: dict[str, float], step: int) -> None:
            assert set(values.values()) == {0.0}

    always.write(vector, 1, metrics, [Logger()], 0)
    assert lines(tmp_path)[0]["tokens"] == 0
