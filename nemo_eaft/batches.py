"""The micro-batches of one step as NeMo's data loader gave them, so that an error can name the row.

NeMo's data step keeps of a batch what its pipeline stage needs (collections/llm/gpt/model/base.py, gpt_data_step), and
neither the text nor the number of a row is part of that. So the loader's iterator is wrapped: batches pass through
unchanged, and of each the host's tokens and its metadata are kept until the step ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

_SHOWN = 60
"""Characters of a row's text in a message."""


class StepBatches(Iterator[Any]):
    """An iterator over what the loader gives for one step, which remembers it.

    With NeMo's fine-tuning data that is one batch, which NeMo cuts into micro-batches; otherwise each micro-batch.

    Attributes:
        seen: of each batch that was taken, in order, what `describe` needs.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self.seen: list[dict[str, Any]] = []
        self._source = source
        self._ahead: deque[Any] = deque()

    def __next__(self) -> Any:
        item = self._ahead.popleft() if self._ahead else next(self._source)
        batch = batch_of(item)
        self.seen.append({key: batch[key] for key in ("tokens", "metadata", "cu_seqlens") if key in batch})
        return item

    def look_ahead(self, count: int) -> list[dict[str, Any]]:
        """The next `count` batches, which stay to be taken; fewer where the data end."""
        while len(self._ahead) < count:
            try:
                self._ahead.append(next(self._source))
            except StopIteration:
                break
        return [batch_of(item) for item in self._ahead]


def batch_of(item: Any) -> dict[str, Any]:
    """The batch of what a loader of Lightning gives: alone, or with its index and the loader's."""
    batch = item[0] if isinstance(item, tuple) else item
    return batch if isinstance(batch, dict) else {}


def micro_batches(batches: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The micro-batches of a step: the loader's batches, or its one batch in equal parts.

    As NeMo 2.7.3 cuts it (utils/megatron_utils.py, get_iterator_k_split): along the first dimension, in order.
    """
    if len(batches) != 1 or count == 1:
        return batches
    (whole,) = batches
    sized = {key: value for key, value in whole.items() if isinstance(value, (Tensor, list))}
    rows = min((len(value) // count for value in sized.values()), default=0)
    return [{key: value[rows * i : rows * (i + 1)] for key, value in sized.items()} for i in range(count)]


def describe(batch: dict[str, Any], row: int, position: int | None, tokenizer: Any) -> str:
    """A row of a batch in words: where it stands in the training data, and how its text begins.

    Args:
        batch: a micro-batch, or what `StepBatches` kept of it.
        row: of the micro-batch, from 0.
        position: of the token, from 0; in a pack it tells which of its rows is meant. None: the whole row.
        tokenizer: NeMo's, with `ids_to_text`. None: the tokens are shown.
    """
    parts = []
    metadata = batch.get("metadata")
    known = metadata[row] if isinstance(metadata, list) and row < len(metadata) else None
    known = dict(known) if isinstance(known, dict) else {}
    if "line" in known:
        parts.append(f"line {known.pop('line')} of the training data")
    if "pack" in known:
        parts.append(f"pack {known.pop('pack')} (from 0)")
    if known:
        parts.append(_short(str(known)))
    tokens = batch.get("tokens")
    if tokens is None:
        return ", ".join(parts) or "a row that is not known"
    start, end = 0, tokens.shape[1]
    if position is not None and "cu_seqlens" in batch:
        # Filled up with -1; the borders grow.
        borders = [border for border in batch["cu_seqlens"][row].tolist() if border >= 0]
        start = max(border for border in borders if border <= position)
        end = min((border for border in borders if border > position), default=end)
        parts.append(f"the row in it that starts at position {start}")
    # As many tokens as surely hold the characters that are shown.
    ids = tokens[row, start : min(end, start + _SHOWN)].tolist()
    text = tokenizer.ids_to_text(ids) if hasattr(tokenizer, "ids_to_text") else f"tokens {ids}"
    return ", ".join([*parts, f"text {_short(text)!r}"])


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
