"""Reading and writing tokens of a logits tensor a few rows at a time, whatever its strides."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Small enough that a block stays in a CPU's last-level cache between the passes over it, large enough that starting
# the threads for each pass does not count. A GPU instead wants a block that fills it; 64 MiB is small beside any
# model's logits.
_BLOCK_BYTES = {"cpu": 5 << 20}
_DEVICE_BLOCK_BYTES = 64 << 20


def row_blocks(tokens: int, width: int, device: torch.device, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of rows that together hold about a block's bytes, at least one row each."""
    row_bytes = max(width, 1) * itemsize
    step = max(_BLOCK_BYTES.get(device.type, _DEVICE_BLOCK_BYTES) // row_bytes, 1)
    if device.type == "cpu":
        # Softmax gives each thread whole rows, so one row a thread at least.
        threads = torch.get_num_threads()
        step = max(step // threads, 1) * threads
    for start in range(0, tokens, step):
        yield start, min(start + step, tokens)


class TokenRows:
    """A [..., width] tensor seen as [tokens, width], without a copy of the whole for any strides."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.width = tensor.shape[-1]
        self.tokens = tensor.shape[:-1].numel()
        self._flat = _as_matrix(tensor, self.tokens)

    def read(self, start: int, stop: int) -> Tensor:
        """[stop - start, width], a view where the strides allow one, else a copy of these rows."""
        if self._flat is not None:
            return self._flat[start:stop]
        return self._tensor[self._index(start, stop)]

    def direct(self, start: int, stop: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """[stop - start, columns], a view to store values of ``dtype`` in without rounding, the rest of the rows set to
        0; None where there is none."""
        if self._flat is None or self._flat.dtype != dtype:
            return None
        self._flat[start:stop, columns:] = 0
        return self._flat[start:stop, :columns]

    def write(self, start: int, stop: int, values: Tensor) -> None:
        """Store [stop - start, columns] in the first columns, rounding to the tensor's dtype, and 0 in the
        rest."""
        columns = values.shape[-1]
        if self._flat is not None:
            target = self._flat[start:stop]
            target[:, :columns] = values
            target[:, columns:] = 0
            return
        index = self._index(start, stop)
        whole = torch.nn.functional.pad(values, (0, self.width - columns))
        self._tensor[index] = whole.to(self._tensor.dtype)

    def _index(self, start: int, stop: int) -> tuple[Tensor, ...]:
        token = torch.arange(start, stop, device=self._tensor.device)
        return torch.unravel_index(token, self._tensor.shape[:-1])


def _as_matrix(tensor: Tensor, tokens: int) -> Tensor | None:
    try:
        return tensor.view(tokens, tensor.shape[-1])
    except RuntimeError:
        # The leading dimensions cannot be merged, as in a transposed [S, B, V].
        return None
