"""How a run's ranks are cut."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_eaft.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the groups of ranks, and what follows from them."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks per stage; 1: not interleaved."""
    context: int = 1
    expert: int = 1
    sequence: bool = False
    last_stage_layers: int | None = None
    """Layers of the last stage, where they are not as many as the others'."""

    @classmethod
    def of(cls, settings: Settings) -> Layout:
        """The layout of a run."""
        parallel = settings.parallel
        return cls(
            world_size=settings.world_size,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline or 1,
            context=parallel.context,
            expert=parallel.expert,
            sequence=parallel.sequence,
            last_stage_layers=parallel.last_stage_layers,
        )

    @property
    def data_parallel(self) -> int:
        """Copies of the model."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def dense_shards(self) -> int:
        """Ranks over which the distributed optimizer cuts all but the experts: data x context parallel."""
        return self.data_parallel * self.context

    @property
    def expert_shards(self) -> int:
        """Ranks that hold the same experts. Experts are cut over the tensor-parallel ranks as well
        (``expert_tensor_parallel_size`` is ``tensor`` unless set, ``megatron/core/parallel_state.py`` 0.15.3)."""
        return self.world_size // (self.tensor * self.pipeline * self.expert)

    def chunks(self, stage: int, layers: int) -> list[range]:
        """Layers of each model chunk of a pipeline stage, of ``layers`` in all; chunk c of stage p is the
        (c x pipeline + p)-th run of layers."""
        if self.last_stage_layers is not None:
            each = (layers - self.last_stage_layers) // (self.pipeline - 1)
            return [range(stage * each, layers if stage == self.pipeline - 1 else (stage + 1) * each)]
        per_chunk = layers // (self.pipeline * self.virtual_pipeline)
        firsts = [(chunk * self.pipeline + stage) * per_chunk for chunk in range(self.virtual_pipeline)]
        return [range(first, first + per_chunk) for first in firsts]

    def layers_of(self, stage: int, layers: int) -> int:
        """How many layers a stage has, of ``layers`` in all."""
        return sum(map(len, self.chunks(stage, layers)))
