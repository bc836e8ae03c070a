"""The exact K largest values of each row, from the maxima of contiguous blocks.

Keep the maximum of each block of columns, take the K blocks with the largest maxima, and look only there.
This is exact. Let t be the smallest of the K chosen maxima. Every other block has a maximum of at most t, so
every value outside the chosen blocks is at most t; and the chosen blocks hold at least K values of at least
t, namely their maxima. So no outside value can exceed any of the K largest inside: the values are those of a
full ``torch.topk``. (With ties at t the columns could differ; entropy depends on values only.) The columns
left over when the width is no multiple of the block are always searched. NaN counts as the largest value, as
in ``torch.topk``.
"""

import torch
from torch import Tensor

# Below this width one torch.topk is as fast on a CPU as the two smaller ones.
_DIRECT_WIDTH = 16384
# sqrt(2 * width / K) minimises maxima plus candidates: about 123 for a whole vocabulary, 44 for an eighth of
# one.
_BLOCK = 64
_WIDE_BLOCK = 128
_WIDE = 60000


def top_values(rows: Tensor, k: int) -> Tensor:
    """The K largest values of each row.

    Args:
        rows: [n, width] float, any dtype; not written to.
        k: how many, at least 1.

    Returns:
        [n, k] of the same dtype, in descending order, NaN first; a row shorter than K is filled up with -Inf.
    """
    width = rows.shape[-1]
    if width < k:
        values = rows.sort(dim=-1, descending=True).values
        return torch.nn.functional.pad(values, (0, k - width), value=float("-inf"))
    if width < _DIRECT_WIDTH:
        return rows.topk(k, dim=-1).values
    return block_top_values(rows, k, block_columns(width))


def block_columns(width: int) -> int:
    """Columns of which one maximum is kept, for rows of this width."""
    return _WIDE_BLOCK if width >= _WIDE else _BLOCK


def block_top_values(rows: Tensor, k: int, block: int) -> Tensor:
    """``rows.topk(k).values`` by the maxima of blocks of ``block`` columns; needs ``k <= width``."""
    width = rows.shape[-1]
    whole = width // block
    if whole <= k:
        return rows.topk(k, dim=-1).values
    blocks = rows[:, : whole * block].unflatten(-1, (whole, block))
    chosen = blocks.amax(dim=-1).topk(k, dim=-1, sorted=False).indices
    row = torch.arange(len(rows), device=rows.device).unsqueeze(-1)
    candidates = blocks[row, chosen].flatten(1)
    rest = rows[:, whole * block :]
    return torch.cat((candidates, rest), dim=-1).topk(k, dim=-1).values
