"""Output layer and loss with the gradients made in forward: three matrix products instead of four.

Only where the upstream gradient will be one number for every token that counts, and with one rank. Forward computes
both gradients for the number 1, chunk by chunk while the logits are there; backward multiplies them. In exchange
tokens x D and V x D numbers in float32 live from forward to backward. On a CPU bfloat16 and float16 factors are
converted for each product, the whole weight among them.
"""

from typing import Any

import torch
from torch import Tensor

from nemo_eaft.loss.gradient import coefficients, refuse_second_derivative
from nemo_eaft.loss.output_layer import LinearJob, token_matrix, without_ignored
from nemo_eaft.loss.output_weight import WeightGradient
from nemo_eaft.loss.products import add_product, piece_buffer, product_in, token_chunks, wide_dtype
from nemo_eaft.loss.records import merge_records
from nemo_eaft.loss.shard import IGNORED
from nemo_eaft.loss.token_loss import TokenLoss
from nemo_eaft.loss.vocab_parallel import weigh


class LinearLossOnce(torch.autograd.Function):
    """Saves both gradients in float32 (float64 for float64 hidden states), and no logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, job: LinearJob) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        tokens, wide = token_matrix(hidden, job), wide_dtype(hidden.dtype)
        grad_tokens = tokens.new_empty(tokens.shape, dtype=wide) if wants_hidden else None
        grad_weight = weight.new_zeros(weight.shape, dtype=wide) if wants_weight else None
        counted = without_ignored(tokens, target) if wants_weight else tokens
        chunks = token_chunks(len(tokens), len(weight), weight)
        buffer = piece_buffer(chunks[0].stop * len(weight), weight)
        real = job.shard.columns
        parts = []
        for rows in chunks:
            logits = product_in(buffer, tokens[rows], weight.t())
            records = job.backend.local_records(logits, target[rows], job.shard, job.top_k)
            statistics = merge_records(records.unsqueeze(0), job.top_k)
            out = weigh(statistics, target[rows], job.config, job.shard.vocab_size)
            parts.append(out)
            unit = coefficients(out.weight, torch.ones_like(out.weight), target[rows])
            job.backend.write_gradient(
                logits, logits, target[rows], job.shard, statistics.maximum, statistics.log_sum, unit
            )
            if grad_tokens is not None:
                # Real columns only: 0 * NaN in a padding row of the weight would be NaN.
                add_product(grad_tokens[rows], logits[:, :real], weight[:real], fresh=True)
            if grad_weight is not None:
                add_product(grad_weight[:real], logits[:, :real].t(), counted[rows], fresh=False)
            del logits  # before the next ones are made
        ctx.save_for_backward(weight, target, grad_tokens, grad_weight)
        ctx.job, ctx.shape, ctx.dtype = job, hidden.shape, hidden.dtype
        ctx.set_materialize_grads(False)
        whole = TokenLoss(*(torch.cat(values) for values in zip(*parts, strict=True)))
        ctx.mark_non_differentiable(*whole[1:])
        return tuple(whole)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if grad_loss is None:
            return (None,) * 4
        weight, target, grad_tokens, grad_weight = ctx.saved_tensors
        number = _the_number(grad_loss.flatten(), target != IGNORED)
        grad_hidden = None
        if grad_tokens is not None:
            grad_hidden = (grad_tokens * number).to(ctx.dtype).view(ctx.shape)
        total = None
        if grad_weight is not None:
            total = WeightGradient(weight, ctx.job.main_grad_of)
            total.add_scaled(grad_weight, number)
        return grad_hidden, None if total is None else total.for_autograd(), None, None


def _the_number(grad_loss: Tensor, counted: Tensor) -> Tensor:
    """The gradient that all counted tokens share, a scalar on the device; 0 where there is none.

    Raises:
        RuntimeError: they differ (on a GPU a device-side assertion).
    """
    if grad_loss.numel() == 0:
        return grad_loss.new_zeros(())
    largest = torch.where(counted, grad_loss, float("-inf")).amax()
    least = torch.where(counted, grad_loss, float("inf")).amin()
    anything = counted.any()
    message = "scaled_mask_upstream: the gradient of the loss is not one number times the loss mask"
    if grad_loss.device.type == "cpu":
        if anything and not largest == least:
            raise RuntimeError(f"{message}: from {least.item()} to {largest.item()}")
    else:
        torch._assert_async((largest == least) | ~anything, message)
    return torch.where(anything, largest, 0.0)
