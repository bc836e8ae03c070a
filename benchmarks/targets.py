"""The figures to reach, and whether a run reached them. MB is 10^6 bytes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from benchmarks.cases import Case
from benchmarks.memory import Memory
from benchmarks.results import Row, find, memory_ratio, time_ratio

Quantity = Literal["time ratio", "memory ratio", "ms", "MB beyond inputs and gradients"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    where: Literal["CPU", "H100"]
    case: Case
    ours: str
    quantity: Quantity
    bound: float
    theirs: str | None = None
    part: str = "sum"
    unmeasured: str | None = None
    """Why no run of this benchmark can give the figure."""

    def title(self) -> str:
        part = "" if self.part == "sum" else f" {self.part}"
        against = "" if self.theirs is None else f" against {self.theirs}"
        return f"{self.case.title()}: {self.ours}{part}, {self.quantity}{against}"

    @property
    def needs_memory(self) -> bool:
        return self.quantity in ("memory ratio", "MB beyond inputs and gradients")

    def value(self, rows: list[Row]) -> float | None:
        """The figure of a run, or None."""
        if self.unmeasured is not None:
            return None
        if self.quantity == "time ratio":
            assert self.theirs is not None
            ratio = time_ratio(rows, self.case, self.ours, self.theirs, self.part)
            return None if ratio is None else ratio.median
        if self.quantity == "memory ratio":
            assert self.theirs is not None
            return memory_ratio(rows, self.case, self.ours, self.theirs)
        row = find(rows, self.case, self.ours)
        if row is None:
            return None
        if self.quantity == "ms":
            time = row.time(self.part)
            return None if time is None else time.median
        return row.memory.beyond_gradients / 1e6 if isinstance(row.memory, Memory) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    target: Target
    status: Literal["reached", "missed", "not measured"]
    value: float | None
    reason: str = ""


def evaluate(targets: tuple[Target, ...], rows: list[Row], device_type: str, device_name: str) -> list[Outcome]:
    """Every target, in order: a figure for one kind of device says nothing about a run on another."""
    outcomes = []
    for target in targets:
        here = device_type == "cpu" if target.where == "CPU" else target.where in device_name
        value = target.value(rows) if here else None
        if value is None:
            reason = target.unmeasured or ("no figure in this run" if here else f"no {target.where} here")
            outcomes.append(Outcome(target=target, status="not measured", value=None, reason=reason))
        else:
            status: Literal["reached", "missed"] = "reached" if value <= target.bound else "missed"
            outcomes.append(Outcome(target=target, status=status, value=value))
    return outcomes


def _cpu(dtype: str, ours: str, quantity: Quantity, theirs: str, bound: float) -> Target:
    case = Case(tokens=512, vocab=151936, dtype=dtype)
    return Target(where="CPU", case=case, ours=ours, quantity=quantity, theirs=theirs, bound=bound)


def _cpu_linear(dtype: str) -> tuple[Target, ...]:
    case = Case(tokens=1024, vocab=49152, hidden=576, dtype=dtype)
    ours = "eaft-linear"
    return (
        Target(where="CPU", case=case, ours=ours, quantity="MB beyond inputs and gradients", bound=64.0),
        Target(where="CPU", case=case, ours=ours, quantity="time ratio", theirs="eaft-unfused-linear", bound=1.3),
    )


_H100 = Case(tokens=8192, vocab=151936, dtype="bfloat16")
_H100_SHARD = Case(tokens=8192, vocab=151936, shards=8, dtype="bfloat16")
_H100_LINEAR = Case(tokens=8192, vocab=151936, hidden=5120, dtype="bfloat16")

TARGETS: tuple[Target, ...] = (
    _cpu("bfloat16", "eaft", "time ratio", "megatron", 1.0),
    _cpu("float32", "eaft", "time ratio", "megatron", 1.6),
    _cpu("float32", "eaft-inplace", "time ratio", "megatron", 1.0),
    _cpu("bfloat16", "eaft", "time ratio", "peers-eaft", 0.55),
    _cpu("float32", "eaft", "time ratio", "peers-eaft", 0.7),
    _cpu("float32", "eaft-inplace", "time ratio", "peers-eaft", 0.45),
    _cpu("bfloat16", "eaft", "memory ratio", "megatron", 0.75),
    _cpu("bfloat16", "eaft", "memory ratio", "peers-eaft", 0.5),
    _cpu("float32", "eaft", "memory ratio", "megatron", 2.05),
    _cpu("float32", "eaft-inplace", "memory ratio", "megatron", 1.02),
    _cpu("float32", "eaft", "memory ratio", "peers-eaft", 0.7),
    *_cpu_linear("bfloat16"),
    *_cpu_linear("float32"),
    Target(where="H100", case=_H100, ours="eaft", quantity="ms", part="forward", bound=0.95),
    Target(where="H100", case=_H100, ours="eaft", quantity="ms", part="backward", bound=1.8),
    # 2.8 ms is 89 % of 6 bytes per logit at 3.0 TB/s.
    Target(where="H100", case=_H100, ours="eaft", quantity="ms", bound=2.8),
    Target(where="H100", case=_H100, ours="eaft", quantity="time ratio", theirs="liger", bound=0.35),
    Target(where="H100", case=_H100, ours="eaft", quantity="time ratio", theirs="megatron-fused", bound=0.16),
    Target(where="H100", case=_H100, ours="eaft", quantity="time ratio", theirs="megatron", bound=0.14),
    Target(where="H100", case=_H100_SHARD, ours="eaft", quantity="ms", bound=0.40),
    Target(where="H100", case=_H100_LINEAR, ours="eaft-linear", quantity="MB beyond inputs and gradients", bound=400.0),
    Target(
        where="H100",
        case=_H100_LINEAR,
        ours="eaft-linear",
        quantity="time ratio",
        theirs="four-products",
        bound=1.05,
    ),
    Target(
        where="H100",
        case=_H100_LINEAR,
        ours="eaft-linear with gradient in forward",
        quantity="time ratio",
        theirs="three products and the ideal loss",
        bound=1.1,
        unmeasured="no contender for the gradient in forward is built: it is reached through the Megatron adapter",
    ),
)
