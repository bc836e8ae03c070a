"""The settings of the rows: where they are, and which of their columns hold what."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from nemo_eaft.settings_checks import at_least, warn

Mapping = Literal["auto", "messages", "conversations", "prompt_response"]

# Setting -> the mappings that read it. Those of chat rows that are not here are read with each.
_READ_BY: dict[str, tuple[str, ...]] = {
    "messages_column": ("auto", "messages", "conversations"),
    "prompt_column": ("prompt_response",),
    "response_column": ("prompt_response",),
    "reasoning_column": ("prompt_response",),
    "prompt_template": ("auto",),
}
# Kind of rows -> what they have no use for; with ``auto`` the rows decide.
_UNREAD: dict[str, tuple[str, ...]] = {
    "chat": ("prompt_template",),
    "pair": ("messages_column", "tools_column", "system_column", "system"),
}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What it is trained on. Rows are ``input``/``output`` pairs, or become chat messages by ``mapping``."""

    train: str
    """A ``.jsonl`` file, a folder of the ``datasets`` library, or the name of a data set."""
    validation: str | None = None
    """As ``data.train``; null trains without validation."""
    train_split: str = "train"
    """Split read where ``data.train`` is not a file. A part is written as in ``datasets``: ``train[1280:]``,
    ``train[:5%]``."""
    validation_split: str = "validation"
    """Split read where ``data.validation`` is not a file."""
    subset: str | None = None
    """Configuration of a data set that has several (``name`` of ``datasets.load_dataset``); null: its default."""
    train_rows: int | None = None
    """Read the first so many rows only, of those that can be used; null: all of them."""
    validation_rows: int | None = None
    """Validate on the first so many rows only; null: all of them."""
    mapping: Mapping = "auto"
    """How a row becomes messages (:mod:`nemo_eaft.data.mapping`). ``messages``: a column of ``role``/``content``.
    ``conversations``: a column of ``from``/``value``, as ShareGPT has it. ``prompt_response``: a column for each.
    ``auto``: rows with that column of turns as the first, ``input``/``output`` rows by ``data.prompt_template``."""
    messages_column: str | None = None
    """Column of the turns. null: ``messages``, or ``conversations`` with that mapping."""
    tools_column: str = "tools"
    """Column of the functions that may be called, a list or JSON text; rows need not have it."""
    prompt_column: str = "prompt"
    """Column of the question."""
    response_column: str = "response"
    """Column of the answer."""
    reasoning_column: str | None = None
    """Column of the reasoning, put before the answer between ``<think>`` and ``</think>``; null: none."""
    system_column: str | None = None
    """Column of the system message; null: none."""
    system: str | None = None
    """System message of every row that brings none; null: what the chat template does without one."""
    prompt_template: str = "{input} {output}"
    """How an ``input``/``output`` row becomes text. Must hold both names and end with ``{output}``. Chat rows
    use the chat template of the tokenizer instead."""
    packed: bool = False
    """Pack several rows into one sequence (NeMo's packing); needs ``trainer.micro_batch_size=1``."""
    packed_size: int | None = None
    """Tokens in a packed sequence. null: ``trainer.seq_length``."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used (broken JSON, no answer, too long) stops the run, or is counted, reported and
    left out."""
    num_workers: int = 2
    """Processes per rank that prepare batches; 0: none, the rank does it."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, str) and entry.name != "prompt_template" and not value.strip():
                raise ValueError(f"data.{entry.name} is empty")
        at_least("data.train_rows", self.train_rows, 1)
        at_least("data.validation_rows", self.validation_rows, 1)
        at_least("data.packed_size", self.packed_size, 2)
        at_least("data.num_workers", self.num_workers, 0)
        template = self.prompt_template
        if template.count("{input}") != 1 or template.count("{output}") != 1 or not template.endswith("{output}"):
            raise ValueError(
                f"data.prompt_template={template!r} must hold {{input}} and {{output}} once each and end "
                f"with {{output}}"
            )
        for name, mappings in _READ_BY.items():
            if self.mapping not in mappings and self._is_set(name):
                warn(
                    f"data.{name} has no effect with data.mapping={self.mapping}; it is read with "
                    f"{' or '.join(mappings)}"
                )
        if self.packed_size is not None and not self.packed:
            warn("data.packed_size has no effect while data.packed=false")

    def without_effect(self, kind: Literal["chat", "pair"]) -> list[str]:
        """Settings, of those that ``mapping`` reads, that rows of this kind do not."""
        return [name for name in _UNREAD[kind] if self.mapping == "auto" and self._is_set(name)]

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(type(self), name))

    @property
    def turns_column(self) -> str:
        """The column of the turns, with its default filled in."""
        return self.messages_column or ("conversations" if self.mapping == "conversations" else "messages")
