"""The tests that must be green before any figure is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.machine import ROOT

KERNEL_TESTS: tuple[str, ...] = (
    "tests/loss/test_vocab_parallel.py",
    "tests/loss/test_kernels.py",
    "tests/loss/test_linear.py",
    "tests/loss/test_linear_adapter.py",
    "tests/loss/test_topk.py",
)


class Gate(NamedTuple):
    passed: bool
    summary: str
    """pytest's last line, such as ``12 passed in 3.4s``."""

    failures: list[str]
    """Failed tests, or what kept pytest from running any."""


def run_tests(paths: Sequence[str] = KERNEL_TESTS) -> Gate:
    """pytest over the files, in a process of its own. A file that does not exist is a failure, and so is a
    run in which no test passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    summary = next((line.strip("= ") for line in reversed(lines) if re.search(r"\d+ \w+.* in ", line)), "no tests ran")
    failures = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    passed = done.returncode == 0 and " passed" in f" {summary}"
    if not passed and not failures:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        failures = said[-3:] or [summary]
    return Gate(passed, summary, [] if passed else failures)
