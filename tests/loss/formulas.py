"""The loss written a second time, independently of the package, in float64 and straight from the paper.

Used by every test of numbers. Shares no function with ``nemo_eaft``: sums over explicit probabilities instead
of shifted sums, numpy-like steps instead of blocks.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_eaft import EAFTConfig


class Expected(NamedTuple):
    loss: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    weight: Tensor
    gradient: Tensor


def expected(
    logits: Tensor,
    labels: Tensor,
    config: EAFTConfig,
    vocab_size: int | None = None,
    loss_mask: Tensor | None = None,
    upstream: Tensor | None = None,
) -> Expected:
    """Everything in float64 from whole rows [..., V_padded]; the gradient of sum(upstream * loss), by
    hand."""
    width = logits.shape[-1]
    vocab = vocab_size or width
    counted = labels != config.ignore_index
    if loss_mask is not None:
        counted &= loss_mask.bool()
    z = logits.detach().double()[..., :vocab]
    shape = labels.shape
    out: dict[str, Any] = {name: torch.zeros(shape, dtype=torch.float64) for name in Expected._fields[:4]}
    gradient = torch.zeros(*shape, width, dtype=torch.float64)
    up = torch.ones(shape, dtype=torch.float64) if upstream is None else upstream.double()
    for token in torch.nonzero(counted).tolist():
        index = tuple(token)
        # Even float64 loses ln V at 1e30; the loss does not depend on an offset.
        row, label = z[index] - z[index].max(), int(labels[index])
        p = torch.exp(row - torch.logsumexp(row, 0))
        ce = torch.logsumexp(row, 0) - row[label]
        top = torch.sort(row, descending=True).values
        if config.top_k is not None:
            top = top[: config.top_k]
        q = torch.exp(top - torch.logsumexp(top, 0))
        h = -torch.xlogy(q, q).sum()
        ratio = h / (config.normalizer or math.log(len(top)))
        w = _weight(ce, ratio, config)
        out["loss"][index], out["cross_entropy"][index] = w * ce, ce
        out["entropy"][index], out["weight"][index] = h, w
        onehot = torch.zeros_like(p)
        onehot[label] = 1
        gradient[(*index, slice(None, vocab))] = up[index] * w * (p - onehot)
    return Expected(gradient=gradient, **out)


def _weight(ce: Tensor, ratio: Tensor, config: EAFTConfig) -> Tensor:
    p = torch.exp(-ce)
    if config.gate == "eaft":
        return ratio**config.alpha if config.alpha else torch.ones_like(ratio)
    if config.gate == "dft":
        return p
    if config.gate == "mask":
        hard = p < config.conflict_probability and ratio < config.conflict_entropy
        return torch.zeros_like(p) if hard else torch.ones_like(p)
    if config.gate == "sigmoid":
        return 1 / (1 + torch.exp(-config.gate_slope * (ratio - config.gate_centre)))
    return torch.ones_like(p)


def shard(logits: Tensor, rank: int, world_size: int) -> Tensor:
    """A leaf holding this rank's columns of [..., V_padded]."""
    width = logits.shape[-1] // world_size
    return logits[..., rank * width : (rank + 1) * width].detach().clone().requires_grad_()


def pad(logits: Tensor, multiple: int, value: float = 0.0) -> Tensor:
    """[..., V] with columns of ``value`` appended until the width is a multiple."""
    return torch.nn.functional.pad(logits, (0, -logits.shape[-1] % multiple), value=value)
