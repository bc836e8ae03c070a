"""Every complete run of ``conf/`` is trained two steps in small, and what it saved is exported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_eaft.checkpoints import checkpoints_in
from nemo_eaft.data import read_prepared
from tests.nemo import jobs, recipes
from tests.nemo.conftest import Run, Workshop, assemble
from tests.nemo.ranks import run_ranks
from tests.nemo.recipes import Recipes


@pytest.mark.parametrize("name", recipes.FAMILIES)
def test_two_steps(made: Recipes, name: str) -> None:
    run = made.train(name)
    prepared = read_prepared(run.dir / "data")
    assert (prepared.train_rows, prepared.train_skipped, prepared.validation_rows) == (16, 0, 8)
    assert [step["step"] for step in run.steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) and step["weight"] > 0 for step in run.steps)
    # Every row once in two steps of eight.
    assert sum(step["tokens"] for step in run.steps) == prepared.train_answer_tokens
    assert [validation["step"] for validation in run.validations] == [2]
    # NeMo counts from 0.
    assert [path.name for path in checkpoints_in(run.dir)] == ["step=1"]
    layers = [held_layers(rank) for rank in run.ranks]
    assert set().union(*layers) == set(range(recipes.LAYERS))
    if run.settings.parallel.pipeline == 2:
        assert sorted({len(held) for held in layers}) == ([1, 3] if run.settings.parallel.last_stage_layers else [2])


def held_layers(rank: jobs.Recorded) -> set[int]:
    """Numbers of the layers that a rank holds, by the places of its pieces in the tensors of all layers."""
    pieces = rank.final["module.decoder.layers.self_attention.linear_proj.weight"]
    return {piece.offset[0] for piece in pieces}


@pytest.mark.parametrize("names", [["qwen3-8b", "qwen3-32b"], ["qwen2.5-7b", "qwen2.5-32b"]])
def test_layouts_of_one_family_train_alike(made: Recipes, names: list[str]) -> None:
    """Sequence parallelism with one stage, and with two."""
    one, other = (made.train(name) for name in names)
    assert one.settings.parallel != other.settings.parallel
    assert other.losses[0] == pytest.approx(one.losses[0], abs=1e-5)
    assert other.losses[1] == pytest.approx(one.losses[1], abs=1e-4)
    assert abs(one.losses[1] - one.losses[0]) > 1e-3


@pytest.mark.parametrize("name", ["qwen3-32b", "qwen3-30b-a3b"])
def test_what_a_split_run_saved_is_exported(made: Recipes, name: str) -> None:
    """TP2 x PP2, and experts on two ranks with every layer computed again and the optimizer state split."""
    run = made.train(name)
    parallel = run.settings.parallel
    assert (parallel.tensor, parallel.pipeline, parallel.expert) == ((2, 2, 1) if name == "qwen3-32b" else (1, 1, 2))
    exported_equals_trained(run, made.export(name))


def test_an_uneven_pipeline(workshop: Workshop, tmp_path: Path) -> None:
    """The last stage has one layer of four; it trains as one rank, and exports whole."""
    plan = {"save": True}
    trainer = {"max_steps": 2, "save_every": 2}
    run = workshop.train(
        "uneven", world=2, parallel={"pipeline": 2, "last_stage_layers": 1}, trainer=trainer, plan=plan
    )
    assert [sorted(held_layers(rank)) for rank in run.ranks] == [[0, 1, 2], [3]]
    single = workshop.train("tp1-two-steps", trainer={"max_steps": 2})
    assert run.losses[0] == pytest.approx(single.losses[0], abs=1e-5)
    assert run.losses[1] == pytest.approx(single.losses[1], abs=1e-4)
    (checkpoint,) = checkpoints_in(run.dir)
    run_ranks(jobs.to_hf, 1, checkpoint, tmp_path / "hf", checkpoint / "context" / "hf")
    exported_equals_trained(run, tmp_path / "hf")


def exported_equals_trained(run: Run, output: Path) -> None:
    """`transformers` gives the logits of the trained model, and not those of the one that training started from."""
    from transformers import AutoModelForCausalLM

    (checkpoint,) = checkpoints_in(run.dir)
    tokens = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(5))
    (expected,) = run_ranks(jobs.nemo_logits, 1, checkpoint, tokens)
    logits = [logits_of(AutoModelForCausalLM, folder, tokens) for folder in (output, Path(run.settings.model.hf))]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-4)
    assert (logits[1] - expected).abs().max() > 1e-3
    # And these are the weights that the ranks held when they ended, bit for bit.
    whole = assemble([rank.final for rank in run.ranks])
    model = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(model.model.embed_tokens.weight, whole["module.embedding.word_embeddings.weight"])
    assert torch.equal(model.model.norm.weight, whole["module.decoder.final_layernorm.weight"])
    projections = whole["module.decoder.layers.self_attention.linear_proj.weight"]
    for layer, projection in zip(model.model.layers, projections, strict=True):
        assert torch.equal(layer.self_attn.o_proj.weight, projection)


@torch.no_grad()
def logits_of(auto: Any, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    return auto.from_pretrained(folder)(input_ids=tokens).logits
