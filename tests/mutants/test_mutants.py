"""Deliberately wrong losses, each a line away from the right one, and the tests of the suite that must fail on it.

A mutant that no test notices would mean a test that cannot fail. A mutant that crashes proves nothing, so that only
failed comparisons count. Each mutant is a file of this folder; ``run.py`` gives each a pytest of its own.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.mutants.mutant import HERE, changed, load, names
from tests.mutants.run import RIGHT

ROOT = HERE.parents[1]
SECONDS = 900.0  # a bound for what hangs; a minute on two free cores
LEAST = 10

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("mutants")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "NEMO_EAFT_"))}
    command = [sys.executable, "-m", "tests.mutants.run", str(folder)]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert process.returncode == 0, process.stdout + process.stderr
    found: Results = {}
    for name in (RIGHT, *names()):
        output = (folder / f"{name}.txt").read_text()[-3000:]
        outcome = folder / f"{name}.json"
        found[name] = {"output": output, **(json.loads(outcome.read_text()) if outcome.exists() else {})}
    return found


def test_the_right_loss_passes_every_test_that_a_mutant_fails(results: Results) -> None:
    right = results[RIGHT]
    assert right.get("code") == 0, right["output"]
    named = {test for name in names() for test in load(name).caught_by}
    assert right["tests"].keys() == named
    for counts in right["tests"].values():
        assert counts["passed"] > 0
        assert counts["failed"] == counts["broke"] == 0


@pytest.mark.parametrize("name", names())
def test_the_suite_fails_on_a_wrong_loss(name: str, results: Results) -> None:
    mutant, outcome = load(name), results[name]
    assert outcome.get("code") == pytest.ExitCode.TESTS_FAILED, outcome["output"]
    for test in mutant.caught_by:
        assert outcome["tests"][test]["failed"] > 0, outcome["output"]


def test_there_are_enough_mutants_and_each_is_a_change_of_its_own() -> None:
    mutants = [load(name) for name in names()]
    assert len(mutants) >= LEAST
    sources = {m.module: (ROOT / "nemo_eaft" / (m.module.replace(".", "/") + ".py")).read_text() for m in mutants}
    assert len({changed(mutant, sources[mutant.module]) for mutant in mutants}) == len(mutants)
    assert all(mutant.caught_by for mutant in mutants)
