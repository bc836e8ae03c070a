"""Runs that are rehearsed in tests, and how a rehearsal is made without its command."""

from __future__ import annotations

from typing import Any

from nemo_eaft.settings import (
    LossSettings,
    ModelSettings,
    ParallelSettings,
    RunSettings,
    Settings,
    TrainerSettings,
)
from nemo_eaft.settings_data import DataSettings

# Tied, with a bias on queries, keys and values, and kv heads that two ranks share.
QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 520,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}
# Heads of 16, where hidden_size / num_attention_heads is 16 too, would hide a lost head_dim.
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "vocab_size": 520,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
}
# Two norms more in each layer, a bias on queries, keys and values, and a single head of keys for each of two ranks.
GLM4: dict[str, Any] = {
    "model_type": "glm4",
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 520,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
}


def settings_of(model: str, world: int, *, trainer: dict[str, Any] | None = None, **parallel: Any) -> Settings:
    """A run of `world` ranks on machines of eight."""
    sizes = ParallelSettings(**parallel)
    per_node = min(world, 8)
    copies = world // sizes.model_ranks
    values: dict[str, Any] = {"num_nodes": world // per_node, "gpus_per_node": per_node}
    values["global_batch_size"] = copies * 4 * sizes.pipeline
    return Settings(
        model=ModelSettings(hf=model),
        data=DataSettings(train="rows.jsonl"),
        loss=LossSettings(fused_linear=True),
        parallel=sizes,
        trainer=TrainerSettings(**values, **(trainer or {})),
        run=RunSettings(dir="runs/rehearsal"),
    )


TIED = settings_of("tiny", 8, tensor=2, pipeline=2, virtual_pipeline=2)
"""TP 2, PP 2, VPP 2, DP 2."""
WHOLE_OPTIMIZER = settings_of("tiny", 4, tensor=2, trainer={"distributed_optimizer": False})
"""TP 2, DP 2, every rank with the optimizer of all that it holds."""
STAGES = settings_of("tiny", 4, pipeline=2, context=2, trainer={"precision": "fp32"})
"""PP 2, CP 2, float32."""
EXPERTS = settings_of("tiny", 16, tensor=2, pipeline=2, expert=4, sequence=True)
"""TP 2, PP 2, EP 4, DP 4."""
QWEN3_30B_A3B = settings_of("Qwen/Qwen3-30B-A3B", 64, pipeline=2, expert=4)
"""PP 2, EP 4, DP 32."""
SANDWICHED = settings_of("tiny", 8, tensor=2, pipeline=2, sequence=True, last_stage_layers=2)
"""TP 2, PP 2 of three layers and two, DP 2."""
GLM_4_32B = settings_of("THUDM/GLM-4-32B-0414", 64, tensor=2, pipeline=4, sequence=True, last_stage_layers=13)
"""TP 2, PP 4 of three times 16 layers and 13, DP 8."""
