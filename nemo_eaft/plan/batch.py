"""What one micro-batch is on a rank, and by which code it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_eaft.plan.layout import Layout
from nemo_eaft.settings import Settings

Attention = Literal["flash", "unfused"]
Layers = Literal["transformer_engine", "local"]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch on one rank of a layout, at full length."""

    rows: int
    length: int
    """Tokens of a row on this rank: of the whole row, or of its part under context parallelism."""
    context_length: int
    """Tokens of the whole row, to which attention looks."""
    itemsize: int
    """Bytes of an activation."""
    sequence_shards: int
    """Tensor-parallel ranks over which norms and residuals are cut along the sequence; 1: not cut."""
    layers: Layers
    """``transformer_engine`` on GPUs, Megatron's ``local`` layers with the CPU backend."""
    attention: Attention
    """``flash`` keeps no scores; ``unfused`` keeps heads x length x length of them."""

    @classmethod
    def of(cls, settings: Settings, layout: Layout, attention: Attention | None = None) -> MicroBatch:
        """The micro-batch of a run.

        attention: None for what the run takes: flash on GPUs, unfused on the CPU and for float32, which Transformer
            Engine's flash and fused attention do not (``dot_product_attention/utils.py``, get_attention_backend).

        Raises:
            ValueError: flash attention in float32.
        """
        trainer, on_cpu = settings.trainer, settings.run.backend == "cpu"
        if attention == "flash" and trainer.precision == "fp32":
            raise ValueError("--attention=flash: not with trainer.precision=fp32; allowed is unfused")
        usual: Attention = "unfused" if on_cpu or trainer.precision == "fp32" else "flash"
        length = max(trainer.seq_length, settings.data.packed_size or 0)
        return cls(
            rows=trainer.micro_batch_size,
            length=length // layout.context,
            context_length=length,
            itemsize={"bf16": 2, "fp32": 4}[trainer.precision],
            sequence_shards=layout.tensor if layout.sequence else 1,
            layers="local" if on_cpu else "transformer_engine",
            attention=attention or usual,
        )

    @property
    def tokens(self) -> int:
        """Tokens on this rank."""
        return self.rows * self.length

    @property
    def residual_tokens(self) -> int:
        """Tokens of norms and residuals on this rank."""
        return self.tokens // self.sequence_shards
