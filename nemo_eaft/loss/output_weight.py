"""Where the gradient of the output weight goes: to autograd, or into Megatron's ``main_grad``."""

from typing import Any

import torch
from torch import Tensor

from nemo_eaft.loss.products import wide_dtype


class WeightGradient:
    """The gradient of one [V_local, D] weight, written block of rows by block of rows.

    weight: only its shape, dtype and device are used.
    main_grad_of: the parameter whose ``main_grad`` it is added to; None: a new tensor in the weight's dtype.
    """

    def __init__(self, weight: Tensor, main_grad_of: Any) -> None:
        self._weight = weight
        self._parameter = main_grad_of
        self._added = main_grad_of is not None
        self._total: Tensor = main_grad_of.main_grad if self._added else torch.empty_like(weight)

    def begin(self, rows: slice, parts: int) -> tuple[Tensor, bool]:
        """Where the ``parts`` products of these rows are summed, [r, D], and whether it holds nothing yet."""
        block = self._total[rows]
        if parts == 1 or block.dtype == wide_dtype(block.dtype):
            return block, not self._added
        return torch.empty(block.shape, dtype=wide_dtype(block.dtype), device=block.device), True

    def end(self, rows: slice, total: Tensor) -> None:
        """Store the sum of these rows, unless it was made in place."""
        block = self._total[rows]
        if total.data_ptr() == block.data_ptr():
            return
        if self._added:
            block.add_(total)
        else:
            block.copy_(total)

    def add_scaled(self, total: Tensor, factor: Tensor) -> None:
        """Add ``factor * total`` for all rows: [V_local, D], and a scalar on the device; neither is written to."""
        if self._added:
            # In place, and the factor stays on the device.
            self._total.addcmul_(total, factor)
        else:
            torch.mul(total, factor, out=self._total)

    def leave_empty(self, rows: slice) -> None:
        """These rows have no gradient: padding of the vocabulary."""
        if not self._added:
            self._total[rows] = 0

    def for_autograd(self) -> Tensor:
        """[V_local, D] of the weight's dtype: the gradient, or zeros where ``main_grad`` has it."""
        if not self._added:
            return self._total
        self._parameter.grad_added_to_main_grad = True
        return torch.zeros_like(self._weight)
