"""Running ranks in tests: as threads of this process, or as processes over gloo.

``run_threads`` starts in milliseconds and is what the tests of numbers use; ``run_ranks`` is the real backend
and costs seconds. The threads stand on a private part of torch, used nowhere else.
"""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GROUP_TIMEOUT = datetime.timedelta(seconds=20)


def run_threads(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """``function(rank, *args)`` on ``world_size`` ranks that are threads; their results in rank order.

    Inside, ``torch.distributed.group.WORLD`` is a working process group.

    Raises:
        RuntimeError: a rank failed; the message is the traceback of the first that did.
        TimeoutError: ranks still ran after ``timeout`` seconds.
    """
    # torch's common_distributed wraps the same, but importing it replaces hypothesis' profile and forbids
    # setting cuDNN flags for the rest of the process, which Lightning does.
    from torch._C._distributed_c10d import _set_thread_isolation_mode  # type: ignore[attr-defined]
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    world = threaded._install_threaded_pg()
    store = dist.HashStore()  # type: ignore[attr-defined]
    results: list[Any] = [None] * world_size
    failures: list[str] = []
    # Threads start with torch's defaults, not with the caller's.
    gradients = torch.is_grad_enabled()

    def worker(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
        try:
            with torch.set_grad_enabled(gradients):
                results[rank] = function(rank, *args)
        except BaseException as error:
            failures.append(f"rank {rank} of {world_size}\n{traceback.format_exc()}")
            # Wakes the ranks that wait for this one; their complaints come after its own.
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            if dist.distributed_c10d._world is world:
                dist.destroy_process_group()

    _set_thread_isolation_mode(True)
    try:
        threads = [threading.Thread(target=worker, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        running = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        if running:
            threaded.ProcessLocalGroup.exception_handle(TimeoutError())
            for thread in threads:
                thread.join(1)
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        _set_thread_isolation_mode(False)
    if failures and not running:
        raise RuntimeError(f"a rank failed:\n{failures[0]}")
    if running:
        raise TimeoutError(f"ranks {running} still ran after {timeout} s")
    return results


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """``function(rank, *args)`` on ``world_size`` processes over gloo; their results in rank order.

    Args:
        function: at module level, so that a fresh interpreter can import it; its results must be picklable.
        timeout: seconds until every rank must have ended.
        env: environment variables of the ranks, beside this process's own and torchrun's names for rank and
            size.

    Raises:
        RuntimeError: a rank failed; the message is the traceback of the first that did.
        TimeoutError: ranks were still running after ``timeout``; they are ended.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(function, rank, world_size, folder, args, env or {}), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder), timeout)
        finally:
            for process in processes:
                _end(process)
        return [pickle.loads((Path(folder) / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _wait(processes: Sequence[BaseProcess], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.exitcode for process in processes]
        if all(code == 0 for code in codes):
            return
        if any(code not in (None, 0) for code in codes):
            # Others may be writing theirs at this moment; the first by time is the cause, the rest
            # consequences.
            time.sleep(0.5)
            errors = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
            text = errors[0].read_text() if errors else f"no traceback; exit codes by rank: {codes}"
            raise RuntimeError(f"a rank failed:\n{text}")
        if time.monotonic() > deadline:
            running = [rank for rank, code in enumerate(codes) if code is None]
            raise TimeoutError(f"ranks {running} still ran after {timeout} s")
        time.sleep(0.02)


def _end(process: BaseProcess) -> None:
    if process.pid is None:
        return
    if process.exitcode is None:
        process.terminate()
        process.join(2)
    if process.exitcode is None:
        process.kill()
    process.join(10)


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    args: tuple[Any, ...],
    env: dict[str, str],
) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), **env})
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=GROUP_TIMEOUT,
        )
        with poisoned_empty():
            result = function(rank, *args)
        (Path(folder) / f"result_{rank}").write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error_{rank}").write_text(f"rank {rank} of {world_size}\n{traceback.format_exc()}")
        # Nothing left to flush but this; a normal exit could wait for the other ranks.
        sys.stderr.flush()
        os._exit(1)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what ``torch.empty``, ``empty_like`` and ``new_empty`` return to this package with NaN.

    A cell that the package forgets to write then shows in every comparison. Integers get their smallest
    value.
    """
    names = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in names]
    for owner, name, original in originals:
        setattr(owner, name, _poisoning(original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _poisoning(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "nemo_eaft" and tensor.device.type != "meta":
            with torch.no_grad():
                if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor

    return empty


def alive(pid: int) -> bool:
    """Whether it runs: one that has ended, and that nobody has asked about yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pids: Iterable[int]) -> None:
    """End those that run still."""
    for pid in filter(alive, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(done: Callable[[], object], seconds: float = 60.0) -> None:
    """Until ``done`` gives something true; an ``AssertionError`` after ``seconds``."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
