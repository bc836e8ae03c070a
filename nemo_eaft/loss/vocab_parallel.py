"""The loss over one rank's shard of the vocabulary, in plain PyTorch.

Forward reads the shard once in row blocks, sends one record per token, and merges the records of all ranks.
Backward recomputes the softmax block by block and needs no collective: its gradient is of this shard's
columns only.

Legend:
    logits   [..., V_local] float32, bfloat16, float16 or float64, this rank's shard
    target   [tokens] int32, the label's column in this shard, or ``shard.ELSEWHERE`` or ``shard.IGNORED``

Everything per token but the target is float32 (float64 for float64 logits) and identical on every rank of the
group.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_eaft.config import EAFTConfig
from nemo_eaft.gates import gate_weight
from nemo_eaft.loss.collectives import all_gather_records
from nemo_eaft.loss.records import (
    RowStatistics,
    local_records,
    merge_records,
    selected,
    skippable,
    statistics_dtype,
)
from nemo_eaft.loss.rows import TokenRows, row_blocks
from nemo_eaft.loss.shard import IGNORED, Shard
from nemo_eaft.loss.token_loss import TokenLoss


def vocab_parallel_loss(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    config: EAFTConfig,
    shard: Shard,
    group: ProcessGroup | None,
    inplace_backward: bool,
) -> TokenLoss:
    """The loss of every token from one shard a rank; arguments as checked by ``eaft_loss``."""
    target = shard.local_targets(labels, valid).flatten()
    return TokenLoss(*_VocabParallelLoss.apply(logits, target, config, shard, group, inplace_backward))


def weigh(statistics: RowStatistics, target: Tensor, config: EAFTConfig, vocab_size: int) -> TokenLoss:
    """[tokens] loss, cross-entropy, entropy and weight of merged rows; exactly 0 at ignored tokens."""
    # Rounding may leave a uniform row an ulp above its bound, and its weight above 1. NaN stays NaN.
    entropy = statistics.entropy.clamp(max=config.entropy_bound(vocab_size))
    ratio = entropy / config.entropy_normalizer(vocab_size)
    weight = gate_weight(statistics.cross_entropy, ratio, config)
    values = (weight * statistics.cross_entropy, statistics.cross_entropy, entropy, weight)
    return TokenLoss(*(torch.where(target != IGNORED, value, 0.0) for value in values))


def gradient_rows(
    block: Tensor, target: Tensor, columns: int, maximum: Tensor, log_sum: Tensor, coefficient: Tensor
) -> Tensor:
    """[r, columns]: ``coefficient * (softmax(z) - onehot(label))`` before rounding, +0 in ignored rows.

    Args:
        block: [r, V_local] logits.
        target, maximum, log_sum: [r], the rows' local targets and merged statistics.
        coefficient: [r], weight times upstream gradient, 0 in rows that do not count.
    """
    z = selected(block, target, columns)
    # z - m first: m + log_sum in one number would lose the digits of log_sum at large offsets.
    z.sub_(maximum.unsqueeze(-1)).sub_(log_sum.unsqueeze(-1)).exp_()
    if columns > 0:
        index = target.clamp(min=0).long().unsqueeze(-1)
        held = (target >= 0).unsqueeze(-1).to(z.dtype)
        z.scatter_(1, index, z.gather(1, index) - held)
    return z.mul_(coefficient.unsqueeze(-1))


def coefficients(weight: Tensor, grad_loss: Tensor, target: Tensor) -> Tensor:
    """[tokens]: weight times upstream gradient; exactly 0 at ignored tokens, whatever comes upstream."""
    return torch.where(target != IGNORED, weight * grad_loss.flatten(), 0.0)


def refuse_second_derivative() -> None:
    """Raise where the gradient itself is to be differentiated.

    ``once_differentiable`` would only do so where the upstream gradient requires grad; otherwise it returns a
    constant, and a gradient penalty would silently be without gradient.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the EAFT loss cannot be differentiated twice: backward needs create_graph=False")


class _VocabParallelLoss(torch.autograd.Function):
    """Saves the logits and 16 bytes a token: maximum, log_sum, weight and target."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        config: EAFTConfig,
        shard: Shard,
        group: ProcessGroup | None,
        inplace_backward: bool,
    ) -> tuple[Tensor, ...]:
        top_k = config.effective_top_k(shard.vocab_size)
        records = all_gather_records(local_records(logits, target, shard, top_k), group)
        statistics = merge_records(records, top_k)
        out = weigh(statistics, target, config, shard.vocab_size)
        ctx.save_for_backward(logits, target, statistics.maximum, statistics.log_sum, out.weight)
        ctx.shard, ctx.inplace_backward, ctx.overwritten = shard, inplace_backward, False
        ctx.set_materialize_grads(False)
        shaped = tuple(value.view(logits.shape[:-1]) for value in out)
        ctx.mark_non_differentiable(*shaped[1:])
        return shaped

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if ctx.overwritten:
            raise RuntimeError(
                "backward ran a second time, but with inplace_backward=True the first run wrote the gradient "
                "over the logits; use inplace_backward=False to keep the graph"
            )
        if grad_loss is None:
            return None, None, None, None, None, None
        logits, target, maximum, log_sum, weight = ctx.saved_tensors
        if ctx.inplace_backward:
            ctx.overwritten = True
            grad = logits.detach()
        else:
            grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        write_gradient(grad, logits, target, ctx.shard, maximum, log_sum, coefficients(weight, grad_loss, target))
        if ctx.inplace_backward:
            # Whoever else saved these logits must get autograd's error, not our gradient.
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None, None


def write_gradient(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    shard: Shard,
    maximum: Tensor,
    log_sum: Tensor,
    coefficient: Tensor,
) -> None:
    """Fill every cell of ``grad``, which may be the logits themselves, rounding once to its dtype."""
    source, sink = TokenRows(logits.detach()), TokenRows(grad)
    itemsize = statistics_dtype(logits.dtype).itemsize
    for start, stop in row_blocks(source.tokens, shard.columns, logits.device, itemsize):
        rows = slice(start, stop)
        if skippable(target[rows]):
            sink.write(start, stop, grad.new_zeros(stop - start, 0))
            continue
        values = gradient_rows(
            source.read(start, stop),
            target[rows],
            shard.columns,
            maximum[rows],
            log_sum[rows],
            coefficient[rows],
        )
        sink.write(start, stop, values)
