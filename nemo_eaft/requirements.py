"""What EAFTCallback asks of the script that it is put into, each with a message of its own."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.lightning.pytorch.strategies import MegatronStrategy

from nemo_eaft.megatron import unwrap


def check_place_in_trainer(trainer: Trainer, callback: Any) -> None:
    """The callback was appended once, and not given to the constructor.

    Raises:
        ValueError: otherwise.
    """
    kind = type(callback)
    # NeMo keeps copies of the constructor's arguments (lightning/pytorch/trainer.py, io_init).
    recorded = getattr(getattr(trainer, "__io__", None), "callbacks", None)
    recorded = recorded if isinstance(recorded, (list, tuple)) else [recorded]
    if any(isinstance(item, kind) for item in recorded):
        raise ValueError(
            f"nl.Trainer(callbacks=[{kind.__name__}(...)]): NeMo would write it into every checkpoint, and then "
            "refuse to load that checkpoint's full context. Build the trainer without it, and then: "
            f"trainer.callbacks.append({kind.__name__}(...))"
        )
    others: list[Any] = trainer.callbacks
    count = sum(isinstance(other, kind) for other in others)
    if count > 1:
        raise ValueError(f"trainer.callbacks: {count} times {kind.__name__}; allowed: once")


def check_registered(trainer: Trainer, callback: Any, set_up: bool) -> None:
    """The callback was there when the fit began.

    Raises:
        RuntimeError: it gets Lightning's events, but not those of Megatron's steps.
    """
    strategy: Any = trainer.strategy
    model = getattr(strategy, "megatron_parallel", None)
    if not set_up or (model is not None and callback not in model.callbacks):
        raise RuntimeError(
            f"{type(callback).__name__} was appended to trainer.callbacks after the fit began: NeMo has not registered "
            "it for Megatron's steps, and DDP is built. Append it after nl.Trainer(...) and before llm.finetune or "
            "trainer.fit"
        )


def check_strategy(trainer: Trainer, stage: str) -> None:
    """Megatron's own DDP under NeMo's MegatronStrategy, one optimizer step for each step of the trainer.

    Raises:
        ValueError: otherwise.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy, MegatronStrategy):
        raise ValueError(
            f"trainer.strategy: {type(strategy).__name__}; EAFTCallback needs nemo.lightning.MegatronStrategy"
        )
    if stage != "fit":
        return
    if not isinstance(strategy.ddp_config, DistributedDataParallelConfig) or getattr(strategy, "_fsdp", None):
        raise ValueError(
            "trainer.strategy: MegatronStrategy(ddp=...) must be 'megatron' or a DistributedDataParallelConfig, and "
            "fsdp must be None; no other DDP or FSDP divides the gradient by the tokens of the global batch"
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches: {trainer.accumulate_grad_batches}; allowed: 1. NeMo clears the gradient "
            "at each step, so all but the last of them would be lost; raise global_batch_size of the data instead"
        )


def set_one_gradient(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """Make Megatron sum gradients and divide once, and note gradients that are not finite; before its DDP is built.

    Returns:
        What was changed, for the log.
    """
    changed = []
    config: Any = pl_module.config
    if not config.calculate_per_token_loss:
        config.calculate_per_token_loss = True
        changed.append("calculate_per_token_loss=True")
    # Virtual pipeline chunks after the first are rebuilt from here (lightning/megatron_parallel.py:238, io.reinit).
    recorded: Any = getattr(getattr(pl_module, "__io__", None), "config", None)
    if recorded is not None:
        recorded.calculate_per_token_loss = True
    strategy: Any = trainer.strategy
    ddp = strategy.ddp_config
    if getattr(ddp, "average_in_collective", False):
        ddp.average_in_collective = False
        changed.append("average_in_collective=False")
    # With float16 infinite gradients are expected: the loss scale is lowered and the step left out.
    if hasattr(ddp, "check_for_nan_in_grad") and not ddp.check_for_nan_in_grad and not config.fp16:
        ddp.check_for_nan_in_grad = True
        changed.append("check_for_nan_in_grad=True")
    if getattr(config, "cross_entropy_fusion_impl", "native") == "te" and config.cross_entropy_loss_fusion:
        warnings.warn(
            "model.config.cross_entropy_fusion_impl='te' has no effect on the loss that is trained: EAFT computes it",
            stacklevel=2,
        )
    return changed


def check_chunk(chunk: Any) -> None:
    """A built model chunk sums gradients (megatron-core 0.15.3, distributed/distributed_data_parallel.py).

    Raises:
        RuntimeError: it would average them somewhere, or exchange the wrong tensors.
    """
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
    # Of DDP: a model that is not wrapped yet has torch's method of that name.
    lists = [getattr(ddp, name, None) for name in ("buffers", "expert_parallel_buffers")]
    for buffer in (each for buffers in lists if isinstance(buffers, list) for each in buffers):
        scale = getattr(buffer, "gradient_scaling_factor", 1.0)
        if scale != 1.0:
            raise RuntimeError(
                f"gradient_scaling_factor is {scale} on a model chunk, expected 1.0: Megatron's DDP was built before "
                "calculate_per_token_loss was set"
            )
    embedding = getattr(unwrap(chunk), "embedding", None)
    trained = [parameter.requires_grad for parameter in chunk.parameters()]
    if (
        config.recompute_granularity == "full"
        and embedding is not None
        and any(trained)
        and not any(parameter.requires_grad for parameter in embedding.parameters())
    ):
        raise RuntimeError(
            "recompute_granularity='full' with a frozen embedding (LoRA): a recomputed layer whose input has no "
            "gradient gets none itself (megatron-core 0.15.3, tensor_parallel/random.py, CheckpointFunction), so the "
            "adapters would not be trained. Allowed: recompute_granularity=None or 'selective'"
        )
    # Two stages, interleaved: batched sends of both directions go to one rank and are matched in the wrong order.
    # Megatron-LM's arguments.py refuses it; NeMo 2.7.3 trains on swapped activations (the first loss was 2 % off).
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    if interleaved and config.pipeline_model_parallel_size == 2 and not config.overlap_p2p_comm:
        raise RuntimeError(
            "virtual pipeline with pipeline_model_parallel_size=2 needs overlap_p2p_comm=True and batch_p2p_comm=False "
            "in the model configuration; otherwise the two stages exchange the wrong tensors"
        )


def true_vocab_size(pl_module: LightningModule) -> int:
    """The vocabulary size before Megatron pads it to a multiple of 128 x TP (nemo/lightning/base.py, get_vocab_size).

    Raises:
        ValueError: neither the model's configuration nor its tokenizer tells.
    """
    model: Any = pl_module
    size = getattr(model.config, "vocab_size", None) or _tokens(model)
    if size is None:
        raise ValueError("vocab_size: the model has neither config.vocab_size nor a tokenizer; pass vocab_size=")
    return int(size)


def check_vocab_size(given: int, pl_module: LightningModule) -> None:
    """A size given by the script leaves none of the tokenizer's tokens out.

    Raises:
        ValueError: it is smaller than the tokenizer.
    """
    tokens = _tokens(pl_module)
    if tokens is not None and given < tokens:
        raise ValueError(
            f"vocab_size: {given}; allowed: {tokens} (the tokenizer's tokens) or more, up to the model's padded "
            "vocabulary. Leave it out to take the model's"
        )


def _tokens(model: Any) -> int | None:
    return getattr(getattr(model, "tokenizer", None), "vocab_size", None)
