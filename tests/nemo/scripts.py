"""A NeMo script of somebody who adds our one line to it. `script` runs on every rank, as the functions of `jobs` do."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback

from nemo_eaft.megatron import unwrap
from nemo_eaft.nemo import EAFTCallback
from tests.nemo.jobs import Recorded, Recorder
from tests.nemo.models import SEQ_LENGTH


@dataclasses.dataclass
class Script:
    """A NeMo script of somebody who adds our one line to it."""

    checkpoint: Path
    rows: Path
    run_dir: Path
    tensor: int = 1
    pipeline: int = 1
    world: int = 1
    learning_rate: float = 0.0
    keep_vocab_size: bool = True
    """False: the configuration says no vocabulary size, so NeMo takes the tokenizer's and pads it."""
    callback: bool = True
    average_in_collective: bool = True
    mistake: Literal["", "per-token off", "too late", "replaced", "not a number"] = ""


def script(spec: Script) -> Recorded:
    """One step and one validation with it; an exception is recorded, not raised."""
    import nemo.lightning as nl
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from nemo.collections import llm

    model = nl.io.load_context(spec.checkpoint, subpath="model")
    model.config.seq_length = SEQ_LENGTH
    model.config.calculate_per_token_loss = False
    if not spec.keep_vocab_size:
        model.config.vocab_size = None
        model.config.make_vocab_size_divisible_by = 128
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=spec.world,
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=spec.tensor,
            pipeline_model_parallel_size=spec.pipeline,
            pipeline_dtype=torch.float32,
            ddp=DistributedDataParallelConfig(average_in_collective=spec.average_in_collective),
            ckpt_async_save=False,
        ),
        max_steps=1,
        val_check_interval=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    recorder = Recorder(None)
    trainer.callbacks.append(recorder)
    if spec.callback:
        kind = _TooLate if spec.mistake == "too late" else EAFTCallback
        trainer.callbacks.append(kind(run_dir=spec.run_dir))
    trainer.callbacks.append(_Mistake(spec.mistake))
    data = llm.FineTuningDataModule(
        dataset_root=str(spec.rows),
        seq_length=SEQ_LENGTH,
        micro_batch_size=2,
        global_batch_size=8,
        tokenizer=model.tokenizer,
        num_workers=0,
        persistent_workers=False,
        dataset_kwargs={"prompt_template": "{input} {output}"},
    )
    try:
        llm.finetune(
            model=model,
            data=data,
            trainer=trainer,
            log=nl.NeMoLogger(log_dir=str(spec.run_dir / "nemo"), use_datetime_version=False),
            resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=str(spec.checkpoint))),
            optim=nl.MegatronOptimizerModule(
                OptimizerConfig(optimizer="adam", lr=spec.learning_rate, params_dtype=torch.float32)
            ),
            tokenizer="model",
        )
    except Exception as error:
        recorder.seen.error = f"{type(error).__name__}: {error}"
    return recorder.seen


class _TooLate(EAFTCallback):
    """Sets the flag only after DDP was built, and believes that it was there for `setup`."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._set_up = True

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for chunk in trainer.strategy.megatron_parallel:
            chunk.config.calculate_per_token_loss = True
        super().on_fit_start(trainer, pl_module)


class _Mistake(Callback):
    """Comes after EAFTCallback and undoes what it relies on."""

    def __init__(self, mistake: str) -> None:
        self._mistake = mistake

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for chunk in trainer.strategy.megatron_parallel:
            model: Any = unwrap(chunk)
            if self._mistake == "per-token off":
                chunk.config.calculate_per_token_loss = False
            elif self._mistake == "replaced" and model.post_process:
                model.compute_language_model_loss = types.MethodType(type(model).compute_language_model_loss, model)
            elif self._mistake == "not a number" and model.post_process:
                # One logit of every token: only the ranks that hold it see it by themselves.
                model.output_layer.weight.data[0] = float("nan")
