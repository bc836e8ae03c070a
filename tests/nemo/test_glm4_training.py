"""GLM-4-0414 trains alike however it is split, goes on under another layout, and comes back from the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nemo import glm4_jobs
from tests.nemo.conftest import Run, Workshop, assemble
from tests.nemo.models import TOKENS
from tests.nemo.ranks import run_ranks
from tests.nemo.test_layouts import Layout, assert_first_step

STEPS = 6
SAVED = 3
NORMS = ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")
LAYOUTS = {
    "one": Layout(1),
    "tp2": Layout(2, {"tensor": 2}),
    "tp2-sequence": Layout(2, {"tensor": 2, "sequence": True}),
    "tp2-sequence-recompute": Layout(2, {"tensor": 2, "sequence": True}, {"recompute": "full"}),
    "pp2": Layout(2, {"pipeline": 2}),
    "vpp2": Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
}


def train(workshop: Workshop, name: str, **model: Any) -> Run:
    layout = LAYOUTS[name]
    save = name == "tp2"
    return workshop.train(
        "-".join(["glm4", name, *model]),
        "glm4",
        world=layout.world,
        model=model,
        parallel=layout.parallel,
        trainer={"max_steps": STEPS, "save_every": SAVED} | layout.trainer,
        plan={"save": save},
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_hugging_faces_first_and_follows_one_rank(workshop: Workshop, name: str) -> None:
    run, one = train(workshop, name), train(workshop, "one")
    assert_first_step(workshop, run, "glm4")
    assert run.losses[0] == pytest.approx(one.losses[0], rel=1e-5)
    assert run.losses == pytest.approx(one.losses, rel=1e-4)
    start, end, expected = (
        assemble([getattr(rank, part) for rank in which.ranks])
        for which, part in ((one, "initial"), (run, "final"), (one, "final"))
    )
    assert start.keys() == end.keys() == expected.keys()
    assert [sum(key.endswith(norm) for key in end) for norm in NORMS] == [1, 1]
    for key, weight in expected.items():
        learned, apart = weight - start[key], end[key] - weight
        assert learned.any(), f"{key} did not learn"
        if key.endswith("linear_qkv.bias"):
            without_null_directions(apart)
        assert float(apart.norm() / learned.norm()) < 1e-3, key


def without_null_directions(bias: torch.Tensor) -> None:
    """Adds the same to every score of a query, so its gradient is rounding, which Adam makes a step of."""
    # [layers, groups, the group's two heads and its key and value, head]: the half of the key that is not rotated.
    bias.view(4, 2, 4, 24)[:, :, 2, 12:] = 0


def test_without_bias_too(workshop: Workshop) -> None:
    run = train(workshop, "tp2-sequence", bias=False)
    assert_first_step(workshop, run, "glm4", bias=False)
    assert not any(key.endswith("bias") for key in run.ranks[0].final)


def test_recompute_changes_nothing(workshop: Workshop) -> None:
    assert train(workshop, "tp2-sequence-recompute").losses == train(workshop, "tp2-sequence").losses


def test_a_norm_that_sequence_parallelism_forgets_would_be_seen(workshop: Workshop) -> None:
    run = workshop.train(
        "glm4-forgotten",
        "glm4",
        world=2,
        parallel={"tensor": 2, "sequence": True},
        trainer={"max_steps": 1},
        plan={"wrong": glm4_jobs.forget_sequence_parallelism},
    )
    with pytest.raises(AssertionError, match=r"post_self_attn_layernorm.weight differs on rank 1"):
        assemble([rank.final for rank in run.ranks])


def test_it_goes_on_under_another_layout(workshop: Workshop) -> None:
    source = train(workshop, "tp2")
    folder = workshop.root / "runs" / "glm4-pp2-resumed" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copytree(source.dir / "checkpoints" / f"step={SAVED - 1}", folder / f"step={SAVED - 1}")
    run = workshop.train(
        "glm4-pp2-resumed",
        "glm4",
        world=2,
        parallel={"pipeline": 2},
        trainer={"max_steps": STEPS, "save_every": SAVED},
        plan={"save": True},
    )
    assert len(run.losses) == STEPS - SAVED
    assert run.losses[0] == pytest.approx(source.losses[SAVED], rel=1e-5)
    assert run.losses == pytest.approx(source.losses[SAVED:], rel=1e-4)


def test_a_checkpoint_is_read_in_full_by_a_script(workshop: Workshop) -> None:
    """NeMo's unpickler allows no class of ours: a context must not hold any."""
    checkpoint = train(workshop, "tp2").dir / "checkpoints" / f"step={STEPS - 1}"
    (names,) = run_ranks(glm4_jobs.context_of, 1, checkpoint)
    assert names == ("Trainer", "GLM4Model", "GLM4Config", "SandwichNormLayer")


def test_the_command_line(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nemo-eaft train` imports and trains on two ranks; `nemo-eaft export` gives what transformers loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_eaft import cli, recorder

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEMO_EAFT_HOME", str(tmp_path / "home"))
    source, run_dir = workshop.hf("glm4"), tmp_path / "run"
    conf = {
        "model": {"hf": str(source)},
        "data": {"train": str(workshop.rows / "training.jsonl"), "num_workers": 0},
        "parallel": {"tensor": 2, "sequence": True},
        "trainer": {
            "gpus_per_node": 2,
            "max_steps": 2,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "seq_length": 48,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "seed": 7,
        },
        "run": {"dir": str(run_dir), "backend": "cpu"},
    }
    (tmp_path / "glm4.yaml").write_text(json.dumps(conf))
    assert cli.main(["train", str(tmp_path / "glm4.yaml")]) == 0
    assert cli.main(["export", str(run_dir), str(tmp_path / "hf")]) == 0

    losses = [row["loss"] for row in recorder.read(run_dir / "metrics.jsonl") if "loss" in row]
    assert losses == pytest.approx(train(workshop, "one").losses[:2], rel=1e-4)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == TOKENS
    before = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for key, weight in model.state_dict().items():
        assert not torch.equal(weight, before[key]), f"{key} is that of the imported model"
