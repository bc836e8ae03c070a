"""Entropy-Adaptive Fine-Tuning (arXiv 2601.02151) for NeMo and Megatron-Core."""

from nemo_eaft.config import EAFTConfig
from nemo_eaft.loss import TokenLoss, eaft_linear_loss, eaft_loss

__all__ = ["EAFTConfig", "TokenLoss", "eaft_linear_loss", "eaft_loss"]
