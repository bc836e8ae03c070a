"""Checks of the arguments of the loss: everything a caller can get wrong, named with its value and range."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_eaft.config import EAFTConfig
from nemo_eaft.loss.collectives import group_rank, group_size
from nemo_eaft.loss.shard import Shard

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_config(config: object) -> None:
    if not isinstance(config, EAFTConfig):
        raise ValueError(f"config must be an EAFTConfig, got {type(config).__name__}")


def check_floating(name: str, tensor: object, least_dim: int) -> None:
    """A float tensor of at least ``least_dim`` dimensions."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name}.dtype must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.dim() < least_dim:
        raise ValueError(f"{name} must have at least {least_dim} dimensions, got shape {tuple(tensor.shape)}")


def check_tokens(name: str, tensor: object, shape: torch.Size, device: torch.device) -> None:
    """A per-token tensor with the shape and device of the tokens."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape of the tokens, {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the logits, got {tensor.device}")


def check_shard(vp_width: int, vocab_size: object, group: ProcessGroup | None) -> Shard:
    """This rank's part of the vocabulary, from the local width, the true vocabulary size and the group."""
    world = group_size(group)
    if vocab_size is None:
        if world > 1:
            raise ValueError(
                f"vocab_size is required when the group has more than one rank, got None with {world} ranks: "
                f"the local size {vp_width} does not tell how many columns are padding"
            )
        vocab_size = vp_width
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 2:
        raise ValueError(f"vocab_size must be an integer of at least 2, got {vocab_size!r}")
    if world > 1 and vp_width >= vocab_size:
        raise ValueError(
            f"logits must be this rank's shard of the vocabulary: local size {vp_width} already covers "
            f"vocab_size {vocab_size}, with a world size of {world}; pass group=None for gathered logits"
        )
    if vp_width * world < vocab_size:
        raise ValueError(
            f"vocab_size must be at most local size x world size = {vp_width} x {world} = {vp_width * world}"
            f", got {vocab_size}"
        )
    return Shard.of_rank(group_rank(group), vp_width, vocab_size)


def check_labels(
    labels: object,
    loss_mask: object,
    config: EAFTConfig,
    vocab_size: int,
    shape: torch.Size,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The labels, and which tokens count: [...] bool, True where the label is not ignored and the mask not 0.

    A label outside [0, V) at a token that counts raises ``ValueError`` on a CPU. On a GPU it is a device-side
    assertion, so that the check never makes the host wait; the error then appears at the next
    synchronisation. Every rank of the group has the same labels, so every rank fails alike and none waits in
    a collective.
    """
    check_tokens("labels", labels, shape, device)
    assert isinstance(labels, Tensor)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels.dtype must be int64, got {labels.dtype}")
    valid = labels != config.ignore_index
    if loss_mask is not None:
        check_tokens("loss_mask", loss_mask, shape, device)
        assert isinstance(loss_mask, Tensor)
        valid = valid & (loss_mask != 0)
    wrong = valid & ((labels < 0) | (labels >= vocab_size))
    if device.type == "cpu":
        if wrong.any():
            raise ValueError(
                f"labels must be in [0, vocab_size={vocab_size}) or ignore_index={config.ignore_index} where "
                f"the loss mask is not 0, got {labels[wrong][0].item()} at {int(wrong.sum())} of "
                f"{wrong.numel()} tokens"
            )
    else:
        torch._assert_async(~wrong.any(), f"labels must be in [0, vocab_size={vocab_size}) or ignore_index")
    return labels, valid


def check_reference(group: ProcessGroup | None) -> None:
    """The reference needs whole rows."""
    if group_size(group) > 1:
        raise ValueError(
            f"NEMO_EAFT_BACKEND must be 'torch' or 'triton' with more than one rank, got 'reference' with "
            f"{group_size(group)} ranks: the reference needs whole rows"
        )


def check_overwritable(logits: Tensor) -> None:
    """Refuse ``inplace_backward`` where writing the gradient over the logits would corrupt something."""
    if not logits.requires_grad:
        return
    base = logits._base
    if any(t is not None and t.requires_grad and (t.is_leaf or t.retains_grad) for t in (logits, base)):
        raise ValueError(
            "inplace_backward must be False for a leaf tensor, one that retains its gradient, or a view of such: its "
            ".grad would be its own overwritten storage"
        )
    if _may_overlap(logits):
        raise ValueError(
            f"inplace_backward must be False where elements share memory, got shape {tuple(logits.shape)} "
            f"with strides {logits.stride()}"
        )


def _may_overlap(tensor: Tensor) -> bool:
    """Whether two elements could share memory: sorted by stride, each must step over all the smaller ones."""
    reach = 0
    dimensions = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in dimensions:
        if size == 1:
            continue
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
