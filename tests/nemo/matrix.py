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
        parts: list[str] = [self.kind]
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name != "kind" and value != entry.default:
                parts.append(short.get(entry.name, entry.name) + ("" if value is True else str(value)))
        return "-".join(parts)

    @property
    def single(self) -> Row:
        """The same training in one process, plainly."""
        return Row(kind=self.kind, packed=self.packed, tied=self.tied, micro_batch=1 if self.packed else 2)

    def meaningless(self) -> bool:
        """Whether the values do not go together by what they mean, or need more ranks than a test machine holds."""
        per_pass = self.micro_batch * self.data
        return (
            self.ranks > MAX_RANKS
            or (self.sequence and self.tensor == 1)
            or (self.virtual > 1 and self.pipeline == 1)
            or (self.packed and self.micro_batch > 1)
            or self.global_batch % per_pass > 0
            or (self.virtual > 1 and self.global_batch // per_pass % self.pipeline > 0)
            or (self.expert > 1 and self.kind != "moe")
            or (self.data * self.context) % self.expert > 0
        )

    def refusal(self) -> str | None:
        """Why values that would go together are not tested; None where they are."""
        if self.packed and self.context > 1:
            return "packed with CP: NeMo 2.7.3 cuts the boundaries of rows like tokens; refused"
        if self.expert > 1 and self.tensor > 1:
            return "EP with TP: gloo cannot gather pieces of different sizes; refused on the CPU"
        if self.kind == "moe" and self.tensor > 1 and not self.sequence:
            return "MoE with TP needs SP in Megatron-Core"
        if self.kind == "mtp" and self.data * self.context > 1:
            return (
                "MTP with DP or CP: stock NeMo 2.7.3 does not keep its gradient; on the same rows the norm is 3.61 on "
                "one rank and 2.98 on two"
            )
        if self.kind == "mtp" and self.packed:
            return "MTP with packed: Megatron-Core 0.15.3 predicts over the boundaries of rows"
        if self.kind == "mtp" and self.tied and self.pipeline > 1:
            return "MTP, tied, with PP: Megatron-Core 0.15.3 cannot save it (assertion in GPTModel.sharded_state_dict)"
        if self.kind == "lora" and self.recompute:
            return "LoRA with full recompute: a frozen embedding leaves the adapters without a gradient; refused"
        return None


def sensible_rows() -> Iterator[Row]:
    """Every product of values that means something."""
    rows = (Row(**dict(zip(FEATURES, values, strict=True))) for values in itertools.product(*FEATURES.values()))
    return (row for row in rows if not row.meaningless())


def legal_rows() -> Iterator[Row]:
    """Every row that could be tested."""
    return (row for row in sensible_rows() if row.refusal() is None)


Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs(row: Row) -> set[Pair]:
    """Every pair of two features' values in a row."""
    values = asdict(row)
    return set(itertools.combinations(((name, values[name]) for name in FEATURES), 2))


ROWS = (
    Row(tensor=4, micro_batch=1, packed=True, tied=True, fused=True),
    Row(
        kind="moe",
        pipeline=2,
        virtual=2,
        context=2,
        expert=2,
        micro_batch=4,
        distributed_optimizer=True,
        recompute=True,
    ),
    Row(kind="lora", tensor=2, data=2, sequence=True, distributed_optimizer=True),
    Row(
        kind="moe",
        tensor=2,
        pipeline=2,
        virtual=2,
        sequence=True,
        micro_batch=1,
        recompute=True,
        packed=True,
        tied=True,
        fused=True,
    ),
    Row(kind="moe", data=4, expert=2, tied=True, fused=True),
    Row(kind="lora", data=2, context=2, micro_batch=4, tied=True, fused=True),
    Row(kind="mtp", tensor=4, sequence=True, distributed_optimizer=True, recompute=True, tied=True),
    Row(pipeline=2, virtual=2, data=2, micro_batch=1, distributed_optimizer=True, recompute=True, packed=True),
    Row(kind="mtp", tensor=2, pipeline=2, virtual=2, micro_batch=4, fused=True),
    Row(tensor=2, context=2, sequence=True, micro_batch=1, distributed_optimizer=True, fused=True),
    Row(kind="lora", data=4, micro_batch=1, distributed_optimizer=True, packed=True),
    Row(kind="lora", pipeline=2, virtual=2, context=2, tied=True),
    Row(kind="moe", pipeline=2, data=2, expert=2, micro_batch=1, distributed_optimizer=True, packed=True, tied=True),
    Row(tensor=4, sequence=True, micro_batch=4, distributed_optimizer=True, fused=True),
    Row(data=4, distributed_optimizer=True, recompute=True),
    Row(kind="mtp", micro_batch=1, recompute=True, tied=True),
    Row(kind="moe", tensor=4, sequence=True, micro_batch=1, recompute=True, packed=True, tied=True, fused=True),
    Row(kind="lora", tensor=4, sequence=True, micro_batch=4, distributed_optimizer=True, tied=True, fused=True),
)
"""Of at most four ranks."""

LARGE_ROWS = (
    Row(
        kind="moe", tensor=4, pipeline=2, virtual=2, sequence=True, micro_batch=4, recompute=True, tied=True, fused=True
    ),
    Row(kind="moe", tensor=2, data=4, sequence=True, micro_batch=1, distributed_optimizer=True, recompute=True),
    Row(pipeline=2, virtual=2, data=4, micro_batch=1, recompute=True, tied=True),
    Row(tensor=4, context=2, sequence=True, micro_batch=1, distributed_optimizer=True),
    Row(kind="lora", data=4, context=2, tied=True, fused=True),
    Row(tensor=4, data=2, sequence=True, micro_batch=4, tied=True, fused=True),
)
"""Of more than four ranks: what the others leave uncovered."""
