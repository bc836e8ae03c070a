"""Whether settings fit a model, and where its conversion goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import Glm4Config, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from nemo_eaft.hf_model import check_model, home, imported_folder
from nemo_eaft.settings import ModelSettings, Settings
from nemo_eaft.settings_mapping import from_mapping


class Sized:
    """A tokenizer of which only the number of tokens counts."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens


def settings(ranks: int = 1, **groups: dict[str, Any]) -> Settings:
    base: dict[str, dict[str, Any]] = {
        "model": {"hf": "org/name"},
        "data": {"train": "t.jsonl"},
        "run": {"dir": "r"},
        "trainer": {"gpus_per_node": ranks, "global_batch_size": 24},
    }
    for name, values in groups.items():
        base[name] = base.get(name, {}) | values
    return from_mapping(base)


LLAMA = LlamaConfig(
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=102,
)


@pytest.mark.parametrize(
    "groups, ranks",
    [
        ({}, 1),
        ({"parallel": {"tensor": 3}}, 3),
        ({"parallel": {"pipeline": 2}}, 2),
        ({"parallel": {"pipeline": 2, "virtual_pipeline": 3}}, 2),
        ({"parallel": {"tensor": 3, "pipeline": 2, "virtual_pipeline": 5}}, 6),
        ({"parallel": {"pipeline": 4, "last_stage_layers": 6}}, 4),
        ({"parallel": {"pipeline": 2, "last_stage_layers": 13}}, 2),
    ],
)
def test_layouts_that_fit(groups: dict[str, Any], ranks: int) -> None:
    check_model(settings(ranks, **groups), LLAMA, Sized(100))


@pytest.mark.parametrize(
    "groups, ranks, named",
    [
        (
            {"parallel": {"tensor": 2}},
            2,
            "parallel.tensor=2 must divide the 9 attention heads and 3 key-value heads of org/name: allowed are 1, 3",
        ),
        (
            {"parallel": {"tensor": 9}, "trainer": {"global_batch_size": 8}},
            9,
            "parallel.tensor=9 must divide",
        ),
        (
            {"parallel": {"pipeline": 4}},
            4,
            "parallel.pipeline=4 must divide the 30 layers of org/name, or parallel.last_stage_layers says",
        ),
        (
            {"parallel": {"pipeline": 4, "last_stage_layers": 7}},
            4,
            "parallel.last_stage_layers=7 leaves 23 of the 30 layers of org/name to 3 stages, which must divide them: "
            "allowed are 3, 6, 9, 12, 15, 18, 21, 24, 27",
        ),
        ({"parallel": {"pipeline": 2, "last_stage_layers": 30}}, 2, "leaves 0 of the 30 layers"),
        (
            {"parallel": {"pipeline": 2, "virtual_pipeline": 4}},
            2,
            "parallel.pipeline=2 x parallel.virtual_pipeline=4 must divide the 30 layers",
        ),
        ({"parallel": {"expert": 2}}, 2, "parallel.expert=2: org/name has no experts: allowed is 1"),
    ],
)
def test_layouts_that_do_not(groups: dict[str, Any], ranks: int, named: str) -> None:
    with pytest.raises(ValueError) as error:
        check_model(settings(ranks, **groups), LLAMA, Sized(100))
    assert named in str(error.value)


def test_a_vocabulary_that_the_ranks_cannot_share_evenly() -> None:
    odd = LlamaConfig(num_attention_heads=9, num_key_value_heads=3, intermediate_size=96, vocab_size=100)
    with pytest.raises(ValueError, match=r"parallel\.tensor=3 must divide the 100 rows of the vocabulary of org/name"):
        check_model(settings(3, parallel={"tensor": 3}), odd, Sized(100))


def test_feed_forward_layers_that_the_ranks_cannot_share_evenly() -> None:
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 102}
    message = r"parallel\.tensor=3 must divide the width 100 of the feed-forward layers of org/name"
    for odd in (
        LlamaConfig(**sizes, intermediate_size=100),
        Qwen3MoeConfig(**sizes, intermediate_size=96, moe_intermediate_size=100),
    ):
        with pytest.raises(ValueError, match=message):
            check_model(settings(3, parallel={"tensor": 3}), odd, Sized(100))


def test_the_rule_for_heads_is_megatrons() -> None:
    """More ranks than key-value heads are refused there, so they are here."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    def megatron(tensor: int) -> bool:
        try:
            TransformerConfig(
                num_layers=2,
                hidden_size=64,
                num_attention_heads=8,
                num_query_groups=2,
                tensor_model_parallel_size=tensor,
            )
        except ValueError:
            return False
        return True

    def ours(tensor: int) -> bool:
        config = Qwen2Config(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, vocab_size=8)
        try:
            check_model(settings(tensor, parallel={"tensor": tensor}), config, Sized(8))
        except ValueError:
            return False
        return True

    assert [megatron(n) for n in (1, 2, 4, 8)] == [ours(n) for n in (1, 2, 4, 8)] == [True, True, False, False]


def test_glm4_has_two_key_value_heads() -> None:
    check_model(settings(4, parallel={"tensor": 2, "pipeline": 2}), Glm4Config(), Sized(9))
    with pytest.raises(
        ValueError, match=r"parallel\.tensor=4 must divide the 32 attention heads and 2 key-value heads"
    ):
        check_model(settings(4, parallel={"tensor": 4}), Glm4Config(), Sized(9))


def test_a_tokenizer_with_more_tokens_than_the_model() -> None:
    with pytest.raises(ValueError, match=r"model\.tokenizer=org/name has 103 tokens, the model .* only 102 rows"):
        check_model(settings(), LLAMA, Sized(103))


def test_experts() -> None:
    config = Qwen3MoeConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, num_experts=4, vocab_size=9
    )
    check_model(settings(2, parallel={"expert": 2}), config, Sized(9))
    with pytest.raises(ValueError, match=r"parallel\.expert=3: org/name has 4 experts"):
        check_model(settings(3, parallel={"expert": 3}), config, Sized(9))


def test_a_family_nemo_cannot_convert() -> None:
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="model type gpt2 cannot be converted; allowed are"):
        check_model(settings(), GPT2Config(), Sized(9))


def test_longer_than_the_model_was_made_for_is_said() -> None:
    short = LlamaConfig(num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=16, vocab_size=9)
    with pytest.warns(UserWarning, match=r"trainer\.seq_length=2048 is longer than the 16 positions"):
        check_model(settings(), short, Sized(9))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEMO_EAFT_HOME", str(tmp_path / "home"))
    folder = tmp_path / "My Model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_conversion_goes_below_home(model: Path) -> None:
    target = imported_folder(ModelSettings(hf=str(model)), model)
    assert target.parent == home() / "imported"
    assert target.name.startswith("My-Model-")
    assert target == imported_folder(ModelSettings(hf=str(model)), model)


def test_a_named_folder_wins(model: Path) -> None:
    assert imported_folder(ModelSettings(hf=str(model), imported="/x/y"), model) == Path("/x/y")


def test_other_weights_of_the_same_size_are_another_conversion(model: Path) -> None:
    hf = ModelSettings(hf=str(model))
    before = imported_folder(hf, model)
    (model / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert imported_folder(hf, model) != before


def test_another_tokenizer_is_another_conversion(model: Path) -> None:
    plain, other = ModelSettings(hf=str(model)), ModelSettings(hf=str(model), tokenizer="other")
    assert imported_folder(plain, model) != imported_folder(other, model)


def test_a_snapshot_of_the_hub_is_known_by_its_name(model: Path, tmp_path: Path) -> None:
    names = []
    for commit in ("abc", "def"):
        folder = tmp_path / "hub" / "snapshots" / commit
        folder.mkdir(parents=True)
        names.append(imported_folder(ModelSettings(hf="org/name"), folder).name)
        (folder / "config.json").write_text("{}")  # a file that arrives later changes nothing
        assert imported_folder(ModelSettings(hf="org/name"), folder).name == names[-1]
    assert names[0] != names[1]
    assert all(name.startswith("org-name-") for name in names)
