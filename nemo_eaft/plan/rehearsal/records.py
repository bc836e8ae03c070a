"""What was built, as plain data: it goes from the process that built it to the one that checks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a rank stands; ranks that differ in data- or context-parallel rank alone hold the same."""

    tensor: int
    expert: int
    pipeline: int

    def __str__(self) -> str:
        return f"stage {self.pipeline}, TP rank {self.tensor}" + (f", EP rank {self.expert}" if self.expert else "")


class Parameter(NamedTuple):
    """One parameter of a rank."""

    shape: tuple[int, ...]
    """This rank's part."""
    cut: int | None = None
    """The dimension that is cut over the tensor-parallel ranks; None: every one of them holds the same."""
    copy: bool = False
    """The second copy of a tied embedding, on the last of several stages."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One model chunk of a rank: its only one, or one of a virtual pipeline."""

    post_process: bool
    """Whether Megatron computes the loss here."""
    attached: bool
    """Whether EAFT is in the place of Megatron's loss."""
    parameters: dict[str, Parameter]
    """By Megatron's name, with layers and experts numbered in the whole model."""
    vocab_size: int | None = None
    """The true vocabulary size that the loss was given; None where there is none."""
    embedding_rows: tuple[int, int] | None = None
    """Tokens whose embedding is here, from the first to before the last; None: no embedding."""
    loss_columns: tuple[int, int] | None = None
    """Tokens whose logits the loss counts here, without padding; None: no loss."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank, with its Megatron DDP and optimizer."""

    number: int
    """In the world."""
    place: Place
    chunks: tuple[Chunk, ...]
    weights: int
    """Bytes of weights; padding of buffers and copies count."""
    gradients: int
    """Bytes of gradient buffers."""
    optimizer: int
    """Bytes of float32 weights and Adam's moments, beside weights and gradients."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Rank:
        """The opposite of `dataclasses.asdict`, also after a journey through JSON."""
        chunks = tuple(_chunk(chunk) for chunk in mapping["chunks"])
        return cls(**{**mapping, "place": Place(*mapping["place"]), "chunks": chunks})


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The model on one rank, and the Hugging Face model that it comes from."""

    parameters: dict[str, Parameter]
    hf_parameters: int
    """Parameters of the Hugging Face model, by `transformers`."""
    vocab_size: int
    """Rows of its vocabulary."""
    conversion: str | None = None
    """What NeMo's importer said against filling the one from the other; None: every tensor has its place and shape."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Whole:
        """The opposite of `dataclasses.asdict`."""
        return cls(**{**mapping, "parameters": _parameters(mapping["parameters"])})


@dataclass(frozen=True, kw_only=True)
class Built:
    """Everything that one rehearsal built."""

    whole: Whole
    ranks: tuple[Rank, ...]
    seconds: float
    """Of building, without the import of NeMo."""
    peak_bytes: int
    """Largest resident memory of the process that built."""

    def as_mapping(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Built:
        """The opposite of `as_mapping`."""
        ranks = tuple(Rank.from_mapping(rank) for rank in mapping["ranks"])
        return cls(**{**mapping, "whole": Whole.from_mapping(mapping["whole"]), "ranks": ranks})


def _chunk(mapping: Mapping[str, Any]) -> Chunk:
    ranges = {
        name: None if mapping[name] is None else tuple(mapping[name]) for name in ("embedding_rows", "loss_columns")
    }
    return Chunk(**{**mapping, **ranges, "parameters": _parameters(mapping["parameters"])})


def _parameters(mapping: Mapping[str, Any]) -> dict[str, Parameter]:
    # asdict keeps a NamedTuple, and JSON makes a list of it.
    return {name: Parameter(tuple(shape), cut, copy) for name, (shape, cut, copy) in mapping.items()}
