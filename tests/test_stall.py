"""Who is stuck, by what ranks say; and that saying it costs a step nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import launch, stall
from nemo_eaft.stall import Answer, judge
from nemo_eaft.watchdog import Watchdog, clear

ROOT = Path(__file__).parent.parent
WAITS = Answer(0, "the forward of step 7", 40, 9.0, True, "waits in all_reduce, from a.py:1", "STACK 0\n")
AWAY = dataclasses.replace(WAITS, rank=1, waits=False, where="is in forever, from b.py:2", stack="STACK 1\n")


def test_who_waits_in_a_collective_is_not_stuck() -> None:
    verdict = judge({0: WAITS, 1: AWAY}, 2, {})
    assert verdict.rank == 1
    assert verdict.message == (
        "is stuck: no progress for 9 s after the forward of step 7; it is in forever, from b.py:2"
    )
    assert verdict.stack.startswith("STACK 1")
    assert "rank 0: the forward of step 7, waits in all_reduce" in verdict.stack


def test_of_two_the_one_behind_is_stuck() -> None:
    ahead = dataclasses.replace(AWAY, rank=0, progress=41)
    verdict = judge({0: ahead, 1: AWAY, 2: dataclasses.replace(WAITS, rank=2)}, 3, {})
    assert verdict.rank == 1
    assert "ranks 0 do not wait for others either" in verdict.message


def test_who_does_not_answer_is_stuck() -> None:
    verdict = judge({0: WAITS, 1: AWAY}, 4, {2: "DUMP\n"})
    assert verdict.rank == 2
    assert "does not answer (nor do ranks 3)" in verdict.message
    assert verdict.message.endswith("no progress for 9 s")
    assert verdict.stack.startswith("DUMP")
    assert "rank 3 left no stack" in judge({0: WAITS, 1: AWAY, 2: AWAY}, 4, {}).stack


def test_ranks_that_wait_for_each_other() -> None:
    verdict = judge({0: WAITS, 1: dataclasses.replace(WAITS, rank=1)}, 2, {})
    assert verdict.rank == 0
    assert "every other rank wait for each other" in verdict.message


def placed(name: str, body: str) -> Callable[[Any], Any]:
    """A function whose code is said to stand in file `name`."""
    import linecache

    text = f"def there(call):\n{textwrap.indent(body, '    ')}\n"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {}
    exec(compile(text, name, "exec"), scope)
    function: Callable[[Any], Any] = scope["there"]
    return function


@pytest.mark.parametrize(
    "file, body, waits",
    [
        ("/x/torch/distributed/distributed_c10d.py", "call()", True),
        ("/x/megatron/core/pipeline_parallel/p2p_communication.py", "call.wait()", True),
        ("/x/megatron/core/transformer/mlp.py", "call()", False),
        ("/home/me/model.py", "call.wait()", False),
    ],
)
def test_where_ranks_wait_for_each_other(file: str, body: str, waits: bool) -> None:
    release, entered = threading.Event(), threading.Event()

    # Called from C, so that the frame of the file is the innermost one, as it is when a collective blocks.
    ready: Any = types.SimpleNamespace(wait=release.wait) if "wait" in body else release.wait
    function = placed(file, body)

    def run() -> None:
        entered.set()
        function(ready)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        entered.wait(5)
        deadline = time.monotonic() + 5
        assert thread.ident is not None
        frame = sys._current_frames()[thread.ident]
        while frame is not None and frame.f_code.co_filename != file:
            assert time.monotonic() < deadline
            back = frame.f_back
            frame = back if back is not None else sys._current_frames()[thread.ident]
        assert stall.is_waiting(frame) == waits
    finally:
        release.set()
        thread.join()


def test_answers_are_read_back(tmp_path: Path) -> None:
    stall.write(tmp_path, AWAY)
    (tmp_path / stall.FOLDER / "rank-2.json").write_text("{")
    assert stall.read(tmp_path, 3) == {1: AWAY}
    clear(tmp_path)
    assert stall.read(tmp_path, 3) == {}


def test_noting_costs_nothing() -> None:
    watchdog = Watchdog(Path("nowhere"), 0, 1, 900)
    began = time.perf_counter()
    for step in range(100_000):
        watchdog.note("forward", step, 1)
    each = (time.perf_counter() - began) / 100_000
    print(f"a note takes {each * 1e9:.0f} ns")
    assert each < 20e-6
    assert watchdog.progress == 100_000


PROGRAM = """
import re, os, sys, time
from pathlib import Path
from nemo_eaft.watchdog import Watchdog
def forever(): time.sleep(1000)
def busy(watchdog):
    for step in range(40):
        watchdog.note("forward", step, 1)
        time.sleep(0.1)
watchdog = Watchdog(Path({folder!r}), int(sys.argv[1]), int(sys.argv[3]), {stall})
watchdog.start()
watchdog.note("forward", 3, 2)
spin = lambda: re.match("(a+)+$", 64 * "a" + "b")
{{"forever": forever, "busy": lambda: busy(watchdog), "spin": spin}}[sys.argv[2]]()
watchdog.stop()
print("done")
"""


def ranks(folder: Path, *doing: str, stall_seconds: float = 2.0) -> list[subprocess.Popen[str]]:
    code = PROGRAM.format(folder=str(folder), stall=stall_seconds)
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), what, str(len(doing))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank, what in enumerate(doing)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        return [(process.wait(40), *process.communicate()) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_rank_that_moves_is_left_alone(tmp_path: Path) -> None:
    """Also when the whole job is suspended for longer than the limit."""
    [process] = processes = ranks(tmp_path, "busy")
    time.sleep(3.0)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3.5)
    process.send_signal(signal.SIGCONT)
    assert [(code, out) for code, out, _ in ended(processes)] == [(0, "done\n")]
    assert os.listdir(tmp_path) == []


def test_a_rank_that_holds_the_interpreters_lock_leaves_its_stack(tmp_path: Path) -> None:
    """It cannot answer; the rank that ends the job finds what faulthandler wrote."""

    processes = ranks(tmp_path, "forever", "spin")
    try:
        assert processes[0].wait(40) == 1
        assert processes[1].poll() is None  # torchrun's to end
    finally:
        processes[1].kill()
        results = ended(processes)
    error = json.loads((tmp_path / launch.ERROR).read_text())
    assert (error["rank"], error["kind"]) == (1, "stall")
    assert "<lambda>" in error["traceback"]
    assert "rank 1 does not answer" in results[0][2]
    assert os.listdir(tmp_path / stall.FOLDER)
