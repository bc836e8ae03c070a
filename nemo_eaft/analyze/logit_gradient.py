"""How hard a token pushes, and what the model itself would have said, from one shard of the logits a rank.

Legend:
    logits   [tokens, V_local] any float, this rank's shard of the vocabulary
    labels   [tokens] int64 global ids
What is returned is identical on every rank of the group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_eaft.loss.collectives import all_gather_records, group_rank
from nemo_eaft.loss.shard import Shard

_BLOCK = 1 << 22
"""Logits that are copied to float32 at a time."""


class LogitGradient(NamedTuple):
    """Of each token."""

    norm: Tensor
    """[tokens] float64: norm of the gradient of the plain cross-entropy with respect to the logits of the true
    vocabulary, ``|softmax(z) - onehot(y)|``, 0 to sqrt 2."""
    top: Tensor
    """[tokens] int64: the most likely token."""
    top_probability: Tensor
    """[tokens] float64: its probability."""


@torch.no_grad()
def logit_gradient(logits: Tensor, labels: Tensor, vocab_size: int, group: ProcessGroup | None) -> LogitGradient:
    """One all-gather over `group` (tensor parallel), whatever the values; none with one rank.

    Written without 1 - p: ``(sum of the others' p) ** 2 + sum of the others' p ** 2``, so that the norm of a token
    that the model is sure of keeps its digits.
    """
    width = logits.shape[1]
    shard = Shard.of_rank(group_rank(group), width, vocab_size)
    records = torch.empty(len(labels), 5, dtype=torch.float64, device=logits.device)
    rows = max(1, _BLOCK // max(width, 1))
    for start in range(0, len(labels), rows):
        records[start : start + rows] = _local(logits[start : start + rows], labels[start : start + rows], shard)
    return _merge(all_gather_records(records, group))


def _local(logits: Tensor, labels: Tensor, shard: Shard) -> Tensor:
    """[rows, 5] float64: largest logit, sum of exp and of its square over all but the label (both relative to the
    largest), logit of the label (-inf elsewhere), global id of the largest."""
    if shard.columns == 0:
        empty = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf, 0.0], dtype=torch.float64, device=logits.device)
        return empty.expand(len(labels), 5)
    # A copy: the label's column is taken out of it.
    others = logits[:, : shard.columns].to(torch.float32, copy=True)
    largest, place = others.max(dim=1)
    target = shard.local_targets(labels, torch.ones_like(labels, dtype=torch.bool)).long()[:, None]
    held = target >= 0
    label = torch.where(held, others.gather(1, target.clamp(min=0)), -torch.inf)
    others.scatter_(1, target.clamp(min=0), torch.where(held, -torch.inf, others.gather(1, target.clamp(min=0))))
    others.sub_(largest[:, None]).exp_()
    total = others.sum(dim=1, dtype=torch.float64)
    squares = others.square_().sum(dim=1, dtype=torch.float64)
    return torch.stack((largest.double(), total, squares, label[:, 0].double(), (place + shard.first).double()), dim=1)


def _merge(records: Tensor) -> LogitGradient:
    """records: [ranks, tokens, 5]."""
    largest, totals, squares, labels, places = records.unbind(dim=2)
    highest = largest.amax(dim=0)
    scale = torch.exp(largest - highest)
    others = (totals * scale).sum(dim=0)
    label = torch.exp(labels.amax(dim=0) - highest)
    whole = others + label
    norm = torch.sqrt(others**2 + (squares * scale**2).sum(dim=0)) / whole
    top = places.gather(0, largest.argmax(dim=0, keepdim=True))[0]
    return LogitGradient(norm, top.long(), 1.0 / whole)
