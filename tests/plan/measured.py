"""Bytes that a small real Megatron model takes from the beginning of forward to the end of backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from nemo_eaft import EAFTConfig
from nemo_eaft.megatron import attach
from nemo_eaft.plan.shape import ModelShape
from tests.cpu import models
from tests.plan.tracking import LiveTensors


class Case(NamedTuple):
    """One run of one micro-batch on one rank."""

    family: str
    layers: int
    rows: int
    length: int
    precision: str
    recompute: str
    loss: str


SIZES = {
    "wide": {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
        "vocab_size": 4096,
    },
    "deep": {
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 32,
        "intermediate_size": 512,
        "vocab_size": 2048,
    },
}


def shape_of(family: str, size: str, layers: int) -> ModelShape:
    return ModelShape.from_hf(
        {"model_type": family, "num_hidden_layers": layers, "tie_word_embeddings": False} | SIZES[size]
    )


def build(shape: ModelShape, precision: str, recompute: str, length: int) -> Any:
    """The model under Megatron's DDP: gradients go into its buffer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    again: dict[str, Any] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[recompute]
    config = models.config(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.intermediate_size,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        **again,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm"),
        vocab_size=shape.vocab_size,
        max_sequence_length=length,
        position_embedding_type="rope",
    ).to(dtype)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, ddp, model)


def measure(shape: ModelShape, case: Case) -> int:
    model = build(shape, case.precision, case.recompute, case.length)
    core = model.module
    if case.loss != "stock_unfused":
        loss = attach(core, EAFTConfig(), vocab_size=shape.vocab_size, fused_linear=case.loss == "eaft_fused_linear")
        loss.scaled_mask_upstream = True
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, shape.vocab_size, (case.rows, case.length), generator=generator)
    positions = torch.arange(case.length).expand(case.rows, case.length)
    with LiveTensors() as live:
        out = model(tokens, positions, None, labels=tokens)
        out.float().sum().backward()
    return live.peak


CASES = [
    (size, Case(family, layers, rows, length, precision, recompute, loss))
    for size, family, layers, rows, length in (("wide", "qwen3", 4, 2, 128), ("deep", "qwen2", 6, 1, 128))
    for precision in ("fp32", "bf16")
    for recompute, loss in (
        ("none", "eaft_unfused"),
        ("selective", "eaft_unfused"),
        ("full", "eaft_unfused"),
        ("full", "stock_unfused"),
        ("full", "eaft_fused_linear"),
    )
]


def measure_all() -> list[Any]:
    from megatron.core import parallel_state

    models.start()
    from nemo_eaft.plan.activations import layer_bytes, final_norm_bytes
    from nemo_eaft.plan.loss_memory import loss_bytes
    from nemo_eaft.plan.batch import MicroBatch
    from nemo_eaft.plan.layout import Layout

    out = []
    for size, case in CASES:
        parallel_state.get_global_memory_buffer().buffer.clear()
        s = shape_of(case.family, size, case.layers)
        m = measure(s, case)
        b = MicroBatch(
            rows=case.rows,
            length=case.length,
            context_length=case.length,
            itemsize=4 if case.precision == "fp32" else 2,
            sequence_shards=1,
            layers="local",
            attention="unfused",
        )
        L = Layout(world_size=1)
        lb = layer_bytes(s, L, b)
        acts = case.layers * lb.kept(case.recompute) + final_norm_bytes(s, b)
        lo = loss_bytes(s, L, b, case.loss)
        again = lb.again(case.recompute) + lb.gradients
        p = acts + max(lo, again)
        out.append(
            f"{size} {case.precision} {case.recompute:9} {case.loss:18} measured {m / 1e6:7.2f} plan {p / 1e6:7.2f} ratio {p / m:.3f}  acts {acts / 1e6:.2f} loss {lo / 1e6:.2f} again {again / 1e6:.2f}"
        )
    return out
