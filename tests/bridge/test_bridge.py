"""`nemo_eaft.bridge` and its example in real Megatron-Bridge: whole `finetune()` runs on the CPU, watched."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nemo import models

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(os.environ.get("BRIDGE_SITE", Path(sys.prefix) / "megatron-bridge"))
"""Where `make test` puts Megatron-Bridge and the Megatron-Core that it needs."""
STEPS, TOP_K = 3, 20
NAMES = ("lm loss", "eaft/cross_entropy", "eaft/entropy", "eaft/weight", "eaft/conflict_fraction")


def run(folder: Path, ranks: int, *jobs: str) -> None:
    """Jobs of tests/bridge/job.py under torchrun, as a user starts them."""
    if not (SITE / "megatron" / "bridge").is_dir() and not torch.cuda.is_available():
        pytest.skip(f"no Megatron-Bridge in {SITE}; `make test` installs it")
    paths = [str(ROOT)] if torch.cuda.is_available() else [str(SITE), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "tests.bridge.job", str(folder), *jobs]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        output, _ = process.communicate(timeout=40)
        raise TimeoutError(output[-6000:]) from None
    assert process.returncode == 0, output[-6000:]


@dataclass
class Run:
    """A finished `finetune()`."""

    folder: Path
    ranks: list[list[dict[str, Any]]]
    """By rank, its micro-batches as `job.example` recorded them."""

    @property
    def scalars(self) -> dict[str, list[float]]:
        """What Bridge wrote to TensorBoard, by name and step."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / "tb_logs"))
        events.Reload()
        return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def finished(folder: Path, name: str, ranks: int) -> Run:
    results = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(ranks)]
    return Run(folder / name, [result["micro_batches"] for result in results])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and rows; then a checkpoint of it and the example on one rank, with the refusals."""
    folder = tmp_path_factory.mktemp("bridge")
    (folder / "rows").mkdir()
    models.save_model("llama", folder / "hf")
    models.write_rows(folder / "rows" / "training.jsonl", 32, seed=1)
    models.write_rows(folder / "rows" / "validation.jsonl", 16, seed=2)
    run(folder, 1, "checkpoint", "one", "refusals")
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Run:
    return finished(folder, "one", 1)


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    run(folder, 2, "tensor", "pipeline", "data")
    return folder


def formula(micro_batch: dict[str, Any]) -> dict[str, Tensor]:
    """Sums over the tokens of one micro-batch, by definition, in float64."""
    z = micro_batch["logits"].double().transpose(0, 1)[..., : models.VOCAB_SIZE]
    counted = micro_batch["loss_mask"] != 0
    labels = micro_batch["labels"].where(counted, 0)
    ce = z.logsumexp(-1) - z.gather(-1, labels[..., None])[..., 0]
    q = z.topk(TOP_K).values.softmax(-1)
    entropy = -(q * q.log()).sum(-1)
    weight = entropy / math.log(TOP_K)
    conflict = ((-ce).exp() < 0.1) & (weight < 0.2)
    values = (weight * ce, ce, entropy, weight, conflict.double())
    return {name: value[counted].sum() for name, value in zip(NAMES, values, strict=True)} | {"tokens": counted.sum()}


def steps(micro_batches: list[dict[str, Any]]) -> Iterator[list[dict[str, Tensor]]]:
    """The sums of each step's micro-batches."""
    sums = [formula(each) for each in micro_batches if each["training"]]
    size = len(sums) // STEPS
    assert len(sums) == STEPS * size
    for step in range(STEPS):
        yield sums[step * size : (step + 1) * size]


def expected(micro_batches: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {
        name: [float(sum(s[name] for s in step) / sum(s["tokens"] for s in step)) for step in steps(micro_batches)]
        for name in NAMES
    }


def test_bridge_logs_what_the_definition_says(one: Run) -> None:
    logged, wanted = one.scalars, expected(one.ranks[0])
    for name in NAMES:
        assert logged[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-7), name
    assert max(logged["eaft/conflict_fraction"]) > 0, "no confident conflict to count"
    assert max(logged["eaft/weight"]) < 0.9, "the gate hardly matters here"
    # A mean of the micro-batches' means, as without calculate_per_token_loss, is another number.
    (first, *_) = steps(one.ranks[0])
    of_means = sum(s["lm loss"] / s["tokens"] for s in first) / len(first)
    assert abs(float(of_means) - wanted["lm loss"][0]) > 1e-3


def test_validation_is_plain_cross_entropy_and_reports_nothing_else(one: Run) -> None:
    sums = [formula(each) for each in one.ranks[0] if not each["training"]]
    half = len(sums) // 2
    # Bridge validates at the interval, which is the last step, and once more at the end.
    for part, logged in zip((sums[:half], sums[half:]), one.scalars["lm loss validation"], strict=True):
        wanted = sum(s["eaft/cross_entropy"] for s in part) / sum(s["tokens"] for s in part)
        assert logged == pytest.approx(float(wanted), rel=1e-5)
    assert not [name for name in one.scalars if name.startswith("eaft/") and "validation" in name]


def test_tokens_outside_the_mask_take_no_part(one: Run) -> None:
    for each in one.ranks[0]:
        outside = each["loss_mask"] == 0
        assert outside.any()
        assert (each["labels"][outside] == -100).all()
        assert (each["losses"][outside] == 0).all()
        assert (each["labels"][~outside] >= 0).all()


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data"])
def test_two_ranks_train_as_one(two_ranks: Path, one: Run, layout: str) -> None:
    run = finished(two_ranks, layout, 2)
    for name in (*NAMES, "grad-norm"):
        # conflict_fraction counts: one token at a threshold could differ, none does.
        assert run.scalars[name] == pytest.approx(one.scalars[name], rel=1e-4, abs=1e-6), name
    first, second = run.ranks
    if layout == "tensor":
        joined = [a | {"logits": torch.cat((a["logits"], b["logits"]), -1)} for a, b in zip(first, second, strict=True)]
        assert all(torch.equal(a["losses"], b["losses"]) for a, b in zip(first, second, strict=True))
        wanted = expected(joined)
        assert run.scalars["lm loss"] == pytest.approx(wanted["lm loss"], rel=1e-5)
    elif layout == "pipeline":
        assert not first
        assert len(second) == len(one.ranks[0])
    else:
        tokens = [sum(int(each["loss_mask"].sum()) for each in half if each["training"]) for half in run.ranks]
        assert tokens[0] != tokens[1], "equal counts would hide a mean of means"


def test_nothing_of_ours_enters_the_configuration_that_bridge_writes(one: Run, folder: Path) -> None:
    written = (folder / "one.yaml").read_text()
    assert "calculate_per_token_loss: true" in written
    saved = [path for path in one.folder.rglob("run_config.yaml") if "checkpoints" in path.parts]
    assert saved, "Bridge writes the configuration into each checkpoint"
    for text in (written, *(path.read_text() for path in saved)):
        assert "nemo_eaft" not in text
        assert "hook" not in text
    said = torch.load(folder / "refusals-0.pt", weights_only=True)
    assert said["configuration read back"] == "ConfigContainer"


REFUSALS = {
    "calculate_per_token_loss": "ValueError: cfg.model.calculate_per_token_loss: False; allowed: True.",
    "linear cross-entropy": "ValueError: cfg.model.cross_entropy_fusion_impl: 'linear'; allowed: 'native' or 'te'",
    "schedule plan": "ValueError: cfg.model.overlap_moe_expert_parallel_comm: True; allowed: False",
    "full-iteration graph": "ValueError: cfg.model.cuda_graph_scope: full_iteration; allowed: any other",
    "full-iteration graph, a name": "ValueError: cfg.model.cuda_graph_scope: full_iteration; allowed: any other",
    "prediction heads": "ValueError: cfg.model.mtp_num_layers: 1; allowed: None.",
    "virtual pipeline": "ValueError: cfg.model.overlap_p2p_comm: False; allowed: True, with batch_p2p_comm=False",
    "no vocabulary size": "ValueError: vocab_size: the model's configuration does not name one",
    "vocabulary too large": "ValueError: vocab_size: 1000; allowed: 2 to 252",
    "hook twice": "ValueError: model: GPTModel.compute_language_model_loss is replaced already",
    "average_in_collective": "ValueError: cfg.ddp.average_in_collective: True; allowed: False.",
    "average_in_collective in DDP": "AssertionError: Cannot average in collective when calculating per-token loss!",
    "FSDP": "ValueError: cfg.dist.use_megatron_fsdp: True; allowed: False",
    "averaged gradients": "ValueError: gradient_scaling_factor is 0.5 on a model chunk, expected 1.0",
    "no hook": "RuntimeError: EAFT's forward_step, but the model has no EAFT loss",
    "replaced": "RuntimeError: EAFT's forward_step, but the model has no EAFT loss",
    "replaced, Bridge's step": "RuntimeError: EAFT is configured but its loss was never called in the forward of "
    "GPTModel: tests.bridge.unit.other took its place after the pre-wrap hook",
    "never called": "RuntimeError: EAFT is configured but its loss was never called in the forward of GPTModel: the "
    "model computes its loss elsewhere",
    "ignored label under the mask": "ValueError: labels: -100 (ignore_index) where the loss mask is 1",
}


def test_what_would_train_something_else_is_refused(folder: Path) -> None:
    said = torch.load(folder / "refusals-0.pt", weights_only=True)["refused"]
    assert said.keys() == REFUSALS.keys()
    for name, message in REFUSALS.items():
        assert said[name].startswith(message), f"{name}: {said[name]}"


def test_one_micro_batch(folder: Path) -> None:
    """A padded model: EAFT, its gradient, and alpha = 0 beside Bridge's own step."""
    seen = torch.load(folder / "refusals-0.pt", weights_only=True)["micro_batch"]
    assert seen["padded vocabulary"] == 252
    assert seen["loss"] == pytest.approx(seen["loss by formula"], rel=1e-6)
    assert seen["tokens"] == seen["tokens in report"]
    assert seen["gradient, relative difference"] < 1e-5
    # Bridge's own step counts the padding columns, unless they cannot be predicted.
    assert seen["alpha 0"] == pytest.approx(seen["bridge without padding"], rel=1e-6)
    assert abs(seen["alpha 0"] - seen["bridge"]) > 1e-4
    assert seen["labels of the caller unchanged"]


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """The example as it is, in bfloat16 with Transformer Engine, where the image has Bridge."""
    pytest.importorskip("transformer_engine")
    (tmp_path / "rows").mkdir()
    models.save_model("llama", tmp_path / "hf")
    models.write_rows(tmp_path / "rows" / "training.jsonl", 32, seed=1)
    models.write_rows(tmp_path / "rows" / "validation.jsonl", 16, seed=2)
    run(tmp_path, 1, "checkpoint", "one")
    one = finished(tmp_path, "one", 1)
    for name, wanted in expected(one.ranks[0]).items():
        assert one.scalars[name] == pytest.approx(wanted, rel=1e-4, abs=1e-6), name
