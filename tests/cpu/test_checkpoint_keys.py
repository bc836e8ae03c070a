"""What a CPU model writes is what a Transformer Engine model reads, and the other way round.

The names here are derived from megatron-core 0.15.3 by hand: models/gpt/gpt_layer_specs.py
(`get_gpt_layer_with_transformer_engine_spec`) says which Transformer Engine layer stands where, and
extensions/transformer_engine.py how each is cut. The true load is the test marked `gpu`.
"""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cpu import models
from tests.nemo.ranks import run_ranks

LAYERS, HIDDEN, FFN, HEADS, GROUPS = 4, 32, 48, 4, 2


@dataclasses.dataclass(frozen=True)
class Entry:
    """One key of a sharded state dict on one rank."""

    kind: str
    """tensor, or object: an `_extra_state`."""
    shape: tuple[int, ...]
    """Of the whole, with the layers stacked in front."""
    offset: tuple[int, ...]
    replica: tuple[int, int, int]
    """Megatron's replica id: (pipeline, tensor parallel rank, data parallel rank), 0 where there is one copy."""


def transformer_engine_entries(
    family: str, tied: bool, tensor: int, tensor_rank: int, layers: range, first: bool, last: bool
) -> set[tuple[str, Entry]]:
    """What a model of Transformer Engine's specification asks a checkpoint for, on one rank."""
    head = 12 if family == "qwen3" else HIDDEN // HEADS
    found: set[tuple[str, Entry]] = set()

    def tensor_entry(name: str, shape: tuple[int, ...], axis: int | None, layer: int | None = None) -> None:
        offset = [0] * len(shape)
        if axis is not None:
            offset[axis] = tensor_rank * (shape[axis] // tensor)
        replica = (0, 0 if axis is not None else tensor_rank, 0)
        stack = () if layer is None else (LAYERS,)
        at = () if layer is None else (layer,)
        found.add((name, Entry("tensor", (*stack, *shape), (*at, *offset), replica)))

    def object_entry(name: str, layer: int | None = None) -> None:
        # make_sharded_object_for_checkpoint: one object a layer, replicated over tensor parallel ranks.
        shape, offset = ((1,), (0,)) if layer is None else ((LAYERS,), (layer,))
        found.add((name, Entry("object", shape, offset, (0, tensor_rank, 0))))

    for layer in layers:
        attention, mlp = "decoder.layers.self_attention", "decoder.layers.mlp"
        qkv = (HEADS + 2 * GROUPS) * head
        # TELayerNormColumnParallelLinear: weight and bias along axis 0, the norm replicated, one extra state.
        tensor_entry(f"{attention}.linear_qkv.layer_norm_weight", (HIDDEN,), None, layer)
        tensor_entry(f"{attention}.linear_qkv.weight", (qkv, HIDDEN), 0, layer)
        object_entry(f"{attention}.linear_qkv._extra_state", layer)
        if family == "qwen2":
            tensor_entry(f"{attention}.linear_qkv.bias", (qkv,), 0, layer)
        if family == "qwen3":
            # TENorm: te.pytorch.RMSNorm, replicated, with an extra state of its own.
            for norm in ("q_layernorm", "k_layernorm"):
                tensor_entry(f"{attention}.{norm}.weight", (head,), None, layer)
                object_entry(f"{attention}.{norm}._extra_state", layer)
        # TEDotProductAttention.sharded_state_dict: nothing, unless the softmax has learnable offsets.
        # TERowParallelLinear: weight along axis 1.
        tensor_entry(f"{attention}.linear_proj.weight", (HIDDEN, HEADS * head), 1, layer)
        object_entry(f"{attention}.linear_proj._extra_state", layer)
        tensor_entry(f"{mlp}.linear_fc1.layer_norm_weight", (HIDDEN,), None, layer)
        # MLP.sharded_state_dict splits gate and up of SwiGLU: two shards a rank, of a tensor with all of both.
        for part in range(2):
            row = (part * tensor + tensor_rank) * (FFN // tensor)
            entry = Entry("tensor", (LAYERS, 2 * FFN, HIDDEN), (layer, row, 0), (0, 0, 0))
            found.add((f"{mlp}.linear_fc1.weight", entry))
        object_entry(f"{mlp}.linear_fc1._extra_state", layer)
        tensor_entry(f"{mlp}.linear_fc2.weight", (HIDDEN, FFN), 1, layer)
        object_entry(f"{mlp}.linear_fc2._extra_state", layer)
    vocabulary = (models.PADDED_VOCAB_SIZE, HIDDEN)
    if first:
        tensor_entry("embedding.word_embeddings.weight", vocabulary, 0)
    if last:
        tensor_entry("decoder.final_layernorm.weight", (HIDDEN,), None)
        object_entry("decoder.final_layernorm._extra_state")
        # GPTModel.sharded_state_dict drops the output layer's extra state.
        if not tied:
            tensor_entry("output_layer.weight", vocabulary, 0)
        elif not first:
            # The last stage's copy of the embedding counts as the second replica.
            corner = (tensor_rank * (models.PADDED_VOCAB_SIZE // tensor), 0)
            found.add(("embedding.word_embeddings.weight", Entry("tensor", vocabulary, corner, (1, 0, 0))))
    return found


def build(family: str, tied: bool, tensor: int = 1, pipeline: int = 1) -> Any:
    from megatron.core import parallel_state

    config = models.config(
        tensor,
        num_layers=LAYERS,
        ffn_hidden_size=FFN,
        pipeline_model_parallel_size=pipeline,
        **models.FAMILIES[family],
    )
    return models.gpt(
        config,
        tied=tied,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def entries_of(state: dict[str, Any]) -> list[tuple[str, Entry]]:
    """The entries of a sharded state dict, with the parts of a factory."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    found = []
    for value in state.values():
        parts = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        for part in parts if isinstance(parts, list) else parts.values():
            if isinstance(part, ShardedObject):
                entry = Entry("object", part.global_shape, part.global_offset, part.replica_id)
            else:
                assert isinstance(part, ShardedTensor)
                entry = Entry("tensor", part.global_shape, part.global_offset, part.replica_id)
            found.append((part.key, entry))
    return found


def written(family: str, tied: bool, tensor: int, pipeline: int) -> dict[str, Any]:
    from megatron.core import parallel_state

    models.start(tensor, pipeline)
    model = build(family, tied, tensor, pipeline)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return {
        "entries": entries_of(model.sharded_state_dict()),
        "tensor rank": parallel_state.get_tensor_model_parallel_rank(),
        "stage": stage,
    }


@pytest.mark.parametrize(
    "family, tied, tensor, pipeline",
    [
        ("llama", False, 1, 1),
        ("llama", True, 2, 1),
        ("qwen2", True, 1, 1),
        ("qwen2", False, 1, 2),
        ("qwen3", False, 2, 1),
        ("qwen3", True, 1, 2),
    ],
)
def test_entries_are_those_of_transformer_engine(family: str, tied: bool, tensor: int, pipeline: int) -> None:
    for found in run_ranks(written, tensor * pipeline, family, tied, tensor, pipeline):
        count = LAYERS // pipeline
        expected = transformer_engine_entries(
            family,
            tied,
            tensor,
            found["tensor rank"],
            range(found["stage"] * count, (found["stage"] + 1) * count),
            first=found["stage"] == 0,
            last=found["stage"] == pipeline - 1,
        )
        entries = found["entries"]
        assert len(entries) == len(set(entries)), "a key is written twice"
        assert set(entries) == expected, sorted(set(entries) ^ expected, key=str)


def load_foreign(folder: Path, extra: str) -> dict[str, float]:
    """Write a checkpoint as Transformer Engine would, with `extra` in every `_extra_state`, and load it."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

    models.start()
    model = build("qwen3", tied=False)
    contents: dict[str, Any] = {
        # transformer_engine/pytorch/module/base.py, get_extra_state: a byte tensor, empty without FP8.
        "no FP8": torch.empty(0, dtype=torch.uint8),
        "FP8": torch.arange(64, dtype=torch.uint8),
        "old FP8": io.BytesIO(b"pickled"),
    }
    state = model.sharded_state_dict()
    objects = [value for value in state.values() if isinstance(value, ShardedObject)]
    for value in objects:
        value.data = contents[extra]
    # Until megatron-core 0.14 attention had an entry too.
    for layer in range(LAYERS):
        key = "decoder.layers.self_attention.core_attention._extra_state"
        old = make_sharded_object_for_checkpoint(contents[extra], key, [(0, layer, LAYERS)])
        state[f"{key}.{layer}"] = old
    dist_checkpointing.save(state, str(folder))

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    loaded = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
    model.load_state_dict(loaded)
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert torch.isfinite(models.batch().forward(model)).all()
    return {
        "objects": len(objects),
        "equal": float(all(torch.equal(before[name], after[name]) for name in before)),
    }


@pytest.mark.parametrize("extra", ["no FP8", "FP8", "old FP8"])
def test_extra_states_of_transformer_engine_load_on_the_cpu(extra: str, tmp_path: Path) -> None:
    (found,) = run_ranks(load_foreign, 1, tmp_path, extra)
    assert found == {"objects": LAYERS * 6 + 1, "equal": 1.0}


def written_without_extra_states_of_norms() -> set[tuple[str, Entry]]:
    from nemo_eaft.cpu.norm import _CheckpointedNorm

    models.start()
    del _CheckpointedNorm.get_extra_state
    return set(entries_of(build("qwen3", tied=False).sharded_state_dict()))


def test_norms_without_extra_state_would_be_seen() -> None:
    (found,) = run_ranks(written_without_extra_states_of_norms, 1)
    expected = transformer_engine_entries("qwen3", False, 1, 0, range(LAYERS), first=True, last=True)
    missing = {name for name, _ in expected - found}
    assert found < expected
    assert missing == {
        "decoder.final_layernorm._extra_state",
        "decoder.layers.self_attention.q_layernorm._extra_state",
        "decoder.layers.self_attention.k_layernorm._extra_state",
    }


def names_of_experts() -> tuple[set[str], set[str]]:
    """What a mixture of experts writes for the second half of a layer, and what a grouped one is told."""
    models.start()
    config = models.config(num_layers=LAYERS, num_moe_experts=2, moe_ffn_hidden_size=FFN)
    entries = entries_of(models.gpt(config).sharded_state_dict())
    half = {name.removeprefix("decoder.layers.") for name, _ in entries if "self_attention" not in name}
    shapes = {entry.shape for name, entry in entries if name.endswith("experts.linear_fc1.weight")}
    assert shapes == {(LAYERS, 2, 2 * FFN, HIDDEN)}, shapes
    return {name for name in half if "mlp" in name}, {config.moe_grouped_gemm, config.moe_permute_fusion}


def test_experts_are_named_as_transformer_engine_names_them() -> None:
    """Megatron-Core 0.15.3: TEGroupedMLP.sharded_state_dict says that its entries are those of SequentialMLP; the norm
    before the router is a TENorm of its own (get_gpt_layer_with_transformer_engine_spec)."""
    ((names, kernels),) = run_ranks(names_of_experts, 1)
    experts = {f"mlp.experts.experts.{layer}" for layer in ("linear_fc1", "linear_fc2")}
    assert names == {
        "pre_mlp_layernorm.weight",
        "pre_mlp_layernorm._extra_state",
        "mlp.router.weight",
        *(f"{layer}.{what}" for layer in experts for what in ("weight", "_extra_state")),
    }
    assert kernels == {False}


def refused(changes: dict[str, Any]) -> str:
    models.start()
    with pytest.raises(ValueError) as error:
        models.config(**changes)
    return str(error.value)


def test_layers_with_other_names_are_refused() -> None:
    (message,) = run_ranks(refused, 1, {"multi_latent_attention": True})
    assert message.startswith("multi_latent_attention: True; the CPU backend has none")


WRITE_ON_THE_CPU = """
import sys
# An installed Transformer Engine or Apex would be preferred to the plain layers that this checkpoint is written with.
sys.modules["transformer_engine"] = sys.modules["apex"] = None
import nemo_eaft.cpu
nemo_eaft.cpu.enable()
import torch
from megatron.core import dist_checkpointing
from tests.cpu import models
from tests.cpu.test_checkpoint_keys import build
models.start()
model = build(sys.argv[2], tied=False)
dist_checkpointing.save(model.sharded_state_dict(), sys.argv[1])
data = models.batch()
torch.save(data.logits(model).detach(), sys.argv[1] + "/logits.pt")
torch.save({n: p.detach() for n, p in model.named_parameters()}, sys.argv[1] + "/weights.pt")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_a_checkpoint_of_the_cpu_loads_into_transformer_engine(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        # One rank: the store takes a free port, and nobody else has to know it.
        "MASTER_PORT": "0",
    }
    subprocess.run(
        [sys.executable, "-c", WRITE_ON_THE_CPU, str(tmp_path), family], env=environment, check=True, timeout=300
    )
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        config = models.config(num_layers=LAYERS, ffn_hidden_size=FFN, **models.FAMILIES[family])
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        model = GPTModel(config, spec, models.PADDED_VOCAB_SIZE, 64, position_embedding_type="rope").cuda()
        loaded = dist_checkpointing.load(model.sharded_state_dict(), str(tmp_path))
        model.load_state_dict(loaded)
        data = models.batch()
        on_gpu = models.Batch(*(part.cuda() for part in dataclasses.astuple(data)))
        expected = torch.load(tmp_path / "logits.pt", weights_only=True)
        # TF32 and other kernels: the weights below are compared bit for bit, this only shows that all of them count.
        torch.testing.assert_close(on_gpu.logits(model).cpu(), expected, atol=5e-2, rtol=5e-2)

        models.assert_weights(model, torch.load(tmp_path / "weights.pt", weights_only=True))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
