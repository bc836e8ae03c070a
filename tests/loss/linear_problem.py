"""A small output layer, its loss on threaded ranks, and the same by hand."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig, TokenLoss, eaft_linear_loss
from nemo_eaft.loss import products
from nemo_eaft.loss.linear import output_layer_loss
from tests.harness import run_threads
from tests.loss.formulas import expected

VOCAB, PADDED, WIDTH = 37, 40, 12


def problem(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (8, 3)) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(*shape, WIDTH).to(dtype)
    weight = torch.randn(PADDED, WIDTH).to(dtype)
    labels = torch.randint(0, VOCAB, shape)
    labels[0] = -100
    return hidden, weight, labels, torch.randn(shape)


def cut(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """Pieces of logits of so many tokens in forward, and by so many columns in backward."""
    monkeypatch.setattr(products, "_CPU_PIECE_BYTES", 0)
    monkeypatch.setattr(products, "_CPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(products, "_LEAST_ROWS", rows)
    monkeypatch.setattr(products, "_LEAST_COLUMNS", columns)


def by_hand(hidden: Tensor, weight: Tensor, labels: Tensor, config: EAFTConfig, upstream: Tensor) -> Any:
    """Expected values, and the gradients of hidden and weight, in float64."""
    h, w = hidden.double().flatten(0, -2), weight.double()
    want = expected((h @ w.t()).view(*labels.shape, -1), labels, config, VOCAB, upstream=upstream)
    grad = want.gradient.flatten(0, -2)
    return want, (grad @ w).view(hidden.shape), grad.t() @ h


def run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    config: EAFTConfig,
    upstream: Tensor,
    world_size: int,
    sequence_parallel: bool = False,
) -> list[tuple[TokenLoss, Tensor, Tensor]]:
    """Per rank: values, the gradient of its hidden states, the gradient of its rows."""

    def rank_loss(rank: int) -> tuple[TokenLoss, Tensor, Tensor]:
        h = (hidden.chunk(world_size)[rank] if sequence_parallel else hidden).clone().requires_grad_()
        w = weight.chunk(world_size)[rank].clone().requires_grad_()
        out = eaft_linear_loss(
            h,
            w,
            labels,
            config,
            vocab_size=VOCAB,
            group=dist.group.WORLD if world_size > 1 else None,
            sequence_parallel=sequence_parallel,
        )
        out.loss.backward(upstream.to(out.loss.dtype))
        assert h.grad is not None
        assert w.grad is not None
        return TokenLoss(*(value.detach() for value in out)), h.grad, w.grad

    return [rank_loss(0)] if world_size == 1 else run_threads(rank_loss, world_size)


def adapter_loss(hidden: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any) -> TokenLoss:
    arguments: dict[str, Any] = {"vocab_size": VOCAB, "group": None, "loss_mask": None, "sequence_parallel": False}
    return output_layer_loss(hidden, weight, labels, EAFTConfig(), **(arguments | kwargs))
