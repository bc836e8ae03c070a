"""The complete runs of ``conf/`` for large models: layouts that the published architectures allow, one key between EAFT
and plain fine-tuning, the same settings in all three domains. tests/nemo/test_recipes.py trains them in small."""

from __future__ import annotations

import re
import tomllib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

from nemo_eaft.compose import compose, shipped
from nemo_eaft.hf_model import check_model
from nemo_eaft.settings_mapping import difference
from tests.test_hf_model import Sized

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("math", "medical", "agent")


class Published(NamedTuple):
    """What the model's own config.json and card say."""

    hf: str
    model_type: str
    layers: int
    heads: int
    kv_heads: int
    width: int
    """Of a feed-forward layer, or of one expert."""
    vocab_size: int
    parameters: float
    """Billions."""
    experts: int = 0
    expert_parameters: float = 0.0
    """Billions, in all experts together."""


RECIPES = {
    "qwen3-4b-instruct-2507": Published("Qwen/Qwen3-4B-Instruct-2507", "qwen3", 36, 32, 8, 9728, 151936, 4.02),
    "qwen3-4b-thinking-2507": Published("Qwen/Qwen3-4B-Thinking-2507", "qwen3", 36, 32, 8, 9728, 151936, 4.02),
    "qwen3-8b": Published("Qwen/Qwen3-8B", "qwen3", 36, 32, 8, 12288, 151936, 8.19),
    "qwen3-32b": Published("Qwen/Qwen3-32B", "qwen3", 64, 64, 8, 25600, 151936, 32.76),
    # 48 layers x 128 experts x 3 matrices of 2048 x 768.
    "qwen3-30b-a3b": Published("Qwen/Qwen3-30B-A3B", "qwen3_moe", 48, 32, 4, 768, 151936, 30.53, 128, 28.99),
    "qwen2.5-7b": Published("Qwen/Qwen2.5-7B-Instruct", "qwen2", 28, 28, 4, 18944, 152064, 7.62),
    "qwen2.5-14b": Published("Qwen/Qwen2.5-14B-Instruct", "qwen2", 48, 40, 8, 13824, 152064, 14.77),
    "qwen2.5-32b": Published("Qwen/Qwen2.5-32B-Instruct", "qwen2", 64, 40, 8, 27648, 152064, 32.76),
    "glm-4-9b-0414": Published("THUDM/GLM-4-9B-0414", "glm4", 40, 32, 2, 13696, 151552, 9.40),
    "glm-4-32b-0414": Published("THUDM/GLM-4-32B-0414", "glm4", 61, 48, 2, 23040, 151552, 32.57),
    "smollm2-135m": Published("HuggingFaceTB/SmolLM2-135M-Instruct", "llama", 30, 9, 3, 1536, 49152, 0.135),
}


class Config:
    """A Hugging Face configuration, as far as the check reads it."""

    def __init__(self, published: Published) -> None:
        self.model_type = published.model_type
        self.num_hidden_layers = published.layers
        self.num_attention_heads = published.heads
        self.num_key_value_heads = published.kv_heads
        self.intermediate_size = published.width
        self.vocab_size = published.vocab_size
        self.num_experts = published.experts or None


def test_every_other_run_asks_for_rows_or_is_the_demo() -> None:
    assert set(shipped()) - set(RECIPES) == {"demo", "qwen2.5-0.5b", "qwen3-0.6b"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_architecture_allows_the_layout(name: str) -> None:
    published, settings = RECIPES[name], compose(name)
    assert settings.model.hf == published.hf
    check_model(settings, Config(published), Sized(published.vocab_size))


@pytest.mark.parametrize("name", RECIPES)
def test_weights_gradients_and_optimizer_leave_room_on_a_gpu_of_80_gb(name: str) -> None:
    """Weights in bfloat16, gradients in float32, and three float32 copies in the optimizer, which are split."""
    published, settings = RECIPES[name], compose(name)
    parallel = settings.parallel
    layers = settings.parallel.last_stage_layers
    # The others are the larger ones.
    share = (
        1 / parallel.pipeline
        if layers is None
        else (published.layers - layers) / ((parallel.pipeline - 1) * published.layers)
    )
    dense = (published.parameters - published.expert_parameters) * share / parallel.tensor
    experts = published.expert_parameters * share / parallel.expert
    copies = settings.data_parallel
    held = dense * (6 + 12 / copies) + experts * (6 + 12 / (copies / parallel.expert))
    assert settings.trainer.distributed_optimizer
    assert settings.trainer.precision == "bf16"
    # 20 GB are left for activations, the loss, NCCL and CUDA.
    assert held < 60, f"{held:.1f} GB"
    assert parallel.sequence == (parallel.tensor > 1)
    assert parallel.tensor <= 8


@pytest.mark.parametrize("name", RECIPES)
def test_plain_fine_tuning_is_one_key(name: str) -> None:
    settings = compose(name)
    assert settings.loss.gate == "eaft"
    assert difference(settings, compose(name, ["loss=sft"])) == [
        'loss.gate: "eaft" -> "stock"',
        'loss.fused_linear: "auto" -> false',
    ]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_domain_is_complete(name: str, domain: str) -> None:
    settings = compose(name, [f"data={domain}"])
    data, trainer = settings.data, settings.trainer
    assert data.mapping != "auto"
    # Rows that are held out are not trained on, and fill whole batches.
    assert data.validation == data.train
    assert data.validation_split == "train[:1280]"
    assert data.train_split.startswith("train[1280:")
    assert trainer.val_batches * trainer.global_batch_size == 1280
    assert trainer.warmup_steps * 10 == trainer.max_steps


def test_a_default_domain_can_be_replaced_and_leaves_nothing() -> None:
    settings = compose("qwen3-4b-thinking-2507")
    assert settings.data.reasoning_column == "Complex_CoT"
    other = compose("qwen3-4b-thinking-2507", ["data=agent"]).data
    assert (other.subset, other.reasoning_column, other.prompt_column) == (None, None, "prompt")


def test_a_layout_can_be_changed_on_the_command_line() -> None:
    changed: dict[str, Any] = {"parallel.pipeline": 4, "trainer.num_nodes": 4, "trainer.global_batch_size": 64}
    settings = compose("qwen3-32b", [f"{key}={value}" for key, value in changed.items()])
    assert (settings.world_size, settings.data_parallel) == (32, 1)


def test_the_commands_of_the_pages_are_complete() -> None:
    """And no setting in them is without effect."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    found = [line for page in pages for line in re.findall(r"^nemo-eaft train (.+)$", page.read_text(), re.MULTILINE)]
    assert len(found) >= 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for line in found:
            conf, *overrides = line.split()
            assert compose(conf, overrides).run.dir == overrides[-1].removeprefix("run.dir=")


def test_the_page_of_evaluation_installs_what_its_commands_need() -> None:
    """`nemo-eaft export` needs NeMo; `lm_eval run` came with 0.4.10."""
    text = (ROOT / "docs" / "evaluate.md").read_text()
    (extras,) = re.findall(r'^pip install -c constraints\.txt "\.\[(.+)\]"$', text, re.MULTILINE)
    assert set(extras.split(",")) == {"nemo", "eval"}
    assert "\nnemo-eaft export " in text
    assert "\nlm_eval run " in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (harness,) = map(Requirement, project["optional-dependencies"]["eval"])
    assert not harness.specifier.contains("0.4.9.2")
    assert harness.specifier.contains("0.4.10")


def test_comments_of_conf_are_not_too_wide() -> None:
    lines = [line for path in (ROOT / "nemo_eaft" / "conf").rglob("*.yaml") for line in path.read_text().splitlines()]
    assert len(lines) > 100
    assert [line for line in lines if len(line) > 120] == []
