"""Bytes that a layer keeps from forward to backward, and what a stage of the pipeline holds of them.

Counted tensor by tensor as autograd saves them. ``local`` layers are those of Megatron-Core 0.15.3 without Transformer
Engine, as the CPU backend runs them (``transformer/attention.py``, ``dot_product_attention.py``, ``mlp.py``,
``fusions/fused_softmax.py``, torch's RMSNorm): ``tests/plan`` compares them with a real model's live tensors.
``transformer_engine`` layers are as read in its code (``pytorch/module/layernorm_linear.py``: what _LayerNormLinear
saves; flash attention keeps queries, keys, values, output and one number a row, arXiv 2205.14135): no test has measured
them.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_eaft.plan.batch import MicroBatch
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.shape import ModelShape

_FLOAT32 = 4
# Families whose NeMo 2.7.3 configuration sets bias_activation_fusion (nemo/collections/llm/gpt/model/llama.py); with
# Transformer Engine alone, for the CPU backend turns fusions off.
_FUSED_SWIGLU = ("llama",)


@dataclass(frozen=True)
class LayerBytes:
    """One layer and one micro-batch on a rank, in bytes."""

    inputs: int
    """The layer's input: all that is kept with ``recompute=full``."""
    core_attention: int
    """What ``recompute=selective`` does not keep: scores and what only they need."""
    rest: int
    """All else that is saved for backward."""
    instead: int
    """What ``recompute=selective`` keeps in place of ``core_attention``."""
    gradients: int
    """Gradients that are there beside the saved tensors at the worst moment of the layer's backward."""

    def kept(self, recompute: str) -> int:
        """Bytes kept from forward to backward."""
        if recompute == "full":
            return self.inputs
        return self.rest + (self.instead if recompute == "selective" else self.core_attention)

    def again(self, recompute: str) -> int:
        """Bytes made a second time, while one layer's backward runs."""
        if recompute == "full":
            return self.rest + self.core_attention
        return self.core_attention - self.instead if recompute == "selective" else 0


def layer_bytes(shape: ModelShape, layout: Layout, batch: MicroBatch) -> LayerBytes:
    """One transformer layer on a rank."""
    count = _local if batch.layers == "local" else _transformer_engine
    return count(_Widths.of(shape, layout, batch), shape, batch)


def chunks_in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Micro-batches times model chunks whose activations a stage holds at most.

    1F1B and its interleaved form (``pipeline_parallel/schedules.py``, ``get_pp_rank_microbatches``): those of the
    warm-up and one more.
    """
    total = micro_batches * layout.virtual_pipeline
    behind = layout.pipeline - stage - 1
    warm_up = behind
    if layout.virtual_pipeline > 1:
        warm_up = 2 * behind + (layout.virtual_pipeline - 1) * layout.pipeline
    return min(warm_up + 1, total)


def final_norm_bytes(shape: ModelShape, batch: MicroBatch) -> int:
    """The last norm and the output layer's input, on the last stage."""
    norm = _norm(batch, shape.hidden_size, 1, batch.residual_tokens)
    return norm + batch.residual_tokens * shape.hidden_size * batch.itemsize


def embedding_backward_bytes(shape: ModelShape, layout: Layout, batch: MicroBatch) -> int:
    """Gradients of the embedding's rows and of what it gave, both whole and of the model's dtype, until Megatron's DDP
    has added the first to its buffer (``distributed/distributed_data_parallel.py``): Megatron fuses that addition for
    linear layers alone."""
    rows = shape.vocab_size // layout.tensor
    return (rows + batch.tokens) * shape.hidden_size * batch.itemsize


def score_buffer_bytes(shape: ModelShape, layout: Layout, batch: MicroBatch) -> int:
    """Where unfused attention multiplies queries by keys: one for all layers, kept for good
    (``parallel_state.get_global_memory_buffer``)."""
    if batch.attention == "flash":
        return 0
    return batch.tokens * (shape.num_attention_heads // layout.tensor) * batch.context_length * batch.itemsize


@dataclass(frozen=True)
class _Widths:
    """Elements per token on a rank."""

    hidden: int
    queries: int
    key_values: int
    heads: int
    key_value_heads: int
    feed_forward: int
    """Gated width; of all experts that a token is sent to."""
    sent: int
    """Copies of a token that are sent to experts; 0: no experts."""

    @classmethod
    def of(cls, shape: ModelShape, layout: Layout, batch: MicroBatch) -> _Widths:
        # Experts get top-k copies of each token, in all as many tokens as there are (assumed: evenly spread). Their
        # matrices are cut over the tensor-parallel ranks, each of which gets all of them.
        sent = shape.num_experts_per_tok if shape.num_experts is not None else 0
        return cls(
            hidden=shape.hidden_size,
            queries=shape.query_width // layout.tensor,
            key_values=shape.key_value_width // layout.tensor,
            heads=shape.num_attention_heads // layout.tensor,
            key_value_heads=shape.num_key_value_heads // layout.tensor,
            feed_forward=shape.intermediate_size // layout.tensor * max(sent, 1),
            sent=sent,
        )


def _norm(batch: MicroBatch, width: int, rows: int, tokens: int, input_kept: bool = True) -> int:
    """A norm of ``rows`` x (width / rows) elements per token: its input and 1 / root-mean-square a row.

    input_kept: False where something else keeps the input.
    """
    if batch.layers == "transformer_engine":
        return tokens * (width * batch.itemsize * input_kept + _FLOAT32 * rows)
    # torch's, on a CPU: float32 copies of input and normalised input for bfloat16; for float32 the input itself.
    copies = 2 if batch.itemsize < _FLOAT32 or input_kept else 1
    return tokens * (copies * width * _FLOAT32 + _FLOAT32 * rows)


def _transformer_engine(width: _Widths, shape: ModelShape, batch: MicroBatch) -> LayerBytes:
    item, tokens, residual = batch.itemsize, batch.tokens, batch.residual_tokens
    hidden = residual * width.hidden * item
    mixed = width.queries + 2 * width.key_values
    # Norm and what goes into the linear layer behind it, twice; then the output of the first, of which values are a
    # view.
    rest = 2 * (_norm(batch, width.hidden, 1, residual) + hidden) + tokens * mixed * item
    if shape.qk_norm:
        # Queries are copied out of the mixed tensor before they are normed; keys are a view of it.
        rest += _norm(batch, width.queries, width.heads, tokens)
        rest += _norm(batch, width.key_values, width.key_value_heads, tokens, input_kept=False)
    if shape.sandwich_norms:
        rest += 2 * _norm(batch, width.hidden, 1, residual)
    # Rotated queries and keys, and the output, which the projection keeps as well.
    rotated = tokens * (width.queries + width.key_values) * item
    rest += rotated + tokens * width.queries * item
    scores = _scores(width, batch)
    fused = shape.model_type in _FUSED_SWIGLU
    rest += _feed_forward(width, batch, 3 if fused else 5, shape)
    gradients = hidden + tokens * 2 * width.feed_forward * item
    if batch.sequence_shards > 1:
        # The input of a column-parallel layer is gathered again for its weight's gradient, and its own is whole before
        # it is cut.
        gradients += 2 * tokens * width.hidden * item
    return LayerBytes(hidden, scores, rest, 0, gradients)


def _local(width: _Widths, shape: ModelShape, batch: MicroBatch) -> LayerBytes:
    item, tokens, residual = batch.itemsize, batch.tokens, batch.residual_tokens
    hidden = residual * width.hidden * item
    mixed = tokens * (width.queries + 2 * width.key_values) * item
    repeated = width.heads > width.key_value_heads
    rest = 2 * (_norm(batch, width.hidden, 1, residual) + hidden)
    mixed_kept = False
    if shape.qk_norm:
        rest += _norm(batch, width.queries, width.heads, tokens)
        # Keys are a view of the mixed tensor, which float32 norms keep whole.
        mixed_kept = item == _FLOAT32
        rest += mixed if mixed_kept else 0
        rest += _norm(batch, width.key_values, width.key_value_heads, tokens, input_kept=False)
    if shape.sandwich_norms:
        rest += 2 * _norm(batch, width.hidden, 1, residual)
    # Cosines and sines, for queries and for keys.
    rest += 4 * batch.length * shape.head_dim * item
    # What the projection keeps.
    rest += tokens * width.queries * item
    # Queries, keys repeated for every query head (a copy), values likewise, or a view of the mixed tensor.
    core = _scores(width, batch) + 2 * tokens * width.queries * item
    instead = tokens * (width.queries + width.key_values) * item
    if repeated:
        core += tokens * width.queries * item
    elif not mixed_kept:
        core += mixed
    instead += 0 if mixed_kept else mixed
    rest += _feed_forward(width, batch, 5, shape)
    gradients = hidden + tokens * 2 * width.feed_forward * item
    return LayerBytes(hidden, core, rest, instead, gradients)


def _scores(width: _Widths, batch: MicroBatch) -> int:
    """What attention keeps besides queries, keys, values and output."""
    if batch.attention == "flash":
        return batch.tokens * width.heads * _FLOAT32
    # Softmax in float32 (attention_softmax_in_fp32), and what the product with the values takes.
    probabilities = _FLOAT32 + (batch.itemsize if batch.itemsize < _FLOAT32 else 0)
    return batch.tokens * width.heads * batch.context_length * probabilities


def _feed_forward(width: _Widths, batch: MicroBatch, tensors: int, shape: ModelShape) -> int:
    """Gate and up together (2 of ``tensors``), the result (1), and without fusion silu's and a copy of up (2)."""
    if shape.num_experts is None:
        return batch.tokens * tensors * width.feed_forward * batch.itemsize
    # The result before it is multiplied by the expert's probability as well; the tokens as experts get them; the
    # router's numbers. Under sequence parallelism experts' inputs are gathered before their first linear layer, which
    # keeps them whole (moe/token_dispatcher.py, dispatch_postprocess; extensions/transformer_engine.py,
    # explicit_expert_comm), where a dense one keeps its part and gathers again.
    kept = batch.tokens * (tensors + 1) * width.feed_forward * batch.itemsize
    kept += batch.tokens * width.sent * width.hidden * batch.itemsize
    return kept + batch.residual_tokens * 4 * shape.num_experts * _FLOAT32
