"""NeMo's configuration and model of GLM-4-0414."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel
from nemo.collections.llm.utils import Config
from nemo.lightning import OptimizerModule

from nemo_eaft.glm4.layer import glm4_layer_spec


@dataclass
class GLM4Config(GPTConfig):
    """What the dense GLM-4-0414 models have in common (transformers 4.57, `models/glm4`, and their config.json)."""

    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-5
    activation_func: Callable[..., Any] = F.silu
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    num_query_groups: int = 2
    kv_channels: int = 128
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 0.5
    rotary_interleaved: bool = True
    """Neighbours are rotated together, not the two halves of what is rotated."""
    seq_length: int = 32768
    vocab_size: int = 151552
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    transformer_layer_spec: Callable[..., Any] = glm4_layer_spec


@dataclass
class GLM4Config9B(GLM4Config):
    """GLM-4-9B-0414 and GLM-Z1-9B-0414: 9,400,279,040 parameters.

    Sizes: defaults of transformers 4.57, `models/glm4/configuration_glm4.py`.
    """

    num_layers: int = 40
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    num_attention_heads: int = 32


@dataclass
class GLM4Config32B(GLM4Config):
    """GLM-4-32B-0414 and GLM-Z1-32B-0414: 32,566,081,536 parameters, none of them a bias.

    Sizes: the models' metadata as llama.cpp prints it (32.57 B). Their 61 layers are a prime number: a pipeline needs
    stages of different length (`num_layers_in_last_pipeline_stage`), and two key-value heads allow two tensor-parallel
    ranks in megatron-core 0.15.3.
    """

    num_layers: int = 61
    hidden_size: int = 6144
    ffn_hidden_size: int = 23040
    num_attention_heads: int = 48
    add_qkv_bias: bool = False


class GLM4Model(GPTModel):
    """NeMo's model of a GLM-4-0414 configuration."""

    def __init__(
        self,
        config: Annotated[GLM4Config | None, Config[GLM4Config]] = None,
        optim: OptimizerModule | None = None,
        tokenizer: Any = None,
        model_transform: Callable[[torch.nn.Module], torch.nn.Module] | None = None,
    ) -> None:
        super().__init__(config or GLM4Config9B(), optim=optim, tokenizer=tokenizer, model_transform=model_transform)
