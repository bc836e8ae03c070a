"""Plans: memory by stage, in-flight micro-batches, verdicts, time, and the search."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, cast

import pytest

from nemo_eaft.compose import compose
from nemo_eaft.hf_model import check_layout
from nemo_eaft.loss import records
from nemo_eaft.plan.activations import chunks_in_flight
from nemo_eaft.plan.communication import loss_collectives, record_width
from nemo_eaft.plan.hardware import Hardware
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.layouts import nearest, search
from nemo_eaft.plan.memory import state_bytes
from nemo_eaft.plan.parameters import ParameterTensor, RankParameters
from nemo_eaft.plan.plan import Plan, changed
from nemo_eaft.plan.shape import find_shape
from nemo_eaft.plan.time import flops_per_token, model_flops
from nemo_eaft.settings import Settings
from tests.nemo.models import run_settings

QWEN_32B = "Qwen/Qwen2.5-32B-Instruct"
MOE = "Qwen/Qwen3-30B-A3B"
GLM_32B = "THUDM/GLM-4-32B-0414"


@functools.cache
def run(model: str, *words: str) -> Settings:
    return compose("qwen3-0.6b", [f"model.hf={model}", "trainer.gpus_per_node=8", *words], unused=("data.train",))


@functools.cache
def plan(model: str, *words: str, hardware: Hardware | None = None) -> Plan:
    settings, shape = run(model, *words), find_shape(model)
    check_layout(settings, shape)
    return Plan(settings, shape, hardware or Hardware())


CLUSTER = (
    "parallel.tensor=8",
    "parallel.pipeline=4",
    "parallel.sequence=true",
    "trainer.num_nodes=128",
    "trainer.global_batch_size=512",
)


# --- weights, gradients, optimizer


@pytest.mark.parametrize(
    "precision, distributed, per_parameter",
    [("bf16", False, 18.0), ("bf16", True, 6 + 12 / 32), ("fp32", False, 16.0), ("fp32", True, 8 + 8 / 32)],
)
def test_state_of_a_32b_is_the_usual_bytes_a_parameter(precision: str, distributed: bool, per_parameter: float) -> None:
    """Megatron's own rule of thumb: 18 bytes a parameter, or 6 + 12 / DP with the distributed optimizer."""
    one = plan(
        QWEN_32B,
        *CLUSTER,
        f"trainer.precision={precision}",
        f"trainer.distributed_optimizer={str(distributed).lower()}",
    )
    assert one.layout.data_parallel == 32
    for parameters, memory in zip(one.stages, one.memory, strict=True):
        assert memory.state.total / parameters.total == pytest.approx(per_parameter, rel=1e-4)


def test_padding_of_buckets(tmp_path: Path) -> None:
    """By hand: parameters start at multiples of 64, buckets end at one of 128 and of the ranks; a shared embedding has
    a bucket of its own."""
    settings = run_settings(tmp_path, tmp_path, tmp_path, trainer={"distributed_optimizer": True, "precision": "bf16"})
    layout = Layout(world_size=6)
    chunk = (ParameterTensor("norms", 10), ParameterTensor("mlp", 100), ParameterTensor("norms", 10))
    # 10 -> 64 + 100 -> 192 + 10 = 202 -> 384, a multiple of lcm(6, 128).
    state = state_bytes(RankParameters((chunk,)), settings, layout)
    assert (state.weights, state.gradients, state.optimizer) == (2 * 384, 4 * 384, 12 * 64)
    shared = (ParameterTensor("embedding", 100, shared_embedding=True), *chunk)
    state = state_bytes(RankParameters((shared,)), settings, layout)
    assert (state.weights, state.gradients, state.optimizer) == (2 * 768, 4 * 768, 12 * 128)
    # No padding without the distributed optimizer.
    plain = dataclasses.replace(settings, trainer=dataclasses.replace(settings.trainer, distributed_optimizer=False))
    state = state_bytes(RankParameters((shared,)), plain, layout)
    assert (state.weights, state.gradients, state.optimizer) == (2 * 220, 4 * 220, 12 * 220)


def test_experts_are_cut_over_their_own_ranks() -> None:
    """EP 8 of 64 ranks: the optimizer's part of an expert is an eighth, of everything else a 64th."""
    one = plan(MOE, "parallel.expert=8", "trainer.num_nodes=8")
    parameters, state = one.stages[0], one.memory[0].state
    dense = parameters.total - parameters.experts
    assert (one.layout.dense_shards, one.layout.expert_shards) == (64, 8)
    assert state.optimizer == pytest.approx(12 * (dense / 64 + parameters.experts / 8), rel=1e-4)


# --- activations of a pipeline


@pytest.mark.parametrize("stages, virtual, micro_batches", [(4, 1, 16), (4, 1, 2), (4, 2, 8), (2, 4, 6), (8, 2, 8)])
def test_in_flight_micro_batches_are_those_of_the_schedule(stages: int, virtual: int, micro_batches: int) -> None:
    """Counted in a simulation of 1F1B: warm-up forwards, then one forward and one backward at a time."""
    layout = Layout(world_size=stages, pipeline=stages, virtual_pipeline=virtual)
    for stage in range(stages):
        behind, total = stages - stage - 1, micro_batches * virtual
        warm_up = min(behind if virtual == 1 else 2 * behind + (virtual - 1) * stages, total)
        held = most = warm_up
        for _ in range(total - warm_up):
            held += 1
            most = max(most, held)
            held -= 1
        assert chunks_in_flight(layout, stage, micro_batches) == most


def test_earlier_stages_hold_more_micro_batches() -> None:
    one = plan(QWEN_32B, *CLUSTER)
    assert [round(memory.activations / one.memory[-2].activations, 2) for memory in one.memory[:3]] == pytest.approx(
        [2.0, 1.5, 1.0], abs=0.03
    )
    assert [memory.loss > 0 for memory in one.memory] == [False, False, False, True]
    assert one.fullest == 0


def test_interleaving_holds_more() -> None:
    plain, interleaved = plan(QWEN_32B, *CLUSTER), plan(QWEN_32B, *CLUSTER, "parallel.virtual_pipeline=2")
    # Stage 0: 4 micro-batches of 16 layers, or 11 chunks of 8.
    ratio = interleaved.kept_by_layers(0, "none") / plain.kept_by_layers(0, "none")
    assert ratio == pytest.approx(11 * 8 / (4 * 16))
    assert interleaved.time.bubble < plain.time.bubble


def test_recompute_and_sequence_parallel_hold_less() -> None:
    one = plan(QWEN_32B, *CLUSTER)
    by = one.activations_by_recompute()
    assert by["full"] < by["selective"] <= by["none"]
    unfused = dataclasses.replace(one, attention="unfused")
    by_unfused = unfused.activations_by_recompute()
    # Scores of 5 heads in float32 and bfloat16, of 16 layers and 4 micro-batches.
    scores = 2048 * 2048 * 5 * 6 * 16 * 4
    assert by_unfused["none"] - by["none"] == pytest.approx(scores, rel=0.02)
    assert by_unfused["selective"] < by_unfused["none"] / 2
    without = plan(QWEN_32B, *(word for word in CLUSTER if "sequence" not in word))
    assert without.peak > one.peak


def test_experts_keep_their_inputs_whole_under_tensor_parallelism() -> None:
    """By hand, TP 4, 2048 tokens of 2048: a quarter of the tokens for norms and residuals, a quarter of heads and of
    each expert, and each token eight times whole for the experts' first linear layer."""
    one = plan(MOE, "parallel.tensor=4", "parallel.sequence=true")
    residual = 512 * 2048 * 2
    attention = 2048 * 2 * ((1024 + 2 * 128) + (1024 + 128) + 1024)
    head_norms = 2048 * (1024 * 2 + 4 * (8 + 1))
    # Gate and up, result, silu, a copy of up, and the result before it is multiplied; 768 / 4, eight experts.
    experts = 2048 * 2 * 6 * 192 * 8 + 2048 * 2 * 8 * 2048
    router = 512 * 4 * 128 * 4
    assert one.layer.rest == 4 * residual + 2 * 512 * 4 + attention + head_norms + experts + router
    # One rank has all of the heads and experts, and as many inputs of them.
    alone = plan(MOE).layer.rest
    inputs = 2048 * 2 * 8 * 2048
    assert (alone - inputs) / (one.layer.rest - inputs) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_embedding_of_several_stages_has_a_gradient_of_its_own(recompute: str) -> None:
    """By hand: when a micro-batch's backward ends, three more are in flight, and there are the gradients of a rank's
    rows and of the hidden states, in bfloat16."""
    one = plan(QWEN_32B, *CLUSTER, f"trainer.recompute={recompute}")
    three = one.kept_by_layers(0, recompute) * 3 // 4
    at_the_end = three + (152064 // 8 + 2048) * 5120 * 2
    layers = one.kept_by_layers(0, recompute) + one.layer.again(recompute) + one.layer.gradients
    assert one.memory[0].activations == max(at_the_end, layers)
    # Small beside layers that keep everything, and more than layers that keep their inputs alone.
    assert (at_the_end > layers) == (recompute == "full")
    # With one stage the loss and all layers are there when there is most.
    alone = plan("Qwen/Qwen3-0.6B", "trainer.recompute=full")
    assert alone.memory[0].activations == alone.kept_by_layers(0, "full") + max(
        alone.layer.again("full") + alone.layer.gradients - alone.memory[0].loss, 0
    )


def test_float32_has_no_flash_attention() -> None:
    single, half = plan(QWEN_32B, *CLUSTER, "trainer.precision=fp32"), plan(QWEN_32B, *CLUSTER)
    assert (single.batch.attention, half.batch.attention) == ("unfused", "flash")
    # The scores of five heads, in float32 as they are.
    assert single.layer.core_attention == 2048 * 2048 * 5 * 4
    with pytest.raises(ValueError, match=r"^--attention=flash: not with trainer\.precision=fp32; allowed is unfused$"):
        assert dataclasses.replace(single, attention="flash").verdict


# --- loss


def test_loss_paths_of_a_32b() -> None:
    """tokens x V / TP: two bfloat16 and one float32 copy for Megatron, logits and gradient for ours, neither fused."""
    one = plan(QWEN_32B, "parallel.tensor=8", "parallel.sequence=true", "trainer.seq_length=16384")
    logits = 16384 * 152064 // 8
    by = one.loss_by_path()
    assert by["stock_unfused"] == by["stock_fused"] == 6 * logits
    assert by["eaft_unfused"] == 4 * logits
    # No logits, but hidden states' gradients in float32, and a gradient of the output layer for autograd.
    assert by["eaft_fused_linear"] < by["eaft_unfused"]
    assert one.path == "eaft_unfused"
    assert plan(QWEN_32B, "parallel.tensor=8", "loss=sft").path == "stock_fused"
    assert plan(QWEN_32B, "parallel.tensor=8", "loss.fused_linear=true").path == "eaft_fused_linear"
    # auto, as training decides it: more than a tenth of the memory.
    long = plan(QWEN_32B, "trainer.seq_length=16384", hardware=Hardware(gpu_memory_gb=80))
    assert long.path == "eaft_fused_linear"


def test_the_fused_output_layer_counts_the_gradient_that_autograd_gets() -> None:
    """TP 8, by hand: gathered hidden states, their gradient in float32 and in bfloat16, and zeros of the size of the
    output layer, whose gradient is in Megatron's buffer by then."""
    one = plan(QWEN_32B, "parallel.tensor=8", "parallel.sequence=true")
    hidden, zeros = 2048 * 5120, 152064 // 8 * 5120
    assert one.loss_by_path()["eaft_fused_linear"] == hidden * (2 + 4) + 2 * (hidden + zeros)


@pytest.mark.parametrize(
    "memory_gb, length, expected",
    [
        # Logits and their gradient: 8.27 GB, above a tenth of 80 GB and below that of the 85.5 GB that an H100 reports.
        (80, 13600, "eaft_unfused"),
        (80, 14336, "eaft_fused_linear"),
        (80, 12288, "eaft_unfused"),
        # 2.49 GB, between a tenth of 24 GB and of what such a GPU may report: fused takes more here.
        (24, 4096, "eaft_fused_linear"),
        (24, 3072, "eaft_unfused"),
    ],
)
def test_auto_is_decided_for_what_a_gpu_reports_and_else_for_the_worse(
    memory_gb: float, length: int, expected: str
) -> None:
    one = plan(QWEN_32B, f"trainer.seq_length={length}", hardware=Hardware(gpu_memory_gb=memory_gb))
    assert one.path == expected
    need = 4 * length * 152064
    if memory_gb * 1e8 < need < 1.069 * memory_gb * 1e8:
        assert one.memory[0].loss == max(one.loss_by_path()[path] for path in ("eaft_unfused", "eaft_fused_linear"))
    # The fit is judged by the memory given.
    assert one.memory_bytes == memory_gb * 1e9


def test_what_the_loss_sends() -> None:
    for top_k in (None, 2, 20):
        assert record_width(top_k) == records.record_width(top_k)
    one = plan(QWEN_32B, "parallel.tensor=8")
    args = (one.shape, one.layout, one.settings, one.batch)
    records_sent = {"all_gather_records": 2048 * 23 * 4}
    assert loss_collectives(*args, "eaft_unfused") == records_sent
    # Plain fine-tuning is measured too.
    assert loss_collectives(*args, "stock_fused") == records_sent | {"all_reduce_max": 8192, "all_reduce_sum": 16384}
    assert loss_collectives(one.shape, Layout(world_size=8), one.settings, one.batch, "eaft_unfused") == {}


# --- time


def test_flops_are_six_for_a_parameter_and_the_scores() -> None:
    one = plan(QWEN_32B, *CLUSTER)
    stages = one.stages
    matrices = 8 * sum(stage.attention + stage.mlp + stage.output_layer for stage in stages)
    # Causal attention: half of 4 x queries x length, three times.
    scores = 3 * 64 * 2 * 5120 * 2048
    tokens = 512 * 2048
    assert model_flops(one.shape, one.settings, one.batch) == pytest.approx(tokens * (6 * matrices + scores), rel=1e-4)
    experts = flops_per_token(find_shape(MOE), 0)
    # 3.3 billion of 30.5 are used for a token, embedding included.
    assert (experts["layers"] + experts["output_layer"]) / 2 == pytest.approx(3.35e9 - 0.31e9, rel=0.02)


def test_step_time() -> None:
    one = plan(QWEN_32B, *CLUSTER)
    assert one.time.bubble / (one.time.compute + one.time.tensor_parallel) == pytest.approx(3 / 16, rel=1e-6)
    slow = plan(QWEN_32B, *CLUSTER, hardware=Hardware(mfu=0.25))
    assert slow.time.compute == pytest.approx(2 * one.time.compute)
    full = plan(QWEN_32B, *CLUSTER, "trainer.recompute=full")
    assert 1.25 < full.time.compute / one.time.compute < 4 / 3
    alone = plan("Qwen/Qwen3-0.6B", "trainer.gpus_per_node=1")
    time = alone.time
    assert (time.bubble, time.tensor_parallel, time.expert_parallel, time.data_parallel) == (0, 0, 0, 0)
    assert plan(MOE, "parallel.expert=8").time.expert_parallel > 0


def test_a_step_waits_for_the_slowest_stage_there_is() -> None:
    """GLM-4-32B, 61 layers: three stages of 16, and 13 with the output layer, which takes as long as 1.3 layers."""
    one = plan(GLM_32B, "parallel.tensor=2", "parallel.pipeline=4", "parallel.last_stage_layers=13")
    each = flops_per_token(one.shape, 2048)
    second = 2 * 989e12 * 0.5 / (128 * 2048 * 3)
    assert 1 < each["output_layer"] / (each["layers"] / 61) < 2
    assert one.time.compute == pytest.approx(16 / 61 * each["layers"] / second)
    sums = 128 * 16 * 4 * 2048 * 6144 * 2 / 300e9
    assert one.time.tensor_parallel == pytest.approx(sums)
    assert one.time.bubble == pytest.approx(3 * (one.time.compute + sums) / 128)
    # As many layers and the output layer: the last one.
    even = plan(QWEN_32B, *CLUSTER)
    each = flops_per_token(even.shape, 2048)
    assert even.time.compute == pytest.approx(
        16 * (each["layers"] / 4 + each["output_layer"]) * 2048 * 3 / (8 * 989e12 * 0.5)
    )


def test_tokens_go_to_experts_once_for_each() -> None:
    """TP 4: a gather and a scatter of 2048 tokens around attention, and of eight times as many around the experts."""
    words = ("parallel.tensor=4", "parallel.sequence=true")
    one, full = plan(MOE, *words), plan(MOE, *words, "trainer.recompute=full")
    once = 2 * 3 / 4 * 2048 * 2048 * 2 / 300e9
    assert one.time.tensor_parallel == pytest.approx(64 * 48 * 2 * (1 + 8) * once)
    assert full.time.tensor_parallel == pytest.approx(1.5 * one.time.tensor_parallel)
    dense = plan(QWEN_32B, "parallel.tensor=4", "parallel.sequence=true")
    assert dense.time.tensor_parallel == pytest.approx(64 * 64 * 4 * once * 5120 / 2048)
    apart, again = plan(MOE, "parallel.expert=8"), plan(MOE, "parallel.expert=8", "trainer.recompute=full")
    assert again.time.expert_parallel == pytest.approx(1.5 * apart.time.expert_parallel)


def test_checkpoint_holds_fourteen_bytes_a_parameter() -> None:
    assert plan(QWEN_32B, *CLUSTER).checkpoint_bytes == 14 * 32_763_876_352


# --- verdict and search


def test_verdicts() -> None:
    # Given, not auto: with less memory that would take another path.
    one = plan("Qwen/Qwen3-0.6B", "loss.fused_linear=false")
    peak = one.peak / 1e9

    def verdict(memory_gb: float) -> str:
        return dataclasses.replace(one, hardware=Hardware(gpu_memory_gb=memory_gb)).verdict

    assert [verdict(peak * factor) for factor in (0.99, 1.01, 1.2)] == ["does not fit", "tight", "fits"]


def test_search_gives_what_train_accepts_and_the_best_first() -> None:
    settings, shape = run(QWEN_32B), find_shape(QWEN_32B)
    plans = search(settings, shape, Hardware(), machines=(2, 8))
    for one in plans:
        check_layout(one.settings, shape)
        assert one.settings.world_size == 16
        assert one.layout.sequence == (one.layout.tensor > 1)
    order = [("fits", "tight", "does not fit").index(one.verdict) for one in plans]
    assert order == sorted(order)
    assert order[0] == 0
    fits = [round(one.time.total, 2) for one in plans if one.verdict == "fits"]
    assert fits == sorted(fits)
    assert {one.layout.tensor for one in plans} == {1, 2, 4, 8}
    # The layout of the official recipe is among them.
    assert any((one.layout.tensor, one.layout.pipeline) == (8, 2) and one.verdict == "fits" for one in plans)
    # One machine has no room to spare for 32B, as those who tried report.
    assert all(one.verdict != "fits" for one in search(settings, shape, Hardware(), machines=(1, 8)))


def test_nearest_layouts_fit_and_change_little() -> None:
    one = plan(QWEN_32B, "parallel.tensor=4", "trainer.num_nodes=2")
    assert one.verdict == "does not fit"
    others = nearest(one)
    assert len(others) == 3
    assert all(other.verdict == "fits" and other.layout.world_size == 16 for other in others)
    # One setting is another one: tensor or pipeline.
    assert all((other.layout.tensor == 4) != (other.layout.pipeline == 1) for other in others)
    # No layout of eight fits: of sixteen then.
    more = nearest(plan(QWEN_32B, "parallel.tensor=8"))
    assert {other.layout.world_size for other in more} == {16}
    # Nothing at all fits into 4 GB.
    assert nearest(plan(QWEN_32B, "parallel.tensor=8", hardware=Hardware(gpu_memory_gb=4))) == []


def test_a_changed_run_is_checked_anew() -> None:
    settings = run(QWEN_32B)
    values: dict[str, Any] = {"tensor": 3}
    with pytest.raises(ValueError, match=r"must be a multiple of parallel\.tensor=3"):
        changed(settings, parallel=values)


@pytest.mark.parametrize("field", ["gpu_memory_gb", "tflops", "mfu", "node_gbs", "network_gbs"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_hardware_is_checked(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^--{field.replace('_', '-')}={value} must be a finite number above 0"):
        Hardware(**cast(Any, {field: value}))
