"""The output layer and the loss in one, for when [tokens, V_local] logits are too large to hold.

Logits exist for one chunk of tokens at a time, in forward and again in backward: one matrix product more, and
no memory of the size of the vocabulary per token.

Legend:
    hidden   [..., D], replicated; under sequence parallelism this rank's part [S / ranks, ..., D]
    weight   [V_local, D], this rank's rows of the output layer
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_eaft.config import EAFTConfig
from nemo_eaft.loss import checks
from nemo_eaft.loss.backend import Backend, backend_name, passes
from nemo_eaft.loss.collectives import (
    all_gather_records,
    gather_sequence,
    group_size,
    reduce_scatter_sequence,
    sum_over_group,
)
from nemo_eaft.loss.gradient import coefficients, refuse_second_derivative
from nemo_eaft.loss.records import merge_records
from nemo_eaft.loss.reference import reference_loss
from nemo_eaft.loss.shard import IGNORED, Shard
from nemo_eaft.loss.token_loss import TokenLoss
from nemo_eaft.loss.vocab_parallel import weigh

# Logits of a chunk: large enough for an efficient matrix product, small beside the weight of any real model.
_CHUNK_BYTES = 64 << 20
_LEAST_CHUNK = 32


def eaft_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    config: EAFTConfig,
    *,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    loss_mask: Tensor | None = None,
    sequence_parallel: bool = False,
) -> TokenLoss:
    """``eaft_loss(hidden @ weight.T, ...)`` without holding the logits; shared arguments mean the same.

    Collectives over ``group``, whatever the values: forward one all-gather of records, and under
    ``sequence_parallel`` one of ``hidden`` before it; backward one sum of the hidden gradient (reduce-scatter
    under ``sequence_parallel``, after a second all-gather of ``hidden``). With one rank none.

    Args:
        hidden: [..., D] float, the same on every rank. Under ``sequence_parallel`` the equal part of
            dimension 0 that this rank holds, in rank order: [S / ranks, ..., D].
        weight: [V_local, D] of the same dtype, this rank's rows of the padded output layer.
        labels: [...] int64, the same on every rank; of the whole sequence even where ``hidden`` is a part.
        sequence_parallel: ``hidden`` is split over the group along dimension 0.

    Returns:
        ``TokenLoss`` with the shape of ``labels``, replicated. The gradient of ``hidden`` is complete (summed
        over the group, in ``hidden``'s dtype), that of ``weight`` is of this rank's rows, accumulated in
        float32.

    Raises:
        ValueError: as ``eaft_loss``; ``hidden`` and ``weight`` that do not fit together.
    """
    checks.check_config(config)
    checks.check_floating("hidden", hidden, 2 if sequence_parallel else 1)
    checks.check_floating("weight", weight, 2)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [V_local, {hidden.shape[-1]}] to fit hidden, got {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"weight must have hidden's dtype and device, {hidden.dtype} on {hidden.device}, got "
            f"{weight.dtype} on {weight.device}"
        )
    shard = checks.check_shard(weight.shape[0], vocab_size, group)
    shape = hidden.shape[:-1]
    if sequence_parallel:
        shape = torch.Size((shape[0] * group_size(group), *shape[1:]))
    labels, valid = checks.check_labels(labels, loss_mask, config, shard.vocab_size, shape, hidden.device)
    name = backend_name(hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        if name == "reference":
            checks.check_reference(group)
            return reference_loss(hidden @ weight.t(), labels, valid, config, shard.vocab_size)
        target = shard.local_targets(labels, valid).flatten()
        out = _LinearLoss.apply(hidden, weight, target, config, shard, group, sequence_parallel, passes(name))
    return TokenLoss(*(value.view(shape) for value in out))


class _LinearLoss(torch.autograd.Function):
    """Saves hidden, weight and 16 bytes a token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        config: EAFTConfig,
        shard: Shard,
        group: ProcessGroup | None,
        sequence_parallel: bool,
        backend: Backend,
    ) -> tuple[Tensor, ...]:
        top_k = config.effective_top_k(shard.vocab_size)
        tokens = _token_matrix(hidden, group, sequence_parallel)
        parts = [
            backend.local_records(_logits(tokens[rows], weight, target[rows]), target[rows], shard, top_k)
            for rows in _chunks(tokens, weight)
        ]
        records = all_gather_records(torch.cat(parts), group)
        statistics = merge_records(records, top_k)
        out = weigh(statistics, target, config, shard.vocab_size)
        ctx.save_for_backward(hidden, weight, target, statistics.maximum, statistics.log_sum, out.weight)
        ctx.shard, ctx.group, ctx.sequence_parallel, ctx.backend = shard, group, sequence_parallel, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if grad_loss is None:
            return (None,) * 8
        hidden, weight, target, maximum, log_sum, token_weight = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        tokens = _token_matrix(hidden, ctx.group, ctx.sequence_parallel)
        coefficient = coefficients(token_weight, grad_loss, target)
        grad_tokens = torch.zeros_like(tokens) if wants_hidden else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
        for rows in _chunks(tokens, weight):
            chunk = _counted(tokens[rows], target[rows])
            logits = chunk @ weight.t()
            # Our own buffer: the gradient may take its place.
            ctx.backend.write_gradient(
                logits, logits, target[rows], ctx.shard, maximum[rows], log_sum[rows], coefficient[rows]
            )
            if grad_tokens is not None:
                grad_tokens[rows] = logits @ weight
            if grad_weight is not None:
                grad_weight += logits.t() @ chunk
        grad_hidden = None
        if grad_tokens is not None:
            reduced = _reduce_hidden(grad_tokens, hidden.shape, ctx.group, ctx.sequence_parallel)
            grad_hidden = reduced.view(hidden.shape)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _token_matrix(hidden: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """[tokens, D] of the whole sequence."""
    whole = gather_sequence(hidden.detach(), group) if sequence_parallel else hidden.detach()
    return whole.reshape(whole.shape[:-1].numel(), whole.shape[-1])


def _reduce_hidden(
    grad_tokens: Tensor, shape: torch.Size, group: ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """Add the ranks' parts: each rank saw only its own columns of the vocabulary."""
    if not sequence_parallel:
        return sum_over_group(grad_tokens, group)
    whole = grad_tokens.view(shape[0] * group_size(group), *shape[1:])
    return reduce_scatter_sequence(whole, group)


def _chunks(tokens: Tensor, weight: Tensor) -> list[slice]:
    """Ranges of tokens whose logits are held at once; one empty range for no tokens."""
    row_bytes = max(weight.shape[0] * weight.element_size(), 1)
    step = max(_CHUNK_BYTES // row_bytes, _LEAST_CHUNK)
    return [slice(start, start + step) for start in range(0, max(len(tokens), 1), step)]


def _counted(tokens: Tensor, target: Tensor) -> Tensor:
    """0 where a token does not count: 0 * NaN in the weight's gradient would be NaN."""
    return torch.where((target != IGNORED).unsqueeze(-1), tokens, 0.0)


def _logits(tokens: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _counted(tokens, target) @ weight.t()
