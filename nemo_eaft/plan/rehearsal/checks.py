"""What must hold of the ranks that were built. Each check says what it compared and every fault that it found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.memory import state_bytes
from nemo_eaft.plan.parameters import rank_parameters
from nemo_eaft.plan.rehearsal.records import Built, Parameter, Place, Rank
from nemo_eaft.plan.shape import ModelShape
from nemo_eaft.settings import Settings

MEMORY_TOLERANCE = 0.02
"""How far the planned bytes of weights, gradients or optimizer may be from those that exist, relative."""

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Check:
    """One check."""

    name: str
    compared: str
    faults: tuple[str, ...]


def check(built: Built, settings: Settings, shape: ModelShape) -> list[Check]:
    """All checks.

    settings: the run that was rehearsed.
    shape: what its plan was made from.
    """
    layout = Layout.of(settings)
    ranks, whole = built.ranks, built.whole
    return [
        Check("ranks", f"{len(ranks)} kinds of rank of {layout.world_size}", tuple(_ranks(ranks, layout))),
        Check(
            "conversion",
            f"{len(whole.parameters)} parameters filled from Hugging Face's by NeMo's importer",
            () if whole.conversion is None else (whole.conversion,),
        ),
        Check(
            "shapes",
            f"{sum(len(chunk.parameters) for rank in ranks for chunk in rank.chunks)} parameters of ranks with the "
            "uncut model",
            tuple(_shapes(built, layout)),
        ),
        Check(
            "parameters",
            f"{whole.hf_parameters:,} of Hugging Face's model; each rank's with the plan",
            tuple(_counts(built, layout, shape)),
        ),
        Check("loss", "EAFT where Megatron computes the loss, nowhere else", tuple(_loss(ranks, layout))),
        Check("vocabulary", f"shards of {whole.vocab_size:,} tokens", tuple(_vocabulary(built, layout))),
        Check(
            "memory",
            f"weights, gradients and optimizer within {MEMORY_TOLERANCE:.0%} of the plan",
            tuple(_memory(ranks, settings, shape)),
        ),
    ]


def memory_by_stage(ranks: tuple[Rank, ...]) -> dict[int, dict[str, int]]:
    """Bytes of each part, of the fullest rank of each stage."""
    stages: dict[int, dict[str, int]] = {}
    for rank in ranks:
        fullest = stages.setdefault(rank.place.pipeline, dict.fromkeys(("weights", "gradients", "optimizer"), 0))
        for part in fullest:
            fullest[part] = max(fullest[part], getattr(rank, part))
    return stages


def _ranks(ranks: tuple[Rank, ...], layout: Layout) -> Iterator[str]:
    asked = {
        Place(tensor, expert, pipeline)
        for tensor in range(layout.tensor)
        for expert in range(layout.expert)
        for pipeline in range(layout.pipeline)
    }
    there = [rank.place for rank in ranks]
    for place in sorted(asked - set(there)):
        yield f"no rank is at {place}"
    for rank in ranks:
        if rank.place not in asked or there.count(rank.place) > 1:
            yield f"rank {rank.number} is at {rank.place}, which is another's or outside the layout"
        if len(rank.chunks) != layout.virtual_pipeline:
            yield f"rank {rank.number} has {len(rank.chunks)} model chunks; expected {layout.virtual_pipeline}"


def _shapes(built: Built, layout: Layout) -> Iterator[str]:
    holders: dict[str, list[Place]] = {name: [] for name in built.whole.parameters}
    for rank in built.ranks:
        for chunk in rank.chunks:
            for name, parameter in chunk.parameters.items():
                original = built.whole.parameters.get(_EMBEDDING if parameter.copy else name)
                if original is None:
                    yield f"{rank.place}: {name} is not in the uncut model"
                    continue
                if not parameter.copy:
                    holders[name].append(rank.place)
                if parameter.cut != original.cut:
                    yield f"{rank.place}: {name} is {_how(parameter)}; expected {_how(original)}"
                elif _joined(parameter, layout) != original.shape:
                    yield (
                        f"{rank.place}: {name} is {list(parameter.shape)}, {layout.tensor} of which make "
                        f"{list(_joined(parameter, layout))}; expected {list(original.shape)}"
                    )
    for name, places in holders.items():
        stages = {place.pipeline for place in places}
        experts = {place.expert for place in places}
        expected = layout.tensor * (1 if _is_expert(name) else layout.expert)
        if len(stages) != 1 or len(places) != expected or (_is_expert(name) and len(experts) != 1):
            where = "nowhere" if not places else f"{len(places)} times, in stages {sorted(stages)}"
            yield f"{name} is held {where}; expected {expected} times, in one stage"


def _counts(built: Built, layout: Layout, shape: ModelShape) -> Iterator[str]:
    count = sum(
        math.prod(parameter.shape)
        for rank in built.ranks
        for chunk in rank.chunks
        for name, parameter in chunk.parameters.items()
        if _counts_here(rank.place, name, parameter)
    )
    if count != built.whole.hf_parameters:
        yield (
            f"all ranks of one copy of the model hold {count:,} parameters; expected {built.whole.hf_parameters:,}, "
            "those of the Hugging Face model"
        )
    for rank in built.ranks:
        there = sum(math.prod(parameter.shape) for chunk in rank.chunks for parameter in chunk.parameters.values())
        planned = rank_parameters(shape, layout, rank.place.pipeline).total
        if there != planned:
            yield f"{rank.place} holds {there:,} parameters; the plan says {planned:,}"


def _loss(ranks: tuple[Rank, ...], layout: Layout) -> Iterator[str]:
    for rank in ranks:
        last_stage = rank.place.pipeline == layout.pipeline - 1
        for number, chunk in enumerate(rank.chunks):
            where = f"{rank.place}, chunk {number}"
            owner = last_stage and number == len(rank.chunks) - 1
            if chunk.post_process != owner:
                yield f"{where}: post_process is {chunk.post_process}; expected {owner}"
            if chunk.attached != owner:
                yield f"{where} has {'an' if chunk.attached else 'no'} EAFT loss; expected {'one' if owner else 'none'}"


def _vocabulary(built: Built, layout: Layout) -> Iterator[str]:
    size = built.whole.vocab_size
    for rank in built.ranks:
        for chunk in rank.chunks:
            if chunk.vocab_size not in (None, size):
                yield f"{rank.place}: the loss was given {chunk.vocab_size:,} tokens; expected {size:,}"
    for expert in range(layout.expert):
        for what, exact in (("embedding_rows", False), ("loss_columns", True)):
            shards = [
                (rank.place.tensor, getattr(chunk, what))
                for rank in built.ranks
                for chunk in rank.chunks
                if rank.place.expert == expert and getattr(chunk, what) is not None
            ]
            yield from _covered(what.replace("_", " "), sorted(shards), layout.tensor, size, exact)


def _covered(what: str, shards: list[tuple[int, tuple[int, int]]], ranks: int, size: int, exact: bool) -> Iterator[str]:
    """Shards in rank order follow each other from 0 to `size`; where not `exact`, padding may follow."""
    if [rank for rank, _ in shards] != list(range(ranks)):
        yield f"{what}: on TP ranks {[rank for rank, _ in shards]}; expected one shard on each of {ranks}"
        return
    end = 0
    for rank, (first, behind) in shards:
        if first != end and behind > first:
            yield f"{what}: TP rank {rank} begins at token {first:,}; the one before it ends at {end:,}"
        end = max(end, behind)
    if end < size or (exact and end > size):
        yield f"{what}: end at token {end:,}; expected {size:,}"


def _memory(ranks: tuple[Rank, ...], settings: Settings, shape: ModelShape) -> Iterator[str]:
    layout = Layout.of(settings)
    for stage, there in sorted(memory_by_stage(ranks).items()):
        planned = asdict(state_bytes(rank_parameters(shape, layout, stage), settings, layout))
        for part, size in there.items():
            if abs(planned[part] - size) > MEMORY_TOLERANCE * size:
                off = f"{planned[part] / size - 1:+.1%}" if size else "all of it"
                yield f"stage {stage}: {part} take {size:,} bytes; the plan says {planned[part]:,} ({off})"


def _counts_here(place: Place, name: str, parameter: Parameter) -> bool:
    """Whether a rank's parameter adds to those of the model: what several ranks hold counts on the first of them."""
    replica = (parameter.cut is None and place.tensor > 0) or (place.expert > 0 and not _is_expert(name))
    return not parameter.copy and not replica


def _is_expert(name: str) -> bool:
    """Whether a parameter belongs to one expert; router and shared experts are on every expert-parallel rank."""
    return ".local_experts." in name


def _joined(parameter: Parameter, layout: Layout) -> tuple[int, ...]:
    """The shape of all tensor-parallel ranks' parts together."""
    times = {parameter.cut: layout.tensor}
    return tuple(size * times.get(dimension, 1) for dimension, size in enumerate(parameter.shape))


def _how(parameter: Parameter) -> str:
    return "whole on every TP rank" if parameter.cut is None else f"cut along dimension {parameter.cut}"
