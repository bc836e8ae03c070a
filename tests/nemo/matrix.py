"""The layouts that a training is compared in: every legal pair of values of two features is in one row at least."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Kind = Literal["dense", "moe", "mtp", "lora"]

FEATURES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2, 4),
    "pipeline": (1, 2),
    "virtual": (1, 2),
    "data": (1, 2, 4),
    "context": (1, 2),
    "expert": (1, 2),
    "sequence": (False, True),
    "micro_batch": (1, 2, 4),
    "distributed_optimizer": (False, True),
    "recompute": (False, True),
    "packed": (False, True),
    "tied": (False, True),
    "fused": (False, True),
    "kind": ("dense", "moe", "mtp", "lora"),
}
"""Every value of a row's field that is tested. `data` counts copies of the whole sequence."""

MAX_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train, and what is trained."""

    kind: Kind = "dense"
    """`moe`: four experts, two chosen. `mtp`: a multi-token-prediction head, too. `lora`: adapters on linear layers."""
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False
    micro_batch: int = 2
    distributed_optimizer: bool = False
    recompute: bool = False
    packed: bool = False
    tied: bool = False
    fused: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def global_batch(self) -> int:
        """Rows of a step, or packs."""
        return 4 if self.packed else 8

    @property
    def name(self) -> str:
        """What differs from the defaults."""
        short = {
            "tensor": "tp", "pipeline": "pp", "virtual": "vpp", "data": "dp", "context": "cp", "expert": "ep",
            "micro_batch": "mb", "distributed_optimizer": "distopt",
        }  # fmt: skip
        parts = [self.kind]
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name != "kind" and value != entry.default:
                parts.append(short.get(entry.name, entry.name) + ("" if value is True else str(value)))
        return "-".join(parts)

    @property
    def single(self) -> Row:
        """The same training in one process, plainly."""
        alone = self.packed or self.kind == "mtp"
        return Row(kind=self.kind, packed=self.packed, tied=self.tied, micro_batch=1 if alone else 2)

    def refusal(self) -> str | None:
        """Why this row is not tested; None for one that is."""
        if self.ranks > MAX_RANKS:
            return "more ranks than a test machine holds"
        if self.sequence and self.tensor == 1:
            return "sequence parallelism splits over tensor-parallel ranks"
        if self.virtual > 1 and self.pipeline == 1:
            return "virtual stages need a pipeline"
        if self.packed and self.micro_batch > 1:
            return "a packed sequence is a micro-batch"
        if self.packed and self.context > 1:
            return "NeMo 2.7.3 cuts the row boundaries of packs like tokens: refused"
        per_pass = self.micro_batch * self.data
        if self.global_batch % per_pass or (self.virtual > 1 and self.global_batch // per_pass % self.pipeline):
            return "the batch cannot be cut like that"
        if self.expert > 1 and self.kind != "moe":
            return "there are no experts"
        if self.expert > 1 and (self.data * self.context) % self.expert:
            return "experts are split over data-parallel ranks"
        if self.expert > 1 and self.tensor > 1:
            return "gloo cannot gather pieces of different sizes: refused on the CPU"
        if self.kind == "moe" and self.tensor > 1 and not self.sequence:
            return "Megatron-Core trains experts at TP > 1 under sequence parallelism only"
        if self.kind == "mtp" and (self.packed or self.context > 1 or self.micro_batch > 1):
            return "Megatron's multi-token prediction counts padding, so its loss depends on which rows are batched"
        if self.kind == "lora" and self.recompute:
            return "NeMo 2.7.3 recomputes without a gradient where the embedding is frozen: refused"
        return None


def legal_rows() -> Iterator[Row]:
    """Every row that could be tested."""
    for values in itertools.product(*FEATURES.values()):
        row = Row(**dict(zip(FEATURES, values, strict=True)))
        if row.refusal() is None:
            yield row


Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs(row: Row) -> set[Pair]:
    """Every pair of two features' values in a row."""
    values = asdict(row)
    return set(itertools.combinations(((name, values[name]) for name in FEATURES), 2))


ROWS = (
    Row(
        kind="moe", data=2, expert=2, micro_batch=1, distributed_optimizer=True, recompute=True, packed=True, tied=True
    ),
    Row(tensor=2, pipeline=2, virtual=2, sequence=True, fused=True),
    Row(kind="lora", context=2, micro_batch=4, distributed_optimizer=True),
    Row(kind="mtp", tensor=4, sequence=True, micro_batch=1, recompute=True, tied=True, fused=True),
    Row(kind="moe", pipeline=2, virtual=2, context=2, expert=2, micro_batch=4, recompute=True, tied=True, fused=True),
    Row(
        kind="lora",
        tensor=2,
        pipeline=2,
        virtual=2,
        sequence=True,
        micro_batch=1,
        distributed_optimizer=True,
        packed=True,
        tied=True,
    ),
    Row(data=4, distributed_optimizer=True, recompute=True, tied=True),
    Row(kind="moe", tensor=2, data=2, sequence=True, micro_batch=4, recompute=True),
    Row(kind="moe", data=4, expert=2, micro_batch=1, packed=True, fused=True),
    Row(kind="mtp", pipeline=2, virtual=2, data=2, micro_batch=1, distributed_optimizer=True, fused=True),
    Row(tensor=4, micro_batch=1, distributed_optimizer=True, packed=True),
    Row(kind="lora", data=2, context=2, tied=True, fused=True),
    Row(kind="mtp", tensor=2, pipeline=2, micro_batch=1, distributed_optimizer=True, recompute=True, tied=True),
    Row(tensor=2, context=2, sequence=True, micro_batch=4, distributed_optimizer=True, tied=True),
    Row(kind="moe", tensor=4, sequence=True, recompute=True, fused=True),
    Row(data=2, context=2, micro_batch=1, recompute=True, tied=True),
    Row(kind="lora", tensor=4, sequence=True, micro_batch=4),
    Row(kind="mtp", data=4, micro_batch=1, distributed_optimizer=True),
    Row(kind="lora", data=4, micro_batch=1, packed=True, fused=True),
    Row(kind="moe", pipeline=2, data=2, expert=2, fused=True),
)
"""Of at most four ranks."""

LARGE_ROWS = (
    Row(kind="moe", tensor=2, data=4, sequence=True, micro_batch=1, recompute=True, packed=True),
    Row(tensor=4, pipeline=2, virtual=2, sequence=True, micro_batch=1, distributed_optimizer=True, tied=True),
    Row(
        kind="mtp", pipeline=2, virtual=2, data=4, micro_batch=1, distributed_optimizer=True, recompute=True, fused=True
    ),
    Row(tensor=4, data=2, sequence=True, micro_batch=1, packed=True, fused=True),
    Row(kind="moe", tensor=4, context=2, sequence=True, distributed_optimizer=True, recompute=True, fused=True),
    Row(data=4, context=2, distributed_optimizer=True),
)
"""Of more than four ranks: what the others leave uncovered."""
