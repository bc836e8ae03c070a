"""Runs pytest once for each mutant, in a fork of one process that has imported everything but the package.

    python -m tests.mutants.run FOLDER [MUTANT ...]

writes FOLDER/NAME.json for each, and for ``right``, the package as it is, with every test that some mutant names.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis  # noqa: F401
import pytest
import torch
import torch.testing._internal.distributed.multi_threaded_pg

from tests.mutants.mutant import install, load, names

TESTS = Path(__file__).parents[1]
RIGHT = "right"
AT_ONCE = 2
# How a comparison fails: assert and assert_close, pytest.raises without an exception, gradcheck.
_COMPARISONS = ("AssertionError", "Failed", "GradcheckError")


class Outcomes:
    """Of each test function ``file::name``, how often it passed, failed by a comparison, or broke."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, int]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if report.skipped or (report.passed and report.when != "call"):
            return report
        name = f"{item.path.relative_to(TESTS)}::{getattr(item, 'originalname', item.name)}"
        counts = self.tests.setdefault(name, {"passed": 0, "failed": 0, "broke": 0})
        kind = "passed"
        if call.excinfo is not None:
            kind = "failed" if _by_comparison(call.excinfo.typename, str(call.excinfo.value)) else "broke"
        counts[kind] += 1
        return report


def _by_comparison(exception: str, text: str) -> bool:
    if exception == "RuntimeError" and text.startswith("a rank failed"):
        # The harness quotes the rank's traceback, whose last unindented line with a colon names the exception.
        last = [line for line in text.splitlines() if line[:1].isalpha() and ":" in line.split(" ")[0] + " "]
        exception = next((kind for line in reversed(last) for kind in _COMPARISONS if kind in line.split(":")[0]), "")
    return exception in _COMPARISONS


def run(name: str, folder: Path) -> None:
    """In the fork: pytest with this mutant, and what became of each test."""
    if name == RIGHT:
        tests = sorted({test for mutant in names() for test in load(mutant).caught_by})
    else:
        mutant = load(name)
        tests = list(mutant.caught_by)
        install(mutant)
    outcomes = Outcomes()
    arguments = ["-q", "-p", "no:cacheprovider", "--no-header", *(str(TESTS / test) for test in tests)]
    code = pytest.main(arguments, plugins=[outcomes])
    (folder / f"{name}.json").write_text(json.dumps({"code": int(code), "tests": outcomes.tests}))


def main(folder: Path, chosen: list[str]) -> None:
    torch.set_num_threads(1)
    waiting, running = list(reversed(chosen)), set[int]()
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name = waiting.pop()
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    output = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(output, 1)
                    os.dup2(output, 2)
                    run(name, folder)
                    code = 0
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            running.add(child)
        ended, _ = os.wait()
        running.discard(ended)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or [RIGHT, *names()])
