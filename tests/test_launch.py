"""Ranks: how they know that they are ranks, and how the launcher learns what went wrong in one."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import launch
from nemo_eaft.analyze import job as analyze
from nemo_eaft.launch import (
    ERROR,
    PROCESS,
    Program,
    check_world,
    is_users,
    job_identity,
    launched,
    run_local,
    write_error,
)
from nemo_eaft.settings import Settings
from nemo_eaft.settings_mapping import from_mapping

ROOT = Path(__file__).parent.parent


def settings(folder: Path, ranks: int = 2, nodes: int = 1) -> Settings:
    trainer = {"gpus_per_node": ranks, "num_nodes": nodes, "global_batch_size": 4 * ranks * nodes}
    return from_mapping(
        {
            "model": {"hf": "m"},
            "data": {"train": "t"},
            "run": {"dir": str(folder / "run")},
            "trainer": trainer,
        }
    )


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8)),
        ({"RANK": "3"}, None),
        # A batch script, or a shell on an allocation: not a task of a step.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}, (5, 8)),
        # torchrun inside one srun task per node: torchrun decides.
        (
            {
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "RANK": "9",
                "WORLD_SIZE": "16",
                "LOCAL_RANK": "1",
            },
            (9, 16),
        ),
    ],
)
def test_where_a_process_stands(environment: dict[str, str], place: tuple[int, int] | None) -> None:
    assert launched(environment) == place


def test_a_job_of_another_size_is_refused(tmp_path: Path) -> None:
    check_world(settings(tmp_path, 2, nodes=2), 4)
    with pytest.raises(ValueError, match=r"trainer.num_nodes=2 x trainer.gpus_per_node=2 = 4 ranks, but .* with 3"):
        check_world(settings(tmp_path, 2, nodes=2), 3)


def test_several_machines_are_not_started_from_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.num_nodes=2: several machines .* -m nemo_eaft\.train CONF;"):
        run_local(settings(tmp_path, nodes=2), [])
    with pytest.raises(ValueError, match=r"-m nemo_eaft\.analyze MODEL DATA;"):
        run_local(settings(tmp_path, nodes=2), [], analyze.PROGRAM)


def test_a_rank_does_not_repeat_what_its_launcher_has_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> int:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with launch.warned_once():
                warnings.warn("a setting has no effect", stacklevel=1)
            warnings.warn("later", stacklevel=1)
        return len(said)

    assert read() == 2
    monkeypatch.setenv(launch.LAUNCHER, "its process")
    assert read() == 1


def caught(call: Any) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_only_what_this_package_raised_is_the_users(tmp_path: Path) -> None:
    assert is_users(caught(lambda: check_world(settings(tmp_path), 3)))
    assert not is_users(caught(lambda: int("a library's ValueError")))
    assert not is_users(caught(lambda: json.loads("{")))
    assert not is_users(caught(lambda: [][1]))


def test_the_first_error_is_kept_whole(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_error(tmp_path / "run", 2, caught(lambda: check_world(settings(tmp_path), 3)))
    write_error(tmp_path / "run", 0, caught(lambda: 1 / 0))
    [name] = os.listdir(tmp_path / "run")
    error = json.loads((tmp_path / "run" / name).read_text())
    assert (name, error["rank"], error["kind"]) == (ERROR, 2, "input")
    assert error["message"].startswith("trainer.num_nodes=1")
    assert "check_world" in error["traceback"]


@pytest.mark.parametrize(
    "variable, value",
    [
        ("TORCHELASTIC_RUN_ID", "b"),
        ("TORCHELASTIC_RESTART_COUNT", "1"),
        ("SLURM_JOB_ID", "8"),
        ("SLURM_RESTART_COUNT", "1"),
    ],
)
def test_an_older_jobs_error_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name, of_first in (("TORCHELASTIC_RUN_ID", "a"), ("TORCHELASTIC_RESTART_COUNT", "0"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(name, of_first)
    (run_dir / ERROR).write_text("{ what an older version left")
    for rank in (3, 4):
        write_error(run_dir, rank, caught(lambda: 1 / 0))
        assert json.loads((run_dir / ERROR).read_text())["rank"] == 3
    monkeypatch.setenv(variable, value)
    for rank in (1, 2):
        write_error(run_dir, rank, caught(lambda: 1 / 0))
        assert json.loads((run_dir / ERROR).read_text())["rank"] == 1
    assert os.listdir(run_dir) == [ERROR]


def test_an_error_put_there_while_an_old_one_is_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at an old file and its removal, another rank of the job removed it and left its own."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write_error(tmp_path, 5, caught(lambda: 1 / 0))
    looks = iter(["an older job"])
    real = launch._job_of
    monkeypatch.setattr(launch, "_job_of", lambda path: next(looks, None) or real(path))
    write_error(tmp_path, 6, caught(lambda: 1 / 0))
    assert json.loads((tmp_path / ERROR).read_text())["rank"] == 5
    assert os.listdir(tmp_path) == [ERROR]


def test_jobs_are_told_apart_and_ranks_are_not() -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}
    assert job_identity(slurm | {"SLURM_PROCID": "0"}) == job_identity(slurm | {"SLURM_PROCID": "9"}) != ""
    assert job_identity(slurm) != job_identity(slurm | {"SLURM_RESTART_COUNT": "1"})
    elastic = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0", "RANK": "0"}
    # Machines count restarts each for itself, so the count is no part of what all ranks share.
    assert job_identity(elastic) == job_identity(elastic | {"TORCHELASTIC_RESTART_COUNT": "1", "RANK": "1"}) != ""
    # On one machine they count together: what the ranks before a restart left is not for those after it.
    alone = elastic | {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    assert job_identity(alone) != job_identity(alone | {"TORCHELASTIC_RESTART_COUNT": "1"})
    # torchrun without a run id, on one machine and on two.
    one = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    logs = [
        one | {"TORCHELASTIC_ERROR_FILE": f"/tmp/{job}/none_x/attempt_0/{rank}/error.json"}
        for job in "ab"
        for rank in "01"
    ]
    identities = [job_identity(environment) for environment in logs]
    assert identities[0] == identities[1] != identities[2] == identities[3]
    # And with the same run id for two jobs.
    assert job_identity(logs[0] | {"TORCHELASTIC_RUN_ID": "x"}) != job_identity(logs[2] | {"TORCHELASTIC_RUN_ID": "x"})
    assert job_identity(logs[0] | {"WORLD_SIZE": "4"}) == job_identity({}) == ""


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    write_error(tmp_path / "run", 0, caught(lambda: 1 / 0))
    assert not (tmp_path / "run").exists()


def test_torchrun_shows_the_traceback_and_the_killed_rank_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that fails within the second in which the agent sees the killed one is dated after it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = tmp_path / "torchrun.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    write_error(tmp_path, 0, caught(lambda: 1 / 0))
    peer = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
    told: Any = peer.message  # torch says str, and means a dict where there is a file
    assert told["message"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in told["extraInfo"]["py_callstack"]
    killed = ProcessFailure(local_rank=1, pid=2, exitcode=-9, error_file=str(tmp_path / "none"))
    assert ChildFailedError("train", {0: peer, 1: killed}).get_first_failure()[0] == 1


# SIGTERM comes when the file for torchrun is open and has nothing in it yet.
ENDED_WHILE_IT_WRITES = """
    import os, pathlib, signal, time
    from nemo_eaft.launch import tell_torchrun
    write = pathlib.Path.write_text
    def slow(path, text, **keywords):
        with open(path, "w"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    pathlib.Path.write_text = slow
    tell_torchrun(RuntimeError("a peer is gone"))
"""


def test_a_rank_that_is_ended_while_it_writes_leaves_torchrun_no_half_file(tmp_path: Path) -> None:
    """torchrun raises on a file that is no JSON, instead of naming the rank that was killed first."""
    path = tmp_path / "error.json"
    environment = os.environ | {"TORCHELASTIC_ERROR_FILE": str(path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(ENDED_WHILE_IT_WRITES)]
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == -signal.SIGTERM
    assert not path.exists()


def test_an_error_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    write_error(tmp_path / "file", 0, caught(lambda: 1 / 0))


# A rank that stands in for training: each word of its arguments is what the rank of that number does.
RANK = """
    import os, sys, time
    from pathlib import Path
    from nemo_eaft.launch import LAUNCHER, launched, check_world, write_error
    from nemo_eaft.settings_mapping import from_mapping
    from nemo_eaft.orphans import end_with_agent

    end_with_agent()
    rank, ranks = launched()
    run_dir, *words = sys.argv[1:]
    Path(run_dir).mkdir(exist_ok=True)
    (Path(run_dir) / f"launcher{rank}").write_text(os.environ[LAUNCHER])
    (Path(run_dir) / f"rank{rank}").write_text(str(ranks))
    while not all((Path(run_dir) / f"rank{n}").exists() for n in range(ranks)):
        time.sleep(0.05)
    word = words[rank]
    base = {"model": {"hf": "m"}, "data": {"train": "t"}, "run": {"dir": "r"}}
    try:
        if word == "input":
            check_world(from_mapping(base), 7)
        elif word == "break":
            1 / 0
        elif word == "later":
            time.sleep(1.0)
            raise RuntimeError("a peer is gone")
        elif word == "sleep":
            time.sleep(600)
        elif word == "vanish":
            os._exit(7)
        elif word == "killed":
            import signal
            (Path(run_dir) / "going").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "notice":
            while not (Path(run_dir) / "going").exists():
                time.sleep(0.001)
            raise RuntimeError("connection closed by peer")
    except Exception as error:
        write_error(Path(run_dir), rank, error)
        raise
"""


@pytest.fixture
def fake_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "fake_rank.py").write_text(textwrap.dedent(RANK))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return "fake_rank"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, code, told",
    [
        ("ok ok", 0, ""),
        ("later input", 2, "nemo-eaft: rank 1: trainer.num_nodes=1 x trainer.gpus_per_node=1 = 1 ranks"),
        ("break later", 1, "nemo-eaft: rank 0 failed first: ZeroDivisionError: division by zero"),
        ("vanish sleep", 1, "left no message"),
        # Its peer fails because of it, and says so at once; the launcher knows better.
        ("notice killed", 1, "was killed by SIGKILL"),
    ],
)
def test_the_launcher_names_the_first_cause(
    tmp_path: Path, fake_rank: str, capfd: pytest.CaptureFixture[str], words: str, code: int, told: str
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ERROR).write_text('{"kind": "input", "rank": 9, "message": "of an older run"}')
    assert run_local(settings(tmp_path), [str(run_dir), *words.split()], Program(fake_rank)) == code
    assert (run_dir / "rank0").read_text() == (run_dir / "rank1").read_text() == "2"
    # By which they know what their own launcher has made ready.
    assert (run_dir / "launcher0").read_text() == (run_dir / "launcher1").read_text() == PROCESS
    out = capfd.readouterr()
    assert told in out.err.strip().splitlines()[-1]
    assert "of an older run" not in out.err


@pytest.fixture
def starting(tmp_path: Path, fake_rank: str) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher that is about to start two ranks that sleep; nothing of them may outlive it."""
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tests.test_launch import settings
        from nemo_eaft.launch import Program, run_local
        folder = Path({str(tmp_path)!r})
        sys.exit(run_local(settings(folder), [str(folder / "run"), "sleep", "sleep"], Program("fake_rank")))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
    try:
        yield process
        process.kill()
        # Nothing of the run is left: no process has its folder among its arguments.
        deadline = time.monotonic() + 60
        while _processes_with(str(tmp_path / "run")):
            assert time.monotonic() < deadline, "ranks outlived their launcher"
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
        for pid in _processes_with(str(tmp_path / "run")):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def launcher(starting: subprocess.Popen[bytes], tmp_path: Path) -> subprocess.Popen[bytes]:
    """The same, once its ranks sleep."""
    deadline = time.monotonic() + 60
    while not all((tmp_path / "run" / f"rank{n}").exists() for n in (0, 1)):
        assert time.monotonic() < deadline, "the ranks did not start"
        assert starting.poll() is None
        time.sleep(0.1)
    return starting


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_launcher_asks_for_a_stop_first_and_ends_its_ranks_when_told_again(
    launcher: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals
) -> None:
    launcher.send_signal(number)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "stop").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert f"{number.name} to the launcher" in (tmp_path / "run" / "stop").read_text()
    time.sleep(1.0)
    assert launcher.poll() is None
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) == 1


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_ranks(launcher: subprocess.Popen[bytes]) -> None:
    launcher.kill()
    launcher.wait()


@pytest.mark.slow
def test_a_launcher_and_agent_that_are_killed_at_once_leave_no_ranks(
    launcher: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """As by SIGKILL to their process group, of which torchrun's ranks are no part."""
    group = os.getpgid(launcher.pid)
    of_the_run = _processes_with(str(tmp_path / "run"))
    assert len(of_the_run) == 3, "agent and two ranks"
    (agent,) = (pid for pid in of_the_run if os.getpgid(pid) == group)
    for pid in (agent, launcher.pid):
        os.kill(pid, signal.SIGKILL)
    launcher.wait()


@pytest.mark.slow
def test_a_launcher_that_is_killed_while_its_agent_starts_leaves_nothing(
    starting: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """The agent takes seconds to import torch; it must not take the process that adopts it then for its launcher."""
    deadline = time.monotonic() + 60
    while not _processes_with(str(tmp_path / "run")):
        assert time.monotonic() < deadline, "no agent"
        time.sleep(0.01)
    starting.kill()
    starting.wait()


@pytest.mark.parametrize("entry", ["nemo_eaft.cli", "nemo_eaft.analyze.job"])
def test_real_ranks_watch_their_agent(entry: str) -> None:
    """That the call is there; what it does is tested above with ranks that stand in for them."""
    source = inspect.getsource(importlib.import_module(entry))
    assert re.search(r"^    end_with_agent\(\)$", source, re.MULTILINE)


def _processes_with(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid() and text in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
