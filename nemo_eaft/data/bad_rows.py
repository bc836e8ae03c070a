"""What is said of the rows of a source that cannot be used."""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

_log = logging.getLogger(__name__)
_SHOWN = 10
_LONGEST_REASON = 160


@dataclass
class BadRows:
    """Collects them, and reports them once all rows are read."""

    source: str
    """For messages: ``data.train=train.jsonl``."""
    count: int = 0
    first: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, why: str) -> None:
        """One more."""
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"  {where}: {why}")
        # One reason for all rows of which only numbers and what is quoted differ.
        alike = re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", why))
        self.reasons[alike[:_LONGEST_REASON]] += 1

    def report(self, good: int, on_bad_row: Literal["error", "skip"]) -> None:
        """Say what there was, if there was any.

        Args:
            good: rows that can be used.
            on_bad_row: ``data.on_bad_row``.

        Raises:
            ValueError: bad rows that are not to be skipped, or no good ones.
        """
        total = good + self.count
        if total == 0:
            raise ValueError(f"{self.source}: there are no rows")
        if not self.count:
            return
        more = self.count - len(self.first)
        listed = "\n".join([*self.first, f"  and {more} more"] if more else self.first)
        said = f"{self.source}: {self.count} of {total} rows cannot be used\n{listed}"
        if on_bad_row == "error":
            raise ValueError(f"{said}\n(data.on_bad_row=skip leaves such rows out)")
        if good == 0:
            raise ValueError(said)
        _log.warning("%s\n  left out because data.on_bad_row=skip", said)
        if self.count > good:
            why = "\n".join(f"  {count} rows: {reason}" for reason, count in self.reasons.most_common(_SHOWN))
            _log.warning(
                "MORE THAN HALF of %s IS LEFT OUT: %d of %d rows. What remains may be another data set than the one "
                "that was meant. The reasons, most frequent first:\n%s", self.source, self.count, total, why,
            )  # fmt: skip
