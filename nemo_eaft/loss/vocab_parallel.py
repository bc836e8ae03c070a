"""The loss over one rank's shard of the vocabulary.

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
from nemo_eaft.loss.backend import Backend
from nemo_eaft.loss.collectives import all_gather_records
from nemo_eaft.loss.gradient import coefficients, refuse_second_derivative
from nemo_eaft.loss.records import RowStatistics, merge_records
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
    backend: Backend,
) -> TokenLoss:
    """The loss of every token from one shard a rank; arguments as checked by ``eaft_loss``."""
    target = shard.local_targets(labels, valid).flatten()
    return TokenLoss(*_VocabParallelLoss.apply(logits, target, config, shard, group, inplace_backward, backend))


def weigh(statistics: RowStatistics, target: Tensor, config: EAFTConfig, vocab_size: int) -> TokenLoss:
    """[tokens] loss, cross-entropy, entropy and weight of merged rows; exactly 0 at ignored tokens."""
    # Rounding may leave a uniform row an ulp above its bound, and its weight above 1. NaN stays NaN.
    entropy = statistics.entropy.clamp(max=config.entropy_bound(vocab_size))
    ratio = entropy / config.entropy_normalizer(vocab_size)
    weight = gate_weight(statistics.cross_entropy, ratio, config)
    values = (weight * statistics.cross_entropy, statistics.cross_entropy, entropy, weight)
    return TokenLoss(*(torch.where(target != IGNORED, value, 0.0) for value in values))


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
        backend: Backend,
    ) -> tuple[Tensor, ...]:
        top_k = config.effective_top_k(shard.vocab_size)
        records = all_gather_records(backend.local_records(logits, target, shard, top_k), group)
        statistics = merge_records(records, top_k)
        out = weigh(statistics, target, config, shard.vocab_size)
        ctx.save_for_backward(logits, target, statistics.maximum, statistics.log_sum, out.weight)
        ctx.shard, ctx.backend = shard, backend
        ctx.inplace_backward, ctx.overwritten = inplace_backward, False
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
            return (None,) * 7
        logits, target, maximum, log_sum, weight = ctx.saved_tensors
        if ctx.inplace_backward:
            ctx.overwritten = True
            grad = logits.detach()
        else:
            grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        coefficient = coefficients(weight, grad_loss, target)
        ctx.backend.write_gradient(grad, logits, target, ctx.shard, maximum, log_sum, coefficient)
        if ctx.inplace_backward:
            # Whoever else saved these logits must get autograd's error, not our gradient.
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None, None, None
