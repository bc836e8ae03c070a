"""EAFT in NeMo 2.x: one line added to an SFT script.

    from nemo_eaft.nemo import EAFTCallback
    trainer.callbacks.append(EAFTCallback(EAFTConfig(alpha=1.0)))

Append it after `nl.Trainer(...)` is built: a callback given to the Trainer's constructor is serialised with it, and
NeMo 2.7.3 then refuses to load the full context of the checkpoint (lightning/io/mixin.py, RestrictedUnpickler).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nemo_eaft.versions  # noqa: F401, one clear ImportError before the imports below could fail

# isort: split
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from nemo.utils import logging
from nemo.utils.app_state import AppState
from torch import Tensor

from nemo_eaft import requirements
from nemo_eaft.atomic import replacing
from nemo_eaft.batches import StepBatches, micro_batches
from nemo_eaft.config import EAFTConfig
from nemo_eaft.first_step import FirstStep
from nemo_eaft.gradients import GradientWatch
from nemo_eaft.landscape.training import TrainingLandscape
from nemo_eaft.loss.collectives import any_over_world, on_rank_zero
from nemo_eaft.megatron import AttachedLoss, attach, attached, detach
from nemo_eaft.metrics import StepMetrics, reduce_sums, zero_sums
from nemo_eaft.nonfinite import find, raise_for_loss
from nemo_eaft.place import here
from nemo_eaft.progress import Pace, format_progress
from nemo_eaft.recorder import MetricsFile
from nemo_eaft.replicas import check_replicas
from nemo_eaft.report import write_report
from nemo_eaft.requirements import true_vocab_size
from nemo_eaft.same_config import check_same

__all__ = ["EAFTCallback", "true_vocab_size"]


class EAFTCallback(Callback):
    """Trains a NeMo model with the EAFT loss and records what it does.

    Validation loss is plain cross-entropy over the true vocabulary. Every step's metrics go to the trainer's loggers
    (`eaft/...`), to the log, and on global rank 0 to `metrics.jsonl` and, at the end, `report.png`.

    config: gate and entropy settings.
    run_dir: folder of `eaft.json`, `metrics.jsonl` and `report.png`; None: NeMo's log folder of this run.
    vocab_size: the true vocabulary size; None: the model configuration's `vocab_size`, else the tokenizer's.
    fused_linear: output layer and loss in one, which never holds the logits of all tokens; see `megatron.attach`. Costs
        one matrix product of the output layer more, or, with one tensor-parallel rank and without virtual pipeline
        stages, V x D float32 numbers held from forward to backward: NeMo's MaskedTokenLossReduction makes the gradient
        of the loss one number times a loss mask of 0 and 1.
    measure_only: train with Megatron's own cross-entropy, bit for bit, and only record: for comparison.
    check_replicas: every so many steps, beginning with the first, compare what the ranks of one copy of the model were
        given to train on (see replicas.py); 0: never. One all-gather a checked step.
    histogram_every: steps between landscapes, histograms and percentiles of entropy and weight (see
        landscape/training.py); 0: never. Two collectives of 52 kB in such a step.
    allow_config_change: go on from a checkpoint that was made with another `config` or `measure_only`.

    Raises, on every rank and before the optimizer step:
        ValueError: a script that lacks what requirements.py asks for; a model without a place for the loss, or
            `fused_linear` with `measure_only` or with LoRA on the output layer; a checkpoint of a run with another
            configuration (`eaft.json`).
        RuntimeError: gradients would not be divided by the tokens of the global batch; the loss was never called; the
            loss or the gradient of a step is not finite; ranks that need the same rows were given different ones.
    """

    def __init__(
        self,
        config: EAFTConfig | None = None,
        *,
        run_dir: str | Path | None = None,
        vocab_size: int | None = None,
        fused_linear: bool = False,
        measure_only: bool = False,
        check_replicas: int = 0,
        histogram_every: int = 100,
        allow_config_change: bool = False,
    ) -> None:
        for name, every in (("check_replicas", check_replicas), ("histogram_every", histogram_every)):
            if every < 0:
                raise ValueError(f"{name}: {every}; allowed: 0 (never) or a number of steps")
        self.config = EAFTConfig() if config is None else config
        self.fused_linear = fused_linear
        self.measure_only = measure_only
        self.allow_config_change = allow_config_change
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._vocab_size = vocab_size
        self._loss: AttachedLoss | None = None
        self._pace = Pace()
        self._file: MetricsFile | None = None
        self._metrics: StepMetrics | None = None
        self._learning_rate = 0.0
        self._step_started = 0.0
        self._check_replicas = check_replicas
        self._histogram_every = histogram_every
        self._landscape: TrainingLandscape | None = None
        self._counts: Tensor | None = None
        self._set_up = False
        self._first_step: FirstStep | None = None
        self._gradients: GradientWatch | None = None
        self._batches: StepBatches | None = None

    # --- setting up

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before Megatron's DDP is built: one gradient, whatever the micro-batch size, DP and CP."""
        requirements.check_strategy(trainer, stage)
        requirements.check_place_in_trainer(trainer, self)
        if self._vocab_size is not None:
            requirements.check_vocab_size(self._vocab_size, pl_module)
        changed = requirements.set_one_gradient(trainer, pl_module)
        self._set_up = True
        if changed:
            logging.info(
                f"EAFT: set {', '.join(changed)}: the loss is divided by the tokens of the global batch, and a "
                "gradient that is not finite stops the run"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to every chunk that owns a loss; all chunks exist now."""
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the chunks as they are built, and open the files."""
        requirements.check_registered(trainer, self, self._set_up)
        for chunk in _chunks(trainer):
            requirements.check_chunk(chunk)
        self._run_dir = self._run_dir or Path(AppState().log_dir or trainer.default_root_dir)
        settings = dataclasses.asdict(self.config)
        settings |= {"fused_linear": self.fused_linear, "measure_only": self.measure_only}
        if trainer.global_step > 0 and not self.allow_config_change:
            check_same(self._run_dir / "eaft.json", settings)
        vocab_size = self._vocab_size or true_vocab_size(pl_module)
        self._landscape = TrainingLandscape(self.config, vocab_size, self._histogram_every)
        on_rank_zero(lambda: self._open_files(settings, trainer.global_step))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation without training (llm.validate) attaches here."""
        self._attach(trainer, pl_module)
        if self._loss is not None:
            self._loss.reset()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the model its own loss back."""
        if getattr(trainer.strategy, "megatron_parallel", None) is not None:
            for chunk in _chunks(trainer):
                detach(chunk)
        for shadow in (self._first_step, self._gradients):
            if shadow is not None:
                shadow.remove()
        self._loss = self._first_step = self._gradients = self._batches = None
        self._set_up = False
        if self._file is not None:
            self._file.close()
            self._file = None

    # --- one step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start of an optimizer step."""
        requirements.check_registered(trainer, self, self._set_up)
        self._step_started = time.perf_counter()
        if self._loss is not None:
            self._loss.reset()
        if self._gradients is None:
            # The first step: with PEFT, DDP is built only at the start of the epoch.
            chunks = _chunks(trainer)
            for chunk in chunks:
                requirements.check_chunk(chunk)
            self._first_step = FirstStep(chunks[0].config)
            self._gradients = GradientWatch(chunks)
        self._gradients.reset()
        assert self._landscape is not None, "on_train_start did not run"
        self._landscape.start_step(trainer.global_step + 1, self._loss)

    def on_megatron_step_start(self, step: Any) -> Any:
        """Remember the batches of a training step, and compare them where that is asked for."""
        if step.forward_only or not isinstance(step.data, Iterator):
            return step
        self._batches = StepBatches(step.data)
        number, every = step.trainer.global_step, self._check_replicas
        # The same on every rank.
        if every and number % every == 0:
            count = get_num_microbatches()
            ahead = self._batches.look_ahead(1 if step.has_global_batch_sampler else count)
            rows = micro_batches(ahead, count)
            check_replicas(rows, count, here(), _device(step), number + 1, _tokenizer(step.trainer))
        return dataclasses.replace(step, data=self._batches)

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], forward_callback: Any) -> None:
        """Hand over the loss mask: NeMo pads labels with eos and masks them only after the loss."""
        if self._loss is not None:
            mask = batch.get("loss_mask")
            self._loss.set_loss_mask(mask)
            # NeMo's loss is sum(loss * mask) times one number; a mask of other numbers than 0 and 1 would break that.
            whole = mask is not None and not mask.is_floating_point()
            self._loss.scaled_mask_upstream = whole and type(forward_callback) is MaskedTokenLossReduction

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any) -> None:
        """Reduce the sums over the global batch, on every rank, before the optimizer steps."""
        if step.forward_only:
            return
        trainer = step.trainer
        device = _device(step)
        sums = self._global_sums(step)
        assert self._landscape is not None
        self._counts = self._landscape.end_step(device, *_groups())
        # Tensor-parallel ranks that were given different loss masks have different sums: no rank may decide by its own
        # whether to enter a collective.
        if self._first_step is not None:
            self._first_step.remove()
            self._first_step.check(self._loss, device, _groups())
            self._first_step = None
        groups = trainer.optimizers[0].param_groups if trainer.optimizers else []
        self._learning_rate = float(groups[0]["lr"]) if groups else 0.0
        number = trainer.global_step + 1 if trainer.is_global_zero else None
        self._metrics = StepMetrics.from_sums(sums, step=number)
        assert self._gradients is not None, "on_train_batch_start did not run"
        own = torch.tensor([not math.isfinite(self._metrics.loss)], dtype=torch.int32, device=device)
        loss_is_bad, gradient_is_bad = any_over_world(torch.cat([own, self._gradients.not_finite(device)])).tolist()
        if loss_is_bad:
            # The owner of a run that diverged needs this line most.
            self._record(trainer.global_step + 1, trainer.max_steps, self._metrics)
            self._draw_report()
            self._raise_for_loss(trainer, self._metrics)
        if gradient_is_bad:
            self._gradients.raise_for_gradient(trainer.global_step + 1, here(), device)
        if not self._metrics.tokens and isinstance(reduced, Tensor):
            # NeMo divides 0 by 0 (lightning/megatron_parallel.py, MaskedTokenLossReduction.reduce).
            reduced.zero_()
        self._batches = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the finished step."""
        requirements.check_registered(trainer, self, self._set_up)
        metrics = self._metrics
        assert metrics is not None, "on_megatron_step_end did not run"
        rate = self._record(trainer.global_step, trainer.max_steps, metrics)
        for name, value in (metrics.as_dict() | {"tokens_per_second": rate}).items():
            in_bar = name in ("loss", "cross_entropy", "weight", "tokens_per_second")
            pl_module.log(f"eaft/{name}", float(value), prog_bar=in_bar, batch_size=1, sync_dist=False)
        if self._counts is not None and trainer.is_global_zero:
            assert self._landscape is not None
            # What Lightning counts pl_module.log by, from 0 (trainer/connectors/logger_connector, log_metrics).
            logged = trainer.fit_loop.epoch_loop._batches_that_stepped
            self._landscape.write(self._counts, trainer.global_step, metrics, trainer.loggers, logged)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plain cross-entropy per token of the whole validation, on every rank."""
        sums = self._global_sums(_chunks(trainer)[0])
        if trainer.sanity_checking:
            return
        metrics = StepMetrics.from_sums(sums)
        if not metrics.tokens and trainer.is_global_zero:
            logging.warning(
                f"EAFT validation after step {trainer.global_step}: no token of the validation data takes part in the "
                "loss (every loss mask is 0), so there is no val_loss to record, and NeMo's own is not a number"
            )
        if self._file is not None and metrics.tokens:
            self._file.append_validation(trainer.global_step, metrics.cross_entropy)
            logging.info(
                f"EAFT validation after step {trainer.global_step}: cross-entropy {metrics.cross_entropy:.4f} nats "
                f"per token over {metrics.tokens} tokens"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the report."""
        self._draw_report()

    # --- helpers

    def _open_files(self, settings: dict[str, Any], step: int) -> None:
        assert self._run_dir is not None
        with replacing(self._run_dir / "eaft.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
        self._file = MetricsFile(self._run_dir / "metrics.jsonl", start_step=step)
        assert self._landscape is not None
        self._landscape.open(self._run_dir, step)

    def _record(self, step: int, max_steps: int, metrics: StepMetrics) -> float:
        """Write and log a step's line on global rank 0; returns tokens per second (a save in the step counts too)."""
        seconds = time.perf_counter() - self._step_started
        rate = metrics.tokens / seconds
        self._pace.add(seconds)
        if self._file is not None:
            line = format_progress(step, max_steps, metrics, rate, self._pace.eta_seconds(step, max_steps))
            logging.info(f"EAFT {line}")
            self._file.append_step(
                step, metrics, tokens_per_second=rate, learning_rate=self._learning_rate, seconds=seconds
            )
        return rate

    def _draw_report(self) -> None:
        if self._file is None:
            return
        assert self._run_dir is not None
        title = "SFT (measured)" if self.measure_only else f"gate {self.config.gate}, alpha {self.config.alpha:g}"
        try:
            write_report(self._file.path, self._run_dir / "report.png", title)
        except Exception as error:
            # A picture must not keep the other ranks waiting for the last checkpoint.
            logging.error(f"EAFT: report.png could not be drawn from {self._file.path}: {error}")

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        vocab_size = self._vocab_size or true_vocab_size(pl_module)
        for chunk in _chunks(trainer):
            loss = attached(chunk)
            if loss is None:
                loss = attach(
                    chunk,
                    self.config,
                    vocab_size=vocab_size,
                    fused_linear=self.fused_linear,
                    measure_only=self.measure_only,
                )
            if loss is not None:
                loss.requires_loss_mask = True
                loss.keep_not_finite = True
                self._loss = loss

    def _global_sums(self, model: Any) -> Tensor:
        sums = self._loss.sums if self._loss is not None else None
        if sums is None:
            sums = zero_sums(_device(model))
        return reduce_sums(sums, *_groups())

    def _raise_for_loss(self, trainer: Trainer, metrics: StepMetrics) -> None:
        bad = [] if self._loss is None else self._loss.not_finite
        count = get_num_microbatches()
        seen = [] if self._batches is None else micro_batches(self._batches.seen, count)
        size = parallel_state.get_context_parallel_world_size()
        hint = (
            "Megatron's own loss is also spoilt by a token outside the loss mask; loss.gate=none (EAFTConfig("
            "gate='none')) is not"
            if self.measure_only
            else ""
        )
        raise_for_loss(
            trainer.global_step + 1,
            metrics,
            lambda: find(bad, seen, here(), size, _tokenizer(trainer)),
            count,
            hint,
        )


def _chunks(trainer: Trainer) -> list[Any]:
    strategy: Any = trainer.strategy
    return list(strategy.megatron_parallel)


def _device(model: Any) -> torch.device:
    return next(iter(getattr(model, "pipeline", model).parameters())).device


def _groups() -> tuple[Any, Any, int]:
    return (
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_last_rank(),
    )


def _tokenizer(trainer: Trainer) -> Any:
    return getattr(trainer.lightning_module, "tokenizer", None)
