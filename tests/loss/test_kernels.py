"""The Triton kernels: in the interpreter, compiled for an H100, and on a GPU where there is one.

Triton decides when it is first imported whether its kernels are interpreted, so each file of cases runs in a pytest of
its own: ``kernel_cases.py`` (numbers), ``kernel_topk_cases.py`` (2,000 configurations of the K largest values),
``kernel_mutant_cases.py`` (wrong variants) and ``kernel_compile_cases.py`` (the compiler, without a device). Two run at
a time. To run one by hand:

    TRITON_INTERPRET=1 python -m pytest tests/loss/kernel_cases.py
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INTERPRETED = ["kernel_topk_cases.py", "kernel_cases.py", "kernel_mutant_cases.py"]
COMPILED = "kernel_compile_cases.py"
LEAST_CASES = {
    "kernel_cases.py": 90,
    "kernel_topk_cases.py": 17,
    "kernel_mutant_cases.py": 13,
    "kernel_compile_cases.py": 20,
}
SECONDS = 280.0

Run = subprocess.CompletedProcess[str]


def start(cases: str, folder: Path, interpreted: bool) -> Run:
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "NEMO_EAFT_BACKEND")}
    # Nothing that an earlier run compiled.
    env["TRITON_CACHE_DIR"] = str(folder)
    if interpreted:
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(HERE / cases)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Run]]]:
    """The runs that need no GPU, started together."""
    with ThreadPoolExecutor(2) as pool:
        started = {}
        for cases in (*INTERPRETED, COMPILED):
            folder = tmp_path_factory.mktemp("triton")
            started[cases] = pool.submit(start, cases, folder, cases in INTERPRETED)
        yield started


def assert_passed(run: Run, cases: str) -> None:
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert passed is not None, run.stdout
    assert int(passed[1]) >= LEAST_CASES[cases], f"only {passed[0]}: {run.stdout}"


@pytest.mark.slow
@pytest.mark.parametrize("cases", INTERPRETED)
def test_in_the_interpreter(cases: str, runs: dict[str, "Future[Run]"]) -> None:
    assert_passed(runs[cases].result(), cases)


@pytest.mark.slow
def test_compiled_for_an_h100(runs: dict[str, "Future[Run]"]) -> None:
    assert_passed(runs[COMPILED].result(), COMPILED)


@pytest.mark.gpu
@pytest.mark.parametrize("cases", INTERPRETED)
def test_on_a_gpu(cases: str, tmp_path: Path) -> None:
    assert torch.cuda.is_available()
    assert_passed(start(cases, tmp_path, interpreted=False), cases)


def test_the_interpreter_really_runs_the_kernels() -> None:
    """A kernel that is interpreted is of another class than one that is compiled."""
    code = (
        "import tests.loss.kernel_passes as passes\n"
        "from nemo_eaft.loss import kernels, selection\n"
        "from triton.runtime.interpreter import InterpretedFunction\n"
        "used = (kernels._statistics, kernels._gradient, kernels._accumulate, selection.selection)\n"
        "assert all(isinstance(kernel, InterpretedFunction) for kernel in used)\n"
        "assert passes.DEVICE == 'cpu'\n"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
