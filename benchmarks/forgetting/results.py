"""One JSON line for each finished run, and one for the base model, in a file for each setting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_eaft.compare.record import Measures, from_json
from nemo_eaft.compare.record import Path as Course


@dataclass(frozen=True)
class Wanted:
    """One run to be made."""

    setting: str
    method: str
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Line:
    """What is written of a run; of the base model too, with ``method`` "base" and one point."""

    setting: str
    method: str
    learning_rate: float
    seed: int
    config: dict[str, Any]
    points: list[dict[str, Any]]
    """``step``, ``measures`` and, but for the base model, ``mass``."""
    device: str
    versions: dict[str, str]
    digest: str
    """Of everything that is trained and measured on."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.setting, self.method, self.learning_rate, self.seed)


class WrongInput(ValueError):
    """What the user can put right; any other error is one of ours."""


BASE = "base"
FOLDER = Path(__file__).parent / "results"


def read(folder: Path, setting: str) -> list[Line]:
    """The lines of a setting; a last one that a killed process left half-written is passed over.

    Raises:
        WrongInput: another line cannot be read.
    """
    path = folder / f"{setting}.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    found = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            found.append(Line(**json.loads(text)))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break  # nothing ends it: it was being written
            raise WrongInput(f"{path}, line {number}: {error}") from error
    return found


def append(folder: Path, line: Line) -> None:
    """Add a line, after taking away what a killed process left of another."""
    path = folder / f"{line.setting}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write((json.dumps(asdict(line), separators=(",", ":")) + "\n").encode())


def measures_of(line: Line, number: int) -> Measures:
    return from_json(line.points[number]["measures"])


def courses(lines: Sequence[Line]) -> list[Course]:
    """The runs of a setting as paths from the base model; empty without the base model's line."""
    base = next((line for line in lines if line.method == BASE), None)
    if base is None:
        return []
    start = measures_of(base, 0)
    return [
        Course(
            f"{line.method}, {line.learning_rate:g}, seed {line.seed}",
            line.method,
            line.learning_rate,
            line.seed,
            (0, *(point["step"] for point in line.points)),
            (start, *(measures_of(line, number) for number in range(len(line.points)))),
        )
        for line in lines
        if line.method != BASE
    ]
