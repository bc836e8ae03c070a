"""Parameters of a model, and of one rank of a layout, tensor by tensor.

As Megatron-Core 0.15.3's GPTModel holds them: ``models/gpt/gpt_model.py`` (embedding on the first stage, final norm and
output layer on the last), ``transformer/attention.py``, ``transformer/mlp.py``, ``transformer/moe/``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.shape import ModelShape

Part = Literal["embedding", "output_layer", "attention", "mlp", "router", "experts", "norms"]
PARTS: tuple[Part, ...] = ("embedding", "output_layer", "attention", "mlp", "router", "experts", "norms")


class ParameterTensor(NamedTuple):
    """One parameter of a rank."""

    part: Part
    elements: int
    """Of this rank."""
    shared_embedding: bool = False
    """One of two copies of a tied embedding, on the first and on the last of several stages."""


@dataclass(frozen=True, eq=False)
class RankParameters:
    """Parameters of one tensor- and expert-parallel rank of a pipeline stage; every such rank has as many.

    Equal only to itself, so that it costs nothing to remember what was worked out for it.
    """

    chunks: tuple[tuple[ParameterTensor, ...], ...]
    """Tensors of each model chunk, in the order in which the model holds them."""

    def of(self, part: Part) -> int:
        """Parameters of one part."""
        return self._counts[part]

    @functools.cached_property
    def _counts(self) -> dict[Part, int]:
        counts = dict.fromkeys(PARTS, 0)
        for chunk in self.chunks:
            for tensor in chunk:
                counts[tensor.part] += tensor.elements
        return counts

    @property
    def embedding(self) -> int:
        """Rows of the vocabulary, first stage."""
        return self.of("embedding")

    @property
    def output_layer(self) -> int:
        """Rows of the vocabulary, last stage; none where the tied embedding is on the same stage."""
        return self.of("output_layer")

    @property
    def attention(self) -> int:
        """Projections of queries, keys, values and of the result."""
        return self.of("attention")

    @property
    def mlp(self) -> int:
        """Feed-forward parts, without experts."""
        return self.of("mlp")

    @property
    def router(self) -> int:
        """What chooses experts."""
        return self.of("router")

    @property
    def experts(self) -> int:
        """Experts of this rank."""
        return self.of("experts")

    @property
    def norms(self) -> int:
        """All norms, those of queries and keys included."""
        return self.of("norms")

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self._counts.values())


def model_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model, a tied embedding once: the count of ``transformers``."""
    return rank_parameters(shape, Layout(world_size=1), 0).total


def rank_parameters(shape: ModelShape, layout: Layout, stage: int) -> RankParameters:
    """Parameters of each tensor- and expert-parallel rank of a pipeline stage.

    shape, layout: must fit each other (:func:`nemo_eaft.hf_model.check_layout`).
    stage: 0 to ``layout.pipeline - 1``.
    """
    assert 0 <= stage < layout.pipeline, (stage, layout.pipeline)
    last = shape.num_hidden_layers
    runs = tuple(
        _Run(len(layers), layers.start == 0, layers.stop == last)
        for layers in layout.chunks(stage, shape.num_hidden_layers)
    )
    return _rank(shape, layout.tensor, layout.expert, layout.pipeline > 1, runs)


class _Run(NamedTuple):
    """A model chunk: so many layers, and whether they are the model's first and its last."""

    layers: int
    first: bool
    last: bool


# A search asks for the same stages again and again, and a mixture of experts has thousands of tensors.
@functools.lru_cache(maxsize=4096)
def _rank(shape: ModelShape, tensor: int, expert: int, stages: bool, runs: tuple[_Run, ...]) -> RankParameters:
    return RankParameters(tuple(tuple(_chunk(shape, tensor, expert, stages, run)) for run in runs))


def _chunk(shape: ModelShape, tensor: int, expert: int, stages: bool, run: _Run) -> Iterator[ParameterTensor]:
    vocabulary = shape.vocab_size // tensor * shape.hidden_size
    copied = shape.tie_word_embeddings and stages
    if run.first:
        yield ParameterTensor("embedding", vocabulary, copied)
    layer = tuple(_layer(shape, tensor, expert))
    for _ in range(run.layers):
        yield from layer
    if run.last:
        yield ParameterTensor("norms", shape.hidden_size)
        # With one stage a tied output layer reads the embedding's weight.
        if not (shape.tie_word_embeddings and run.first):
            yield ParameterTensor("output_layer", vocabulary, copied)


def _layer(shape: ModelShape, tensor: int, expert: int) -> Iterator[ParameterTensor]:
    hidden = shape.hidden_size
    yield ParameterTensor("norms", hidden)
    queries, qkv = shape.query_width // tensor, (shape.query_width + 2 * shape.key_value_width) // tensor
    yield ParameterTensor("attention", queries * hidden)
    if shape.projection_bias:
        yield ParameterTensor("attention", hidden)
    yield ParameterTensor("attention", qkv * hidden)
    if shape.qkv_bias:
        yield ParameterTensor("attention", qkv)
    if shape.qk_norm:
        yield from (ParameterTensor("norms", shape.head_dim) for _ in range(2))
    yield from (ParameterTensor("norms", hidden) for _ in range(3 if shape.sandwich_norms else 1))
    width = shape.intermediate_size // tensor
    if shape.num_experts is None:
        yield from _feed_forward("mlp", hidden, width, shape.mlp_bias)
        return
    yield ParameterTensor("router", shape.num_experts * hidden)
    for _ in range(shape.num_experts // expert):
        yield from _feed_forward("experts", hidden, width, shape.mlp_bias)


def _feed_forward(part: Part, hidden: int, width: int, bias: bool) -> Iterator[ParameterTensor]:
    """Gate and up in one matrix, and down."""
    yield ParameterTensor(part, 2 * width * hidden)
    if bias:
        yield ParameterTensor(part, 2 * width)
    yield ParameterTensor(part, hidden * width)
    if bias:
        yield ParameterTensor(part, hidden)
