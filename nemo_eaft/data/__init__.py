"""Rows in, a NeMo data module out.

:func:`prepare` reads, checks and writes the rows (once, in one process, without NeMo).
``nemo_eaft.data.module`` builds NeMo's data module on what it wrote (on every rank).
"""

from nemo_eaft.data.chat import tokenize_chat
from nemo_eaft.data.prepare import PreparedData, prepare
from nemo_eaft.data.rows import RowError
from nemo_eaft.data.tokens import Tokens, tokenize_pair

__all__ = ["PreparedData", "RowError", "Tokens", "prepare", "tokenize_chat", "tokenize_pair"]
