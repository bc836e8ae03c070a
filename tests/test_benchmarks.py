"""The benchmark: it stops on red, finds who is wrong, compares right, and writes what it says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import memory, peers
from benchmarks.__main__ import main
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.check import error_of
from benchmarks.contenders import BY_NAME, CONTENDERS, Contender, contenders_of
from benchmarks.gate import KERNEL_TESTS, run_tests
from benchmarks.memory import Memory
from benchmarks.plan import COMPILED, Step
from benchmarks.runner import run
from benchmarks.targets import TARGETS
from nemo_eaft import EAFTConfig
from nemo_eaft.loss.reference import reference_loss

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = Case(tokens=16, vocab=512, dtype="float32")
LINEAR = Case(tokens=16, vocab=512, hidden=32, dtype="float32")

GREEN = "def test_green():\n    pass\n"
RED = "def test_green():\n    pass\n\n\ndef test_red():\n    assert False\n"


def written(folder: Path, text: str) -> str:
    path = folder / "test_of_the_gate.py"
    path.write_text(text)
    return str(path)


# --- command line ---


def test_help_and_wrong_arguments() -> None:
    def called(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    shown = called("--help")
    assert shown.returncode == 0
    assert all(word in shown.stdout for word in ("--quick", "--device", "--only", "--out"))
    # There is no way round the tests.
    assert called("--skip-tests").returncode == 2


def test_an_unknown_contender_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "ligre"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "no contender 'ligre'" in said
    assert "liger" in said


# --- the gate ---


def test_nothing_is_measured_on_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("measured although a test failed")

    monkeypatch.setattr("benchmarks.runner.time_contenders", never)
    monkeypatch.setattr("benchmarks.machine.copy_bandwidth", never)
    said: list[str] = []
    out = tmp_path / "out"
    status = run([Step(SMALL, 1)], CPU, out, tests=[written(tmp_path, RED)], say=said.append)
    assert status == 1
    assert not out.exists()
    assert any("test_of_the_gate.py::test_red" in line for line in said)
    assert not any("test_green" in line or "MB" in line for line in said)


def test_a_missing_file_of_tests_is_red(tmp_path: Path) -> None:
    gate = run_tests([str(tmp_path / "test_nowhere.py")])
    assert not gate.passed
    assert "test_nowhere.py" in " ".join(gate.failures)


def test_the_gate_names_the_kernel_tests() -> None:
    assert {
        "test_vocab_parallel.py",
        "test_kernels.py",
        "test_linear.py",
        "test_linear_adapter.py",
        "test_topk.py",
    } == {Path(name).name for name in KERNEL_TESTS}


# --- who is right ---


@pytest.mark.parametrize("top_k", [20, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_peers_formula_is_eaft(dtype: torch.dtype, top_k: int) -> None:
    case = dataclasses.replace(SMALL, top_k=top_k)
    drawn = make_inputs(case, CPU)
    logits = drawn.tensors[0].detach().to(dtype).requires_grad_()
    # Its .float() makes float64 logits float32.
    rtol, atol = 2e-6, 1e-6
    theirs = peers.peers_eaft(Inputs((logits,), drawn.labels), case)
    ours = reference_loss(
        logits, drawn.labels, torch.ones_like(drawn.labels).bool(), EAFTConfig(top_k=top_k), case.width
    )
    torch.testing.assert_close(theirs.to(dtype), ours.loss.to(dtype), rtol=rtol, atol=atol)
    upstream = torch.linspace(0.5, 1.5, case.tokens)
    (mine,) = torch.autograd.grad(ours.loss, logits, upstream.to(ours.loss.dtype))
    (other,) = torch.autograd.grad(theirs, logits, upstream)
    torch.testing.assert_close(other, mine, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", [each.name for each in CONTENDERS if each.ours or each.name in ("peers-eaft", "megatron")]
)
def test_the_check_passes_who_is_right(name: str, dtype: str) -> None:
    contender = BY_NAME[name]
    case = dataclasses.replace(SMALL if contender.kind == "logits" else LINEAR, dtype=dtype)
    if (reason := contender.unavailable(case, CPU)) is not None:
        pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert error_of(contender, case, CPU) is None


def altered(name: str, change: str) -> Contender:
    """A contender of which one thing is wrong."""
    true = BY_NAME[name]

    def forward(inputs: Inputs, case: Case) -> Tensor:
        if change == "upstream":
            # The mean of the upstream gradients for each token.
            return _OneForAll.apply(true.forward(inputs, case))
        loss = true.forward(inputs, case)
        if change == "loss":
            return loss * 1.0001
        first = inputs.tensors[0].sum(-1)
        return loss + 1e-4 * (first - first.detach())

    return dataclasses.replace(true, forward=forward)


class _OneForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.mean().expand_as(grad)


@pytest.mark.parametrize("change", ["loss", "gradient", "upstream"])
@pytest.mark.parametrize("name", ["eaft", "eaft-linear"])
def test_the_check_finds_who_is_wrong(name: str, change: str) -> None:
    case = SMALL if name == "eaft" else LINEAR
    error = error_of(altered(name, change), case, CPU)
    assert error is not None
    assert error.startswith("wrong: the loss" if change == "loss" else "wrong: the gradient")


def test_wrong_peers_are_told_and_wrong_ours_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    green = written(tmp_path, GREEN)
    monkeypatch.setattr("benchmarks.machine.copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr("benchmarks.memory.measure_in_new_process", lambda name, cases: ["not asked"] * len(cases))
    monkeypatch.setattr("benchmarks.runner.run_tests", lambda tests: run_green())

    def run_green():
        from benchmarks.gate import Gate

        return Gate(True, "1 passed", [])

    def status(names: tuple[str, ...], changed: str, out: Path) -> tuple[int, str]:
        wrong = altered(changed, "loss")
        monkeypatch.setattr(
            "benchmarks.runner.contenders_of",
            lambda case, only: [wrong if each.name == changed else each for each in contenders_of(case, names)],
        )
        said: list[str] = []
        done = run([Step(SMALL, 2)], CPU, out, tests=[green], say=said.append)
        return done, "\n".join(said)

    done, said = status(("eaft", "peers-eaft"), "peers-eaft", tmp_path / "peer")
    assert done == 0
    assert re.search(r"peers' EAFT formula.*\| wrong: the loss is off by", said)
    (path,) = (tmp_path / "peer").glob("*.json")
    rows = {each["contender"]: each for each in json.loads(path.read_text())["rows"]}
    assert "ms" in rows["eaft"]
    assert "ms" not in rows["peers-eaft"]

    done, said = status(("eaft", "peers-eaft"), "eaft", tmp_path / "ours")
    assert done == 1
    assert "our own loss is wrong" in said
    assert not (tmp_path / "ours").exists()


def test_the_unavailable_say_why() -> None:
    for contender in CONTENDERS:
        case = SMALL if contender.kind == "logits" else LINEAR
        reason = contender.unavailable(case, CPU)
        if contender.gpu_only:
            assert reason is not None
            assert "not installed" in reason or "need a GPU" in reason
        if contender.ours:
            assert reason is None
    assert peers.missing("no_such_package_of_anyone") == "no_such_package_of_anyone is not installed"
    full = dataclasses.replace(SMALL, top_k=None)
    assert BY_NAME["peers-eaft"].unavailable(full, CPU) == "has the top-K entropy only"


def test_a_reason_holds_no_path() -> None:
    error = RuntimeError(f"\n{ROOT}/benchmarks/peers.py: no compiler on {os.uname().nodename}\nmore")
    assert peers.describe(error) == "RuntimeError: peers.py: no compiler on localhost"


# --- the whole ---


def test_peak_memory_of_a_process() -> None:
    """The gradient out of place has the size of the logits, here 34 MB; in place there is none."""
    case = Case(tokens=64, vocab=131072, dtype="float32")
    size = 64 * 131072 * 4
    (out_of_place,) = memory.measure_in_new_process("eaft", [case])
    (in_place,) = memory.measure_in_new_process("eaft-inplace", [case])
    assert isinstance(out_of_place, Memory), out_of_place
    assert isinstance(in_place, Memory), in_place
    assert out_of_place.inputs == in_place.inputs == size
    assert size <= out_of_place.extra
    # Both have the same blocks and records; the difference is the gradient.
    assert out_of_place.extra - in_place.extra == pytest.approx(size, rel=0.25)


def test_a_small_run_writes_its_three_files(tmp_path: Path) -> None:
    said: list[str] = []
    steps = [Step(dataclasses.replace(SMALL, vocab=1024, shards=2), 3, COMPILED), Step(LINEAR, 2)]
    only = ("eaft", "peers-eaft", "megatron-fused", "liger", "eaft-linear")
    status = run(steps, CPU, tmp_path, only=only, tests=[written(tmp_path, GREEN)], say=said.append)
    assert status == 0, said
    (data,) = tmp_path.glob("*.json")
    (table,) = tmp_path.glob("*.md")
    (figure,) = tmp_path.glob("*.png")
    assert re.fullmatch(r"[a-z0-9-]+-\d{4}-\d\d-\d\d", data.stem)
    assert data.stem == table.stem == figure.stem
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    result = json.loads(data.read_text())
    assert result["kernel_tests"].startswith("1 passed")
    assert result["copy_bytes_per_second"] > 0
    assert {"torch", "triton", "megatron-core", "liger-kernel"} <= set(result["versions"])
    assert len(result["targets"]) == len(TARGETS)
    rows = {each["contender"]: each for each in result["rows"]}
    assert set(rows) == set(only)
    assert re.search("left out|not installed", rows["megatron-fused"]["reason"])
    assert re.search("need a GPU|not installed", rows["liger"]["reason"])
    for name, rounds in (("eaft", 3), ("peers-eaft", 3), ("eaft-linear", 2)):
        mine = rows[name]
        assert len(mine["rounds_ms"]) == rounds
        for part in ("forward", "backward", "sum"):
            times = mine["ms"][part]
            assert 0 < times["low"] <= times["median"] <= times["high"]
        assert mine["memory_bytes"]["total"] >= mine["memory_bytes"]["inputs"] > 0
        assert ("bytes_per_logit" in mine) == (name != "eaft-linear")

    text = table.read_text()
    assert "a TP2 shard of 1024, no collective" in text
    assert text == said[-2]
    for everything in (text, data.read_text()):
        assert os.uname().nodename not in everything
        assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|usr)/", everything)
