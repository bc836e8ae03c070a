"""Everyone who is measured, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Case, Inputs
from nemo_eaft import EAFTConfig, eaft_linear_loss, eaft_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    """What ``--only`` and the result files call it."""

    label: str
    """What tables and plots call it."""

    forward: Callable[[Inputs, Case], Tensor]
    """The loss: [tokens] or [tokens, 1], or a sum."""

    kind: Literal["logits", "linear"] = "logits"
    """What it starts from."""

    formula: Literal["ce", "eaft", "none"] = "ce"
    """What it must equal; ``none`` is no loss, only a yardstick."""

    ours: bool = False
    """Our own being wrong stops the whole run."""

    top_k_only: bool = False
    """Has no entropy over the whole vocabulary."""

    gpu_only: bool = False

    compiled: bool = False
    """``torch.compile`` on a CPU, tens of seconds for each size."""

    missing: Callable[[], str | None] = lambda: None
    """Why it is not there, or None."""

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot run this case here, or None."""
        if (reason := self.missing()) is not None:
            return reason
        if self.gpu_only and device.type != "cuda":
            return "its kernels need a GPU"
        if self.top_k_only and case.top_k is None:
            return "has the top-K entropy only"
        return None


def _config(case: Case) -> EAFTConfig:
    return EAFTConfig(top_k=case.top_k)


def _eaft(inputs: Inputs, case: Case) -> Tensor:
    return eaft_loss(inputs.tensors[0], inputs.labels, _config(case)).loss


class _Result(torch.autograd.Function):
    """The same memory as a result: in a model the logits are one, and leaves and their views are refused."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.new_empty(0).set_(logits.untyped_storage(), 0, logits.shape, logits.stride())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _eaft_inplace(inputs: Inputs, case: Case) -> Tensor:
    logits: Tensor = _Result.apply(inputs.tensors[0])
    return eaft_loss(logits, inputs.labels, _config(case), inplace_backward=True).loss


def _eaft_linear(inputs: Inputs, case: Case) -> Tensor:
    hidden, weight = inputs.tensors
    return eaft_linear_loss(hidden, weight, inputs.labels, _config(case)).loss


def _eaft_unfused_linear(inputs: Inputs, case: Case) -> Tensor:
    hidden, weight = inputs.tensors
    return eaft_loss(hidden @ weight.t(), inputs.labels, _config(case)).loss


class _FourProducts(torch.autograd.Function):
    """The matrix products of a fused output layer that recomputes the logits in backward, and nothing else."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return (hidden @ weight.t())[:, 0].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        logits = hidden @ weight.t()
        return logits @ weight, logits.t() @ hidden


def _four_products(inputs: Inputs, case: Case) -> Tensor:
    out: Tensor = _FourProducts.apply(*inputs.tensors)
    return out


CONTENDERS: tuple[Contender, ...] = (
    Contender(name="eaft", label="ours", forward=_eaft, formula="eaft", ours=True),
    Contender(
        name="eaft-inplace",
        label="ours, in place",
        forward=_eaft_inplace,
        formula="eaft",
        ours=True,
    ),
    Contender(
        name="peers-eaft",
        label="peers' EAFT formula (our re-statement, single rank only)",
        forward=peers.peers_eaft,
        formula="eaft",
        top_k_only=True,
    ),
    Contender(
        name="megatron",
        label="Megatron-Core, unfused CE",
        forward=peers.megatron_unfused,
        missing=peers.missing_megatron,
    ),
    Contender(
        name="megatron-fused",
        label="Megatron-Core, native fused CE",
        forward=peers.megatron_fused,
        missing=peers.missing_megatron,
        compiled=True,
    ),
    Contender(
        name="liger",
        label="Liger vocab-parallel CE",
        forward=peers.liger_vocab_parallel,
        missing=lambda: peers.missing("liger_kernel"),
        gpu_only=True,
    ),
    Contender(
        name="transformer-engine",
        label="TransformerEngine CE",
        forward=peers.transformer_engine,
        missing=lambda: peers.missing("transformer_engine"),
        gpu_only=True,
    ),
    Contender(
        name="eaft-linear",
        label="ours, fused output layer",
        forward=_eaft_linear,
        kind="linear",
        formula="eaft",
        ours=True,
    ),
    Contender(
        name="eaft-unfused-linear",
        label="hidden @ weight.T, then ours",
        forward=_eaft_unfused_linear,
        kind="linear",
        formula="eaft",
        ours=True,
    ),
    Contender(
        name="four-products",
        label="four matrix products alone (no loss)",
        forward=_four_products,
        kind="linear",
        formula="none",
    ),
    Contender(
        name="liger-linear",
        label="Liger fused-linear CE (single rank only)",
        forward=peers.liger_fused_linear,
        kind="linear",
        missing=lambda: peers.missing("liger_kernel"),
        gpu_only=True,
    ),
    Contender(
        name="cut-cross-entropy",
        label="cut-cross-entropy",
        forward=peers.cut_cross_entropy,
        kind="linear",
        missing=lambda: peers.missing("cut_cross_entropy"),
        compiled=True,
    ),
)

BY_NAME: dict[str, Contender] = {contender.name: contender for contender in CONTENDERS}


def contenders_of(case: Case, only: tuple[str, ...] = ()) -> list[Contender]:
    """Those that start from what the case gives, in the order above; all, or the named ones."""
    kind = "logits" if case.hidden is None else "linear"
    return [each for each in CONTENDERS if each.kind == kind and (not only or each.name in only)]
