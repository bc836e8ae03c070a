"""EAFT in any Megatron-Core model: `attach` puts the loss where the model computes it, `detach` takes it out.

The place is the bound method `compute_language_model_loss(labels, logits)` of the unwrapped model, shadowed by an
attribute of the instance. Its signature is the same in megatron-core 0.12 to 0.20 (models/common/language_module/
language_module.py); the class stays what it is, and nothing enters a state_dict, a checkpoint or a configuration.
The fused output layer needs a second place, `output_layer.forward`: see fused_output.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_eaft.config import EAFTConfig
from nemo_eaft.fused_output import FusedOutput
from nemo_eaft.loss import TokenLoss, eaft_loss
from nemo_eaft.metrics import token_sums, zero_sums

_METHOD = "compute_language_model_loss"


class Observed(NamedTuple):
    """One main call, as its observer gets it."""

    out: TokenLoss
    """[s, b] float32 each, identical on every tensor-parallel rank."""
    valid: Tensor
    """[s, b] bool: the tokens in the loss."""
    labels: Tensor
    """[s, b] int64."""
    logits: Tensor
    """[s, b, V_local], this rank's shard, not to be written to; of a fused output layer its input."""


class AttachedLoss:
    """The loss of one model, and what it counted since `reset`.

    Created by `attach`. Call order in one forward of megatron-core 0.15.3 (models/gpt/gpt_model.py, _postprocess): one
    call for each multi-token-prediction head, then the main call. The heads keep Megatron's own cross-entropy.

    Attributes:
        requires_loss_mask: whether a forward with labels and without a loss mask is an error.
        scaled_mask_upstream: what a caller may promise for a fused output layer: the gradient of the loss will be one
            number times the loss mask. Then training makes the gradients in forward and saves a matrix product of four,
            at the price of the weight's gradient in float32 held from forward to backward. Only with one
            tensor-parallel rank and without virtual pipeline stages, whose forwards would each hold one; elsewhere the
            promise changes nothing. A broken promise stops the run.
        keep_not_finite: whether `not_finite` is kept; who sets it calls `reset` at each step.
        not_finite: of each main call in training since `reset`, [b, s] bool on the device: where the loss that is
            trained on is NaN or infinite. With `measure_only` also at tokens outside the loss, as Megatron's callers
            multiply by the mask.
        weigh_validation: whether validation has the weights of training too, for whoever only looks.
        observer: called in each main call, training and validation, before its loss is returned; None: nobody.
        calls: main calls since `reset`, in training and validation.
        sums: [6] float64, `metrics.token_sums` added up over those calls; None before the first.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: EAFTConfig,
        vocab_size: int,
        group: ProcessGroup | None,
        measure_only: bool,
        fused: FusedOutput | None,
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.measure_only = measure_only
        self.requires_loss_mask = False
        self.scaled_mask_upstream = False
        self.keep_not_finite = False
        self.weigh_validation = False
        self.observer: Callable[[Observed], None] | None = None
        self.not_finite: list[Tensor] = []
        self.calls = 0
        self.sums: Tensor | None = None
        self._model = model
        self._group = group
        self._fused = fused
        self._megatron_loss: Callable[[Tensor, Tensor], Tensor] = getattr(model, _METHOD)
        self._loss_mask: Tensor | None = None
        self._heads_left = 0
        self._hooks = (
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        )
        setattr(model, _METHOD, self._loss)

    def set_loss_mask(self, loss_mask: Tensor | None) -> None:
        """The loss mask [b, s] of the coming forward, for a caller that does not pass it to the model itself."""
        self._loss_mask = loss_mask

    def reset(self) -> None:
        """Start counting anew (a new optimizer step)."""
        self.not_finite = []
        self.calls = 0
        self.sums = None

    def remove(self) -> None:
        """Give the model its own loss back."""
        for hook in self._hooks:
            hook.remove()
        del self._model.__dict__[_METHOD]
        if self._fused is not None:
            self._fused.remove()

    def in_place(self) -> bool:
        """Whether the model still calls this loss: False when something else replaced it afterwards."""
        fused = self._fused is None or self._fused.in_place()
        return fused and self._model.__dict__.get(_METHOD) == self._loss

    def replaced_by(self) -> str | None:
        """What took the place of this loss, by name; None where nothing did."""
        if self.in_place():
            return None
        method = getattr(self._model, _METHOD)
        if method == self._loss:
            return f"another {type(self._model.output_layer).__name__} (or its forward)"
        function = getattr(method, "__func__", method)
        return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"

    @property
    def fused_linear(self) -> bool:
        """Whether output layer and loss are one."""
        return self._fused is not None

    def _before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Plain Megatron-LM and Bridge hand the mask to GPTModel.forward; NeMo's adapter calls set_loss_mask.
        if kwargs.get("loss_mask") is not None:
            self._loss_mask = kwargs["loss_mask"]
        self._heads_left = (model.config.mtp_num_layers or 0) if getattr(model, "mtp_process", False) else 0
        if self._fused is not None:
            place = self._fused.labels_at
            given = args[place] if len(args) > place else kwargs.get("labels")
            self._fused.start(expect_main=given is not None and not self._heads_left)

    def _after_forward(self, _: Any, __: Any, output: Any) -> None:
        # Also after a forward without labels, or one that failed: its mask must not meet the next micro-batch.
        self._loss_mask = None
        if self._fused is not None:
            self._fused.finish(failed=output is None)

    def _loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V_local] -> loss [b, s] float32, as Megatron's own method.

        With a fused output layer the main call brings hidden states [s, b, h] instead, under sequence parallelism the
        rank's part of them.
        """
        if self._heads_left:
            self._heads_left -= 1
            if self._fused is not None and not self._heads_left:
                self._fused.start(expect_main=True)
            return self._megatron_loss(labels, logits)
        loss_mask = self._loss_mask
        if loss_mask is None and self.requires_loss_mask:
            raise RuntimeError(
                "EAFT got no loss mask for this micro-batch: on_megatron_microbatch_start(batch) did not fire with "
                "'loss_mask' before the forward pass (NeMo 2.7.3 nemo/lightning/megatron_parallel.py, "
                "wrapped_forward_step)"
            )
        valid = labels != self.config.ignore_index
        if loss_mask is not None:
            check_labels_under_mask(valid, loss_mask, self.config.ignore_index)
            valid = valid & (loss_mask != 0)
        config = self.config if self._model.training or self.weigh_validation else self.config.plain()
        measured = self._model.training and self.measure_only
        # Before Megatron's loss, which overwrites float32 logits (tensor_parallel/cross_entropy.py).
        with torch.set_grad_enabled(torch.is_grad_enabled() and not measured):
            out = self._eaft(logits.detach() if measured else logits, labels, config, loss_mask)
        if self.observer is not None:
            detached = out._replace(loss=out.loss.detach())
            self.observer(Observed(detached, valid.transpose(0, 1), labels.transpose(0, 1), logits.detach()))
        trained = self._megatron_loss(labels, logits) if measured else out.loss.transpose(0, 1).contiguous()
        self._count(out, trained.detach(), valid, config)
        return trained

    def _count(self, out: TokenLoss, trained: Tensor, valid: Tensor, config: EAFTConfig) -> None:
        """Add the micro-batch to what was counted. out: [s, b]; trained and valid: [b, s]. Waits for nothing."""
        if self._model.training and self.measure_only:
            # What Megatron minimises decides whether the step is finite: padding columns and tokens outside the loss
            # mask spoil its loss, not ours.
            finite = trained.isfinite()
            spoilt = ~(finite | valid).transpose(0, 1)
            out = out._replace(loss=torch.where(finite.transpose(0, 1), out.loss, trained.transpose(0, 1)))
            valid = valid | spoilt.transpose(0, 1)
        self.calls += 1
        so_far = zero_sums(out.loss.device) if self.sums is None else self.sums
        self.sums = so_far + token_sums(out, valid.transpose(0, 1), config, self.vocab_size)
        if self.keep_not_finite and self._model.training:
            self.not_finite.append(valid & ~out.loss.isfinite().transpose(0, 1))

    def _eaft(self, logits: Tensor, labels: Tensor, config: EAFTConfig, loss_mask: Tensor | None) -> TokenLoss:
        # Labels and mask are transposed, a view; the logits, V times larger, never are.
        labels = labels.transpose(0, 1)
        loss_mask = None if loss_mask is None else loss_mask.transpose(0, 1)
        if self._fused is not None:
            return self._fused.loss(
                logits,
                labels,
                config,
                vocab_size=self.vocab_size,
                group=self._group,
                loss_mask=loss_mask,
                scaled_mask_upstream=self.scaled_mask_upstream and self._model.training,
            )
        return eaft_loss(logits, labels, config, vocab_size=self.vocab_size, group=self._group, loss_mask=loss_mask)


def attach(
    model: torch.nn.Module,
    config: EAFTConfig,
    *,
    vocab_size: int,
    fused_linear: bool = False,
    measure_only: bool = False,
) -> AttachedLoss | None:
    """Make `model` train with the EAFT loss; its validation loss (`model.eval()`) becomes plain cross-entropy.

    model: a Megatron-Core model with `compute_language_model_loss`, bare or wrapped (Float16Module, DDP). A pipeline
        stage without the loss (`post_process` False) is left alone, so one call in a model provider serves all stages.
    vocab_size: the true vocabulary size V, as the Hugging Face model has it, before Megatron pads it.
    fused_linear: output layer and loss in one, without the logits of all tokens, in training and validation (see
        fused_output.py). Generation and multi-token-prediction heads keep the real output layer.
    measure_only: train with Megatron's own cross-entropy, bit for bit, and only measure; validation as above.

    The caller's loss function must divide by the number of valid tokens of the whole global batch
    (`calculate_per_token_loss=True`), or the gradient depends on how the batch is cut.

    Returns:
        The attached loss, or None for a stage without one.

    Raises:
        ValueError: no such method, EAFT is attached already, `vocab_size` is above the model's padded vocabulary,
            `fused_linear` with `measure_only`, or with an output layer that does more than a matrix product (LoRA,
            bias, gathered output, a subclass).
    """
    if fused_linear and measure_only:
        raise ValueError(
            "fused_linear: True; allowed: False with measure_only=True, where Megatron's own loss needs the logits"
        )
    core = unwrap(model)
    if not getattr(core, "post_process", True):
        return None
    if _METHOD in core.__dict__:
        raise ValueError(f"model: {type(core).__name__}.{_METHOD} is replaced already; detach(model) first")
    padded = getattr(core, "vocab_size", None)
    if padded is not None and not 2 <= vocab_size <= padded:
        raise ValueError(f"vocab_size: {vocab_size}; allowed: 2 to {padded}, the model's padded vocabulary")
    group = _tensor_parallel_group(core)
    # Last of what can fail, as it changes the output layer.
    fused = FusedOutput(core) if fused_linear else None
    loss = AttachedLoss(core, config, vocab_size, group, measure_only, fused)
    assert loss.in_place()
    return loss


def attached(model: torch.nn.Module) -> AttachedLoss | None:
    """The loss that `attach` put on `model`, or None."""
    owner = getattr(unwrap(model).__dict__.get(_METHOD), "__self__", None)
    return owner if isinstance(owner, AttachedLoss) else None


def detach(model: torch.nn.Module) -> None:
    """Undo `attach`. A model that has none is left alone."""
    loss = attached(model)
    if loss is not None:
        loss.remove()


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The Megatron-Core model inside its wrappers (DDP, Float16Module, NeMo's LightningModule).

    Raises:
        ValueError: there is none with `compute_language_model_loss`.
    """
    core: Any = model
    # Looked up on the class: wrappers of NeMo forward unknown attributes to what they wrap.
    while not hasattr(type(core), _METHOD):
        core = getattr(core, "module", None)
        if core is None:
            raise ValueError(f"model: {type(model).__name__} holds no model with a method {_METHOD}(labels, logits)")
    return core


def _tensor_parallel_group(core: Any) -> ProcessGroup | None:
    groups = getattr(core, "pg_collection", None)
    if groups is not None and getattr(groups, "tp", None) is not None:
        return groups.tp
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def check_labels_under_mask(labelled: Tensor, loss_mask: Tensor, ignore_index: int) -> None:
    """A counted token needs a label: Megatron's denominator is the mask, so an ignored one would dilute the mean.

    labelled: [...] bool, where the label is not `ignore_index`; loss_mask: [...], of the same shape.

    Raises:
        ValueError: there is such a token. On a GPU the error comes later, as a failed device assertion.
    """
    wrong = ~labelled & (loss_mask != 0)
    message = f"labels: {ignore_index} (ignore_index) where the loss mask is 1; mask such tokens out"
    if wrong.device.type == "cpu":
        if wrong.any():
            raise ValueError(f"{message} ({int(wrong.sum())} of {wrong.numel()} tokens)")
    else:
        torch._assert_async(~wrong.any(), message)
