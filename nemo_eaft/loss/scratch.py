"""What forward and backward of the PyTorch path share as they go through blocks of rows."""

import torch
from torch import Tensor

from nemo_eaft.loss.shard import IGNORED


class Scratch:
    """Room for the two [r, columns] tensors that a block of rows needs, kept from one block to the next.

    Fresh memory is slow on a CPU: the system clears every page of it, which costs as much as the arithmetic.
    """

    def __init__(self, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._columns, self._dtype, self._device = columns, dtype, device
        self._tensors: dict[str, Tensor] = {}

    def converted(self, block: Tensor) -> Tensor:
        """``block`` in the statistics' dtype: itself, or a copy that lives until the next call."""
        if block.dtype == self._dtype:
            return block
        return self._room("converted", len(block)).copy_(block)

    def softmax(self, z: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """[r, columns] softmax over a shard, living until the next call, and [r] its largest value.

        Their ratio is e^(z - m). PyTorch's softmax is one fused kernel with a fast exponential, on a CPU twice as
        quick as the steps apart. Its own sum over a long row loses digits; they cancel in the ratio. A row of nothing
        but -Inf gives 0 and 1.
        """
        probability = torch.softmax(z, dim=-1, out=self._room("probability", len(z)))
        peak = probability.amax(dim=-1)
        empty = maximum == float("-inf")
        clear_rows(probability, empty)
        return probability, peak.masked_fill_(empty, 1.0)

    def _room(self, name: str, rows: int) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None or len(tensor) < rows:
            tensor = torch.empty(rows, self._columns, dtype=self._dtype, device=self._device)
            self._tensors[name] = tensor
        return tensor[:rows]


def skippable(target: Tensor) -> bool:
    """Whether a block of rows has no token that counts; only asked where the host need not wait."""
    return target.device.type == "cpu" and bool((target == IGNORED).all())


def clear_rows(values: Tensor, chosen: Tensor) -> None:
    """Set the chosen rows of [r, columns] to 0; ``chosen`` is [r] bool. A pass is saved where the host may look, as a
    look at a GPU would make it wait."""
    if values.device.type != "cpu" or chosen.any():
        values.masked_fill_(chosen.unsqueeze(-1), 0.0)
