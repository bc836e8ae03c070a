"""Made-up inputs and lines of the study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.forgetting.facts import CAPITALS
from benchmarks.forgetting.inputs import Inputs
from benchmarks.forgetting.results import BASE, Line, Wanted
from benchmarks.forgetting.training import KINDS
from nemo_eaft.compare.record import Sums, to_json

KNOWN = dict.fromkeys(list(CAPITALS)[:24], 0.9)
ENTROPY = {country: 0.1 + 0.01 * number for number, country in enumerate(KNOWN)}
INPUTS = Inputs(
    KNOWN, ENTROPY, 92, [[0, 5, 6, 7], [0, 9, 8, 7, 6]], {f"What is {n}?": f"It is {n}." for n in range(30)}
)


def line(
    wanted: Wanted,
    target: float | Sequence[float] = 1.0,
    drift: float = 0.1,
    mass: dict[str, tuple[float, float, float]] | None = None,
) -> Line:
    """A run with a checkpoint every 40 steps for each target; at the last one it has forgotten as much as is said."""
    targets = [target] if isinstance(target, float) else list(target)
    pushes = {"sft": (2.0, 1.0, 0.5), "eaft": (2.0, 1.0, 0.5), "own": (2.0, 1.0, 0.5), "tokens": (8.0, 2.0, 1.0)}
    pushes |= mass or {}
    points: list[dict[str, Any]] = []
    for number, each in enumerate(targets, start=1):
        forgot = drift * number / len(targets)
        measures = {
            "target": Sums((each, each), (1, 1)),
            "exact": Sums((0.0, 1.0), (1, 1)),
            "drift": Sums((forgot, forgot / 2), (1, 1)),
            "text": Sums((2.0 + forgot, 2.0), (1, 1)),
            "probe": Sums((1.0, 1.0 if forgot < 0.5 else 0.0), (1, 1)),
            "answer": Sums((forgot, forgot), (1, 1)),
        }
        point = {"step": 40 * number if wanted.method != BASE else 0, "measures": to_json(measures)}
        if wanted.method != BASE:
            point["mass"] = {name: dict(zip(KINDS, pushed, strict=True)) for name, pushed in pushes.items()}
        points.append(point)
    return Line(
        wanted.setting, wanted.method, wanted.learning_rate, wanted.seed, {}, points, "CPU", {"torch": "2"}, "d",
        {"training": 90.0, "measuring": 30.0},
    )  # fmt: skip
