"""Where a rank stands in the job, for messages that name it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state
from torch import distributed


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank. Every number counts from 0."""

    rank: int
    """Global rank."""
    tensor: int
    pipeline: int
    """Stage of the pipeline."""
    data: int
    """Copy of the model; the ranks of one copy must train on the same rows."""
    context: int

    def __str__(self) -> str:
        return (
            f"global rank {self.rank} (tensor {self.tensor}, pipeline {self.pipeline}, data {self.data}, "
            f"context {self.context})"
        )


def here() -> Place:
    """This rank; after Megatron's groups were built."""
    return Place(
        rank=distributed.get_rank(),
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(with_context_parallel=False),
        context=parallel_state.get_context_parallel_rank(),
    )
