"""EAFT in Megatron-Bridge: two lines in a fine-tuning script.

    from nemo_eaft import EAFTConfig, bridge

    cfg.model.register_pre_wrap_hook(bridge.pre_wrap_hook(EAFTConfig()))
    finetune(cfg, bridge.forward_step)

With `cfg.model.calculate_per_token_loss = True` and `cfg.ddp.average_in_collective = False`, which are asked for. A
`ModelConfig` (Bridge 0.4 and later) has a list in place of the method: `cfg.model.pre_wrap_hooks.append(...)`.

Neither line leaves anything in Bridge's `run_config.yaml` or in a checkpoint. Written for Megatron-Bridge 0.3.1; the
names and signatures used here are the same in 0.2 to 0.6 (training/gpt_step.py, models/model_provider.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.bridge.training import gpt_step
from torch import Tensor

from nemo_eaft.config import EAFTConfig
from nemo_eaft.megatron import AttachedLoss, attach, attached, check_labels_under_mask, unwrap
from nemo_eaft.metrics import sums_and_counts

if TYPE_CHECKING:
    from megatron.bridge.training.state import GlobalState

__all__ = ["forward_step", "pre_wrap_hook"]

Chunks = list[Any]
"""A rank's model chunks: one, or with a virtual pipeline several."""


def pre_wrap_hook(
    config: EAFTConfig | None = None,
    *,
    vocab_size: int | None = None,
    fused_linear: bool = False,
    measure_only: bool = False,
) -> Callable[[Chunks], Chunks]:
    """What Bridge is to call with the model before it wraps it: attaches the EAFT loss to the chunk that has one.

    config: gate and entropy settings.
    vocab_size: the true vocabulary size V, before Bridge pads it. None: the provider's `vocab_size`, which
        `AutoBridge` takes from the Hugging Face configuration, and Bridge's setup from the tokenizer where that is
        open. A `ModelConfig` does not hand it to the model: give `cfg.model.vocab_size` then.
    fused_linear, measure_only: see `megatron.attach`.

    The hook raises, on every rank and before anything is trained:
        ValueError: the model's configuration does not sum gradients (`calculate_per_token_loss`), or computes its loss
            where the hook does not reach it; no vocabulary size; or what `megatron.attach` refuses.
    In a forward with labels the model raises RuntimeError where its loss was not called.
    """
    chosen = EAFTConfig() if config is None else config

    def attach_eaft(model: Chunks) -> Chunks:
        for chunk in model:
            _check_config(chunk.config, measure_only)
        for chunk in model:
            size = vocab_size or getattr(chunk.config, "vocab_size", None)
            if size is None:
                raise ValueError(
                    "vocab_size: the model's configuration does not name one; "
                    "pass pre_wrap_hook(..., vocab_size=cfg.model.vocab_size), the size before padding"
                )
            loss = attach(chunk, chosen, vocab_size=size, fused_linear=fused_linear, measure_only=measure_only)
            if loss is not None:
                _CalledCheck(unwrap(chunk), loss)
        return model

    return attach_eaft


def forward_step(
    state: GlobalState, data_iterator: Iterator[Any], model: Any, return_schedule_plan: bool = False
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Bridge's `gpt_step.forward_step`, for a model with the hook: give it to `finetune`.

    Tokens outside the loss mask get the label `ignore_index`, so that they take no part before the loss either. The
    report of a training step has, beside Bridge's `lm loss` (the EAFT loss that is trained, nats per token),
    `eaft/cross_entropy`, `eaft/entropy` (nats), `eaft/weight` and `eaft/conflict_fraction`: [2] float64, sum and number
    of tokens of the micro-batch, which Bridge adds up over the global batch, divides and gives to its loggers. In
    validation `lm loss` is plain cross-entropy, and nothing is added.

    Raises:
        ValueError: a label of `ignore_index` where the loss mask is 1; gradients would be averaged
            (`average_in_collective`), or FSDP would sum them.
        RuntimeError: no hook was registered, or its loss was replaced since.
    """
    _check_built(state.cfg, model)
    loss = _loss_of(model)
    if loss is None:
        return gpt_step.forward_step(state, data_iterator, model, return_schedule_plan)
    loss.reset()
    batches = _WithoutMasked(data_iterator, loss.config.ignore_index)
    output, loss_function = gpt_step.forward_step(state, batches, model, return_schedule_plan)
    if not model.training:
        return output, loss_function
    assert loss.sums is not None, "the hook's check of the forward pass did not run"
    return output, partial(_with_metrics, loss_function, loss.sums)


class _CalledCheck:
    """Watches the forwards of a model: one with labels must have called the loss, or nothing of EAFT is trained."""

    def __init__(self, core: Any, loss: AttachedLoss) -> None:
        self._loss = loss
        self._before = 0
        core.register_forward_pre_hook(self._start)
        core.register_forward_hook(self._finish, with_kwargs=True)

    def _start(self, *_: Any) -> None:
        self._before = self._loss.calls

    def _finish(self, core: Any, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        if kwargs.get("labels") is not None and self._loss.calls == self._before:
            by = self._loss.replaced_by()
            why = f"{by} took its place after the pre-wrap hook" if by else "the model computes its loss elsewhere"
            raise RuntimeError(
                f"EAFT is configured but its loss was never called in the forward of {type(core).__name__}: {why}. "
                "Nothing was trained."
            )


class _WithoutMasked:
    """Batches with `ignore_index` for the labels outside the loss mask; the given ones stay as they are.

    Before Bridge cuts them for context parallelism, so labels and mask go the same way.
    """

    def __init__(self, batches: Iterator[Any], ignore_index: int) -> None:
        self._batches = batches
        self._ignore_index = ignore_index

    def __iter__(self) -> _WithoutMasked:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        labels, mask = batch.get("labels"), batch.get("loss_mask")
        if labels is None or mask is None:
            return batch
        check_labels_under_mask(labels != self._ignore_index, mask, self._ignore_index)
        return batch | {"labels": torch.where(mask != 0, labels, self._ignore_index)}


def _with_metrics(loss_function: Callable[[Tensor], Any], sums: Tensor, output: Tensor) -> tuple[Any, ...]:
    """Bridge's (loss, number of tokens, report), the report with EAFT's sums of the micro-batch."""
    loss, tokens, report = loss_function(output)
    return loss, tokens, report | {f"eaft/{name}": pair for name, pair in sums_and_counts(sums).items()}


def _loss_of(model: Any) -> AttachedLoss | None:
    """The loss of this chunk, None for one without."""
    loss = attached(model)
    core: Any = unwrap(model)
    if not getattr(core, "post_process", True):
        return None
    if loss is None:
        raise RuntimeError(
            "EAFT's forward_step, but the model has no EAFT loss: "
            "cfg.model.register_pre_wrap_hook(nemo_eaft.bridge.pre_wrap_hook(EAFTConfig())) is missing, or something "
            "replaced it since. Nothing was trained."
        )
    return loss


def _check_config(config: Any, measure_only: bool) -> None:
    """The configuration of a model chunk sums gradients, and its loss is where the hook reaches it.

    Raises:
        ValueError: otherwise.
    """
    if not config.calculate_per_token_loss:
        raise ValueError(
            "cfg.model.calculate_per_token_loss: False; allowed: True. Otherwise the loss is a mean of the "
            "micro-batches' means, and the gradient depends on how the global batch is cut"
        )
    # Scheduled and captured forwards run without the module's hooks, which tell prediction heads from the main loss and
    # count the calls.
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        raise ValueError(
            "cfg.model.overlap_moe_expert_parallel_comm: True; allowed: False, as it bypasses the model's forward"
        )
    scope = getattr(config, "cuda_graph_scope", None) or []
    # One name up to Megatron-Core 0.15, a list of names or of enum members since.
    scopes = [getattr(part, "name", part) for part in (scope.split(",") if isinstance(scope, str) else scope)]
    if getattr(config, "cuda_graph_impl", "none") == "local" and "full_iteration" in scopes:
        raise ValueError(
            "cfg.model.cuda_graph_scope: full_iteration; allowed: any other, as it bypasses the model's forward"
        )
    if getattr(config, "mtp_num_layers", None):
        raise ValueError(
            f"cfg.model.mtp_num_layers: {config.mtp_num_layers}; allowed: None. Bridge gives prediction heads no loss "
            "mask, so they would be trained on the labels outside it, which EAFT's forward_step takes away"
        )
    # As requirements.py for NeMo; Megatron-LM's arguments.py refuses it, Bridge 0.3.1 (training/config.py) does not.
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    if interleaved and config.pipeline_model_parallel_size == 2 and not config.overlap_p2p_comm:
        raise ValueError(
            "cfg.model.overlap_p2p_comm: False; allowed: True, with batch_p2p_comm=False, where a virtual pipeline has "
            "two stages: batched, they exchange the wrong tensors"
        )
    implementation = getattr(config, "cross_entropy_fusion_impl", "native")
    if config.cross_entropy_loss_fusion and implementation not in ("native", "te"):
        raise ValueError(
            f"cfg.model.cross_entropy_fusion_impl: {implementation!r}; allowed: 'native' or 'te', with which the model "
            "calls compute_language_model_loss, or cross_entropy_loss_fusion=False"
        )
    if config.cross_entropy_loss_fusion and implementation == "te" and not measure_only:
        warnings.warn(
            "cfg.model.cross_entropy_fusion_impl='te' has no effect on the loss that is trained: EAFT computes it",
            stacklevel=2,
        )


def _check_built(cfg: Any, model: Any) -> None:
    """What only the whole configuration and the wrapped model show: gradients are summed, not averaged.

    Raises:
        ValueError: otherwise.
    """
    if cfg.ddp.average_in_collective:
        raise ValueError(
            "cfg.ddp.average_in_collective: True; allowed: False. Gradients are summed over the ranks and divided once "
            "by the tokens of the global batch"
        )
    for field in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(cfg.dist, field, False):
            raise ValueError(f"cfg.dist.{field}: True; allowed: False, as EAFT was not tested with FSDP")
    for name in ("buffers", "expert_parallel_buffers"):
        # Of Megatron's DDP: a model that is not wrapped has torch's method of that name.
        buffers = getattr(model, name, None)
        for buffer in buffers if isinstance(buffers, list) else []:
            if buffer.gradient_scaling_factor != 1.0:
                raise ValueError(
                    f"gradient_scaling_factor is {buffer.gradient_scaling_factor} on a model chunk, expected 1.0: "
                    "calculate_per_token_loss was changed while the model was built"
                )
