"""``metrics.jsonl``: one JSON object a line, one line a step, written by rank 0 alone.

A step's line has the keys of ``STEP_KEYS``, a validation's has ``step`` and ``val_loss``. ``step`` counts
finished optimizer steps: the first line of a run is step 1, a validation before training is step 0.

The JSON is strict. A value that is NaN or infinite is written as ``null``: the line of the step at which a
run diverged is the one its owner needs most, and ``NaN`` would make the file unreadable to everything but
Python.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from nemo_eaft.atomic import numbered, replacing
from nemo_eaft.metrics import StepMetrics

STEP_KEYS = (
    "step",
    "loss",
    "cross_entropy",
    "entropy",
    "weight",
    "conflict_fraction",
    "tokens",
    "tokens_per_second",
    "learning_rate",
    "seconds",
)
"""Keys of a step's line, in the order they are written."""

Row = dict[str, Any]
"""One line: ``step`` int, ``tokens`` int, every other value float, or None where it was not finite."""


class MetricsFile:
    """The file, open for appending. One process only (rank 0); the parent folder is created if missing.

    Args:
        path: the file; it need not exist.
        start_step: the step the run continues from, 0 for a new run; see :func:`drop_after`.

    Raises:
        ValueError: ``start_step`` is negative, or a line other than an unfinished last one is not a row.
    """

    def __init__(self, path: Path, *, start_step: int = 0) -> None:
        if start_step < 0:
            raise ValueError(f"start_step must be >= 0, got {start_step}")
        self.path = Path(path)
        self._step = start_step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        drop_after(self.path, start_step)
        # Unbuffered: each line is one write(), on its way to the disk before append returns, so a reader
        # beside the run sees whole lines and a killed run loses none.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open for the life of the object)

    def append_step(
        self,
        step: int,
        metrics: StepMetrics,
        *,
        tokens_per_second: float,
        learning_rate: float,
        seconds: float,
    ) -> None:
        """Write the line of a finished step.

        Args:
            step: finished optimizer steps, this one included; larger than every step before.
            metrics: of the global batch; loss, cross entropy and entropy in nats per token.
            tokens_per_second: valid tokens of the global batch divided by ``seconds``.
            learning_rate: the one this step used.
            seconds: wall time of this step.
        """
        assert step > self._step, f"step {step} does not follow step {self._step}"
        self._step = step
        timing = {"tokens_per_second": tokens_per_second, "learning_rate": learning_rate, "seconds": seconds}
        row = {"step": step} | metrics.as_dict() | timing
        assert tuple(row) == STEP_KEYS, tuple(row)
        self._append(row)

    def append_validation(self, step: int, val_loss: float) -> None:
        """Write a validation's line: plain cross-entropy, nats per token, after ``step`` optimizer steps."""
        assert step >= self._step, f"validation at step {step} comes after step {self._step}"
        self._append({"step": step, "val_loss": val_loss})

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, row: Mapping[str, float]) -> None:
        line = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def drop_after(path: Path, step: int) -> Path | None:
    """Take the lines of later steps out of a file: their work was lost and is done again.

    They are kept in ``<stem>.<number>.jsonl`` beside it, the oldest being 1. A last line that a killed process did not
    finish is dropped. What stays takes its place in one rename: no crash can lose a line.

    Returns:
        The file that they went to; None if there were none.

    Raises:
        ValueError: a line other than an unfinished last one is not a row; nothing was changed then.
    """
    if not path.exists():
        return None
    content = path.read_bytes()
    lines = [(line + b"\n", row["step"] <= step) for line, row in _parse(content, path)]
    kept, dropped = (b"".join(line for line, stays in lines if stays == which) for which in (True, False))
    aside = None
    if dropped:
        aside = numbered(path)
        with replacing(aside) as temporary:
            temporary.write_bytes(dropped)
    if kept != content:
        with replacing(path) as temporary:
            temporary.write_bytes(kept)
    return aside


def read(path: Path) -> list[Row]:
    """Read the rows back, steps and validations in the order they were written.

    A last line that is not finished (the run writes at this moment, or was killed) is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is not a JSON object with a ``step``; names file and line.
    """
    return [row for _, row in _parse(Path(path).read_bytes(), Path(path))]


def _parse(content: bytes, path: Path) -> list[tuple[bytes, Row]]:
    # split(b"\n") and not splitlines(): only the newline ends a row. What follows the last newline is the
    # unfinished line, or a whole one that lacks nothing but its newline (no proper beginning of a JSON
    # object is one itself).
    *lines, last = content.split(b"\n")
    rows = [(line, _parse_line(line, path, number)) for number, line in enumerate(lines, start=1)]
    with suppress(ValueError):
        rows.append((last, _parse_line(last, path, len(lines) + 1)))
    return rows


def _parse_line(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: not strict JSON: {error}") from error
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError(f"{path}:{number}: not an object with an integer step")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
