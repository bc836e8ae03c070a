"""A tiny random model, one like it that was changed, and a tokenizer whose words are tokens."""

from __future__ import annotations

from typing import Any

import torch

from tests.nemo.models import VOCAB_SIZE

HEADS = 2


def pair() -> tuple[Any, Any]:
    """A base model and one that was moved away from it: float32, sharp enough that some tokens are sure."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=248,
        eos_token_id=249,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        base = LlamaForCausalLM(config).eval()
        tuned = LlamaForCausalLM(config).eval()
        tuned.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return base, tuned
