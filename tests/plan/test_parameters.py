"""Parameter counts against transformers on the meta device and against published weights, and per rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.parameters import PARTS, model_parameters, rank_parameters
from nemo_eaft.plan.shape import ModelShape, find_config, find_shape, shipped_models

# total_size of model.safetensors.index.json, which came with the weights: bytes of all tensors, two for each parameter
# (from public copies of the file; models whose weights are one file have none, of the others' no copy was found).
INDEX_BYTES = {
    "Qwen/Qwen3-8B": 16_381_470_720,
    "Qwen/Qwen3-14B": 29_536_614_400,
    "Qwen/Qwen3-32B": 65_524_246_528,
    "Qwen/Qwen3-30B-A3B": 61_064_245_248,
    "Qwen/Qwen2.5-7B-Instruct": 15_231_233_024,
    "Qwen/Qwen2.5-14B-Instruct": 29_540_067_328,
    "Qwen/Qwen2.5-32B-Instruct": 65_527_752_704,
}

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 20},
    "mistral": {"head_dim": 12},
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "qwen3 with biases": {"attention_bias": True, "head_dim": 8},
    "qwen3 of the usual heads": {},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4 with biases": {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
}


def config_of(name: str) -> dict[str, Any]:
    return {"model_type": name.split()[0]} | TINY | FAMILIES[name]


def of_transformers(values: dict[str, Any]) -> int:
    """Parameters of the model that `transformers` builds from a config.json, a tied one once."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    # What save_pretrained left out of config.json is the family's default, as for a user's folder.
    config = AutoConfig.for_model(**values)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_models_have_the_parameters_of_transformers(name: str) -> None:
    assert model_parameters(find_shape(name)) == of_transformers(find_config(name))


@pytest.mark.parametrize("name", INDEX_BYTES)
def test_shipped_models_have_the_parameters_of_the_published_weights(name: str) -> None:
    assert 2 * model_parameters(find_shape(name)) == INDEX_BYTES[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_counted_as_transformers_builds_it(name: str) -> None:
    values = config_of(name)
    assert model_parameters(ModelShape.from_hf(values)) == of_transformers(values)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("change", ["hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size"])
def test_a_wrong_size_is_another_count(name: str, change: str) -> None:
    values = config_of(name)
    key = "moe_intermediate_size" if change == "intermediate_size" and "moe" in name else change
    wrong = values | {key: values[key] * 2} if key != "num_key_value_heads" else values | {key: 3}
    assert model_parameters(ModelShape.from_hf(wrong)) != model_parameters(ModelShape.from_hf(values))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "layout",
    [
        Layout(world_size=2, tensor=2, sequence=True),
        Layout(world_size=2, pipeline=2),
        Layout(world_size=8, tensor=2, pipeline=2, virtual_pipeline=2),
        Layout(world_size=6, pipeline=3, last_stage_layers=2),
    ],
    ids=["TP2", "PP2", "TP2 PP2 VPP2", "PP3, last stage 2 layers"],
)
def test_ranks_hold_the_model_once(name: str, layout: Layout) -> None:
    """Sharded tensors add up over the tensor-parallel ranks; norms, routers and biases behind a sum are on each."""
    shape = ModelShape.from_hf(config_of(name))
    stages = [rank_parameters(shape, layout, stage) for stage in range(layout.pipeline)]
    whole = rank_parameters(shape, Layout(world_size=1), 0)
    ranks = layout.tensor
    for part in PARTS:
        held = sum(stage.of(part) for stage in stages)
        if part in ("norms", "router"):
            assert held == whole.of(part)
        elif part == "output_layer" and shape.tie_word_embeddings:
            # The last of several stages has a copy of a tied embedding.
            assert (whole.of(part), held * ranks) == (0, whole.embedding if layout.pipeline > 1 else 0)
        else:
            replicated = 0
            if part == "attention" and shape.projection_bias:
                replicated = shape.num_hidden_layers * shape.hidden_size
            if part == "mlp" and shape.mlp_bias:
                replicated += shape.num_hidden_layers * shape.hidden_size
            assert (held - replicated) * ranks + replicated == whole.of(part), part
    layers = [layer for stage in range(layout.pipeline) for chunk in layout.chunks(stage, 4) for layer in chunk]
    assert sorted(layers) == [0, 1, 2, 3]


def test_experts_are_shared_by_expert_parallel_ranks() -> None:
    shape = ModelShape.from_hf(config_of("qwen3_moe") | {"num_experts": 8})
    one, four = (rank_parameters(shape, Layout(world_size=4, expert=expert), 0) for expert in (1, 4))
    assert one.experts == 4 * four.experts
    assert one.total - one.experts == four.total - four.experts


def test_a_folder_wins_over_the_shipped_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Qwen" / "Qwen3-8B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of("qwen3")))
    monkeypatch.chdir(tmp_path)
    assert find_shape("Qwen/Qwen3-8B").hidden_size == TINY["hidden_size"]
    monkeypatch.chdir("/")
    assert find_shape("Qwen/Qwen3-8B").hidden_size == 4096


def test_the_local_cache_wins_over_the_shipped_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config_of("qwen3")))
    (tmp_path / "models--Qwen--Qwen3-8B" / "refs").mkdir()
    (tmp_path / "models--Qwen--Qwen3-8B" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert find_shape("Qwen/Qwen3-8B").hidden_size == TINY["hidden_size"]
    assert find_shape("Qwen/Qwen3-14B").hidden_size == 5120


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' cannot be planned; allowed: glm4, llama"),
        ({"hidden_size": None}, "hidden_size=None; expected a whole number of at least 1"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.hf: ") as error:
        ModelShape.from_hf(config_of("llama") | change)
    assert message in str(error.value)


def test_experts_in_some_layers_only_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mlp_only_layers=\[0\].*allowed are \[\] and 1"):
        ModelShape.from_hf(config_of("qwen3_moe") | {"mlp_only_layers": [0]})


@pytest.mark.parametrize("name", ["nobody/nothing", "../nowhere", "/nowhere/at/all", "a b", ""])
def test_a_model_that_is_nowhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.hf: "):
        find_shape(name)
