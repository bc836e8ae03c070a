"""GLM-4-0414: what is converted is Hugging Face's model, and goes back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nemo import glm4_jobs, jobs
from tests.nemo.conftest import Workshop
from tests.nemo.models import save_tokenizer
from tests.nemo.ranks import run_ranks
from tests.nemo.test_conversion import read_config

MODELS: dict[str, dict[str, Any]] = {
    "as the 9B": {},
    "as the 32B, without bias": {"bias": False},
    "tied": {"tied": True},
}
TOKENS = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(3))


def huggingface_logits(workshop: Workshop, **changes: Any) -> torch.Tensor:
    with torch.no_grad():
        return workshop.model("glm4", **changes)(input_ids=TOKENS).logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same(workshop: Workshop, name: str) -> None:
    (logits,) = run_ranks(jobs.nemo_logits, 1, workshop.nemo("glm4", **MODELS[name]), TOKENS)
    assert logits.dtype == torch.float32
    expected = huggingface_logits(workshop, **MODELS[name])
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong", glm4_jobs.WRONG)
def test_a_wrong_layer_would_be_seen(workshop: Workshop, wrong: str) -> None:
    (logits,) = run_ranks(glm4_jobs.wrong_logits, 1, wrong, workshop.nemo("glm4"), TOKENS)
    assert float((logits - huggingface_logits(workshop)).abs().max()) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_changes_nothing(workshop: Workshop, name: str, tmp_path: Path) -> None:
    checkpoint = workshop.nemo("glm4", **MODELS[name])
    run_ranks(jobs.to_hf, 1, checkpoint, tmp_path / "hf", checkpoint / "hf")
    source = workshop.hf("glm4", **MODELS[name])
    assert_same_model(source, tmp_path / "hf")
    for file in ("config.json", "generation_config.json"):
        assert read_config(tmp_path / "hf", file) == read_config(source, file)


@pytest.mark.parametrize("family", ["glm4", "qwen2"])
def test_bfloat16_there_and_back(workshop: Workshop, family: str, tmp_path: Path) -> None:
    """What is published is bfloat16."""
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(workshop.hf(family), dtype=torch.bfloat16).save_pretrained(source)
    save_tokenizer(source)
    run_ranks(jobs.to_nemo, 1, source, tmp_path / "nemo")
    run_ranks(jobs.to_hf, 1, tmp_path / "nemo", tmp_path / "hf", tmp_path / "nemo" / "hf")
    assert_same_model(source, tmp_path / "hf", torch.bfloat16)


def test_there_and_back_by_nemo_alone(workshop: Workshop, tmp_path: Path) -> None:
    """A script has NeMo's own functions; what the exporter knows is then only in the checkpoint."""
    from transformers import GenerationConfig

    source = tmp_path / "source"
    shutil.copytree(workshop.hf("glm4"), source)
    # As GLM-4-0414 has them: several tokens end a text.
    ends = [5, 7, 249]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    GenerationConfig(eos_token_id=ends, pad_token_id=5, do_sample=True, temperature=0.6).save_pretrained(source)
    (left,) = run_ranks(glm4_jobs.by_nemo_alone, 1, source, tmp_path / "nemo", tmp_path / "hf")
    assert_same_model(source, tmp_path / "hf")
    for file in ("config.json", "generation_config.json"):
        assert read_config(tmp_path / "hf", file) == read_config(source, file)
    assert read_config(tmp_path / "hf", "generation_config.json")["eos_token_id"] == ends
    assert left == []


def assert_same_model(source: Path, output: Path, dtype: torch.dtype = torch.float32) -> None:
    """The same weights to the bit, and nothing missing when it is loaded."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    before, after = (load_file(folder / "model.safetensors") for folder in (source, output))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype == dtype, key
        assert torch.equal(after[key], tensor), key
    model, loading = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert type(model).__name__ == read_config(source, "config.json")["architectures"][0]
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling={'rope_type': 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_cannot_be_said_in_nemo_is_refused(
    workshop: Workshop, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    # Its weights are not there: they are not looked at.
    for path in workshop.hf("glm4").iterdir():
        if path.suffix == ".json":
            (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    (message,) = run_ranks(glm4_jobs.refused, 1, source, tmp_path / "nemo")
    assert message.startswith(named), message
    assert not (tmp_path / "nemo").exists()


def test_parameters_are_counted_as_by_hugging_face() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM, Glm4Config

    sizes = {
        "GLM4Config9B": {},
        "GLM4Config32B": {
            "hidden_size": 6144,
            "intermediate_size": 23040,
            "num_hidden_layers": 61,
            "num_attention_heads": 48,
            "attention_bias": False,
        },
    }
    (counts,) = run_ranks(glm4_jobs.parameter_counts, 1)
    expected = {}
    for name, size in sizes.items():
        # Not the meta device: torch.empty, which the tests poison, would not be seen by it.
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(Glm4Config(**size))
            expected[name] = sum(parameter.numel() for parameter in model.parameters())
    assert counts == expected == {"GLM4Config9B": 9_400_279_040, "GLM4Config32B": 32_566_081_536}


def test_the_layer_of_transformer_engine() -> None:
    (spec,) = run_ranks(glm4_jobs.transformer_engine_spec, 1)
    assert spec.module == "SandwichNormLayer"
    assert spec.modules == dict.fromkeys(spec.modules, True)
