"""Trainings in which something goes wrong on purpose. `train` runs on every rank, as the functions of `jobs` do."""

from __future__ import annotations

import dataclasses
import math
import types
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch.utils.data import Dataset

import nemo_eaft.train
from nemo_eaft import replicas
from nemo_eaft.loss import linear
from nemo_eaft.megatron import attached, unwrap
from nemo_eaft.settings import Settings
from tests.nemo import jobs

Answer = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Poison:
    """A number that is put into what the output layer makes of one token, in one step (from 1)."""

    step: int
    answer: Answer
    """Which row."""
    where: Literal["valid", "masked"] = "valid"
    """The second token of the answer, or the last token before it."""
    value: float = math.nan


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong."""

    poison: tuple[Poison, ...] = ()
    hidden: bool = False
    """Poison the hidden state before the output layer, not a logit; a fused output layer has no logits."""
    masked: frozenset[tuple[int, Answer]] = frozenset()
    """Rows whose loss mask is 0: step and answer."""
    masked_on: int | None = None
    """The one global rank whose loss masks `masked` changes; None: all ranks."""
    masked_validations: int = 0
    """So many validations, the first ones, have no token in the loss."""
    overflow: tuple[int, int] | None = None
    """Step and global rank where backward gives infinity."""
    other_rows: tuple[int, int] | None = None
    """Step and global rank from which on the data loader gives rows in another order."""
    short: bool = False
    """`other_rows` are four tokens long: a batch of another shape."""
    late: bool = False
    """No promise about the gradient of the loss to a fused output layer."""
    monitor: bool = False
    """Keep NeMo's best checkpoints by `val_loss`."""


@dataclasses.dataclass
class Outcome(jobs.Recorded):
    """What one rank saw."""

    before: dict[str, list[jobs.Piece]] = dataclasses.field(default_factory=dict)
    """Parameters at the start of the last step that began."""
    optimizers: list[list[torch.Tensor]] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    """Said through NeMo's logging or Python's warnings."""
    digests: int = 0
    """Batches that were compared between ranks."""
    early: int = 0
    """Micro-batches whose gradient a fused output layer made in forward."""
    poisoned: int = 0
    """Times that a number was put in."""


def train(plan: jobs.Plan, fault: Fault) -> Outcome:
    """`jobs.train` with the fault; an exception is recorded, not raised."""
    import warnings

    from nemo.collections import llm
    from nemo.utils import logging

    recorder = jobs.Recorder(None)
    outcome = Outcome()
    injected = _Inject(fault, outcome)
    jobs._with_callback(recorder, plan)
    finetune = llm.finetune

    def watched(*args: Any, trainer: Any, **kwargs: Any) -> Any:
        trainer.callbacks.append(injected)
        return finetune(*args, trainer=trainer, **kwargs)

    llm.finetune = watched
    _with_other_rows(fault)
    if fault.monitor:
        _with_monitor()
    elif not plan.save:
        jobs._without_checkpoints()
    compare = replicas.digests

    def counted(batches: list[Any], count: int) -> torch.Tensor:
        outcome.digests += len(batches)
        return compare(batches, count)

    replicas.digests = counted
    module: Any = linear
    once = module.LinearLossOnce.apply

    def early(*args: Any) -> Any:
        outcome.early += 1
        return once(*args)

    module.LinearLossOnce = types.SimpleNamespace(apply=early)
    warn = logging.warning

    def heard(message: Any, *args: Any, **kwargs: Any) -> None:
        outcome.warnings.append(str(message))
        warn(message)

    logging.warning = heard
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            nemo_eaft.train.run_training(plan.settings, plan.checkpoint, None)
        except Exception as error:
            recorder.seen.error = f"{type(error).__name__}: {error}"
    outcome.warnings += [str(warning.message) for warning in said]
    for field in dataclasses.fields(jobs.Recorded):
        setattr(outcome, field.name, getattr(recorder.seen, field.name))
    return outcome


class _Inject(Callback):
    """Comes after EAFTCallback; loss masks are changed in place, so that NeMo's loss sees the change, too."""

    def __init__(self, fault: Fault, outcome: Outcome) -> None:
        self._fault = fault
        self._outcome = outcome
        self._step = 0
        self._validations = 0
        self._next: list[tuple[int, int, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from megatron.core import parallel_state

        first = parallel_state.get_tensor_model_parallel_rank() == 0
        for chunk in trainer.strategy.megatron_parallel:
            model: Any = unwrap(chunk)
            if not model.post_process:
                continue
            norm, layer = model.decoder.final_layernorm, model.output_layer
            norm.register_forward_hook(self._overflow)
            if self._fault.poison and self._fault.hidden:
                norm.register_forward_hook(self._put)
            elif self._fault.poison and first:
                # One logit of a token: of the tensor-parallel ranks only the one that holds it sees it by itself.
                layer.register_forward_hook(lambda module, args, output: (self._put(None, None, output[0]), output[1]))

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._step = trainer.global_step + 1
        self._outcome.before = jobs.pieces(trainer.strategy.megatron_parallel)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._validations += 1

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        core = trainer.optimizers[0].mcore_optimizer
        parts = getattr(core, "chained_optimizers", [core])
        self._outcome.optimizers.append([t for part in parts for t in jobs.tensors(part.optimizer.state_dict())])

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], **_: Any) -> None:
        labels, mask = batch.get("labels"), batch.get("loss_mask")
        if mask is None:
            return
        if self._fault.late:
            for chunk in step.pipeline:
                loss = attached(chunk)
                if loss is not None:
                    loss.scaled_mask_upstream = False
        if step.forward_only:
            if self._validations <= self._fault.masked_validations:
                mask.zero_()
            return
        assert labels is not None
        # The forward of this very chunk comes next; what was noted for a chunk before the last is not for it.
        self._next = []
        answers = [tuple(row[counted != 0].tolist()) for row, counted in zip(labels, mask, strict=True)]
        for row, answer in enumerate(answers):
            for poison in self._fault.poison:
                if (poison.step, poison.answer) == (self._step, answer):
                    start = int((mask[row] != 0).nonzero()[0])
                    position = start + 1 if poison.where == "valid" else start - 1
                    assert bool(mask[row, position]) is (poison.where == "valid")
                    self._next.append((position, row, poison.value))
            if (self._step, answer) in self._fault.masked and self._fault.masked_on in (None, step.trainer.global_rank):
                mask[row] = 0

    def _put(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        """[s, b, ...] with the numbers put in."""
        if self._next:
            output = output.clone()
            for position, row, value in self._next:
                output[position, row, 0] = value
                self._outcome.poisoned += 1
            self._next = []
        return output

    def _overflow(self, module: Any, args: Any, output: torch.Tensor) -> None:
        if self._fault.overflow == (self._step, torch.distributed.get_rank()) and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)


class _OtherRows(Dataset[Any]):
    def __init__(self, rows: Any, start: int, short: bool) -> None:
        self._rows, self._start, self._short = rows, start, short
        self.collate_fn = rows.collate_fn

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        if index < self._start:
            return self._rows[index]
        row = self._rows[index ^ 1]
        if self._short:
            ids = row["input_ids"][:4]
            row = row | {"input_ids": ids, "context_ids": ids[:1], "answer_start_idx": 1, "answer_ids": ids[1:]}
        return row


def _with_other_rows(fault: Fault) -> None:
    if fault.other_rows is None:
        return
    step, rank = fault.other_rows
    train: Any = nemo_eaft.train
    build = train.build_module

    def built(settings: Settings, root: Path, tokenizer: Any) -> Any:
        module = build(settings, root, tokenizer)
        make = module._create_dataloader

        def dataloader(dataset: Any, mode: str, **kwargs: Any) -> Any:
            if mode == "train" and torch.distributed.get_rank() == rank:
                start = (step - 1) * settings.trainer.global_batch_size
                dataset = _OtherRows(dataset, start, fault.short)
            return make(dataset, mode, **kwargs)

        module._create_dataloader = dataloader
        return module

    train.build_module = built


def _with_monitor() -> None:
    import nemo.lightning as nl

    build = nemo_eaft.train.build_logger

    def monitored(settings: Settings, run_dir: Path) -> Any:
        logger = build(settings, run_dir)
        logger.ckpt = nl.ModelCheckpoint(
            dirpath=str(run_dir / "checkpoints"),
            filename="{step}-{val_loss:.2f}",
            monitor="val_loss",
            mode="min",
            save_top_k=1,
            save_last=False,
        )
        return logger

    nemo_eaft.train.build_logger = monitored
