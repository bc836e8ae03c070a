"""Entropy-Adaptive Fine-Tuning for NeMo and Megatron-Core (arXiv 2601.02151)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_eaft.config import EAFTConfig as EAFTConfig
    from nemo_eaft.loss import TokenLoss as TokenLoss
    from nemo_eaft.loss import eaft_linear_loss as eaft_linear_loss
    from nemo_eaft.loss import eaft_loss as eaft_loss

__all__ = ["EAFTConfig", "TokenLoss", "eaft_linear_loss", "eaft_loss"]

# Loaded on first use: the command line answers --help and wrong settings without the seconds that torch takes.
_HOMES = {name: "nemo_eaft.config" if name == "EAFTConfig" else "nemo_eaft.loss" for name in __all__}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
