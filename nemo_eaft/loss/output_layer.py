"""The two passes of output layer and loss in one.

Logits exist for one piece at a time: whole rows of some tokens in forward, some columns of all tokens in backward,
which computes them a second time. That is one matrix product more, and no memory of the size of the vocabulary per
token. By columns, each row of the weight's gradient is finished at once: summed in float32 and rounded once, without
a float32 copy of the whole.

Legend:
    hidden   [..., D], replicated; under sequence parallelism this rank's part [S / ranks, ..., D]
    tokens   [tokens, D], the hidden states of the whole sequence
    weight   [V_local, D], this rank's rows of the output layer
    target   [tokens] int32, the label's column in this shard, or ``shard.ELSEWHERE`` or ``shard.IGNORED``
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_eaft.config import EAFTConfig
from nemo_eaft.loss.backend import Backend
from nemo_eaft.loss.collectives import (
    all_gather_records,
    gather_sequence,
    group_size,
    reduce_scatter_sequence,
    sum_over_group,
)
from nemo_eaft.loss.gradient import coefficients, refuse_second_derivative
from nemo_eaft.loss.output_weight import WeightGradient
from nemo_eaft.loss.products import (
    add_product,
    piece_buffer,
    product_in,
    token_chunks,
    vocabulary_tiles,
    wide_dtype,
)
from nemo_eaft.loss.records import merge_records
from nemo_eaft.loss.shard import ELSEWHERE, IGNORED, Shard
from nemo_eaft.loss.vocab_parallel import weigh


class LinearJob(NamedTuple):
    """What forward and backward of one loss need besides tensors."""

    config: EAFTConfig
    shard: Shard
    group: ProcessGroup | None
    sequence_parallel: bool
    backend: Backend

    main_grad_of: Tensor | None
    """The parameter into whose ``main_grad`` its gradient goes; None: autograd gets it."""

    @property
    def top_k(self) -> int | None:
        """K of this vocabulary."""
        return self.config.effective_top_k(self.shard.vocab_size)


class LinearLoss(torch.autograd.Function):
    """Saves hidden, weight and 16 bytes a token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, job: LinearJob) -> tuple[Tensor, ...]:
        tokens = token_matrix(hidden, job)
        chunks = token_chunks(len(tokens), len(weight), weight)
        buffer = piece_buffer(chunks[0].stop * len(weight), weight)
        parts = [
            job.backend.local_records(product_in(buffer, tokens[rows], weight.t()), target[rows], job.shard, job.top_k)
            for rows in chunks
        ]
        del buffer
        statistics = merge_records(all_gather_records(torch.cat(parts), job.group), job.top_k)
        out = weigh(statistics, target, job.config, job.shard.vocab_size)
        ctx.save_for_backward(hidden, weight, target, statistics.maximum, statistics.log_sum, out.weight)
        ctx.job = job
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if grad_loss is None:
            return (None,) * 4
        job: LinearJob = ctx.job
        hidden, weight, target, maximum, log_sum, token_weight = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        tokens = token_matrix(hidden, job)
        rows = _Rows(target, maximum, log_sum, coefficients(token_weight, grad_loss, target))
        wide = wide_dtype(tokens.dtype)
        grad_tokens = torch.zeros(tokens.shape, dtype=wide, device=tokens.device) if wants_hidden else None
        grad_weight = WeightGradient(weight, job.main_grad_of) if wants_weight else None
        _add_gradients(grad_tokens, grad_weight, tokens, weight, rows, job)
        return (
            None if grad_tokens is None else _reduce_hidden(grad_tokens.to(hidden.dtype), hidden.shape, job),
            None if grad_weight is None else grad_weight.for_autograd(),
            None,
            None,
        )


class _Rows(NamedTuple):
    """What a gradient needs of each token, [tokens] each; arguments of ``Backend.write_gradient``."""

    target: Tensor
    maximum: Tensor
    log_sum: Tensor
    coefficient: Tensor


def _add_gradients(
    grad_tokens: Tensor | None,
    grad_weight: WeightGradient | None,
    tokens: Tensor,
    weight: Tensor,
    rows: _Rows,
    job: LinearJob,
) -> None:
    """Add this shard's part to the gradients of [tokens, D] hidden states and of the weight, where there are such.

    One tile of logits after the other; each is computed again, and its gradient takes its place.
    """
    shard = job.shard
    column_tiles, token_tiles = vocabulary_tiles(len(tokens), shard.columns, weight)
    if grad_weight is not None:
        tokens = without_ignored(tokens, rows.target)
        grad_weight.leave_empty(slice(shard.columns, None))
    width = column_tiles[0].stop if column_tiles else 0
    buffer = piece_buffer(token_tiles[0].stop * width, weight)
    for columns in column_tiles:
        part = Shard(shard.first + columns.start, columns.stop - columns.start, shard.vocab_size)
        target = _targets_in(rows.target, columns)
        total, fresh = grad_weight.begin(columns, len(token_tiles)) if grad_weight is not None else (None, True)
        for some in token_tiles:
            piece = product_in(buffer, tokens[some], weight[columns].t())
            job.backend.write_gradient(
                piece, piece, target[some], part, rows.maximum[some], rows.log_sum[some], rows.coefficient[some]
            )
            if grad_tokens is not None:
                add_product(grad_tokens[some], piece, weight[columns], fresh=False)
            if total is not None:
                add_product(total, piece.t(), tokens[some], fresh=fresh)
                fresh = False
            del piece  # before the next one is made
        if grad_weight is not None and total is not None:
            grad_weight.end(columns, total)


def without_ignored(tokens: Tensor, target: Tensor) -> Tensor:
    """[tokens, D] with 0 where a token does not count: 0 * NaN in the weight's gradient would be NaN."""
    ignored = target == IGNORED
    if tokens.device.type == "cpu" and not ignored.any():
        return tokens
    return torch.where(ignored.unsqueeze(-1), 0.0, tokens)


def _targets_in(target: Tensor, columns: slice) -> Tensor:
    """Local targets of a range of the shard's columns."""
    inside = (target >= columns.start) & (target < columns.stop)
    return torch.where(inside, target - columns.start, target.clamp(max=ELSEWHERE))


def token_matrix(hidden: Tensor, job: LinearJob) -> Tensor:
    """[tokens, D] of the whole sequence."""
    whole = gather_sequence(hidden.detach(), job.group) if job.sequence_parallel else hidden.detach()
    return whole.reshape(whole.shape[:-1].numel(), whole.shape[-1])


def _reduce_hidden(grad_tokens: Tensor, shape: torch.Size, job: LinearJob) -> Tensor:
    """The gradient of this rank's ``hidden``: the ranks' parts added, as each saw only its own columns."""
    if not job.sequence_parallel:
        return sum_over_group(grad_tokens, job.group).view(shape)
    whole = grad_tokens.view(shape[0] * group_size(job.group), *shape[1:])
    return reduce_scatter_sequence(whole, job.group)
