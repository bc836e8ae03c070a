"""What the settings of a run ask of each other, and the checks that its groups share."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_eaft.settings import Settings


def warn(message: str) -> None:
    """Warn at this line, and not in a caller: above a dataclass stands code that was generated and has no file, and the
    command line shows a warning of this package in one line."""
    warnings.warn(message, stacklevel=1)


def at_least(key: str, value: int | None, least: int, more: str = "") -> None:
    """Refuse a number below ``least``; None passes."""
    if value is not None and value < least:
        raise ValueError(f"{key}={value} must be {least} or more{more}")


def finite(key: str, value: float, least: float) -> None:
    """Refuse a number that is not finite or below ``least``."""
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{key}={value} must be a finite number of at least {least}")


def check_together(settings: Settings) -> None:
    """Check what no single group can check alone.

    Raises:
        ValueError: naming the key, its value and what is allowed. The rules are those of NeMo 2.7.3
            (``nemo/collections/llm/api.py``, ``_validate_config``) and megatron-core 0.15.3
            (``model_parallel_config.py``, ``pipeline_parallel/schedules.py``), found before any process
            starts.
    """
    _check_texts(settings)
    parallel, trainer, data = settings.parallel, settings.trainer, settings.data
    world = settings.world_size
    if world % parallel.model_ranks:
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes} x trainer.gpus_per_node={trainer.gpus_per_node} = "
            f"{world} ranks must be a multiple of parallel.tensor={parallel.tensor} x "
            f"parallel.pipeline={parallel.pipeline} x parallel.context={parallel.context} = {parallel.model_ranks}"
        )
    per_pass = trainer.micro_batch_size * settings.data_parallel
    if trainer.global_batch_size % per_pass:
        raise ValueError(
            f"trainer.global_batch_size={trainer.global_batch_size} must be a multiple of "
            f"trainer.micro_batch_size={trainer.micro_batch_size} x {settings.data_parallel} data-parallel ranks = "
            f"{per_pass}"
        )
    if parallel.virtual_pipeline is not None and settings.num_micro_batches % parallel.pipeline:
        raise ValueError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs a number of micro-batches per step "
            f"that is a multiple of parallel.pipeline={parallel.pipeline}, but "
            f"trainer.global_batch_size={trainer.global_batch_size} gives {settings.num_micro_batches}"
        )
    if (world // (parallel.tensor * parallel.pipeline)) % parallel.expert:
        raise ValueError(
            f"parallel.expert={parallel.expert} must divide the "
            f"{world // (parallel.tensor * parallel.pipeline)} ranks that "
            f"parallel.tensor={parallel.tensor} and parallel.pipeline={parallel.pipeline} leave"
        )
    if parallel.expert > 1 and parallel.tensor > 1 and not parallel.sequence:
        raise ValueError(
            f"parallel.expert={parallel.expert} with parallel.tensor={parallel.tensor} needs parallel.sequence=true"
        )
    if settings.run.backend == "cpu" and parallel.expert > 1 and parallel.tensor > 1:
        raise ValueError(
            f"parallel.expert={parallel.expert} with parallel.tensor={parallel.tensor} and run.backend=cpu: "
            f"Megatron-Core gathers pieces of different sizes then, which gloo cannot; allowed is 1 for either"
        )
    # NeMo pads a batch to a multiple of 16 but never beyond seq_length, so a batch may be exactly seq_length long.
    unit = settings.sequence_unit
    for key, length in (("trainer.seq_length", trainer.seq_length), ("data.packed_size", data.packed_size)):
        if length is not None and length % unit:
            raise ValueError(
                f"{key}={length} must be a multiple of {unit} with "
                f"parallel.sequence={str(parallel.sequence).lower()}, "
                f"parallel.tensor={parallel.tensor}, parallel.context={parallel.context}"
            )
    if data.packed:
        _validate_packed(settings)
    if data.validation is None and trainer.val_every not in (0, type(trainer).val_every):
        warnings.warn(f"trainer.val_every={trainer.val_every} has no effect without data.validation", stacklevel=1)


def _check_texts(settings: Settings) -> None:
    """Names end up in paths and in lines of a log."""
    for group in fields(settings):
        values = getattr(settings, group.name)
        for entry in fields(values):
            value = getattr(values, entry.name)
            # A template and a system message are text, with line breaks of their own.
            free = entry.name in ("prompt_template", "system")
            if isinstance(value, str) and not free and not value.isprintable():
                raise ValueError(f"{group.name}.{entry.name}={value!r} holds a character that cannot be printed")
    name = settings.run.name
    if name is not None and (set(name) & set("/\\") or name in (".", "..")):
        raise ValueError(f"run.name={name!r} must be a name, without / and \\; run.dir is the folder of the run")


def _validate_packed(settings: Settings) -> None:
    trainer, data = settings.trainer, settings.data
    if trainer.micro_batch_size != 1:
        raise ValueError(
            f"data.packed=true needs trainer.micro_batch_size=1, got {trainer.micro_batch_size}: a packed sequence is "
            f"a micro-batch already (lower trainer.global_batch_size and raise data.packed_size instead)"
        )
    if settings.parallel.context > 1:
        raise ValueError(
            f"data.packed=true with parallel.context={settings.parallel.context} is refused: NeMo 2.7.3 "
            f"would slice the row boundaries (cu_seqlens) like tokens and let rows attend to each other. Use "
            f"parallel.context=1 or data.packed=false"
        )
    if data.packed_size is not None and data.packed_size < trainer.seq_length:
        raise ValueError(
            f"data.packed_size={data.packed_size} must be at least trainer.seq_length={trainer.seq_length}, "
            f"or the longest rows would fit into no pack"
        )
