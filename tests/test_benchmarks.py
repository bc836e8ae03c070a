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

from benchmarks import memory, peers, timing
from benchmarks.__main__ import main
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.check import error_of
from benchmarks.contenders import BY_NAME, CONTENDERS, Contender, contenders_of
from benchmarks.gate import KERNEL_TESTS, run_tests
from benchmarks.memory import Memory
from benchmarks.plan import COMPILED, Step, plan
from benchmarks.results import Row, memory_ratio, time_ratio
from benchmarks.runner import run
from benchmarks.targets import TARGETS, evaluate
from benchmarks.timing import Round, paired_ratio, spread
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


def row(contender: str, rounds: list[tuple[float, float]], extra: int | None = None, case: Case = SMALL) -> Row:
    size = case.logits * case.torch_dtype.itemsize
    held = None if extra is None else Memory(inputs=size, extra=extra, gradients=size, method="test")
    return Row(case=case, contender=contender, rounds=[Round(*each) for each in rounds], memory=held)


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
    assert {"test_vocab_parallel.py", "test_kernels.py", "test_linear.py", "test_topk.py"} == {
        Path(name).name for name in KERNEL_TESTS
    }


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


# --- figures ---


def test_a_ratio_is_of_the_same_round() -> None:
    # The machine became ten times slower after the second round; both medians alone would say 0.1 or 10.
    ours = [(1.0, 1.0), (1.0, 1.0), (10.0, 10.0)]
    theirs = [(2.0, 2.0), (2.0, 2.0), (20.0, 20.0)]
    rows = [row("eaft", ours), row("megatron", theirs), row("liger", [])]
    assert time_ratio(rows, SMALL, "eaft", "megatron") == (0.5, 0.5, 0.5)
    assert time_ratio(rows, SMALL, "eaft", "liger") is None
    assert time_ratio(rows, LINEAR, "eaft", "megatron") is None
    assert paired_ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == (2.0, 1.5, 2.5)
    assert spread([3.0]) == (3.0, 3.0, 3.0)


def test_a_memory_ratio_counts_the_logits() -> None:
    size = SMALL.logits * 4
    # float32: Megatron works in the caller's logits; ours out of place adds a gradient, the peers two copies.
    rows = [row("eaft", [], size), row("megatron", [], 0), row("peers-eaft", [], 2 * size)]
    assert memory_ratio(rows, SMALL, "eaft", "megatron") == 2.0
    assert memory_ratio(rows, SMALL, "eaft", "peers-eaft") == pytest.approx(2 / 3)
    beyond = [each.memory.beyond_gradients for each in rows if isinstance(each.memory, Memory)]
    assert beyond == [0, 0, size]
    # What forward takes is not paid for by gradients that backward makes.
    assert (
        Memory(inputs=size, extra=size, gradients=size, method="test", forward=size // 2).beyond_gradients == size // 2
    )


def test_bytes_per_logit() -> None:
    assert (Case(tokens=1, vocab=8, dtype="bfloat16").limit_bytes, SMALL.limit_bytes) == (6, 12)
    mine = row("eaft", [(1.0, 2.0)], 0)
    plain = mine.as_json(bandwidth=12 * SMALL.logits / 1e-3)
    # 3 ms where the limit is 1 ms.
    assert mine.limit_ms(12 * SMALL.logits / 1e-3) == pytest.approx(1.0)
    assert plain["bytes_per_logit"]["time_as_bytes"] == pytest.approx(36.0)
    assert plain["bytes_per_logit"]["held"] == 4


def test_every_contender_starts_from_the_same_logits() -> None:
    seen: list[float] = []

    def forward(inputs: Inputs, case: Case) -> Tensor:
        (logits,) = inputs.tensors
        seen.append(float(logits.detach().sum()))
        loss = logits.sum(-1)
        with torch.no_grad():
            logits.zero_()
        return loss

    spoiler = dataclasses.replace(BY_NAME["megatron"], name="spoiler", forward=forward)
    other = dataclasses.replace(spoiler, name="other")
    result = timing.time_contenders([spoiler, other], SMALL, CPU, rounds=2)
    assert [len(rounds) for rounds in result.values()] == [2, 2]
    assert len(seen) == 6
    assert len(set(seen)) == 1
    assert seen[0] != 0.0


def test_who_fails_drops_out_with_the_reason() -> None:
    def forward(inputs: Inputs, case: Case) -> Tensor:
        raise RuntimeError("no such kernel")

    broken = dataclasses.replace(BY_NAME["megatron"], name="broken", forward=forward)
    result = timing.time_contenders([broken, BY_NAME["eaft"]], SMALL, CPU, rounds=1)
    assert result["broken"] == "did not run: RuntimeError: no such kernel"
    assert len(result["eaft"]) == 1


# --- figures to reach ---

# (where, tokens, columns, D, type, ours, part, quantity, theirs) -> bound, row by row as the issue has them.
LISTED = {
    ("CPU", 512, 151936, None, "bfloat16", "eaft", "sum", "time ratio", "megatron"): 1.0,
    ("CPU", 512, 151936, None, "float32", "eaft", "sum", "time ratio", "megatron"): 1.6,
    ("CPU", 512, 151936, None, "float32", "eaft-inplace", "sum", "time ratio", "megatron"): 1.0,
    ("CPU", 512, 151936, None, "bfloat16", "eaft", "sum", "time ratio", "peers-eaft"): 0.55,
    ("CPU", 512, 151936, None, "float32", "eaft", "sum", "time ratio", "peers-eaft"): 0.7,
    ("CPU", 512, 151936, None, "float32", "eaft-inplace", "sum", "time ratio", "peers-eaft"): 0.45,
    ("CPU", 512, 151936, None, "bfloat16", "eaft", "sum", "memory ratio", "megatron"): 0.75,
    ("CPU", 512, 151936, None, "bfloat16", "eaft", "sum", "memory ratio", "peers-eaft"): 0.5,
    ("CPU", 512, 151936, None, "float32", "eaft", "sum", "memory ratio", "megatron"): 2.05,
    ("CPU", 512, 151936, None, "float32", "eaft-inplace", "sum", "memory ratio", "megatron"): 1.02,
    ("CPU", 512, 151936, None, "float32", "eaft", "sum", "memory ratio", "peers-eaft"): 0.7,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "forward", "ms", None): 0.95,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "backward", "ms", None): 1.8,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "sum", "ms", None): 2.8,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "sum", "time ratio", "liger"): 0.35,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "sum", "time ratio", "megatron-fused"): 0.16,
    ("H100", 8192, 151936, None, "bfloat16", "eaft", "sum", "time ratio", "megatron"): 0.14,
    ("H100", 8192, 18992, None, "bfloat16", "eaft", "sum", "ms", None): 0.4,
}
LINEAR_LISTED = {
    ("CPU", 1024, 49152, 576, "MB beyond inputs and gradients"): {64.0},
    ("CPU", 1024, 49152, 576, "time ratio"): {1.3},
    ("H100", 8192, 151936, 5120, "MB beyond inputs and gradients"): {400.0},
    ("H100", 8192, 151936, 5120, "time ratio"): {1.05, 1.1},
}


def test_the_targets_are_the_listed_ones() -> None:
    found: dict[tuple, float] = {}
    linear: dict[tuple, set[float]] = {}
    for target in TARGETS:
        case = target.case
        assert case.top_k == 20
        if case.hidden is not None:
            key = (target.where, case.tokens, case.width, case.hidden, target.quantity)
            linear.setdefault(key, set()).add(target.bound)
            continue
        size = (target.where, case.tokens, case.width, case.hidden, case.dtype)
        found[(*size, target.ours, target.part, target.quantity, target.theirs)] = target.bound
    assert found == LISTED
    assert linear == LINEAR_LISTED


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_target_is_in_the_plan(kind: str, quick: bool) -> None:
    cases = {step.case for step in plan(torch.device(kind), quick)}
    wanted = {target.case for target in TARGETS if (target.where == "CPU") == (kind == "cpu")}
    assert wanted <= cases
    for target in TARGETS:
        if target.unmeasured is None:
            names = [each.name for each in contenders_of(target.case)]
            assert {target.ours, target.theirs} - {None} <= set(names)
    if not quick:
        swept = {(case.vocab, case.shards, case.dtype, case.top_k) for case in cases}
        for vocab in (32000, 49152, 151936, 262144):
            for shards in (1, 2, 4, 8):
                assert {(vocab, shards, dtype, k) for dtype in ("float32", "bfloat16") for k in (20, None)} <= swept


def test_reached_missed_and_not_measured() -> None:
    target = TARGETS[0]
    assert target.theirs is not None
    names = (target.ours, target.theirs)

    def status(a: float, device_type: str = "cpu") -> str:
        rows = [row(name, [(t, 0.0)], case=target.case) for name, t in zip(names, (a, 1.0), strict=True)]
        (outcome,) = evaluate((target,), rows, device_type, "some device")
        assert (outcome.value is None) == (outcome.status == "not measured")
        return outcome.status

    assert status(target.bound) == "reached"
    assert status(target.bound * 1.01) == "missed"
    assert status(target.bound, "cuda") == "not measured"
    away = evaluate(TARGETS, [], "cpu", "some device")
    assert all(each.status == "not measured" and each.value is None for each in away)
    assert {each.reason for each in away if each.target.where == "H100" and not each.target.unmeasured} == {
        "no H100 here"
    }


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
