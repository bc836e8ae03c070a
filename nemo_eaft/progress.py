"""The line a user watches while training, and the estimate of when it ends."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from nemo_eaft.metrics import StepMetrics


def format_progress(
    step: int, max_steps: int, metrics: StepMetrics, tokens_per_second: float, eta_seconds: float | None
) -> str:
    """One line on one step, without a newline.

    Example::

        step 12/60  loss 0.412  ce 0.671  weight 0.58  entropy 1.21  conflicts 1.9%  812 tok/s  ETA 3m10s

    Args:
        step: finished optimizer steps, padded to the width of ``max_steps`` so that columns line up.
        max_steps: the step at which the run ends.
        metrics: of the step's global batch; loss, ce and entropy are printed in nats per token.
        tokens_per_second: valid tokens of the global batch per second.
        eta_seconds: remaining time; None while it is unknown, printed as ``ETA ?``.
    """
    return "  ".join(
        (
            f"step {step:{len(str(max_steps))}d}/{max_steps}",
            f"loss {metrics.loss:.3f}",
            f"ce {metrics.cross_entropy:.3f}",
            f"weight {metrics.weight:.2f}",
            f"entropy {metrics.entropy:.2f}",
            f"conflicts {100 * metrics.conflict_fraction:.1f}%",
            f"{format_count(tokens_per_second)} tok/s",
            f"ETA {'?' if eta_seconds is None else format_duration(eta_seconds)}",
        )
    )


def format_duration(seconds: float) -> str:
    """A time >= 0 in its two largest units: ``9s``, ``3m10s``, ``2h05m``, ``1d03h``; ``?`` if not finite."""
    if not math.isfinite(seconds):
        return "?"
    assert seconds >= 0, f"a duration of {seconds} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def format_count(count: float) -> str:
    """A number in about three digits: ``3.4``, ``812``, ``12.3k``, ``1.24M``; ``?`` if not finite."""
    if not math.isfinite(count):
        return "?"
    # The bounds are those at which rounding would need another digit: 999.6 is 1.00k, not 1000.
    if abs(count) < 9.95:
        return f"{count:.1f}"
    if abs(count) < 999.5:
        return f"{count:.0f}"
    for unit, scale in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        value = count / scale
        if abs(value) < 999.5 or unit == "G":
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f}{unit}"
    raise AssertionError("unreachable: G takes every count")


class Pace:
    """How long a step takes, to tell how long the rest will.

    The estimate is the median of the last ``window`` steps: the first step (compilation, caches) and those
    that wait for a checkpoint or a validation do not move it.
    """

    def __init__(self, window: int = 32) -> None:
        assert window >= 1, window
        self._seconds: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        """Note the wall time of a finished step."""
        self._seconds.append(seconds)

    def eta_seconds(self, step: int, max_steps: int) -> float | None:
        """Seconds until ``max_steps``, after ``step`` finished ones; None before the first :meth:`add`."""
        if not self._seconds:
            return None
        return median(self._seconds) * max(max_steps - step, 0)
