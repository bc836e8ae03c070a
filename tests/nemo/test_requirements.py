"""What a NeMo script can forget when it uses EAFTCallback: each mistake has a message of its own, on every rank."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nemo import jobs, mistakes, scripts
from tests.nemo.conftest import Workshop
from tests.nemo.ranks import run_ranks

Said = list[tuple[jobs.Recorded, list[str]]]


def script(workshop: Workshop, run_dir: Path, mistake: str, world: int = 1, **changes: Any) -> Said:
    spec = scripts.Script(
        workshop.nemo("llama"), workshop.rows, run_dir, world=world, average_in_collective=False, **changes
    )
    return run_ranks(mistakes.run, world, spec, mistake)


@pytest.mark.parametrize(
    "mistake, world, message",
    [
        ("in the constructor", 1, "ValueError: nl.Trainer(callbacks=[EAFTCallback(...)]): NeMo would write it into"),
        ("twice", 1, "ValueError: trainer.callbacks: 2 times EAFTCallback; allowed: once"),
        ("another strategy", 1, "ValueError: trainer.strategy: DDPStrategy; EAFTCallback needs"),
        # NeMo's own message comes first.
        ("pytorch DDP", 1, "ValueError: PyTorch DDP is not enabled for mcore optimizer"),
        ("FSDP", 1, "ValueError: trainer.strategy: MegatronStrategy(ddp=...) must be 'megatron'"),
        ("accumulation", 1, "ValueError: trainer.accumulate_grad_batches: 2; allowed: 1."),
        ("virtual pipeline", 2, "RuntimeError: virtual pipeline with pipeline_model_parallel_size=2 needs overlap_p2p"),
        ("small vocabulary", 1, "ValueError: vocab_size: 200; allowed: 250 (the tokenizer's tokens) or more"),
        ("large vocabulary", 1, "ValueError: vocab_size: 300; allowed: 2 to 252, the model's padded vocabulary"),
        ("in on_fit_start", 1, "RuntimeError: EAFTCallback was appended to trainer.callbacks after the fit began"),
        ("in on_train_start", 1, "RuntimeError: EAFTCallback was appended to trainer.callbacks after the fit began"),
        ("in on_train_batch_start", 1, "RuntimeError: EAFTCallback was appended to trainer.callbacks after the fit"),
        ("in on_train_batch_end", 1, "RuntimeError: EAFTCallback was appended to trainer.callbacks after the fit"),
        ("LoRA on the output layer", 1, "ValueError: fused_linear: True; allowed: False with this model: its output"),
        ("replaced", 2, "its loss was never called in the first step: tests.nemo.mistakes.another_loss"),
        ("replaced before", 1, "ValueError: model: GPTModel.compute_language_model_loss is replaced already"),
        ("two values", 1, "RuntimeError: the gradient would be divided by 0, but "),
        ("tokens not summed", 2, "RuntimeError: the gradient would be divided by 4, but "),
        ("no optimizer", 1, "RuntimeError: model.config.finalize_model_grads_func is not set"),
    ],
)
def test_a_mistake_is_named_on_every_rank(
    workshop: Workshop, tmp_path: Path, mistake: str, world: int, message: str
) -> None:
    pipeline = 2 if mistake == "virtual pipeline" else 1
    ranks = script(workshop, tmp_path, mistake, world, pipeline=pipeline, learning_rate=1e-2)
    assert len(ranks) == world
    for seen, _ in ranks:
        assert seen.error is not None
        assert message in seen.error
        if not mistake.startswith("in on_train_batch_"):
            assert seen.losses == []
        for name, before in seen.initial.items():
            if mistake == "in on_train_batch_end" or not seen.final:
                continue
            for left, right in zip(before, seen.final[name], strict=True):
                assert torch.equal(left.data, right.data), name


def test_nothing_is_forgotten(workshop: Workshop, tmp_path: Path) -> None:
    """The harness itself makes no mistake."""
    ((seen, _),) = script(workshop, tmp_path, "nothing")
    assert seen.error is None
    assert len(seen.losses) == 1


def test_nemos_progress_printer(workshop: Workshop, tmp_path: Path) -> None:
    """On the CPU, rank 0 alone would gather the timers of all ranks, and hang; nemo_eaft.cpu answers that."""
    for seen, _ in script(workshop, tmp_path, "progress printer", 2):
        assert seen.error is None
        assert len(seen.losses) == len(seen.val_losses) == 1


def test_a_cross_entropy_that_is_not_used_is_warned_of(workshop: Workshop, tmp_path: Path) -> None:
    ((seen, warned),) = script(workshop, tmp_path, "TE cross-entropy")
    assert seen.error is None
    assert any("cross_entropy_fusion_impl='te' has no effect" in text for text in warned)


def test_the_range_of_an_option() -> None:
    from nemo_eaft.nemo import EAFTCallback

    with pytest.raises(ValueError, match="check_replicas: -1; allowed: 0"):
        EAFTCallback(check_replicas=-1)


@pytest.mark.parametrize(
    "version, message",
    [
        ("1.23.0", "nemo_eaft.nemo needs nemo_toolkit 2.5 or later and below 3.0 (tested with 2.7.3), found 1.23.0"),
        ("3.0.0", "(tested with 2.7.3), found 3.0.0"),
        (None, "nemo_eaft.nemo needs nemo_toolkit 2.5 or later and below 3.0 (tested with 2.7.3), which cannot be"),
    ],
)
def test_other_versions(tmp_path: Path, version: str | None, message: str) -> None:
    """A module of that name and version, or one that cannot be imported."""
    text = f"__version__ = {version!r}\n" if version else "raise ImportError('libcudart.so.13')\n"
    (tmp_path / "nemo").mkdir()
    (tmp_path / "nemo" / "__init__.py").write_text(text)
    paths = [str(tmp_path), str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-c", "import nemo_eaft.nemo"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert message in last
