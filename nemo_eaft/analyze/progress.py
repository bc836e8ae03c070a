"""How far an analysis is, for who watches: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from nemo_eaft.progress import format_duration

SAY_EVERY = 30.0
"""Seconds between two lines in a log, at least."""


class Progress:
    """On rank 0; both go to the standard error.

    Args:
        rows: of the whole analysis.
        done: rows of earlier starts.
        clock: seconds.
    """

    def __init__(self, rows: int, done: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._rows, self._before, self._clock = rows, done, clock
        self._started = self._said = clock()
        self._bar: Any = None
        self._task: Any = None

    def begin(self) -> None:
        """The model is there: from now on it is timed."""
        self._started = self._said = self._clock()

    def show(self, done: int, read: int) -> None:
        """`done` rows are counted, those of earlier starts among them; `read` tokens were read since `begin`."""
        seconds = self._seconds()
        if sys.stderr.isatty():
            self._show_bar(done, f"{read / seconds:.0f} tokens/s")
        elif self._clock() - self._said >= SAY_EVERY:
            self._said = self._clock()
            left = seconds * (self._rows - done) / max(done - self._before, 1)
            print(
                f"analyze: {done}/{self._rows} rows, {read / seconds:.0f} tokens/s, {format_duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self, done: int, read: int) -> None:
        """Leave the bar as it is, and say how fast it went."""
        if self._bar is not None:
            self._bar.stop()
        if done > self._before:
            seconds, rows = self._seconds(), done - self._before
            print(f"analyze: {rows} rows, {read} tokens in {seconds:.1f} s: {read / seconds:.0f} tokens/s", flush=True)

    def _seconds(self) -> float:
        return max(self._clock() - self._started, 1e-6)

    def _show_bar(self, done: int, rate: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        if self._bar is None:
            columns = ("analyze", BarColumn(), MofNCompleteColumn(), "rows", TextColumn("{task.fields[rate]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._rows, completed=self._before, rate="")
            self._bar.start()
        self._bar.update(self._task, completed=done, rate=rate)
