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
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import launch, stall
from nemo_eaft.settings import RunSettings
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
    assert verdict.message.startswith("is stuck (ranks 0 do not wait for others either, but got further): no progress")


@pytest.mark.parametrize("on_gpu, shared", [(False, "the network"), (True, "a GPU, the network")])
def test_of_two_that_are_level_neither_is_behind(on_gpu: bool, shared: str) -> None:
    answers = {rank: dataclasses.replace(AWAY, rank=rank) for rank in (1, 2, 3)}
    answers |= {0: WAITS, 4: dataclasses.replace(AWAY, rank=4, progress=41)}
    verdict = judge(answers, 5, {}, on_gpu)
    assert verdict.rank == 1
    assert verdict.message == (
        "and ranks 2, 3 stand still, none behind another (ranks 4 do not wait for others either, but got further): "
        f"{shared} or a file system may hang, and no rank can be singled out; no progress for 9 s after the forward of "
        "step 7; rank 1 is in forever, from b.py:2"
    )


def test_a_rank_in_forward_and_one_that_waits_for_it_on_its_gpu() -> None:
    """Two stages: the first is stuck, the second has done less, for it receives with the host blocked by its GPU."""
    first = dataclasses.replace(AWAY, rank=0, progress=40)
    second = dataclasses.replace(WAITS, rank=1, progress=39, where="waits for its GPU in synchronize, from p2p.py:398")
    assert judge({0: first, 1: second}, 2, {}, on_gpu=True).message.startswith("is stuck: no progress")
    assert judge({0: first, 1: second}, 2, {}, on_gpu=True).rank == 0


def test_who_does_not_answer_is_stuck() -> None:
    verdict = judge({0: WAITS, 1: AWAY}, 4, {2: "DUMP\n"})
    assert verdict.rank == 2
    assert "does not answer (nor do ranks 3)" in verdict.message
    assert verdict.message.endswith("no progress for 9 s")
    assert verdict.stack.startswith("DUMP")
    assert "rank 3 left no stack" in judge({0: WAITS, 1: AWAY, 2: AWAY}, 4, {}).stack


def test_ranks_that_wait_for_each_other() -> None:
    answers = {rank: dataclasses.replace(WAITS, rank=rank, progress=40 + rank) for rank in range(3)}
    verdict = judge(answers, 3, {})
    assert verdict.rank == 0
    assert verdict.message == (
        "and ranks 1, 2 wait for each other, no progress for 9 s: they are in different collectives, or the network is "
        "gone; no rank can be singled out"
    )
    assert judge(answers, 3, {}, on_gpu=True).message == (
        "and ranks 1, 2 wait for each other or their GPUs, no progress for 9 s: they are in different collectives, or "
        "a GPU or the network hangs; no rank can be singled out"
    )
    assert "there is no other: its GPU hangs" in judge({0: WAITS}, 1, {}, on_gpu=True).message


def placed(name: str, body: str) -> Callable[[Any], Any]:
    """A function whose code is said to stand in file `name`."""
    import linecache

    function = "synchronize" if "/torch/cuda/" in name else "there"
    text = f"def {function}(call):\n{textwrap.indent(body, '    ')}\n"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {}
    exec(compile(text, name, "exec"), scope)
    found: Callable[[Any], Any] = scope[function]
    return found


class Blocking:
    """It, and each of its methods, blocks the caller until it is released, as a collective or a tensor's copy does."""

    def __init__(self, release: threading.Event) -> None:
        self._release = release

    def __call__(self, *_: Any) -> tuple[int, int]:
        self._release.wait()
        return 0, 0

    def __getattr__(self, name: str) -> Callable[..., tuple[int, int]]:
        return self.__call__


@pytest.mark.parametrize(
    "file, body, waits, waits_on_gpu",
    [
        ("/x/torch/distributed/distributed_c10d.py", "call()", True, True),
        ("/x/megatron/core/pipeline_parallel/p2p_communication.py", "call.wait()", True, True),
        ("/x/megatron/core/transformer/mlp.py", "call()", False, False),
        ("/home/me/model.py", "call.wait()", False, False),
        ("/x/torch/cuda/__init__.py", "call()", False, True),
        ("/x/nemo_eaft/metrics.py", "loss, tokens = call.tolist()", False, True),
        ("/x/megatron/core/optimizer/clip_grads.py", "total_norm = call.item()", False, True),
        ("/home/me/model.py", "mask = call.cpu()", False, True),
        ("/home/me/model.py", "mask = call.to('cpu')", False, True),
        ("/home/me/model.py", "mask = call.to('cuda')", False, False),
        ("/home/me/model.py", "return bool(call.flag())", False, True),
        ("/home/me/model.py", "return call.float()", False, False),
    ],
)
def test_where_ranks_wait_for_each_other(file: str, body: str, waits: bool, waits_on_gpu: bool) -> None:
    release, entered = threading.Event(), threading.Event()
    function = placed(file, body)

    def run() -> None:
        entered.set()
        function(Blocking(release))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        entered.wait(60)
        deadline = time.monotonic() + 60
        assert thread.ident is not None
        frame = sys._current_frames()[thread.ident]
        while frame is not None and frame.f_code.co_filename != file:
            assert time.monotonic() < deadline
            back = frame.f_back
            frame = back if back is not None else sys._current_frames()[thread.ident]
        assert stall.is_waiting(frame) == waits
        assert stall.is_waiting(frame, on_gpu=True) == waits_on_gpu
    finally:
        release.set()
        thread.join()


def test_answers_are_read_back(tmp_path: Path) -> None:
    stall.write(tmp_path, AWAY)
    (tmp_path / stall.FOLDER / "rank-2.json").write_text("{")
    assert stall.read(tmp_path, 3) == {1: AWAY}
    assert stall.read(tmp_path, 3, job="another") == {}
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


def test_limits_that_mean_nothing_are_said() -> None:
    with pytest.raises(ValueError, match=r"run\.save_seconds=0 must be 1 or more"):
        RunSettings(dir="runs/mine", save_seconds=0)
    with pytest.warns(UserWarning, match=r"run\.save_seconds=10 has no effect below run\.stall_seconds=900"):
        RunSettings(dir="runs/mine", save_seconds=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # It is the backend's limit then; and a default is nobody's wish.
        RunSettings(dir="runs/mine", stall_seconds=0, save_seconds=10)
        RunSettings(dir="runs/mine", stall_seconds=7200)


PROGRAM = """
import re, os, sys, time
from pathlib import Path
from nemo_eaft.watchdog import SAVE, Watchdog

folder, rank, doing, ranks, together = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
watchdog = Watchdog(folder, rank, ranks, {stall}, {save}, job="this one")

def meet(name):
    # All ranks are here: how long the machine takes to start them is no stall of theirs.
    (Path(together) / f"{{name}}-{{rank}}").touch()
    while not all((Path(together) / f"{{name}}-{{other}}").exists() for other in range(ranks)):
        watchdog.note("start", 3)
        time.sleep(0.05)

def told():
    return (Path(together) / "told").exists()

def forever():
    time.sleep(1000)

def busy():
    while not told():
        watchdog.note("forward", 3, 2)
        time.sleep(0.05)

def spin():
    re.match("(a+)+$", 64 * "a" + "b")

def save():
    watchdog.note(SAVE, 3)
    while not told():
        time.sleep(0.05)

def lose_folder():
    watchdog.run_dir = Path(folder / (300 * "x"))  # from here on every look fails, and not as for a missing file
    forever()

def fail_when_noticed():
    while not (folder / "stall" / "noticed").exists():
        time.sleep(0.05)
    try:
        raise KeyError("of its own")
    finally:
        watchdog.stop()

meet("imported")
watchdog.start()
meet("started")
watchdog.note("forward", 3, 2)
print("watched", flush=True)
globals()[doing]()
watchdog.stop()
print("done")
"""


def ranks(
    folder: Path,
    together: Path,
    *doing: str,
    lost: int = 0,
    stall_seconds: float = 2.0,
    save_seconds: float | None = None,
) -> list[subprocess.Popen[str]]:
    """Processes that each do something from the moment on when all of them watch and have said so.

    together: a folder that they meet in, beside the run's. lost: so many ranks more belong to the job and are not
        there.
    """
    together.mkdir(exist_ok=True)
    count = len(doing) + lost
    for name in ("imported", "started"):
        for rank in range(len(doing), count):
            (together / f"{name}-{rank}").touch()
    code = PROGRAM.format(stall=stall_seconds, save=save_seconds)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(rank), what, str(count), str(together)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank, what in enumerate(doing)
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "watched\n":
            raise AssertionError(ended(processes))
    return processes


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        return [(process.wait(120), *process.communicate()) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_rank_that_moves_is_left_alone(tmp_path: Path) -> None:
    """Also when the whole job is suspended for longer than the limit."""
    folder, together = tmp_path / "run", tmp_path / "together"
    [process] = processes = ranks(folder, together, "busy")
    time.sleep(3.0)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3.5)
    process.send_signal(signal.SIGCONT)
    time.sleep(1.0)
    (together / "told").touch()
    assert [(code, out) for code, out, _ in ended(processes)] == [(0, "done\n")]
    assert os.listdir(folder) == []


def test_what_an_earlier_job_left_is_no_stall(tmp_path: Path) -> None:
    """A network file system may still show it after it was removed."""
    together = tmp_path / "together"
    stall.write(tmp_path, dataclasses.replace(AWAY, job="an earlier one"))
    (tmp_path / stall.FOLDER / "noticed").write_text("an earlier one")
    processes = ranks(tmp_path, together, "busy", "busy")
    time.sleep(1.5)  # seven looks
    (together / "told").touch()
    assert [(code, out) for code, out, _ in ended(processes)] == [(0, "done\n")] * 2


def test_a_rank_that_holds_the_interpreters_lock_leaves_its_stack(tmp_path: Path) -> None:
    """It cannot answer; the rank that ends the job finds what faulthandler wrote."""
    processes = ranks(tmp_path, tmp_path / "together", "forever", "spin")
    try:
        assert processes[0].wait(120) == 1
        assert processes[1].poll() is None  # torchrun's to end
    finally:
        processes[1].kill()
        results = ended(processes)
    error = json.loads((tmp_path / launch.ERROR).read_text())
    assert (error["rank"], error["kind"]) == (1, "stall")
    assert "in spin" in error["traceback"]
    assert "rank 1 does not answer" in results[0][2]
    assert os.listdir(tmp_path / stall.FOLDER)


def test_a_save_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """More than twice what any other part of a step may take."""
    together = tmp_path / "together"
    processes = ranks(tmp_path, together, "save", save_seconds=1000)
    time.sleep(4.5)
    (together / "told").touch()
    assert [(code, out) for code, out, _ in ended(processes)] == [(0, "done\n")]


def test_a_save_that_does_not_end_is_a_stall(tmp_path: Path) -> None:
    [(code, _, said)] = ended(ranks(tmp_path, tmp_path / "together", "save", save_seconds=3.0))
    assert code == 1
    assert "after the save of step 3 (run.save_seconds is its limit); it is in save" in said


def test_a_file_system_that_fails_does_not_end_the_watch(tmp_path: Path) -> None:
    """The rank cannot tell the others; but it ends, with its stack, and says once why it told nobody."""
    [(code, _, said)] = ended(ranks(tmp_path, tmp_path / "together", "lose_folder"))
    assert code == 1
    assert said.count("the watchdog of rank 0 goes on without a file: [Errno 36] File name too long") == 1
    assert "in forever" in said
    assert "rank 0 is stuck: no progress for 2 s after the forward of step 3, micro-batch 2" in said


def test_a_folder_that_cannot_be_made_does_not_end_the_run(tmp_path: Path) -> None:
    together = tmp_path / "together"
    processes = ranks(tmp_path / (300 * "x"), together, "busy")
    (together / "told").touch()
    [(code, out, said)] = ended(processes)
    assert (code, out) == (0, "done\n")
    assert said.count("goes on without a file: [Errno 36]") == 1


def test_an_error_of_its_own_is_told_in_spite_of_a_stall(tmp_path: Path) -> None:
    """Its watchdog waits for another rank's answer when the rank stops it, on its way to its traceback."""
    [(code, _, said)] = ended(ranks(tmp_path, tmp_path / "together", "fail_when_noticed", lost=1))
    assert code == 1
    assert "rank 0 made no progress" in said
    assert said.rstrip().endswith("KeyError: 'of its own'"), said
    # Nobody is blamed for a stall.
    assert not (tmp_path / launch.ERROR).exists()
