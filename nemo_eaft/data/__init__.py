"""Rows in, a NeMo data module out.

:func:`prepare` reads, checks and writes the rows: once, in one process, without NeMo. :func:`build_module`
builds NeMo's data module on what it wrote: on every rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_eaft.data.chat import tokenize_chat
from nemo_eaft.data.prepare import PreparedData, prepare, read_prepared
from nemo_eaft.data.rows import RowError
from nemo_eaft.data.tokens import Tokens, tokenize_pair
from nemo_eaft.settings import Settings

__all__ = [
    "PreparedData",
    "RowError",
    "Tokens",
    "build_module",
    "prepare",
    "read_prepared",
    "tokenize_chat",
    "tokenize_pair",
]


def build_module(settings: Settings, root: Path, tokenizer: Any) -> Any:
    """See :func:`nemo_eaft.data.module.build_module`. Imported here, for NeMo takes half a minute."""
    from nemo_eaft.data import module

    return module.build_module(settings, root, tokenizer)
