"""What a rehearsal found: for people, and for ``--json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nemo_eaft.plan.rehearsal.checks import Check, memory_by_stage
from nemo_eaft.plan.rehearsal.records import Built
from nemo_eaft.settings import Settings

_SHOWN = 5
"""Faults of one check that are printed; ``--json`` has all of them."""


@dataclass(frozen=True)
class Rehearsal:
    """What was built, and whether it is what was planned."""

    settings: Settings
    built: Built
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check found a fault."""
        return not any(each.faults for each in self.checks)

    def as_mapping(self) -> dict[str, Any]:
        """For JSON. Bytes are those of the fullest rank of each stage."""
        return {
            "passed": self.passed,
            "ranks_built": len(self.built.ranks),
            "world_size": self.settings.world_size,
            "parameters": self.built.whole.hf_parameters,
            "bytes_by_stage": [sizes for _, sizes in sorted(memory_by_stage(self.built.ranks).items())],
            "seconds": round(self.built.seconds, 1),
            "peak_rss_gb": round(self.built.peak_bytes / 1e9, 2),
            "checks": [asdict(each) for each in self.checks],
        }

    def lines(self) -> list[str]:
        """One line for each check, and one for each fault."""
        built = self.built
        lines = [
            f"rehearsal: {len(built.ranks)} kinds of rank of {self.settings.world_size} built on the meta device in "
            f"{built.seconds:.0f} s, {built.peak_bytes / 1e9:.1f} GB"
        ]
        for each in self.checks:
            lines.append(f"  {'FAILED' if each.faults else 'ok':<6}  {each.name:<10}  {each.compared}")
            lines += [f"            {fault}" for fault in each.faults[:_SHOWN]]
            if len(each.faults) > _SHOWN:
                lines.append(f"            and {len(each.faults) - _SHOWN} more")
        return lines
