"""Operations of a step and how long it may take. The efficiencies are assumptions (:mod:`nemo_eaft.plan.hardware`)."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_eaft.plan.batch import MicroBatch
from nemo_eaft.plan.hardware import Hardware
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.loss_memory import LossPath
from nemo_eaft.plan.parameters import RankParameters
from nemo_eaft.plan.shape import ModelShape
from nemo_eaft.settings import Settings


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, all assumed."""

    compute: float
    """Matrix products of one rank's stage, those that are made again included."""
    bubble: float
    """Waiting for other stages, at the beginning and the end of the step."""
    tensor_parallel: float
    """Sums over the tensor-parallel ranks."""
    expert_parallel: float
    """Tokens sent to experts and back."""
    data_parallel: float
    """Gradients added over the copies of the model, and the new weights fetched; nothing of it overlaps."""

    @property
    def total(self) -> float:
        """All of them, one after the other."""
        return self.compute + self.bubble + self.tensor_parallel + self.expert_parallel + self.data_parallel


def flops_per_token(shape: ModelShape, length: int) -> dict[str, int]:
    """Operations of one token's forward: ``layers`` (of them ``scores``, which causal attention halves) and
    ``output_layer``. Two for each multiplication of a matrix product; nothing else is counted."""
    hidden, queries = shape.hidden_size, shape.query_width
    attention = hidden * (2 * queries + 2 * shape.key_value_width)
    feed_forward = 3 * hidden * shape.intermediate_size * shape.num_experts_per_tok
    router = hidden * (shape.num_experts or 0)
    scores = shape.num_hidden_layers * 2 * queries * length
    layers = shape.num_hidden_layers * 2 * (attention + feed_forward + router) + scores
    return {"layers": layers, "scores": scores, "output_layer": 2 * hidden * shape.vocab_size}


def model_flops(shape: ModelShape, settings: Settings, batch: MicroBatch) -> int:
    """Operations of one step as they are counted for model FLOPs utilisation: forward and twice as much backward,
    nothing made again, every row at full length."""
    each = flops_per_token(shape, batch.context_length)
    tokens = settings.trainer.global_batch_size * batch.context_length
    return 3 * tokens * (each["layers"] + each["output_layer"])


def step_time(
    shape: ModelShape,
    layout: Layout,
    settings: Settings,
    batch: MicroBatch,
    path: LossPath,
    hardware: Hardware,
    stages: list[RankParameters],
) -> StepTime:
    """How long one step may take.

    stages: parameters of each stage; the largest gradient buffer is the last to be reduced.
    """
    each, number = flops_per_token(shape, batch.context_length), settings.num_micro_batches
    again = {"none": 0, "selective": each["scores"], "full": each["layers"]}[settings.trainer.recompute]
    fused = each["output_layer"] if path == "eaft_fused_linear" and layout.tensor * layout.virtual_pipeline > 1 else 0
    rate = hardware.tflops * 1e12 * hardware.mfu * layout.tensor
    if settings.trainer.precision == "fp32":
        # TF32 products, half as fast.
        rate /= 2
    layer = batch.tokens * (3 * each["layers"] + again) / shape.num_hidden_layers / rate
    output_layer = batch.tokens * (3 * each["output_layer"] + fused) / rate
    per_layer = _tensor_parallel(shape, layout, settings, batch, hardware)
    per_layer_experts = _expert_parallel(shape, layout, settings, batch, hardware)

    def of_stage(stage: int) -> tuple[float, int, float]:
        """Seconds of a micro-batch, layers, and the seconds in which the rank computes."""
        own = layout.layers_of(stage, shape.num_hidden_layers)
        computing = own * layer + (output_layer if stage == layout.pipeline - 1 else 0)
        return computing + own * (per_layer + per_layer_experts), own, computing

    # Every micro-batch waits for the slowest stage: the last, which has the output layer, or one with more layers.
    slowest, own_layers, seconds = max(map(of_stage, range(layout.pipeline)))
    return StepTime(
        compute=number * seconds,
        bubble=(layout.pipeline - 1) / layout.virtual_pipeline * slowest,
        tensor_parallel=number * own_layers * per_layer,
        expert_parallel=number * own_layers * per_layer_experts,
        data_parallel=max(_data_parallel(stage, layout, settings, batch, hardware) for stage in stages),
    )


def _tensor_parallel(
    shape: ModelShape, layout: Layout, settings: Settings, batch: MicroBatch, hardware: Hardware
) -> float:
    """Seconds of a layer's sums: one behind attention and one behind the feed-forward part, forward, backward, and
    once more where forward is repeated; each an all-reduce, or an all-gather and a reduce-scatter, which take as long
    together. To experts goes each token as often as it has experts (``moe/token_dispatcher.py``,
    dispatch_postprocess)."""
    if layout.tensor == 1:
        return 0.0
    sums = _passes(settings) * (1 + shape.num_experts_per_tok)
    sent = 2 * (layout.tensor - 1) / layout.tensor * batch.tokens * shape.hidden_size * batch.itemsize
    bandwidth = hardware.node_gbs if layout.tensor <= hardware.gpus_per_node else hardware.network_gbs
    return sums * sent / (bandwidth * 1e9)


def _passes(settings: Settings) -> int:
    """How often a layer's collectives are called: forward, backward, and in forward that is repeated."""
    return 3 if settings.trainer.recompute == "full" else 2


def _expert_parallel(
    shape: ModelShape, layout: Layout, settings: Settings, batch: MicroBatch, hardware: Hardware
) -> float:
    """Seconds in which a layer's tokens go to their experts and come back, in each pass."""
    if layout.expert == 1:
        return 0.0
    copies = batch.residual_tokens * shape.num_experts_per_tok * (layout.expert - 1) / layout.expert
    inside = layout.expert * layout.tensor <= hardware.gpus_per_node
    bandwidth = hardware.node_gbs if inside else hardware.network_gbs
    return 2 * _passes(settings) * copies * shape.hidden_size * batch.itemsize / (bandwidth * 1e9)


def _data_parallel(
    stage: RankParameters, layout: Layout, settings: Settings, batch: MicroBatch, hardware: Hardware
) -> float:
    """Seconds to add the float32 gradients of a stage, and to fetch the new weights."""
    # Ranks of a group are as far apart as the tensor-parallel ranks between them.
    inside = layout.world_size <= hardware.gpus_per_node
    bandwidth = (hardware.node_gbs if inside else hardware.network_gbs) * 1e9
    seconds = 0.0
    experts = stage.experts if layout.expert > 1 else 0
    for count, shards in ((stage.total - experts, layout.dense_shards), (experts, layout.expert_shards)):
        whole = count * (4 + batch.itemsize) if settings.trainer.distributed_optimizer else count * 2 * 4
        seconds += whole * (shards - 1) / shards / bandwidth
    return seconds
