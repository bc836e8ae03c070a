"""Tests marked ``gpu``: skipped where there is no CUDA device, and always counted at the end of the run."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line that cannot be overlooked: a green run without a GPU has not run these."""
    counts = {
        outcome: sum(
            "gpu" in report.keywords and (outcome != "passed" or report.when == "call")
            for report in terminalreporter.getreports(outcome)
        )
        for outcome in ("passed", "failed", "error", "skipped")
    }
    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no CUDA device here"
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "none selected"
    terminalreporter.write_sep("-", f"tests marked gpu: {told} ({where})")
