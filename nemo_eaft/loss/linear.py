"""The output layer and the loss in one, for when [tokens, V_local] logits are too large to hold.

Legend:
    hidden   [..., D], replicated; under sequence parallelism this rank's part [S / ranks, ..., D]
    weight   [V_local, D], this rank's rows of the output layer
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_eaft.config import EAFTConfig
from nemo_eaft.loss import checks
from nemo_eaft.loss.backend import backend_name, passes
from nemo_eaft.loss.collectives import group_size
from nemo_eaft.loss.output_layer import LinearJob, LinearLoss
from nemo_eaft.loss.output_layer_once import LinearLossOnce
from nemo_eaft.loss.reference import reference_loss
from nemo_eaft.loss.token_loss import TokenLoss


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

    Memory beyond inputs and gradients: one piece of logits (at most 40 MiB in float32 on a CPU, 128 MiB on a GPU)
    and a few numbers per token; in backward also ``hidden``'s gradient in float32 where its dtype is narrower, and a
    copy of ``hidden`` where tokens are ignored. On a CPU besides: scratch of 5 MiB, or of one row a thread where that
    is more, and then 8 MiB for a product in float32; for bfloat16 and float16 also float32 copies of ``hidden`` and of
    a tile of the weight.

    Args:
        hidden: [..., D] float, the same on every rank. Under ``sequence_parallel`` the equal part of
            dimension 0 that this rank holds, in rank order: [S / ranks, ..., D].
        weight: [V_local, D] of the same dtype, this rank's rows of the padded output layer.
        labels: [...] int64, the same on every rank; of the whole sequence even where ``hidden`` is a part.
        sequence_parallel: ``hidden`` is split over the group along dimension 0.

    Returns:
        ``TokenLoss`` with the shape of ``labels``, replicated. The gradient of ``hidden`` is complete (summed
        over the group, in ``hidden``'s dtype), that of ``weight`` is of this rank's rows, accumulated in
        float32. Backward with ``create_graph=True`` raises ``RuntimeError``.

    Raises:
        ValueError: as ``eaft_loss``; ``hidden`` and ``weight`` that do not fit together.
    """
    return output_layer_loss(
        hidden,
        weight,
        labels,
        config,
        vocab_size=vocab_size,
        group=group,
        loss_mask=loss_mask,
        sequence_parallel=sequence_parallel,
    )


@torch.compiler.disable(reason="the EAFT loss is its own autograd function with its own kernels")
def output_layer_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    config: EAFTConfig,
    *,
    vocab_size: int | None,
    group: ProcessGroup | None,
    loss_mask: Tensor | None,
    sequence_parallel: bool,
    into_main_grad: bool = False,
    scaled_mask_upstream: bool = False,
) -> TokenLoss:
    """``eaft_linear_loss`` with what only an adapter to Megatron can promise.

    Args:
        into_main_grad: backward adds the weight's gradient to ``weight.main_grad`` [V_local, D], in that tensor's
            dtype, sets ``weight.grad_added_to_main_grad``, and gives autograd zeros (megatron-core 0.15.3,
            tensor_parallel/layers.py, which leaves those uninitialised where the weight is used once). DDP's hook
            (distributed/distributed_data_parallel.py) drops them, or adds them along with the embedding's gradient
            where ``zero_out_wgrad`` marks a tied weight.
        scaled_mask_upstream: the gradient of every counted token's loss will be one and the same number. Forward then
            computes the gradients for the number 1 and backward multiplies: a matrix product less, but ``hidden``'s
            gradient and V_local x D float32 numbers are held from forward to backward, so that it suits one
            micro-batch in flight. One rank only, as a chunk's gradient needs the statistics of all shards, and that
            would be a collective for each chunk. A gradient that is not so raises ``RuntimeError`` on a CPU and is a
            device-side assertion on a GPU.

    Raises:
        ValueError: as ``eaft_linear_loss``; ``scaled_mask_upstream`` with more than one rank.
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
    if scaled_mask_upstream and group_size(group) > 1:
        raise ValueError(
            f"scaled_mask_upstream must be False with more than one rank, got True with {group_size(group)} ranks"
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
        job = LinearJob(config, shard, group, sequence_parallel, passes(name), weight if into_main_grad else None)
        # Without gradients there is nothing to compute early.
        function = LinearLossOnce if scaled_mask_upstream and torch.is_grad_enabled() else LinearLoss
        out = function.apply(hidden, weight, target, job)
    return TokenLoss(*(value.view(shape) for value in out))
