"""What a GLM-4 model writes on the CPU is what one of Transformer Engine's layers reads.

The layer has a Qwen2 layer's tensors, whose names `test_checkpoint_keys` derives from Transformer Engine's layers, and
two norms more, each a `TENorm` of its own: replicated over the tensor-parallel ranks, with an extra state.
"""

from typing import Any

import pytest

from tests.cpu import models
from tests.cpu.test_checkpoint_keys import (
    FFN,
    GROUPS,
    HEADS,
    HIDDEN,
    LAYERS,
    Entry,
    entries_of,
    transformer_engine_entries,
)
from tests.nemo.ranks import run_ranks


def written(tensor: int, pipeline: int, bias: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    from nemo_eaft.glm4 import GLM4Config

    models.start(tensor, pipeline)
    config = GLM4Config(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HIDDEN // HEADS,
        add_qkv_bias=bias,
        vocab_size=models.PADDED_VOCAB_SIZE,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype="float32",
    )
    return {
        "entries": entries_of(config.configure_model(None).sharded_state_dict()),
        "tensor rank": parallel_state.get_tensor_model_parallel_rank(),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
    }


@pytest.mark.parametrize("tensor, pipeline, bias", [(1, 1, True), (2, 1, False), (1, 2, True)])
def test_entries_are_those_of_transformer_engine(tensor: int, pipeline: int, bias: bool) -> None:
    for found in run_ranks(written, tensor * pipeline, tensor, pipeline, bias):
        count, rank, stage = LAYERS // pipeline, found["tensor rank"], found["stage"]
        layers = range(stage * count, (stage + 1) * count)
        expected = transformer_engine_entries(
            "qwen2" if bias else "llama",
            False,
            tensor,
            rank,
            layers,
            first=stage == 0,
            last=stage == pipeline - 1,
        )
        for layer in layers:
            for norm in ("post_self_attn_layernorm", "post_mlp_layernorm"):
                weight = Entry("tensor", (LAYERS, HIDDEN), (layer, 0), (0, rank, 0))
                state = Entry("object", (LAYERS,), (layer,), (0, rank, 0))
                expected |= {
                    (f"decoder.layers.{norm}.weight", weight),
                    (f"decoder.layers.{norm}._extra_state", state),
                }
        entries = found["entries"]
        assert len(entries) == len(set(entries)), "a key is written twice"
        assert set(entries) == expected, sorted(set(entries) ^ expected, key=str)
