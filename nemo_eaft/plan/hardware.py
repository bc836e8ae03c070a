"""What is assumed of the machines. Every figure can be given on the command line; none was measured here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU and how it is connected. GB are 10^9 bytes."""

    gpu_memory_gb: float = 80.0
    """Memory of a GPU. An H100 of "80 GB" has about 85, which leaves some for what is not foreseen."""
    tflops: float = 989.0
    """Highest rate of dense bfloat16 matrix products, 10^12 operations a second (data sheet of the H100 SXM)."""
    mfu: float = 0.5
    """Part of ``tflops`` reached while a rank computes; waiting is counted by itself."""
    node_gbs: float = 300.0
    """GB a second that a rank sends to others of its machine (NVLink)."""
    network_gbs: float = 40.0
    """GB a second that a rank sends to other machines (one 400 Gbit/s adapter a GPU, four fifths of it)."""
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{entry.name.replace('_', '-')}={value} must be a finite number above 0")
        if self.mfu > 1:
            raise ValueError(f"--mfu={self.mfu} must be at most 1")


CONTEXT_BYTES = 2 * 10**9
"""CUDA context, cuBLAS, cuDNN and their workspaces, and what the allocator cannot use (assumed)."""

NAMED_TO_REPORTED = 1.07
"""A GPU reports up to so many times the GB of its name: nvidia-smi lists 81559 MiB, 85.5 x 10^9 bytes, for an H100 of
"80 GB"."""

COMMUNICATOR_BYTES = 10**9
"""NCCL's buffers for each kind of group with more than one rank (assumed)."""

TIGHT = 0.9
"""Above this part of a GPU's memory a run is tight: the allocator's pieces and uneven batches may not fit."""
