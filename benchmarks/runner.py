"""A run: tests, checks, times, memory, result files."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import machine, memory, report
from benchmarks.check import error_of
from benchmarks.contenders import BY_NAME, Contender, contenders_of
from benchmarks.gate import KERNEL_TESTS, run_tests
from benchmarks.peers import fresh_compiler
from benchmarks.plan import Step
from benchmarks.results import Row
from benchmarks.targets import TARGETS, evaluate
from benchmarks.timing import time_contenders


class OursIsWrong(RuntimeError):
    """One of our own losses is wrong or does not run: there is nothing to compare."""


def run(
    steps: Sequence[Step],
    device: torch.device,
    out: Path,
    *,
    suffix: str = "",
    only: tuple[str, ...] = (),
    tests: Sequence[str] = KERNEL_TESTS,
    all_memory: bool = True,
    say: Callable[[str], None] = print,
) -> int:
    """Measure and write; 0, or 1 where a test failed or our own loss is wrong, and then no figure is printed.

    Args:
        steps: what to measure.
        device: where.
        out: folder of the result files.
        suffix: ending of their names, before the file type.
        only: names of contenders; empty: all.
        tests: files that must pass first.
        all_memory: measure peak memory of every contender; else only where a figure to reach needs it.
        say: takes each line of output.
    """
    say(f"running {len(tests)} files of tests first")
    gate = run_tests(tests)
    say(f"  {gate.summary}")
    if not gate.passed:
        say("the kernel tests fail, so there are no figures:")
        for failure in gate.failures:
            say(f"  {failure}")
        return 1
    load = machine.load()
    bandwidth = machine.copy_bandwidth(device)
    name = machine.device_name(device)
    say(f"{name}; copy {bandwidth / 1e9:.1f} GB/s; load {load}")
    try:
        rows = [row for step in steps for row in _time_step(step, device, only, say)]
    except OursIsWrong as error:
        say(f"our own loss is wrong, so there are no figures: {error}")
        return 1
    needed = {(each.case, name) for each in TARGETS if each.needs_memory for name in (each.ours, each.theirs)}
    _measure_memory([row for row in rows if all_memory or (row.case, row.contender) in needed], device, say)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = report.Run(
        device=name,
        date=date,
        commit=machine.commit(),
        versions=machine.versions(),
        bandwidth=bandwidth,
        load=load,
        tests=gate.summary,
        rows=rows,
        outcomes=evaluate(TARGETS, rows, device.type, name),
    )
    paths = report.write(result, out, f"{machine.slug(name)}-{date}{suffix}")
    say("")
    say(report.markdown(result))
    say("written: " + ", ".join(path.name for path in paths))
    return 0


def _time_step(step: Step, device: torch.device, only: tuple[str, ...], say: Callable[[str], None]) -> list[Row]:
    case = step.case
    contenders = contenders_of(case, only)
    reasons = {each.name: _reason(each, step, device) for each in contenders}
    for each in contenders:
        if each.ours and reasons[each.name] is not None:
            raise OursIsWrong(f"{each.name}, {case.title()}: {reasons[each.name]}")
    ready = [each for each in contenders if reasons[each.name] is None]
    say(f"{case.title()}: {', '.join(each.name for each in ready)}")
    if any(each.compiled for each in ready):
        fresh_compiler()
    times = time_contenders(ready, case, device, step.rounds)
    rows = []
    for each in contenders:
        rounds = times.get(each.name, reasons[each.name])
        if isinstance(rounds, list):
            rows.append(Row(case=case, contender=each.name, rounds=rounds))
            continue
        if each.ours:
            raise OursIsWrong(f"{each.name}, {case.title()}: {rounds}")
        rows.append(Row(case=case, contender=each.name, reason=rounds))
    return rows


def _reason(contender: Contender, step: Step, device: torch.device) -> str | None:
    """Why a contender is not timed: not there, left out of this step, or wrong."""
    if (reason := contender.unavailable(step.case, device)) is not None:
        return reason
    if contender.name in step.left_out:
        return "left out of this case: it would take longer than all the rest"
    return error_of(contender, step.case, device)


def _measure_memory(rows: list[Row], device: torch.device, say: Callable[[str], None]) -> None:
    """Peak memory of every row that was timed. On a CPU one new process for each contender."""
    timed = [row for row in rows if row.rounds]
    for name in dict.fromkeys(row.contender for row in timed):
        mine = [row for row in timed if row.contender == name]
        say(f"peak memory: {name}")
        if device.type == "cuda":
            for row in mine:
                row.memory = memory.measure(BY_NAME[name], row.case, device)
            continue
        try:
            answers = memory.measure_in_new_process(name, [row.case for row in mine])
        except subprocess.TimeoutExpired:
            answers = ["its process took too long"] * len(mine)
        for row, answer in zip(mine, answers, strict=True):
            row.memory = answer
