"""One row: one contender in one case."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.cases import Case
from benchmarks.memory import Memory
from benchmarks.timing import Round, Spread, paired_ratio, parts, spread


@dataclasses.dataclass(kw_only=True)
class Row:
    case: Case
    contender: str
    reason: str | None = None
    """Why there are no times: not there, wrong, or ended with an error."""

    rounds: list[Round] = dataclasses.field(default_factory=list)
    memory: Memory | str | None = None
    """A string says why there is no figure."""

    def time(self, part: str = "sum") -> Spread | None:
        """Milliseconds of ``forward``, ``backward`` or ``sum``."""
        return spread(parts(self.rounds)[part]) if self.rounds else None

    def limit_ms(self, bandwidth: float) -> float:
        """Time of the bytes that must be moved, at a bandwidth in bytes a second."""
        return self.case.limit_bytes * self.case.logits / bandwidth * 1e3

    def as_json(self, bandwidth: float) -> dict[str, Any]:
        """Plain values; for given logits also per logit, beside the limit."""
        plain: dict[str, Any] = {"case": dataclasses.asdict(self.case), "contender": self.contender}
        if self.reason is not None:
            plain["reason"] = self.reason
        total = self.time()
        if total is not None:
            plain["ms"] = {part: spread(values)._asdict() for part, values in parts(self.rounds).items()}
            plain["rounds_ms"] = [[round(each.forward, 4), round(each.backward, 4)] for each in self.rounds]
        if isinstance(self.memory, Memory):
            plain["memory_bytes"] = {
                **dataclasses.asdict(self.memory),
                "total": self.memory.total,
                "beyond_gradients": self.memory.beyond_gradients,
            }
        elif self.memory is not None:
            plain["memory_reason"] = self.memory
        if self.case.hidden is None:
            per_logit: dict[str, float] = {"limit_moved": self.case.limit_bytes}
            if total is not None:
                # What a copy moves in the same time, not a count of what this contender moves.
                per_logit["time_as_bytes"] = total.median / 1e3 * bandwidth / self.case.logits
            if isinstance(self.memory, Memory):
                per_logit["held"] = self.memory.total / self.case.logits
            plain["bytes_per_logit"] = per_logit
        return plain


def find(rows: list[Row], case: Case, contender: str) -> Row | None:
    return next((row for row in rows if row.case == case and row.contender == contender), None)


def time_ratio(rows: list[Row], case: Case, ours: str, theirs: str, part: str = "sum") -> Spread | None:
    """Ratio of times within the same rounds; None where one of the two was not timed."""
    a, b = find(rows, case, ours), find(rows, case, theirs)
    if a is None or b is None or not a.rounds or not b.rounds:
        return None
    return paired_ratio(parts(a.rounds)[part], parts(b.rounds)[part])


def memory_ratio(rows: list[Row], case: Case, ours: str, theirs: str) -> float | None:
    """Ratio of peaks, each the inputs and everything the loss allocates, gradient included."""
    a, b = find(rows, case, ours), find(rows, case, theirs)
    if a is None or b is None or not isinstance(a.memory, Memory) or not isinstance(b.memory, Memory):
        return None
    return a.memory.total / b.memory.total
