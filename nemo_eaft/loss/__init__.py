"""The loss: ``eaft_loss`` on logits, ``eaft_linear_loss`` on hidden states and the output weight.

CUDA tensors go through Triton kernels, others through PyTorch; ``backend.py`` says how to force one.
"""

import warnings

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_eaft.config import EAFTConfig
from nemo_eaft.loss import checks
from nemo_eaft.loss.backend import VARIABLE, backend_name, passes
from nemo_eaft.loss.linear import eaft_linear_loss
from nemo_eaft.loss.reference import reference_loss
from nemo_eaft.loss.token_loss import TokenLoss
from nemo_eaft.loss.vocab_parallel import vocab_parallel_loss

__all__ = ["TokenLoss", "eaft_linear_loss", "eaft_loss"]


@torch.compiler.disable(reason="the EAFT loss is its own autograd function with its own kernels")
def eaft_loss(
    logits: Tensor,
    labels: Tensor,
    config: EAFTConfig,
    *,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    loss_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> TokenLoss:
    """The entropy-adaptive loss of every token (arXiv 2601.02151), exact at any tensor-parallel size.

    With more than one rank: one all-gather in forward, whatever the values, and no collective in backward. A
    token does not count, and gets loss and gradient exactly 0 whatever its logits, when its label is
    ``config.ignore_index`` or its ``loss_mask`` is 0. Sum the loss over the whole global batch and divide
    once by its number of tokens that count.

    Args:
        logits: [..., V_local] float32, bfloat16, float16 or float64, this rank's shard: columns
            [rank * V_local, (rank + 1) * V_local) of the padded vocabulary. Any strides. Never written to
            unless ``inplace_backward``. Columns from ``vocab_size`` on are padding: they take no part and get
            gradient 0.
        labels: [...] int64 global token ids in [0, V) or ``config.ignore_index``, the same on every rank.
        config: gate and entropy settings.
        vocab_size: the true vocabulary size V. Required when the group has more than one rank; else V_local.
        group: the tensor-parallel ranks, or None for one process.
        loss_mask: [...] of any number or bool dtype, the same on every rank; 0 leaves a token out, anything
            else counts it. Weighing by other values is the caller's, on ``loss``. None: only ``ignore_index``
            decides.
        inplace_backward: write the gradient over the logits and so save their size in memory. Then nothing
            else may need the logits after this loss; autograd raises where something saved them. Backward
            runs once.

    Returns:
        ``TokenLoss``: [...] float32 (float64 for float64 logits), replicated. The gradient with respect to
        ``logits`` is ``upstream * weight * (softmax - onehot)`` over this rank's columns, rounded once to the
        logits' dtype. Backward with
        ``create_graph=True`` raises ``RuntimeError``.

    Under ``torch.compile`` the loss runs as it is, between two compiled graphs; ``fullgraph=True`` is refused by torch.

    Raises:
        ValueError: a wrong shape, dtype, device or vocabulary size; logits that are already gathered; a label
            out of range (on a GPU a device-side assertion); ``inplace_backward`` where it is unsafe.
    """
    checks.check_config(config)
    checks.check_floating("logits", logits, 1)
    name = backend_name(logits.device)
    shard = checks.check_shard(logits.shape[-1], vocab_size, group)
    labels, valid = checks.check_labels(labels, loss_mask, config, shard.vocab_size, logits.shape[:-1], logits.device)
    if inplace_backward:
        checks.check_overwritable(logits)
    if name == "reference":
        checks.check_reference(group)
        if inplace_backward:
            # At this line, whoever calls: Python shows a warning once for each line.
            warnings.warn(f"inplace_backward=True has no effect with {VARIABLE}=reference", stacklevel=1)
        return reference_loss(logits, labels, valid, config, shard.vocab_size)
    with torch.autocast(logits.device.type, enabled=False):
        return vocab_parallel_loss(logits, labels, valid, config, shard, group, inplace_backward, passes(name))
