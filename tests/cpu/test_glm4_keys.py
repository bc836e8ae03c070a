"""What a GLM-4 model writes on the CPU is what one of Transformer Engine's layers reads.

The layer has a Qwen2 layer's tensors, whose names `test_checkpoint_keys` derives from Transformer Engine's layers, and
two norms more, each a `TENorm` of its own: replicated over the tensor-parallel ranks, with an extra state.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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


def build(tensor: int = 1, pipeline: int = 1, bias: bool = True) -> Any:
    """This rank's model, of the layers that NeMo chooses where it runs."""
    from nemo_eaft.glm4 import GLM4Config

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
        pipeline_dtype=torch.float32,
    )
    model = config.configure_model(None)
    models.set_weights(model)
    return model


def written(tensor: int, pipeline: int, bias: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    models.start(tensor, pipeline)
    return {
        "entries": entries_of(build(tensor, pipeline, bias).sharded_state_dict()),
        "tensor rank": parallel_state.get_tensor_model_parallel_rank(),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
    }


@pytest.mark.parametrize("tensor, pipeline, bias", [(1, 1, True), (2, 1, False), (1, 2, True)])
def test_entries_are_those_of_transformer_engine(tensor: int, pipeline: int, bias: bool) -> None:
    for found in run_ranks(written, tensor * pipeline, tensor, pipeline, bias):
        count, rank, stage = LAYERS // pipeline, found["tensor rank"], found["stage"]
        layers = range(stage * count, (stage + 1) * count)
        family = "qwen2" if bias else "llama"
        expected = transformer_engine_entries(
            family, False, tensor, rank, layers, first=stage == 0, last=stage == pipeline - 1
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


WRITE_ON_THE_CPU = """
import sys
sys.modules["transformer_engine"] = sys.modules["apex"] = None
import nemo_eaft.cpu
nemo_eaft.cpu.enable()
import torch
from megatron.core import dist_checkpointing
from tests.cpu import models
from tests.cpu.test_glm4_keys import build
models.start()
model = build()
dist_checkpointing.save(model.sharded_state_dict(), sys.argv[1])
torch.save(models.batch().logits(model).detach(), sys.argv[1] + "/logits.pt")
torch.save({n: p.detach() for n, p in model.named_parameters()}, sys.argv[1] + "/weights.pt")
"""


@pytest.mark.gpu
def test_a_checkpoint_of_the_cpu_loads_into_transformer_engine(tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    subprocess.run([sys.executable, "-c", WRITE_ON_THE_CPU, str(tmp_path)], env=environment, check=True, timeout=300)
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        model = build().cuda()
        assert isinstance(model.decoder.layers[0].self_attention.linear_qkv, TELayerNormColumnParallelLinear)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(tmp_path)))
        on_gpu = models.Batch(*(part.cuda() for part in dataclasses.astuple(models.batch())))
        expected = torch.load(tmp_path / "logits.pt", weights_only=True)
        # TF32 and other kernels: the weights below are compared bit for bit, this only shows that all of them count.
        torch.testing.assert_close(on_gpu.logits(model).cpu(), expected, atol=5e-2, rtol=5e-2)

        models.assert_weights(model, torch.load(tmp_path / "weights.pt", weights_only=True))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
