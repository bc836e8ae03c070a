"""Bytes of weights, gradients and optimizer state of a rank, as Megatron-Core 0.15.3 allocates them.

``distributed/param_and_grad_buffer.py``: one buffer per model chunk and per kind of parameter (dense, expert-parallel)
holds the gradients in float32 (``grad_reduce_in_fp32``), and with the distributed optimizer a second one the weights.
Without overlapped reduction, which is how :mod:`nemo_eaft.train` sets it, a buffer is one bucket, but for a shared
embedding, which has its own. With the distributed optimizer each parameter starts at a multiple of 64 elements and each
bucket ends at a multiple of 128 and of the ranks that share it. ``optimizer/``: Adam's two moments in float32 and, for
bfloat16 weights, the weights once more in float32; with the distributed optimizer the rank's part of each bucket alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.parameters import ParameterTensor, RankParameters
from nemo_eaft.settings import Settings

_PARAMETER_UNIT = 64
_BUCKET_UNIT = 128
_FLOAT32 = 4


@dataclass(frozen=True)
class StateBytes:
    """What lives from step to step on a rank, in bytes."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def weight_bytes(settings: Settings) -> int:
    """Bytes of one element of a weight or an activation."""
    return {"bf16": 2, "fp32": 4}[settings.trainer.precision]


def state_bytes(rank_parameters: RankParameters, settings: Settings, layout: Layout) -> StateBytes:
    """Bytes of weights, gradients and optimizer state of a rank (of the fullest one, where ranks of a distributed
    optimizer differ by the padding at the end of a bucket)."""
    experts_apart = layout.expert > 1
    shards = (layout.dense_shards, layout.expert_shards)
    return _state(
        rank_parameters, weight_bytes(settings), settings.trainer.distributed_optimizer, experts_apart, shards
    )


@functools.lru_cache(maxsize=4096)
def _state(
    rank_parameters: RankParameters, itemsize: int, distributed: bool, experts_apart: bool, shards: tuple[int, int]
) -> StateBytes:
    """experts_apart: they are in buffers of their own. shards: ranks that share a buffer, dense and of experts."""
    weights = gradients = optimizer = 0
    # exp_avg, exp_avg_sq, and the float32 weights where the model's are narrower.
    per_element = 2 * _FLOAT32 + (_FLOAT32 if itemsize < _FLOAT32 else 0)
    for chunk in rank_parameters.chunks:
        experts = [tensor for tensor in chunk if experts_apart and tensor.part == "experts"]
        dense = [tensor for tensor in chunk if not (experts_apart and tensor.part == "experts")]
        for tensors, ranks in zip((dense, experts), shards, strict=True):
            if not distributed:
                count = sum(tensor.elements for tensor in tensors)
                weights += count * itemsize
                gradients += count * _FLOAT32
                optimizer += count * per_element
                continue
            for bucket in _buckets(tensors):
                size = _padded(bucket, ranks)
                weights += size * itemsize
                gradients += size * _FLOAT32
                optimizer += min(size // ranks, sum(tensor.elements for tensor in bucket)) * per_element
    return StateBytes(weights, gradients, optimizer)


def _buckets(tensors: Iterable[ParameterTensor]) -> list[list[ParameterTensor]]:
    """Tensors that are reduced together: all of a buffer, but a shared embedding, which has a bucket of its own."""
    buckets: list[list[ParameterTensor]] = [[]]
    for tensor in tensors:
        if tensor.shared_embedding:
            buckets += [[tensor], []]
        else:
            buckets[-1].append(tensor)
    return [bucket for bucket in buckets if bucket]


def _padded(bucket: list[ParameterTensor], shards: int) -> int:
    """Elements of a bucket of the distributed optimizer."""
    end = 0
    for tensor in reversed(bucket):
        end = -(-end // _PARAMETER_UNIT) * _PARAMETER_UNIT + tensor.elements
    unit = math.lcm(shards, _BUCKET_UNIT)
    return -(-end // unit) * unit
