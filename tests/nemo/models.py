"""Tiny random models, a tokenizer, rows and settings that the tests of this folder train with."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch

from nemo_eaft.settings import (
    LossSettings,
    ModelSettings,
    ParallelSettings,
    RunSettings,
    Settings,
    TrainerSettings,
)
from nemo_eaft.settings_data import DataSettings

TOKENS = 250
"""Size of the tokenizer."""
VOCAB_SIZE = 252
"""Rows of the models: not the tokenizer's size, divisible by 2, 3 and 4, not by 128."""
SEQ_LENGTH = 48

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "glm4")
WINDOW = 7
"""Tokens that a token of the `mistral` family sees, itself among them."""


def save_tokenizer(folder: Path) -> None:
    """A tokenizer whose words are t0, t1, ..., one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{index}": index for index in range(TOKENS - 3)}
    words |= {"<pad>": TOKENS - 3, "<s>": TOKENS - 2, "</s>": TOKENS - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="t0"
    ).save_pretrained(folder)


def save_model(
    family: str,
    folder: Path,
    *,
    heads: int = 4,
    vocab_size: int = VOCAB_SIZE,
    tied: bool | None = None,
    bias: bool = True,
) -> None:
    """A random float32 model of `family` with its tokenizer, as `save_pretrained` writes them.

    Its weights are large enough for sharp predictions: some tokens are confident conflicts, others near uniform.
    `tied`: whether the output layer is the embedding; None: as the smaller models of the family, but Llama's.
    `bias`: of GLM-4's query, key and value; only the 9B has them.
    """
    from transformers import (
        AutoModelForCausalLM,
        Glm4Config,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 16 * heads,
        "intermediate_size": 32 * heads,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": family in ("qwen2", "qwen3") if tied is None else tied,
        "bos_token_id": TOKENS - 2,
        "eos_token_id": TOKENS - 1,
        "initializer_range": 0.1,
        "rope_theta": 50_000.0,
    }
    configs: dict[str, Any] = {
        "llama": lambda: LlamaConfig(**common, rms_norm_eps=1e-5),
        "mistral": lambda: MistralConfig(**common, rms_norm_eps=1e-5, sliding_window=WINDOW),
        "qwen2": lambda: Qwen2Config(**common, rms_norm_eps=1e-6),
        "qwen3": lambda: Qwen3Config(**common, rms_norm_eps=1e-6, head_dim=32),
        # No auxiliary loss: it is of a micro-batch, so it depends on how the batch is cut.
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **common,
            rms_norm_eps=1e-6,
            head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16 * heads,
            norm_topk_prob=True,
            router_aux_loss_coef=0.0,
        ),
        # A head is not hidden_size / heads wide, and half of it is rotated.
        "glm4": lambda: Glm4Config(
            **common | {"num_key_value_heads": 2},
            rms_norm_eps=1e-5,
            head_dim=24,
            partial_rotary_factor=0.5,
            attention_bias=bias,
            pad_token_id=TOKENS - 3,
        ),
    }
    generator_state = torch.get_rng_state()
    torch.manual_seed(FAMILIES.index(family))
    model = AutoModelForCausalLM.from_config(configs[family](), torch_dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms start at one and biases at zero, where a conversion that drops them would go unseen.
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(std=0.2)
        # Tied, it also says which token comes next to which, so less is enough.
        model.get_output_embeddings().weight.mul_(2.0 if model.config.tie_word_embeddings else 5.0)
    torch.set_rng_state(generator_state)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def write_rows(path: Path, count: int, seed: int) -> None:
    """`input`/`output` rows with prompts of 1 to 20 and answers of 1 to 24 words; no two answers are equal."""
    chosen = random.Random(seed)
    seen: set[str] = set()
    with path.open("w") as file:
        while len(seen) < count:
            words = [[f"t{chosen.randrange(TOKENS - 3)}" for _ in range(chosen.randint(1, n))] for n in (20, 24)]
            prompt, answer = (" ".join(part) for part in words)
            if answer not in seen:
                seen.add(answer)
                file.write(json.dumps({"input": prompt, "output": answer}) + "\n")


def run_settings(hf: Path, rows: Path, run_dir: Path, **changes: Any) -> Settings:
    """A run on `rows/training.jsonl` and `rows/validation.jsonl`; `changes` are groups of settings."""
    trainer: dict[str, Any] = {
        "max_steps": 10,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "seq_length": SEQ_LENGTH,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "distributed_optimizer": False,
        "val_every": 0,
        "val_batches": 2,
        "save_every": 1000,
        "histogram_every": 0,
        "seed": 7,
    } | changes.get("trainer", {})
    parallel = changes.get("parallel", {})
    settings = Settings(
        model=ModelSettings(hf=str(hf)),
        data=DataSettings(
            **{
                "train": str(rows / "training.jsonl"),
                "validation": str(rows / "validation.jsonl"),
                "num_workers": 0,
            }
            | changes.get("data", {})
        ),
        loss=LossSettings(**changes.get("loss", {})),
        parallel=ParallelSettings(**parallel),
        trainer=TrainerSettings(**trainer),
        run=RunSettings(dir=str(run_dir), backend="cpu"),
    )
    return settings


def with_dir(settings: Settings, run_dir: Path) -> Settings:
    """The same run in another folder."""
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, dir=str(run_dir)))
