"""The rows of the data in the order of the file, each once, for NeMo's validation loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from nemo_eaft.data.module import PreparedDataModule, build_module
from nemo_eaft.settings import Settings

PADDING = -1
"""Number of a row that only fills up the last batch."""


class RowsFrom(Dataset[dict[str, Any]]):
    """A NeMo data set from some row on, filled up to whole batches with rows that have no token in the loss.

    NeMo leaves an incomplete batch of a validation out. A batch says which rows it holds (`metadata`: their numbers
    from 0, in the order of the prepared file).

    rows: a NeMo data set without shuffling, with `collate_fn`.
    start: the first row.
    batch: rows of a global batch.
    """

    def __init__(self, rows: Any, start: int, batch: int) -> None:
        self.rows, self.start = rows, start
        self._length = -(-(len(rows) - start) // batch) * batch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> dict[str, Any]:
        number = self.start + int(index)
        known = number < len(self.rows)
        return self.rows[number if known else 0] | {"number": number if known else PADDING}

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """NeMo's batch, with `metadata`."""
        numbers = [item.pop("number") for item in batch]
        collated = self.rows.collate_fn(batch)
        known = torch.tensor([number != PADDING for number in numbers])
        collated["loss_mask"] = collated["loss_mask"] * known[:, None].to(collated["loss_mask"].dtype)
        return collated | {"metadata": [{"row": number} for number in numbers]}


class AnalyzedRows(PreparedDataModule):
    """The training rows of a run, to be validated on."""

    start = 0
    """The first row."""

    def val_dataloader(self) -> Any:
        """NeMo's loader of validation rows, on the training rows."""
        rows = self._create_dataset(self.train_path, is_test=True, **self.dataset_kwargs)
        return self._create_dataloader(RowsFrom(rows, self.start, self.global_batch_size), mode="validation")


def build_rows(settings: Settings, root: Path, tokenizer: Any, start: int) -> AnalyzedRows:
    """As `nemo_eaft.data.module.build_module`, from row `start` on."""
    module = build_module(settings, root, tokenizer, AnalyzedRows)
    assert isinstance(module, AnalyzedRows)
    module.start = start
    return module
