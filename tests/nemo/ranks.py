"""Ranks of a NeMo job as processes over gloo, forked from a server that has NeMo imported already.

Importing NeMo takes some 17 s a process. `multiprocessing`'s fork server pays that once for the whole session (see
`preload.py`); a rank then starts in a fraction of a second, and is as separate a process as any.
"""

import contextlib
import datetime
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.harness import poisoned_empty

GROUP_TIMEOUT = datetime.timedelta(seconds=60)
DIES = 17
"""Exit code of a rank that a job killed on purpose, with `os._exit(DIES)`."""

_PRELOAD = "tests.nemo.preload"
_ROOT = Path(__file__).resolve().parents[2]


def start_server() -> None:
    """Start the fork server, if it does not run yet. It imports NeMo while the caller goes on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])
    before = os.environ.get("PYTHONPATH")
    # Python 3.11 does not hand sys.path to the server.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT)] + ([before] if before else []))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run_ranks(
    job: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, dies: bool = False
) -> list[Any]:
    """`job(*args)` on `world_size` ranks, with the environment of a rank of torchrun; their results in rank order.

    Args:
        job: at module level; it and its arguments and results must be picklable.
        timeout: seconds until every rank must have ended.
        dies: the job ends itself, with `os._exit(DIES)` or SIGKILL, on at least one rank, as a lost machine would. The
            others are ended then, and the result is empty.

    Raises:
        RuntimeError: a rank failed; the message is the traceback of the first that did and the end of its output.
        TimeoutError: ranks were still running after `timeout`; they are ended.
    """
    start_server()
    context = multiprocessing.get_context("forkserver")
    # The ranks are clients of this store, as under torchrun: its port is the system's choice and is never let go.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=GROUP_TIMEOUT, use_libuv=True
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Not daemons: Megatron's checkpoint writer starts a process of its own.
        processes = [
            context.Process(target=_rank, args=(job, args, rank, world_size, store.port, folder))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                _start(process)
            died = _wait(processes, folder, timeout, dies)
        finally:
            for process in processes:
                _end(process)
        if dies:
            assert died, "the job was to die, but every rank finished"
            return []
        return [pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _start(process: BaseProcess) -> None:
    try:
        process.start()
    except EOFError as error:
        raise RuntimeError(
            f"the fork server ended while it imported {_PRELOAD}; its traceback stands in this process's stderr"
        ) from error


def _wait(processes: Sequence[BaseProcess], folder: Path, timeout: float, dies: bool) -> bool:
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.exitcode for process in processes]
        if dies and (DIES in codes or -signal.SIGKILL in codes):
            return True
        if all(code == 0 for code in codes):
            return False
        errors = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
        if errors or any(code not in (None, 0) for code in codes):
            # A file names its rank's exception when it was raised, so the first is the cause; those of its peers,
            # whose connection it closed, come later.
            time.sleep(0.2)
            if dies and {DIES, -signal.SIGKILL} & {process.exitcode for process in processes}:
                return True
            errors = errors or sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
            rank = int(errors[0].name.split("_")[1]) if errors else 0
            text = errors[0].read_text() if errors else "no traceback"
            raise RuntimeError(f"a rank failed; exit codes by rank: {codes}\n{text}\n{_output(folder, rank)}")
        if time.monotonic() > deadline:
            running = [rank for rank, code in enumerate(codes) if code is None]
            outputs = "\n".join(_output(folder, rank) for rank in running)
            raise TimeoutError(f"ranks {running} still ran after {timeout} s\n{outputs}")
        time.sleep(0.02)


def _output(folder: Path, rank: int) -> str:
    path = folder / f"output_{rank}"
    text = path.read_text(errors="replace")[-3000:] if path.exists() else ""
    return f"--- end of the output of rank {rank}:\n{text}"


def _end(process: BaseProcess) -> None:
    if process.pid is None:
        return
    if process.exitcode is None:
        process.kill()
    process.join(10)
    # Megatron's checkpoint writer starts a process (200 MB) that outlives a rank which ends by os._exit or a signal.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _rank(job: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, folder: Path) -> None:
    os.setsid()
    output = os.open(folder / f"output_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _check_preload()
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            GROUP_RANK="0",
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="test",
            TORCHELASTIC_RESTART_COUNT="0",
            TORCHELASTIC_MAX_RESTARTS="0",
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        _limit_group_timeouts()
        torch.set_num_threads(1)
        # The run would ask for all cores; threads that spin while they wait for each other cost more than they bring.
        torch.set_num_threads = lambda nthreads: None
        with poisoned_empty():
            result = job(*args)
        temporary = folder / f"writing_{rank}"
        temporary.write_bytes(pickle.dumps(result))
        temporary.rename(folder / f"result_{rank}")
        sys.stdout.flush()
        sys.stderr.flush()
        # A normal exit would wait for gloo threads and destructors that other ranks may have left hanging.
        os._exit(0)
    except BaseException:
        temporary = folder / f"writing_{rank}"
        temporary.write_text(f"rank {rank} of {world_size}\n{traceback.format_exc()}")
        temporary.rename(folder / f"error_{rank}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _end_with_parent() -> None:
    """A rank whose session was killed must not stay behind, waiting for its peers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _check_preload() -> None:
    """The fork server ignores an ImportError of what it preloads; every rank would then import NeMo by itself."""
    preload = sys.modules.get(_PRELOAD)
    server = getattr(preload, "SERVER_PID", None)
    if server != os.getppid():
        raise RuntimeError(
            f"the fork server did not import {_PRELOAD} (server {os.getppid()}, imported in {server}); "
            f"run `python -c 'import {_PRELOAD}'` for the reason"
        )


def _limit_group_timeouts() -> None:
    """NeMo and Megatron ask for 10 to 30 minutes; a test that hangs must end sooner."""

    def limited(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            kwargs["timeout"] = GROUP_TIMEOUT
            return function(*args, **kwargs)

        return wrapped

    torch.distributed.init_process_group = limited(torch.distributed.init_process_group)
    torch.distributed.new_group = limited(torch.distributed.new_group)
