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
class Recorded:
    """What one rank saw of a training."""

    answers: list[list[tuple[int, ...]]] = dataclasses.field(default_factory=list)
    """By step: the labels under the loss mask of each row this rank computed the loss of."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """By step: `reduced_train_loss`, as NeMo logged it."""
    val_losses: list[float] = dataclasses.field(default_factory=list)
    """By validation: `val_loss`, as NeMo logged it."""
    micro_batches: list[int] = dataclasses.field(default_factory=list)
    """By step: micro-batches that entered the first stage or chunk of this rank."""
    parameters: dict[str, list[Piece]] = dataclasses.field(default_factory=dict)
    """Final parameters, and optimizer state where asked for: Megatron's name -> the pieces that this rank holds."""
    error: str | None = None
    """Type and message of the exception that ended the training."""


@dataclasses.dataclass
class Piece:
    """A part of a tensor: `whole[offset : offset + data.shape]`."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor


class Recorder(Callback):
    def __init__(self, optimizer: bool, stop_at: int | None) -> None:
        self.seen = Recorded()
        self._optimizer = optimizer
        self._stop_at = stop_at
        self._answers: list[tuple[int, ...]] = []

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], forward_callback: Any) -> None:
        if batch.get("loss_mask") is None or step.forward_only:
            return
        for labels, mask in zip(batch["labels"], batch["loss_mask"], strict=True):
            self._answers.append(tuple(labels[mask != 0].tolist()))

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any) -> None:
        if not step.forward_only and step.trainer.global_step + 1 == self._stop_at:
            os._exit(DIES)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.answers.append(self._answers)
        self._answers = []
        self.seen.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if "val_loss" in trainer.callback_metrics:
            self.seen.val_losses.append(float(trainer.callback_metrics["val_loss"]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        strategy = trainer.strategy
        model = strategy.megatron_parallel.sharded_state_dict()
        self.seen.parameters = pieces(model)
        if self._optimizer:
            state = strategy.optimizer_sharded_state_dict()
            self.seen.parameters |= {f"optimizer {name}": part for name, part in pieces(state).items()}


def pieces(sharded: dict[str, Any]) -> dict[str, list[Piece]]:
    """Every tensor of a sharded state dict of Megatron, as this rank holds it."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    apply_factories(sharded)
    found: dict[str, list[Piece]] = {}
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor) and value.data is not None:
            data = value.data.detach().clone()
            data = data.reshape((1,) * value.prepend_axis_num + tuple(data.shape))
            piece = Piece(tuple(value.global_shape), tuple(value.global_offset), data)
            found.setdefault(value.key, []).append(piece)
    return found


@dataclasses.dataclass
class Plan:
    """One training."""

    settings: Settings
    checkpoint: Path
    save: bool = False
    """Keep the checkpoints of the settings; otherwise nothing is written but the metrics."""
    optimizer: bool = False
    """Return the optimizer's state too."""
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
    recorder = Recorder(plan.optimizer, plan.stop_at)
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
