"""What ranks do. Each function runs on every rank of `ranks.run_ranks` and returns something picklable."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import nemo_eaft.train
from nemo_eaft.convert import convert_to_hf, convert_to_nemo
from nemo_eaft.settings import Settings
from tests.nemo.ranks import DIES


def to_nemo(source: Path, output: Path) -> None:
    convert_to_nemo(source, output)


def to_hf(checkpoint: Path, output: Path, hf_files: Path) -> None:
    convert_to_hf(checkpoint, output, hf_files)


@dataclasses.dataclass
class Piece:
    """A part of a tensor: `whole[offset : offset + data.shape]`."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor


@dataclasses.dataclass
class Recorded:
    """What one rank saw of a training."""

    answers: list[list[list[tuple[int, ...]]]] = dataclasses.field(default_factory=list)
    """By step, micro-batch and row, the labels under the loss mask; of the rows this rank computed the loss of."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """By step: `reduced_train_loss`, as NeMo logged it."""
    gradient_norms: list[float] = dataclasses.field(default_factory=list)
    """By step: norm of the whole model's gradient before clipping, as NeMo logged it."""
    val_losses: list[float] = dataclasses.field(default_factory=list)
    """By validation: `val_loss`, as NeMo logged it."""
    initial: dict[str, list[Piece]] = dataclasses.field(default_factory=dict)
    """Parameters before the first step, by Megatron's names: the pieces that this rank holds."""
    final: dict[str, list[Piece]] = dataclasses.field(default_factory=dict)
    """The same after the last step."""
    optimizer: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """Every tensor of this rank's optimizer state after the last step."""
    error: str | None = None
    """Type and message of the exception that ended the training."""


class Recorder(Callback):
    """Watches a training; may end its process in the middle of a step."""

    def __init__(self, stop_at: int | None) -> None:
        self.seen = Recorded()
        self._stop_at = stop_at
        self._answers: list[list[tuple[int, ...]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.initial = pieces(trainer.strategy.megatron_parallel)

    def on_megatron_microbatch_end(self, step: Any, batch: dict[str, Any], output: Any, **_: Any) -> None:
        # [b, s] is a loss; the chunks before it give hidden states [s, b, h].
        if step.forward_only or output.dim() != 2:
            return
        rows = zip(batch["labels"], batch["loss_mask"], strict=True)
        self._answers.append([tuple(labels[mask != 0].tolist()) for labels, mask in rows])

    def on_megatron_step_end(self, step: Any, **_: Any) -> None:
        if not step.forward_only and step.trainer.global_step + 1 == self._stop_at:
            os._exit(DIES)

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.seen.answers.append(self._answers)
        self._answers = []
        self.seen.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))
        self.seen.gradient_norms.append(float(trainer.callback_metrics["grad_norm"]))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.val_losses.append(float(trainer.callback_metrics["val_loss"]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.final = pieces(trainer.strategy.megatron_parallel)
        for optimizer in trainer.optimizers:
            self.seen.optimizer += tensors(optimizer.state_dict())


def pieces(model: Any) -> dict[str, list[Piece]]:
    """Every parameter of a Megatron model, as this rank holds it."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    found: dict[str, list[Piece]] = {}
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor) and value.data is not None:
            data = value.data.detach().clone()
            data = data.reshape((1,) * value.prepend_axis_num + tuple(data.shape))
            piece = Piece(tuple(value.global_shape), tuple(value.global_offset), data)
            found.setdefault(value.key, []).append(piece)
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested dicts and lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


@dataclasses.dataclass
class Plan:
    """One training."""

    settings: Settings
    checkpoint: Path
    save: bool = False
    """Keep the checkpoints of the settings; otherwise nothing is written but the metrics."""
    stop_at: int | None = None
    """Die in this step, before the optimizer."""
    callback: bool = True
    """False: no EAFTCallback, as in a NeMo script of somebody who does not know us."""
    catch: bool = False
    """Return an exception instead of raising it."""
    change: Callable[[], None] | None = None
    """Called first on each rank, to break something on purpose."""


def train(plan: Plan) -> Recorded:
    """`run_training`, watched."""
    recorder = Recorder(plan.stop_at)
    if plan.change is not None:
        plan.change()
    _with_callback(recorder, plan)
    if not plan.save:
        _without_checkpoints()
    try:
        nemo_eaft.train.run_training(plan.settings, plan.checkpoint)
    except Exception as error:
        if not plan.catch:
            raise
        recorder.seen.error = f"{type(error).__name__}: {error}"
    return recorder.seen


def _with_callback(recorder: Recorder, plan: Plan) -> None:
    from nemo.collections import llm

    import nemo_eaft.nemo

    finetune = llm.finetune

    def watched(*args: Any, trainer: Any, **kwargs: Any) -> Any:
        unwanted = [] if plan.callback else [nemo_eaft.nemo.EAFTCallback]
        # Lightning adds a checkpoint callback of its own where none is given.
        unwanted += [] if plan.save else [ModelCheckpoint]
        trainer.callbacks = [
            callback for callback in trainer.callbacks if not isinstance(callback, tuple(unwanted))
        ]
        trainer.callbacks.append(recorder)
        return finetune(*args, trainer=trainer, **kwargs)

    llm.finetune = watched


def _without_checkpoints() -> None:
    build = nemo_eaft.train.build_logger

    def without(*args: Any) -> Any:
        logger = build(*args)
        logger.ckpt = None
        return logger

    nemo_eaft.train.build_logger = without
