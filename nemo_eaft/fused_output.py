"""The output layer of a Megatron-Core model that hands its hidden states to the loss.

`compute_language_model_loss` receives logits, so a fused output layer cannot hang on it alone. Here the instance's
`output_layer.forward` is shadowed: in the main call of a forward with labels it returns the hidden states and keeps the
weight that it was called with, and the loss then takes both.

Assumed of megatron-core 0.15.3 (models/gpt/gpt_model.py, `_postprocess`): a forward with labels calls, for each
multi-token-prediction head, `output_layer` and `compute_language_model_loss`; then `output_layer` once more with the
keyword `weight` (the embedding's where it is shared, else None), and passes the first value it returns to
`compute_language_model_loss(labels, logits)` untouched (a config logger may write it to disk). Whatever breaks this is
an error at the first forward, never another loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_eaft.config import EAFTConfig
from nemo_eaft.loss import TokenLoss
from nemo_eaft.loss.collectives import group_size
from nemo_eaft.loss.linear import output_layer_loss

_REFUSED = "fused_linear: True; allowed: False with this model:"


class FusedOutput:
    """The shadowed output layer of one model.

    Raises:
        ValueError: the layer does more than multiply hidden states by a weight.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model: Any = model
        self._layer = _layer_of(self._model)
        parameters = list(inspect.signature(model.forward).parameters)
        if "labels" not in parameters:
            raise ValueError(f"{_REFUSED} {type(model).__name__}.forward has no parameter named labels")
        self.labels_at = parameters.index("labels")
        self._real: Callable[..., Any] = self._layer.forward
        self._expects_main = False
        self._weight: Tensor | None = None
        self._layer.forward = self._forward

    def start(self, *, expect_main: bool) -> None:
        """Whether the next call of the output layer is the main one of a forward with labels.

        Raises:
            ValueError: the output layer was replaced since `attach`.
        """
        if not self.in_place():
            kind = type(self._model.output_layer).__name__
            raise ValueError(
                f"{_REFUSED} its output layer was replaced after attach (now {kind}); with LoRA on the output layer "
                "use fused_linear=False"
            )
        self._weight = None
        self._expects_main = expect_main

    def finish(self, *, failed: bool) -> None:
        """End of the model's forward.

        Raises:
            RuntimeError: hidden states were handed out, and the loss did not take them.
        """
        unused = self._weight is not None and not failed
        self._weight, self._expects_main = None, False
        if unused:
            raise RuntimeError(
                "the fused output layer gave hidden states instead of logits, but compute_language_model_loss was not "
                "called with them: this model computes its loss elsewhere; use fused_linear=False"
            )

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        config: EAFTConfig,
        *,
        vocab_size: int,
        group: ProcessGroup | None,
        loss_mask: Tensor | None,
        scaled_mask_upstream: bool,
    ) -> TokenLoss:
        """The loss of the main call, [s, b]; arguments as of `loss.linear.output_layer_loss`.

        Raises:
            RuntimeError: labels came, but not through this output layer.
        """
        weight, self._weight = self._weight, None
        if weight is None:
            raise RuntimeError(
                "compute_language_model_loss was called, but the fused output layer was not called before it: this "
                "model computes its logits elsewhere (megatron-core 0.15.3 models/gpt/gpt_model.py, _postprocess); use "
                "fused_linear=False"
            )
        one_in_flight = self._model.config.virtual_pipeline_model_parallel_size is None
        return output_layer_loss(
            hidden,
            weight,
            labels,
            config,
            vocab_size=vocab_size,
            group=group,
            loss_mask=loss_mask,
            sequence_parallel=self._layer.sequence_parallel,
            into_main_grad=self._adds_to_main_grad(weight),
            scaled_mask_upstream=scaled_mask_upstream and one_in_flight and group_size(group) == 1,
        )

    def in_place(self) -> bool:
        """Whether the model still calls this output layer."""
        return self._model.output_layer is self._layer and self._layer.__dict__.get("forward") == self._forward

    def remove(self) -> None:
        """Give the layer its own forward back."""
        if self._layer.__dict__.get("forward") == self._forward:
            del self._layer.__dict__["forward"]

    def _forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if not self._expects_main:
            return self._real(input_, weight=weight, runtime_gather_output=runtime_gather_output)
        if runtime_gather_output:
            raise ValueError(f"{_REFUSED} runtime_gather_output=True with labels; leave it out")
        self._expects_main = False
        self._weight = self._layer.weight if weight is None else weight
        return input_, None

    def _adds_to_main_grad(self, weight: Any) -> bool:
        """Whether backward adds the weight's gradient to Megatron's `main_grad` itself.

        With `gradient_accumulation_fusion` or without, where DDP's hook would add it in the parameter's dtype
        (megatron-core 0.15.3, distributed/distributed_data_parallel.py). The hook drops what else comes through
        autograd for a weight whose `grad_added_to_main_grad` is set, unless `zero_out_wgrad` marks it as tied. So not
        where unfused prediction heads use it as well, nor where FSDP makes `main_grad` at its own time.
        """
        if not weight.requires_grad or getattr(weight, "main_grad", None) is None:
            return False
        if not hasattr(weight, "grad_added_to_main_grad") or hasattr(weight, "__fsdp_param__"):
            return False
        heads = getattr(self._model, "mtp_process", False) and self._model.config.mtp_num_layers
        return self._layer.gradient_accumulation_fusion or not heads


def _layer_of(model: Any) -> Any:
    """The model's output layer; refused where its result is not `hidden @ weight.T` of this rank's rows."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    layer, config = getattr(model, "output_layer", None), model.config
    kind = type(layer).__name__
    if not isinstance(layer, ColumnParallelLinear):
        # NeMo 2.7.3 (collections/llm/peft/lora.py) replaces an adapted layer by LoRALinear, which holds it in to_wrap.
        adapter = " (LoRA on the output layer)" if hasattr(layer, "to_wrap") or "lora" in kind.lower() else ""
        raise ValueError(f"{_REFUSED} its output layer is {kind}{adapter}, not megatron-core's ColumnParallelLinear")
    if type(layer).forward is not ColumnParallelLinear.forward or "forward" in layer.__dict__:
        raise ValueError(f"{_REFUSED} the forward of its output layer {kind} is not ColumnParallelLinear's")
    # Hooks before forward still run, as it is shadowed below __call__; DDP has one with overlap_param_gather.
    if layer._forward_hooks:
        raise ValueError(f"{_REFUSED} its output layer has forward hooks, which would see no logits")
    reasons = {
        "a bias": layer.bias is not None,
        "gather_output=True (parallel_output=False)": layer.gather_output,
        "disable_grad_reduce=True": layer.disable_grad_reduce,
        "experts": layer.explicit_expert_comm,
    }
    for reason, there in reasons.items():
        if there:
            raise ValueError(f"{_REFUSED} its output layer has {reason}")
    # use_mup scales the logits in later versions; 0.15.3 has no such field.
    for field in ("defer_embedding_wgrad_compute", "overlap_moe_expert_parallel_comm", "use_mup"):
        if getattr(config, field, False):
            raise ValueError(f"{_REFUSED} its configuration has {field}=True")
    return layer
