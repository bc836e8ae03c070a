"""Whether a run should fuse its output layer with the loss: what the logits would take of a rank's memory."""

from __future__ import annotations

import os

from nemo_eaft.settings import Settings

SHARE = 10
"""``loss.fused_linear=auto`` allows the logits one part in so many of the memory: the rest is for weights, optimizer
state and activations."""


def choose_fused_linear(settings: Settings, vocab_size: int, memory: int | None = None) -> tuple[bool, str | None]:
    """What ``loss.fused_linear`` means on this rank, and for ``auto`` a sentence that says why.

    Every rank decides for itself from the settings and its memory, so the machines of a run must be of one kind.

    memory: bytes of a rank; None: of this one.
    """
    choice = settings.loss.fused_linear
    if choice != "auto":
        return choice, None
    if settings.loss.gate == "stock":
        return False, None
    need, have = logits_bytes(settings, vocab_size), rank_memory(settings) if memory is None else memory
    fused = need * SHARE > have
    why = (
        f"loss.fused_linear=auto means {str(fused).lower()}: the logits of a micro-batch and their gradient would take "
        f"{need / 1e9:.2f} GB, {'more than' if fused else 'at most'} a tenth of a rank's {have / 1e9:.1f} GB"
    )
    return fused, why


def logits_bytes(settings: Settings, vocab_size: int) -> int:
    """Bytes of one micro-batch's logits and their gradient on a rank of the last stage, at full length.

    vocab_size: the true one; the few columns of padding are left out.
    """
    trainer, parallel = settings.trainer, settings.parallel
    length = max(trainer.seq_length, settings.data.packed_size or 0)
    tokens = trainer.micro_batch_size * length // parallel.context
    itemsize = {"bf16": 2, "fp32": 4}[trainer.precision]
    return 2 * tokens * -(-vocab_size // parallel.tensor) * itemsize


def rank_memory(settings: Settings) -> int:
    """Bytes of this rank's GPU, or its part of the machine's memory with ``run.backend=cpu``."""
    if settings.run.backend == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // settings.trainer.gpus_per_node
    import torch

    # Not the current device: before NeMo sets it, that is GPU 0 for every rank.
    return int(torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory)
