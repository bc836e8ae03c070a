"""Megatron's checkpoint writer has processes of its own, which must not outlive their rank."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

from nemo_eaft.orphans import end_with_parent


def end_writer_with_rank() -> None:
    """Let the processes of Megatron's checkpoint writer end when this process does, however that happens.

    megatron-core 0.15.3, dist_checkpointing/strategies/filesystem_async.py. ``_get_write_results_queue``: the first
    save starts ``multiprocessing.Manager()``, a server of some 200 MB. It is ended by ``atexit``, which a rank that is
    killed or leaves by ``os._exit`` never reaches, and it then waits for ever. Ours is the same queue of the same kind
    of server, which looks every second whether its parent is still there. ``write_preloaded_data``: every save forks
    a process for each file, which, done, waits for a queue that nobody empties any more. A version without these
    functions is left alone: it has another writer.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if hasattr(filesystem_async, "_get_write_results_queue"):
        filesystem_async._get_write_results_queue = _write_results_queue
    writer: Any = filesystem_async.FileSystemWriterAsync
    write = getattr(writer, "write_preloaded_data", None)
    if write is not None and not hasattr(write, "__wrapped__"):
        writer.write_preloaded_data = staticmethod(ending_with_parent(write))


def ending_with_parent(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` for a process of its own, which then ends when the process that started it does."""

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        parent = multiprocessing.parent_process()
        assert parent is not None, "not a process of multiprocessing"
        assert parent.pid is not None
        _end_with(parent.pid)
        return run(*args, **kwargs)

    return wrapped


_started: tuple[SyncManager, Any] | None = None


def _write_results_queue() -> Any:
    global _started
    if _started is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=_end_with, initargs=(os.getpid(),))
        _started = manager, manager.Queue()
    return _started[1]


def _end_with(parent: int) -> None:
    end_with_parent(parent, lambda: os._exit(0))
