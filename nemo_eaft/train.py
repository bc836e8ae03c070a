"""From settings to a NeMo run: `python -m nemo_eaft.train CONF [key=value ...]`, alone or under torchrun or SLURM.

NeMo trains. This file only says what: the model configuration of the imported checkpoint with this run's precision,
NeMo's data module, optimizer, strategy, logger, checkpoints and resume, and the EAFT callback.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_eaft.checkpoints import FOLDER
from nemo_eaft.convert import MANIFEST
from nemo_eaft.data import build_module
from nemo_eaft.saved import SAVED
from nemo_eaft.settings import Settings


def run_training(settings: Settings, checkpoint: Path, resume_from: Path | None) -> None:
    """Train on this rank until `trainer.max_steps`.

    Every rank of the job calls it, with the same arguments. With `run.backend=cpu`, before NeMo is imported in this
    process.

    settings: the run. What it says of the optimizer and its schedule holds, whatever the checkpoint was made with.
    checkpoint: the imported model; its weights are where a new run starts.
    resume_from: the checkpoint of this run to go on from; None: a new run.

    Raises:
        RuntimeError: ranks were given different checkpoints.
        ValueError: settings and checkpoint do not fit each other.
    """
    if settings.run.backend == "cpu":
        import torch

        import nemo_eaft.cpu

        nemo_eaft.cpu.enable()
        # Ranks share the cores: more threads than that wait for each other.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.trainer.gpus_per_node))

    from nemo.collections import llm
    from nemo.utils import logging

    from nemo_eaft.logits_memory import choose_fused_linear
    from nemo_eaft.nemo import EAFTCallback, true_vocab_size
    from nemo_eaft.restart import store_of_this_attempt
    from nemo_eaft.resume import KeepDataOrder, KeepSchedule, RepeatValidation, SameStart
    from nemo_eaft.stop_callback import StopOnRequest
    from nemo_eaft.writer import end_writer_with_rank

    end_writer_with_rank()
    run_dir = Path(settings.run.dir)
    model = build_model(settings, checkpoint)
    vocab_size = imported_vocab_size(checkpoint) or true_vocab_size(model)
    fused_linear, why = choose_fused_linear(settings, vocab_size)
    if why is not None:
        logging.info(f"EAFT: {why}")
    trainer = build_trainer(settings)
    trainer.strategy.store = store_of_this_attempt()
    trainer.callbacks += [SameStart(resume_from), KeepDataOrder(), KeepSchedule()]
    trainer.callbacks.append(
        EAFTCallback(
            settings.loss.eaft_config(),
            run_dir=run_dir,
            vocab_size=vocab_size,
            fused_linear=fused_linear,
            measure_only=settings.loss.gate == "stock",
            check_replicas=settings.loss.check_replicas,
            histogram_every=settings.trainer.histogram_every,
            # The whole configuration was compared before the ranks were started.
            allow_config_change=True,
        )
    )
    trainer.callbacks.append(RepeatValidation(run_dir / "metrics.jsonl"))
    trainer.callbacks.append(build_watch(settings, run_dir))
    # After what records the step: it saves.
    trainer.callbacks.append(StopOnRequest(run_dir))
    llm.finetune(
        model=model,
        data=build_module(settings, run_dir / "data", model.tokenizer),
        trainer=trainer,
        log=build_logger(settings, run_dir),
        resume=build_resume(checkpoint, resume_from),
        optim=build_optimizer(settings),
        tokenizer="model",
    )


def build_watch(settings: Settings, run_dir: Path) -> Any:
    """The callback that ends a stalled job, or where nothing does, the one that lets a save take its time."""
    from nemo_eaft.watchdog_callback import EndStalled, RaiseTimeouts

    run = settings.run
    if not run.stall_seconds:
        return RaiseTimeouts(run.save_seconds + 60)
    # The settings have said where the limit of a save has no effect.
    return EndStalled(run_dir, run.stall_seconds, max(run.stall_seconds, run.save_seconds))


def imported_vocab_size(checkpoint: Path) -> int | None:
    """The Hugging Face model's vocabulary size; None for a checkpoint that was not imported by `nemo-eaft import`."""
    manifest = checkpoint / MANIFEST
    return int(json.loads(manifest.read_text())["vocab_size"]) if manifest.is_file() else None


def build_resume(checkpoint: Path, resume_from: Path | None) -> Any:
    """NeMo's AutoResume: a checkpoint of the run if there is one, else the imported weights.

    The checkpoint is named, not searched for: NeMo's search takes `*-last` alone and starts anew where it finds none.
    """
    import nemo.lightning as nl

    if resume_from is not None:
        return nl.AutoResume(resume_if_exists=True, resume_from_path=str(resume_from))
    return nl.AutoResume(
        resume_if_exists=False,
        resume_ignore_no_checkpoint=True,
        restore_config=nl.RestoreConfig(path=str(checkpoint)),
    )


def build_model(settings: Settings, checkpoint: Path) -> Any:
    """NeMo's model of the imported checkpoint, with this run's precision and recompute."""
    from nemo.lightning import io

    model = io.load_context(checkpoint, subpath="model")
    set_model_config(model, model_overrides(settings))
    return model


def _dtype(settings: Settings) -> Any:
    """What weights are held in: `torch.bfloat16` or `torch.float32`."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.trainer.precision]


def model_overrides(settings: Settings) -> dict[str, Any]:
    """Fields of NeMo's model configuration that the run decides."""
    trainer, dtype = settings.trainer, _dtype(settings)
    overrides = {
        "seq_length": max(trainer.seq_length, settings.data.packed_size or 0),
        "bf16": trainer.precision == "bf16",
        "fp16": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        # NeMo 2.7.3 saves no random state: with dropout a resumed run would not be the undisturbed one.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # The gradient must not depend on how the batch is cut (EAFTCallback checks it).
        "calculate_per_token_loss": True,
    }
    if settings.parallel.virtual_pipeline is not None:
        # With two stages the next and the previous rank are one, and batched sends of both directions are matched in
        # the wrong order (Megatron-LM's arguments.py asks for the same pair).
        overrides |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if trainer.recompute == "full":
        overrides |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif trainer.recompute == "selective":
        overrides |= {"recompute_granularity": "selective"}
    return overrides


def set_model_config(model: Any, overrides: Mapping[str, Any]) -> None:
    """Rebuild the model's configuration with `overrides`, also where NeMo recorded it.

    Chunks of a virtual pipeline and the context of a checkpoint are rebuilt from the record (`__io__`), so a field
    that is only set on the object is lost there.
    """
    import fiddle as fdl

    record = model.config.__io__
    for name, value in overrides.items():
        setattr(record, name, value)
    model.config = fdl.build(record)
    # The record made by this build, not the old one: the strategy adds the parallel sizes to it.
    model.__io__.config = model.config.__io__


def build_optimizer(settings: Settings) -> Any:
    """NeMo's Megatron optimizer: AdamW with warm-up and cosine decay."""
    import nemo.lightning as nl
    from megatron.core.optimizer import OptimizerConfig

    trainer = settings.trainer
    config = OptimizerConfig(
        optimizer="adam",
        lr=trainer.learning_rate,
        min_lr=trainer.min_learning_rate,
        weight_decay=trainer.weight_decay,
        adam_beta1=trainer.adam_beta1,
        adam_beta2=trainer.adam_beta2,
        clip_grad=trainer.clip_grad,
        bf16=trainer.precision == "bf16",
        params_dtype=_dtype(settings),
        use_distributed_optimizer=trainer.distributed_optimizer,
    )
    schedule = nl.lr_scheduler.CosineAnnealingScheduler(
        max_steps=trainer.max_steps,
        warmup_steps=trainer.warmup_steps,
        constant_steps=0,
        min_lr=trainer.min_learning_rate,
    )
    return nl.MegatronOptimizerModule(config=config, lr_scheduler=schedule)


def parallel_sizes(settings: Settings) -> dict[str, Any]:
    """Arguments of NeMo's MegatronStrategy: how the model is split."""
    parallel = settings.parallel
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "sequence_parallel": parallel.sequence,
        "pipeline_dtype": _dtype(settings) if parallel.pipeline > 1 else None,
    }


def build_strategy(settings: Settings) -> Any:
    """NeMo's MegatronStrategy: the parallel sizes, Megatron's DDP, and how checkpoints are written."""
    import nemo.lightning as nl
    from megatron.core.distributed import DistributedDataParallelConfig

    return nl.MegatronStrategy(
        **parallel_sizes(settings),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=settings.trainer.distributed_optimizer,
            grad_reduce_in_fp32=True,
            average_in_collective=False,
            check_for_nan_in_grad=True,
        ),
        gradient_as_bucket_view=True,
        # A save that goes on in the background could be cut short by the end of the job.
        ckpt_async_save=False,
        replace_progress_bar=False,
        **_reshardable(nl.MegatronStrategy),
    )


def _reshardable(strategy: type) -> dict[str, bool]:
    """Arguments of NeMo's strategy with which another TP or PP can load the distributed optimizer's state.

    NeMo 2.5 has none of them, and would take them for arguments of torch's DDP: with Megatron-Core 0.14 every state can
    be loaded so (optimizer/distrib_optimizer.py, sharded_param_state_fs_model_space; megatron_strategy.py, 2.5.0,
    sharded_state_dict_metadata).
    """
    wanted = {
        # Otherwise the same TP and PP only.
        "ckpt_optim_fully_reshardable": True,
        # A save gathers that state, 12 bytes for each parameter of a rank's part of the model (megatron-core 0.15.3,
        # optimizer/distrib_optimizer.py, get_parameter_state_dp_zero): so over gloo into the host's memory of the first
        # of the data-parallel ranks; otherwise over NCCL, through GPU memory into the host's memory of every rank.
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }
    there = inspect.signature(strategy).parameters
    return wanted if wanted.keys() <= there.keys() else {}


def precision_plugins(settings: Settings) -> list[Any] | None:
    """NeMo's mixed precision for bf16; None for float32 throughout."""
    import nemo.lightning as nl

    return [nl.MegatronMixedPrecision(precision="bf16-mixed")] if settings.trainer.precision == "bf16" else None


def build_trainer(settings: Settings) -> Any:
    """NeMo's trainer on a MegatronStrategy."""
    import nemo.lightning as nl

    trainer = settings.trainer
    on_cpu = settings.run.backend == "cpu"
    validate = settings.data.validation is not None and trainer.val_every > 0
    return nl.Trainer(
        accelerator="cpu" if on_cpu else "gpu",
        devices=trainer.gpus_per_node,
        num_nodes=trainer.num_nodes,
        strategy=build_strategy(settings),
        plugins=precision_plugins(settings),
        max_steps=trainer.max_steps,
        val_check_interval=min(trainer.val_every, trainer.max_steps) if validate else None,
        # Validation is timed by steps of the run, not of the epoch, which starts anew with a resume.
        check_val_every_n_epoch=None if validate else 1,
        limit_val_batches=trainer.val_batches if validate else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=trainer.log_every,
        use_distributed_sampler=False,
        # EAFTCallback logs one line a step with loss, weight, tokens per second and ETA.
        enable_progress_bar=False,
    )


def build_logger(settings: Settings, run_dir: Path) -> Any:
    """NeMo's logger: TensorBoard, W&B when asked, and checkpoints every `trainer.save_every` steps."""
    import nemo.lightning as nl
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    from nemo_eaft.model_checkpoint import ModelCheckpoint

    run, trainer = settings.run, settings.trainer
    name = run.name or run_dir.name
    checkpoints = ModelCheckpoint(
        dirpath=str(run_dir / FOLDER),
        record=run_dir / SAVED,
        filename="{step}",
        monitor="step",
        mode="max",
        every_n_train_steps=min(trainer.save_every, trainer.max_steps),
        save_top_k=trainer.keep_checkpoints,
        # A link: the newest checkpoint is not written twice.
        save_last="link",
        # Otherwise every validation saves as well.
        save_on_train_epoch_end=True,
        save_optim_on_train_end=True,
    )
    wandb = WandbLogger(project=run.wandb_project, name=name) if run.wandb_project else None
    return nl.NeMoLogger(
        name=name,
        log_dir=str(run_dir / "nemo"),
        use_datetime_version=False,
        explicit_log_dir=str(run_dir / "nemo"),
        # Otherwise TensorBoard's folder becomes NeMo's log folder with this whole path below it once more.
        update_logger_directory=False,
        tensorboard=TensorBoardLogger(save_dir=str(run_dir), name="tensorboard", version=""),
        wandb=wandb,
        ckpt=checkpoints,
    )


def main(argv: list[str]) -> int:
    """Rank entry point; the command line joins or launches through `nemo_eaft.cli`."""
    from nemo_eaft.cli import run_rank

    return run_rank(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
