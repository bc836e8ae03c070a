"""Tiny Megatron-Core models on the CPU backend, for jobs of `tests.nemo.ranks.run_ranks`."""

import dataclasses
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

VOCAB_SIZE = 29
PADDED_VOCAB_SIZE = 32
"""Rows of embedding and output layer, so that padding columns exist."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True, "kv_channels": 12},
}


def start(tensor: int = 1, pipeline: int = 1, virtual: int | None = None) -> None:
    """Megatron's groups over all ranks of the job, and its random streams."""
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
    )
    # A rank that needs nothing more of the others, and ends, would close connections that they are still making.
    dist.barrier()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def config(tensor: int = 1, **changes: Any) -> Any:
    """A Llama-like configuration: RMSNorm, SwiGLU, grouped-query attention, no dropout, no bias."""
    from megatron.core.transformer import TransformerConfig

    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tensor,
        "pipeline_dtype": torch.float32,
        "calculate_per_token_loss": True,
    }
    return TransformerConfig(**(fields | changes))


def gpt(
    config: Any,
    *,
    tied: bool = False,
    pre_process: bool = True,
    post_process: bool = True,
    position_embedding_type: str = "rope",
) -> Any:
    """A GPTModel of Megatron's local specification with the same weights whatever the tensor parallel size."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    heads = None
    if config.mtp_num_layers:
        heads = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    model = GPTModel(
        config,
        spec,
        vocab_size=PADDED_VOCAB_SIZE,
        max_sequence_length=64,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=tied,
        position_embedding_type=position_embedding_type,
        mtp_block_spec=heads,
    )
    set_weights(model)
    return model


@torch.no_grad()
def set_weights(model: Any) -> None:
    """Weights drawn by parameter name, so that a shard is a slice of what one rank would hold."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        axis = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        shape = list(parameter.shape)
        if axis is not None:
            shape[axis] *= ranks
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(shape, generator=generator)
        # Norms start at one, where a forgotten one would go unseen.
        whole = 1 + 0.3 * whole if whole.dim() == 1 and "norm" in name else 0.3 * whole
        if axis is not None:
            # Gate and up projection are sharded each by itself (SwiGLU).
            parts = whole.chunk(2) if "linear_fc1" in name else (whole,)
            whole = torch.cat([part.chunk(ranks, dim=axis)[rank] for part in parts], dim=axis)
        parameter.copy_(whole)


@dataclasses.dataclass
class Batch:
    """tokens, labels, positions [b, s] int64; loss_mask [b, s] float32."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    loss_mask: Tensor

    def forward(self, model: Any, **extra: Any) -> Tensor:
        """The model's loss [b, s]."""
        return model(self.tokens, self.positions, None, labels=self.labels, **extra)

    def logits(self, model: Any, **extra: Any) -> Tensor:
        """The model's logits [b, s, V_local]."""
        return model(self.tokens, self.positions, None, **extra)

    def logits_of_main(self, model: Any) -> Tensor:
        """Logits of the main prediction, where Megatron refuses to give them: with multi-token prediction heads."""
        seen = []
        hook = model.output_layer.register_forward_hook(lambda _, __, out: seen.append(out[0].detach().clone()))
        self.forward(model)
        hook.remove()
        return seen[-1].transpose(0, 1)


def batch(size: int = 2, length: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB_SIZE, (size, length), generator=generator)
    labels = torch.randint(0, VOCAB_SIZE, (size, length), generator=generator)
    mask = torch.ones(size, length)
    for row in range(size):
        mask[row, : 1 + row % 3] = 0
    positions = torch.arange(length).expand(size, length)
    return Batch(tokens, labels, positions, mask)


def model_and_data(**changes: Any) -> tuple[Any, Batch]:
    """One rank's model, its configuration changed so, and a batch."""
    start()
    return gpt(config(**changes)), batch()


def gradients(model: Any) -> dict[str, Tensor]:
    """A copy of every parameter's gradient; what sequence parallelism leaves partial is summed over the ranks."""
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(found[name])
    return found


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of all entries. The names must be the same."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def largest_relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of all entries, each relative to the largest of its tensor in `b`."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in a)


def assert_weights(model: torch.nn.Module, written: dict[str, torch.Tensor]) -> None:
    """A model of Transformer Engine's layers has, bit for bit, the weights of one of Megatron's local layers."""
    renamed = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    weights = dict(model.named_parameters())
    for name, weight in written.items():
        for local, fused in renamed.items():
            name = name.replace(local, fused)
        assert torch.equal(weights.pop(name).cpu(), weight), name
    assert not weights, list(weights)
