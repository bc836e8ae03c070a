"""One run's plan: the numbers, put together from the files beside this one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from nemo_eaft.logits_memory import choose_fused_linear, rank_memory
from nemo_eaft.plan.activations import (
    LayerBytes,
    chunks_in_flight,
    embedding_backward_bytes,
    final_norm_bytes,
    layer_bytes,
    score_buffer_bytes,
)
from nemo_eaft.plan.batch import Attention, MicroBatch
from nemo_eaft.plan.hardware import COMMUNICATOR_BYTES, CONTEXT_BYTES, NAMED_TO_REPORTED, TIGHT, Hardware
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.loss_memory import LOSS_PATHS, LossPath, loss_bytes, loss_path
from nemo_eaft.plan.memory import StateBytes, state_bytes
from nemo_eaft.plan.parameters import RankParameters, model_parameters, rank_parameters
from nemo_eaft.plan.shape import ModelShape
from nemo_eaft.plan.time import StepTime, step_time
from nemo_eaft.settings import Settings

Verdict = Literal["fits", "tight", "does not fit"]
RECOMPUTES = ("none", "selective", "full")


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage, at the worst moment of a step."""

    state: StateBytes
    activations: int
    """What layers keep for backward, of all micro-batches in flight, and what one layer's backward takes on the stages
    without a loss, or the embedding's on the first of several."""
    loss: int
    """Logits and loss, beside the activations; 0 but on the last stage."""
    overhead: int
    """CUDA and NCCL, assumed; 0 on the CPU."""

    @property
    def parts(self) -> dict[str, int]:
        """Each part by its name."""
        return {
            "weights": self.state.weights,
            "gradients": self.state.gradients,
            "optimizer": self.state.optimizer,
            "activations": self.activations,
            "loss": self.loss,
            "overhead": self.overhead,
        }

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What a run asks of its GPUs.

    settings and shape must fit each other (:func:`nemo_eaft.hf_model.check_layout`).
    """

    settings: Settings
    shape: ModelShape
    hardware: Hardware
    attention: Attention | None = None

    @cached_property
    def layout(self) -> Layout:
        """How the ranks are cut."""
        return Layout.of(self.settings)

    @cached_property
    def batch(self) -> MicroBatch:
        """One micro-batch of a rank."""
        return MicroBatch.of(self.settings, self.layout, self.attention)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the model."""
        return model_parameters(self.shape)

    @cached_property
    def stages(self) -> list[RankParameters]:
        """Parameters of a rank of each stage."""
        return [rank_parameters(self.shape, self.layout, stage) for stage in range(self.layout.pipeline)]

    @cached_property
    def memory_bytes(self) -> int:
        """Bytes of a GPU; with the CPU backend a rank's part of this machine."""
        if self.settings.run.backend == "cpu":
            return rank_memory(self.settings)
        return int(self.hardware.gpu_memory_gb * 1e9)

    @cached_property
    def fused_linear(self) -> bool:
        """What ``loss.fused_linear`` means on such a GPU.

        ``auto`` asks the GPU, which has more than its name says; where that could decide either way, the way that takes
        more memory.
        """
        on_cpu = self.settings.run.backend == "cpu"
        sizes = [self.memory_bytes] if on_cpu else [self.memory_bytes, int(self.memory_bytes * NAMED_TO_REPORTED)]
        choices = [choose_fused_linear(self.settings, self.shape.vocab_size, size)[0] for size in sizes]
        return max(choices, key=lambda fused: self.loss_by_path()[loss_path(self.settings, fused)])

    @cached_property
    def path(self) -> LossPath:
        """How the loss is computed."""
        return loss_path(self.settings, self.fused_linear)

    @cached_property
    def layer(self) -> LayerBytes:
        """One layer and one micro-batch."""
        return layer_bytes(self.shape, self.layout, self.batch)

    @cached_property
    def memory(self) -> list[StageMemory]:
        """Memory of a rank of each stage."""
        return [self._stage_memory(stage) for stage in range(self.layout.pipeline)]

    @cached_property
    def fullest(self) -> int:
        """The stage whose ranks hold most; the first of several."""
        return max(range(self.layout.pipeline), key=lambda stage: (self.memory[stage].total, -stage))

    @property
    def peak(self) -> int:
        """Bytes of a rank of the fullest stage."""
        return self.memory[self.fullest].total

    @property
    def verdict(self) -> Verdict:
        """Whether the fullest stage has room."""
        if self.peak > self.memory_bytes:
            return "does not fit"
        return "tight" if self.peak > TIGHT * self.memory_bytes else "fits"

    @cached_property
    def time(self) -> StepTime:
        """Seconds of a step, assumed."""
        return step_time(self.shape, self.layout, self.settings, self.batch, self.path, self.hardware, self.stages)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step where every row is full."""
        return self.settings.trainer.global_batch_size * self.batch.context_length

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, and per parameter the optimizer's float32 weight (with bfloat16, or the distributed optimizer) and
        two moments; what NeMo writes besides is small."""
        trainer, item = self.settings.trainer, self.batch.itemsize
        float32_weight = 4 if item < 4 or trainer.distributed_optimizer else 0
        return self.parameters * (item + float32_weight + 8)

    def activations_by_recompute(self) -> dict[str, int]:
        """Bytes of activations on the fullest stage with each ``trainer.recompute``."""
        return {name: self._activations(self.fullest, name) for name in RECOMPUTES}

    def loss_by_path(self) -> dict[LossPath, int]:
        """Bytes of logits and loss on the last stage, with each way to compute the loss."""
        return {path: loss_bytes(self.shape, self.layout, self.batch, path) for path in LOSS_PATHS}

    def kept_by_layers(self, stage: int, recompute: str) -> int:
        """Bytes that layers and the last norm keep for backward, of all micro-batches in flight."""
        layout = self.layout
        chunks = chunks_in_flight(layout, stage, self.settings.num_micro_batches)
        kept = chunks * self._chunk(stage, recompute)
        if stage == layout.pipeline - 1:
            kept += final_norm_bytes(self.shape, self.batch)
        return kept + score_buffer_bytes(self.shape, layout, self.batch)

    def _activations(self, stage: int, recompute: str) -> int:
        """Bytes of activations of a stage, and of one layer's backward where that takes more than the loss, or on the
        first of several stages of the embedding's."""
        backward = self.layer.again(recompute) + self.layer.gradients
        kept, layout = self.kept_by_layers(stage, recompute), self.layout
        at_most = kept + max(backward - self._loss(stage), 0)
        if stage > 0 or layout.pipeline == 1:
            return at_most
        # The end of a chunk's backward: nothing of the chunk is kept by then.
        return max(
            at_most, kept - self._chunk(stage, recompute) + embedding_backward_bytes(self.shape, layout, self.batch)
        )

    def _chunk(self, stage: int, recompute: str) -> int:
        """Bytes that the layers of one model chunk keep of one micro-batch."""
        layers = self.layout.layers_of(stage, self.shape.num_hidden_layers)
        return layers // self.layout.virtual_pipeline * self.layer.kept(recompute)

    def _loss(self, stage: int) -> int:
        if stage < self.layout.pipeline - 1:
            return 0
        return loss_bytes(self.shape, self.layout, self.batch, self.path)

    def _stage_memory(self, stage: int) -> StageMemory:
        return StageMemory(
            state_bytes(self.stages[stage], self.settings, self.layout),
            self._activations(stage, self.settings.trainer.recompute),
            self._loss(stage),
            self._overhead(),
        )

    def _overhead(self) -> int:
        if self.settings.run.backend == "cpu":
            return 0
        layout = self.layout
        groups = (layout.tensor, layout.pipeline, layout.dense_shards, layout.expert)
        return CONTEXT_BYTES + COMMUNICATOR_BYTES * sum(ranks > 1 for ranks in groups)


def changed(settings: Settings, **groups: dict[str, Any]) -> Settings:
    """The run with other values, checked anew.

    Raises:
        ValueError: they do not go together.
    """
    new = {name: replace(getattr(settings, name), **values) for name, values in groups.items()}
    # What has no effect was said once, for the settings given.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return replace(settings, **new)
