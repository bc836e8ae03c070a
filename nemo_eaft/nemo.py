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
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.lightning.pytorch.strategies import MegatronStrategy
from nemo.utils import logging
from nemo.utils.app_state import AppState
from torch import Tensor

from nemo_eaft.atomic import replacing
from nemo_eaft.config import EAFTConfig
from nemo_eaft.loss.collectives import gather_objects, sum_over_data_and_broadcast_over_pipeline
from nemo_eaft.megatron import AttachedLoss, attach, attached, detach
from nemo_eaft.metrics import StepMetrics, reduce_sums, zero_sums
from nemo_eaft.progress import Pace, format_progress
from nemo_eaft.recorder import MetricsFile
from nemo_eaft.report import write_report


class EAFTCallback(Callback):
    """Trains a NeMo model with the EAFT loss and records what it does.

    Validation loss is plain cross-entropy over the true vocabulary. Every step's metrics go to the trainer's loggers
    (`eaft/...`), to the log, and on global rank 0 to `metrics.jsonl` and, at the end, `report.png`.

    config: gate and entropy settings.
    run_dir: folder of `eaft.json`, `metrics.jsonl` and `report.png`; None: NeMo's log folder of this run.
    vocab_size: the true vocabulary size; None: the model configuration's `vocab_size`, else the tokenizer's.
    fused_linear: output layer and loss in one, which never holds the logits of all tokens; costs one matrix product of
        the output layer more. Recomputes in backward; see `megatron.attach`.
    measure_only: train with Megatron's own cross-entropy, bit for bit, and only record: for comparison.
    allow_config_change: go on from a checkpoint that was made with another `config` or `measure_only`.

    Raises, on every rank and before the first optimizer step:
        ValueError: the strategy is not NeMo's MegatronStrategy, the model has no place for the loss, or `fused_linear`
            with `measure_only` or with LoRA on the output layer; or the run was trained with another configuration
            up to its checkpoint (`eaft.json`).
        RuntimeError: gradients would not be divided by the tokens of the global batch; the loss was never called; or
            the loss of a step is not finite.
    """

    def __init__(
        self,
        config: EAFTConfig | None = None,
        *,
        run_dir: str | Path | None = None,
        vocab_size: int | None = None,
        fused_linear: bool = False,
        measure_only: bool = False,
        allow_config_change: bool = False,
    ) -> None:
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
        self._verified = False

    # --- setting up

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before Megatron's DDP is built: one gradient, whatever the micro-batch size, DP and CP."""
        strategy = trainer.strategy
        if not isinstance(strategy, MegatronStrategy):
            raise ValueError(
                f"trainer.strategy: {type(strategy).__name__}; EAFTCallback needs nemo.lightning.MegatronStrategy"
            )
        changed = []
        config: Any = pl_module.config
        if not config.calculate_per_token_loss:
            config.calculate_per_token_loss = True
            changed.append("calculate_per_token_loss=True")
        # Virtual pipeline chunks after the first are rebuilt from here (lightning/megatron_parallel.py:238, io.reinit).
        recorded: Any = getattr(getattr(pl_module, "__io__", None), "config", None)
        if recorded is not None:
            recorded.calculate_per_token_loss = True
        ddp: Any = strategy.ddp_config
        if stage == "fit" and not isinstance(ddp, DistributedDataParallelConfig):
            raise ValueError(
                "trainer.strategy: MegatronStrategy(ddp=...) must be 'megatron' or a DistributedDataParallelConfig; "
                "no other DDP or FSDP divides the gradient by the tokens of the global batch"
            )
        if getattr(ddp, "average_in_collective", False):
            ddp.average_in_collective = False
            changed.append("average_in_collective=False")
        if changed:
            logging.info(f"EAFT: set {', '.join(changed)}: the loss is divided by the tokens of the global batch")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to every chunk that owns a loss; all chunks exist now."""
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the gradient's scale (with PEFT, DDP is built only after on_fit_start) and open the files."""
        for chunk in _chunks(trainer):
            _check_gradient_scale(chunk)
            _check_interleaving(chunk.config)
        self._verified = False
        self._run_dir = self._run_dir or Path(AppState().log_dir or trainer.default_root_dir)
        settings = dataclasses.asdict(self.config)
        settings |= {"fused_linear": self.fused_linear, "measure_only": self.measure_only}
        if trainer.global_step > 0 and not self.allow_config_change:
            _check_same(self._run_dir / "eaft.json", settings)
        if trainer.is_global_zero:
            with replacing(self._run_dir / "eaft.json") as temporary:
                temporary.write_text(json.dumps(settings, indent=2) + "\n")
            self._file = MetricsFile(self._run_dir / "metrics.jsonl", start_step=trainer.global_step)

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
        self._loss = None
        if self._file is not None:
            self._file.close()
            self._file = None

    # --- one step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start of an optimizer step."""
        self._step_started = time.perf_counter()
        if self._loss is not None:
            self._loss.reset()

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], forward_callback: Any) -> None:
        """Hand over the loss mask: NeMo pads labels with eos and masks them only after the loss."""
        if self._loss is not None:
            self._loss.set_loss_mask(batch.get("loss_mask"))

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any) -> None:
        """Reduce the sums over the global batch, on every rank, before the optimizer steps."""
        if step.forward_only:
            return
        trainer = step.trainer
        if not self._verified:
            self._check_called(step)
            self._verified = True
        groups = trainer.optimizers[0].param_groups if trainer.optimizers else []
        self._learning_rate = float(groups[0]["lr"]) if groups else 0.0
        self._metrics = StepMetrics.from_sums(
            self._global_sums(step), step=trainer.global_step + 1 if trainer.is_global_zero else None
        )
        if not math.isfinite(self._metrics.loss):
            # The owner of a run that diverged needs this line most.
            self._record(trainer.global_step + 1, trainer.max_steps, self._metrics)
            self._draw_report()
            raise RuntimeError(
                f"step {trainer.global_step + 1}: the loss is {self._metrics.loss} (cross-entropy "
                f"{self._metrics.cross_entropy}); stopped before the optimizer step"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the finished step."""
        metrics = self._metrics
        assert metrics is not None, "on_megatron_step_end did not run"
        rate = self._record(trainer.global_step, trainer.max_steps, metrics)
        for name, value in (metrics.as_dict() | {"tokens_per_second": rate}).items():
            in_bar = name in ("loss", "cross_entropy", "weight", "tokens_per_second")
            pl_module.log(f"eaft/{name}", float(value), prog_bar=in_bar, batch_size=1, sync_dist=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plain cross-entropy per token of the whole validation, on every rank."""
        sums = self._global_sums(_chunks(trainer)[0])
        if trainer.sanity_checking:
            return
        metrics = StepMetrics.from_sums(sums)
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
                self._loss = loss

    def _global_sums(self, model: Any) -> Tensor:
        sums = self._loss.sums if self._loss is not None else None
        if sums is None:
            sums = zero_sums(_device(model))
        return reduce_sums(sums, *_groups())

    def _check_called(self, step: Any) -> None:
        calls = torch.zeros(1, dtype=torch.float64, device=_device(step))
        if self._loss is not None and self._loss.in_place():
            calls += self._loss.calls
        total = int(sum_over_data_and_broadcast_over_pipeline(calls, *_groups()).item())
        if total == 0:
            raise RuntimeError(
                "EAFT is configured but its loss was never called in the first step: the model computes its loss "
                "elsewhere, or another patch replaced compute_language_model_loss or the fused output layer after the "
                "callback. Nothing was trained."
            )


def true_vocab_size(pl_module: LightningModule) -> int:
    """The vocabulary size before Megatron pads it to a multiple of 128 x TP (nemo/lightning/base.py, get_vocab_size).

    Raises:
        ValueError: neither the model's configuration nor its tokenizer tells.
    """
    model: Any = pl_module
    size = getattr(model.config, "vocab_size", None) or getattr(getattr(model, "tokenizer", None), "vocab_size", None)
    if size is None:
        raise ValueError("vocab_size: the model has neither config.vocab_size nor a tokenizer; pass vocab_size=")
    return int(size)


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


def _check_same(path: Path, settings: dict[str, Any]) -> None:
    """Refuse, on every rank, to go on with a loss that the run was not trained with; how it is computed may differ."""
    try:
        old = json.loads(path.read_text())
    except FileNotFoundError:
        old = settings
    # What rank 0 read counts: another machine may not see the folder.
    differing = gather_objects(
        [
            f"{name}: {old.get(name)} -> {value}"
            for name, value in settings.items()
            if name != "fused_linear" and old.get(name) != value
        ]
    )[0]
    if differing:
        raise ValueError(
            f"{path}: the run was trained with another loss up to this checkpoint: {', '.join(differing)}; go back to "
            "it, or accept the change with EAFTCallback(..., allow_config_change=True)"
        )


def _check_gradient_scale(chunk: Any) -> None:
    """Megatron must sum the gradients and divide once (core/distributed/distributed_data_parallel.py, 0.15.3)."""
    config = chunk.config
    if not config.calculate_per_token_loss:
        raise RuntimeError(
            "calculate_per_token_loss is False on a model chunk; EAFT's gradient would depend on the cut"
        )
    ddp = chunk.module
    if getattr(getattr(ddp, "ddp_config", None), "average_in_collective", False):
        raise RuntimeError(
            "average_in_collective is True on a model chunk: gradients would be averaged over its replicas"
        )
    for buffer in [*getattr(ddp, "buffers", []), *getattr(ddp, "expert_parallel_buffers", [])]:
        scale = getattr(buffer, "gradient_scaling_factor", 1.0)
        if scale != 1.0:
            raise RuntimeError(
                f"gradient_scaling_factor is {scale} on a model chunk, expected 1.0: Megatron's DDP was built before "
                "calculate_per_token_loss was set"
            )


def _check_interleaving(config: Any) -> None:
    """Two stages, interleaved: batched sends of both directions go to one rank and are matched in the wrong order.

    Megatron-LM's arguments.py refuses it; NeMo 2.7.3 trains on swapped activations (the first loss was 2 % off).
    """
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    if interleaved and config.pipeline_model_parallel_size == 2 and not config.overlap_p2p_comm:
        raise RuntimeError(
            "virtual pipeline with pipeline_model_parallel_size=2 needs overlap_p2p_comm=True and batch_p2p_comm=False "
            "in the model configuration; otherwise the two stages exchange the wrong tensors"
        )
