"""What ranks do. Each function runs on every rank of `ranks.run_ranks` and returns something picklable."""

from __future__ import annotations

import dataclasses
import importlib.abc
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import nemo_eaft.train
from nemo_eaft.checkpoints import checkpoints_in
from nemo_eaft.convert import convert_to_hf, convert_to_nemo
from nemo_eaft.nemo import EAFTCallback
from nemo_eaft.settings import Settings
from tests.nemo import kinds
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
    """The same after the last step, or when an exception ended the training."""
    optimizer: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """Every tensor of this rank's optimizer state after the last step."""
    nearest_tie: float = math.inf
    """How near this rank's routers came to choosing other experts in the training: see `kinds.watch_ties`."""
    error: str | None = None
    """Type and message of the exception that ended the training."""


class Recorder(Callback):
    """Watches a training; may end its process in the middle of a step."""

    def __init__(self, stop_at: int | None) -> None:
        self.seen = Recorded()
        self._stop_at = stop_at
        self._epochs = 0
        self._answers: list[list[tuple[int, ...]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.initial = pieces(trainer.strategy.megatron_parallel)
        kinds.watch_ties(trainer.strategy.megatron_parallel, self._saw_tie)

    def _saw_tie(self, gap: float) -> None:
        self.seen.nearest_tie = min(self.seen.nearest_tie, gap)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # Adapters are put in now.
        self._epochs += 1

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self._epochs == 1 and not self.seen.losses:
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

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        # There is no model yet where the script is refused in setup.
        if getattr(trainer.strategy, "megatron_parallel", None) is not None:
            self.seen.final = pieces(trainer.strategy.megatron_parallel)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.final = pieces(trainer.strategy.megatron_parallel)
        for optimizer in trainer.optimizers:
            core = optimizer.mcore_optimizer
            for part in getattr(core, "chained_optimizers", [core]):
                self.seen.optimizer += tensors(part.optimizer.state_dict())


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
    """Every tensor in nested dicts and lists, dicts in the order of their keys' names."""
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value, key=str)]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


@dataclasses.dataclass
class Plan:
    """One training."""

    settings: Settings
    checkpoint: Path
    resume_from: Path | Literal["newest"] | None = "newest"
    """The checkpoint to go on from; None: the imported one; `newest`: the run's newest, if there is one."""
    save: bool = False
    """Keep the checkpoints of the settings; otherwise nothing is written but the metrics."""
    stop_at: int | None = None
    """Die in this step, before the optimizer."""
    callback: bool = True
    """False: no EAFTCallback, as in a NeMo script of somebody who does not know us."""
    lora: bool = False
    """Train NeMo's LoRA adapters of all linear layers, and nothing else."""
    wrong: Callable[[], None] | None = None
    """Called on every rank before the training: makes the code wrong in one way."""


def train(plan: Plan) -> Recorded:
    """`run_training`, watched."""
    if plan.wrong is not None:
        plan.wrong()
    recorder = Recorder(plan.stop_at)
    _with_callback(recorder, plan)
    if not plan.save:
        _without_checkpoints()
    resume_from = plan.resume_from
    if resume_from == "newest":
        there = checkpoints_in(Path(plan.settings.run.dir))
        resume_from = there[-1] if there else None
    nemo_eaft.train.run_training(plan.settings, plan.checkpoint, resume_from)
    return recorder.seen


def _with_callback(recorder: Recorder, plan: Plan) -> None:
    from nemo.collections import llm

    finetune = llm.finetune

    def watched(*args: Any, trainer: Any, **kwargs: Any) -> Any:
        unwanted = [] if plan.callback else [EAFTCallback]
        # Lightning adds a checkpoint callback of its own where none is given.
        unwanted += [] if plan.save else [ModelCheckpoint]
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, tuple(unwanted))]
        trainer.callbacks.append(recorder)
        if plan.lora:
            kwargs["peft"] = kinds.lora()
        return finetune(*args, trainer=trainer, **kwargs)

    llm.finetune = watched


def _without_checkpoints() -> None:
    build = nemo_eaft.train.build_logger

    def without(settings: Settings, run_dir: Path) -> Any:
        logger = build(settings, run_dir)
        logger.ckpt = None
        return logger

    nemo_eaft.train.build_logger = without


def load_model(checkpoint: Path) -> Any:
    """The whole NeMo model of a checkpoint in this process, as its exporters load it."""
    from nemo.lightning import io

    model_class = type(io.load_context(checkpoint, subpath="model"))
    model, _ = model_class.exporter("hf", checkpoint).nemo_load(checkpoint)
    return model


def nemo_logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """[b, s, V] of the tokens [b, s]."""
    model = load_model(checkpoint).eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    # Megatron masks where it is True.
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(tokens, positions, attention_mask=mask)


def parameter_names(checkpoint: Path) -> list[str]:
    names = (name.split("module.")[-1] for name, _ in load_model(checkpoint).named_parameters())
    return sorted(names)


class _Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "nemo_eaft":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)


def load_without_nemo_eaft(checkpoint: Path, output: Path) -> tuple[str, str]:
    """Load the whole context of a checkpoint and export it by NeMo alone; the classes of trainer and model."""
    # The CPU backend has replaced what it replaces; from here on nothing of the package can be looked up.
    for name in [name for name in sys.modules if name.split(".")[0] == "nemo_eaft"]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Blocked())
    from nemo.collections import llm
    from nemo.lightning import io

    context = io.load_context(checkpoint)
    model = io.load_context(checkpoint, subpath="model")
    llm.export_ckpt(checkpoint, "hf", output, overwrite=True)
    return type(context.trainer).__name__, type(model).__name__
