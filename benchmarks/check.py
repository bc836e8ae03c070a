"""Is a contender right? Asked on a small input before anything is timed."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.contenders import Contender
from benchmarks.peers import describe
from nemo_eaft import EAFTConfig
from nemo_eaft.loss.reference import reference_loss

# The floors are the project's tolerances for float32 arithmetic: nats of a token's loss, and gradient.
_FACTOR, _LOSS_FLOOR, _GRADIENT_FLOOR = 2.0, 1e-5, 1e-6


class Answer(dict[str, Tensor]):
    """The loss and the gradient of each input, by name."""


def small(case: Case) -> Case:
    """The same kind of case with few tokens and an odd number of columns."""
    return dataclasses.replace(case, tokens=24, vocab=1003, shards=1, hidden=None if case.hidden is None else 64)


def error_of(contender: Contender, case: Case, device: torch.device) -> str | None:
    """What is wrong with a contender on a small version of the case; None: nothing.

    The truth is the formula in float64 on the same values. The allowed error is twice what PyTorch makes with
    whole rows in plain autograd in the case's own type, plus a float32 floor.
    """
    if contender.formula == "none":
        return None
    case = small(case)
    inputs = make_inputs(case, device, seed=1)
    # Now, because the contender may overwrite its input.
    wide = Inputs(tuple(_leaf(tensor.double()) for tensor in inputs.tensors), inputs.labels)
    own = Inputs(tuple(_leaf(tensor.clone()) for tensor in inputs.tensors), inputs.labels)
    try:
        loss = contender.forward(inputs, case)
        whole = loss.dim() == 0
        upstream = _upstream(case, device, uniform=whole)
        given = upstream.sum() / case.tokens if whole else upstream.view(loss.shape)
        gradients = torch.autograd.grad(loss, inputs.tensors, given.to(loss.dtype))
    except Exception as error:
        return f"did not run: {describe(error)}"
    answer = _answer(loss, gradients)
    truth, plain = (_formula(contender, kind, case, upstream, whole) for kind in (wide, own))
    for name, value in answer.items():
        if value.dtype != inputs.tensors[0].dtype and name != "loss":
            return f"wrong: the {name} is {value.dtype}"
        found = _distance(value, truth[name])
        floor = _GRADIENT_FLOOR if name != "loss" else _LOSS_FLOOR * (case.tokens if whole else 1)
        allowed = _FACTOR * _distance(plain[name], truth[name]) + floor
        if not found <= allowed:
            return f"wrong: the {name} is off by {found:.2g}, more than {allowed:.2g}"
    return None


def _formula(contender: Contender, inputs: Inputs, case: Case, upstream: Tensor, whole: bool) -> Answer:
    logits = inputs.tensors[0]
    if case.hidden is not None:
        logits = logits @ inputs.tensors[1].t()
    if contender.formula == "eaft":
        valid = torch.ones_like(inputs.labels, dtype=torch.bool)
        loss = reference_loss(logits, inputs.labels, valid, EAFTConfig(top_k=case.top_k), case.width).loss
    else:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide, inputs.labels, reduction="none")
    gradients = torch.autograd.grad(loss, inputs.tensors, upstream.to(loss.dtype))
    return _answer(loss.sum() if whole else loss, gradients)


def _answer(loss: Tensor, gradients: tuple[Tensor, ...]) -> Answer:
    names = ("gradient",) if len(gradients) == 1 else ("gradient of hidden", "gradient of weight")
    return Answer({"loss": loss.detach().flatten(), **dict(zip(names, gradients, strict=True))})


def _upstream(case: Case, device: torch.device, uniform: bool) -> Tensor:
    """Another number for each token: a contender that takes one for all is found."""
    if uniform:
        return torch.ones(case.tokens, device=device)
    return torch.linspace(0.5, 1.5, case.tokens, device=device)


def _distance(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).abs().max())


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
