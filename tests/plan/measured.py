"""What a small real Megatron model takes from the beginning of forward to the end of backward, and what plan says."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from nemo_eaft import EAFTConfig
from nemo_eaft.megatron import attach
from nemo_eaft.plan.activations import final_norm_bytes, layer_bytes, score_buffer_bytes
from nemo_eaft.plan.batch import Attention, MicroBatch
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.loss_memory import LossPath, loss_bytes
from nemo_eaft.plan.shape import ModelShape
from tests.cpu import models
from tests.plan.tracking import LiveTensors

SHAPES: dict[str, dict[str, Any]] = {
    # Keys and values are repeated for each query head, and normed.
    "wide": {
        "model_type": "qwen3",
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
        "vocab_size": 4096,
    },
    # As many keys and values as queries, a bias, heads that are not hidden_size / heads wide.
    "deep": {
        "model_type": "qwen2",
        "num_hidden_layers": 6,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 32,
        "intermediate_size": 512,
        "vocab_size": 2048,
    },
    "experts": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "vocab_size": 1024,
    },
}
ROWS = {"wide": 2, "deep": 1, "experts": 2}
LENGTH = 128


class Case(NamedTuple):
    """One micro-batch of a model of `SHAPES` on one rank."""

    shape: str
    precision: str
    recompute: str
    path: LossPath
    one_pass: bool = True
    """Of the fused output layer: both gradients made in forward, as with one rank and no virtual pipeline."""

    @property
    def model(self) -> ModelShape:
        return ModelShape.from_hf(SHAPES[self.shape])

    def planned(self, attention: Attention = "unfused", **changes: Any) -> int:
        """Bytes that plan expects; of another case where there are `changes`."""
        case = self._replace(**changes)
        shape = case.model
        batch = MicroBatch(
            rows=ROWS[case.shape],
            length=LENGTH,
            context_length=LENGTH,
            itemsize={"bf16": 2, "fp32": 4}[case.precision],
            sequence_shards=1,
            layers="local",
            attention=attention,
        )
        layout = Layout(world_size=1)
        layer = layer_bytes(shape, layout, batch)
        kept = shape.num_hidden_layers * layer.kept(case.recompute) + final_norm_bytes(shape, batch)
        # Two passes are taken with a virtual pipeline, whatever its chunks are.
        loss_layout = layout if case.one_pass else dataclasses.replace(layout, virtual_pipeline=2)
        loss = loss_bytes(shape, loss_layout, batch, case.path)
        backward = layer.again(case.recompute) + layer.gradients
        return kept + score_buffer_bytes(shape, layout, batch) + max(loss, backward)


_LOSSES: list[tuple[LossPath, bool]] = [
    ("stock_unfused", True),
    ("stock_fused", True),
    ("eaft_fused_linear", True),
    ("eaft_fused_linear", False),
]
CASES: list[Case] = [
    Case(shape, precision, recompute, "eaft_unfused")
    for shape in ("wide", "deep")
    for precision in ("fp32", "bf16")
    for recompute in ("none", "selective", "full")
]
CASES += [Case("experts", precision, "none", "eaft_unfused") for precision in ("fp32", "bf16")]
CASES += [
    # With full recompute little is kept, and the loss is most of it.
    Case("wide", precision, "full", path, one_pass)
    for precision in ("fp32", "bf16")
    for path, one_pass in _LOSSES
]


class Measured(NamedTuple):
    """What one process with NeMo and Megatron-Core on the CPU backend has to say."""

    peaks: list[int]
    """Bytes of live tensors of each of `CASES`, at their most."""
    buffers: dict[str, tuple[int, int]]
    nemo_sizes: dict[str, dict[str, int]]


def measure() -> Measured:
    """Everything, in one process: NeMo takes long to start."""
    models.start()
    return Measured([_measured(case) for case in CASES], buffers(), nemo_sizes())


def buffers() -> dict[str, tuple[int, int]]:
    """Elements of Megatron's buffers of weights and of gradients under the distributed optimizer, by shape."""
    found = {}
    for name in SHAPES:
        (buffer,) = _model(Case(name, "fp32", "none", "stock_unfused"), distributed_optimizer=True).buffers
        found[name] = (buffer.param_data.numel(), buffer.grad_data.numel())
    return found


def nemo_sizes() -> dict[str, dict[str, int]]:
    """Sizes of NeMo's own configurations of the Qwen models, under config.json's names."""
    from nemo.collections import llm

    classes = {
        "Qwen/Qwen3-0.6B": llm.Qwen3Config600M,
        "Qwen/Qwen3-4B-Instruct-2507": llm.Qwen3Config4B,
        "Qwen/Qwen3-4B-Thinking-2507": llm.Qwen3Config4B,
        "Qwen/Qwen3-8B": llm.Qwen3Config8B,
        "Qwen/Qwen3-14B": llm.Qwen3Config14B,
        "Qwen/Qwen3-32B": llm.Qwen3Config32B,
        "Qwen/Qwen3-30B-A3B": llm.Qwen3Config30B_A3B,
        "Qwen/Qwen2.5-0.5B-Instruct": llm.Qwen25Config500M,
        "Qwen/Qwen2.5-7B-Instruct": llm.Qwen25Config7B,
        "Qwen/Qwen2.5-14B-Instruct": llm.Qwen25Config14B,
        "Qwen/Qwen2.5-32B-Instruct": llm.Qwen25Config32B,
    }
    found = {}
    for name, config in classes.items():
        values: dict[str, Any] = {entry.name: entry.default for entry in dataclasses.fields(config)}
        found[name] = {
            "num_hidden_layers": values["num_layers"],
            "hidden_size": values["hidden_size"],
            "num_attention_heads": values["num_attention_heads"],
            "num_key_value_heads": values["num_query_groups"],
            "intermediate_size": values.get("moe_ffn_hidden_size") or values["ffn_hidden_size"],
            "vocab_size": values["vocab_size"],
        }
        if "Qwen3" in name:
            found[name]["head_dim"] = values["kv_channels"]
        if values.get("num_moe_experts"):
            found[name]["num_experts"] = values["num_moe_experts"]
            found[name]["num_experts_per_tok"] = values["moe_router_topk"]
    return found


def _measured(case: Case) -> int:
    from megatron.core import parallel_state

    model = _model(case)
    if case.path.startswith("eaft"):
        fused = case.path == "eaft_fused_linear"
        loss = attach(model.module, EAFTConfig(), vocab_size=case.model.vocab_size, fused_linear=fused)
        assert loss is not None
        loss.scaled_mask_upstream = case.one_pass
    model.module.config.cross_entropy_loss_fusion = case.path == "stock_fused"
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, case.model.vocab_size, (ROWS[case.shape], LENGTH), generator=generator)
    positions = torch.arange(LENGTH).expand(len(tokens), LENGTH)
    # The buffer of attention's scores is kept from one model to the next.
    parallel_state.get_global_memory_buffer().buffer.clear()
    # Megatron compiles its fused loss; as it is written it needs no compiler.
    with torch.compiler.set_stance("force_eager"), LiveTensors() as live:
        model(tokens, positions, None, labels=tokens).float().sum().backward()
    return live.peak


def _model(case: Case, distributed_optimizer: bool = False) -> Any:
    """The model under Megatron's DDP, so that gradients of weights go into its buffer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    shape = case.model
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[case.precision]
    recompute: dict[str, Any] = {}
    if case.recompute != "none":
        recompute["recompute_granularity"] = case.recompute
    if case.recompute == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    experts: dict[str, Any] = {}
    if shape.num_experts is not None:
        experts = {
            "num_moe_experts": shape.num_experts,
            "moe_router_topk": shape.num_experts_per_tok,
            "moe_ffn_hidden_size": shape.intermediate_size,
            "moe_aux_loss_coeff": 1e-3,
        }
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
        bf16=case.precision == "bf16",
        **recompute,
        **experts,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=shape.num_experts, qk_layernorm=shape.qk_norm, normalization="RMSNorm"),
        vocab_size=shape.vocab_size,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
    ).to(dtype)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer)
    return DistributedDataParallel(config, ddp, model)
