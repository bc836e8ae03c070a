"""Megatron's checkpoint writer has a process of its own, which must not outlive its rank."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.managers import SyncManager
from typing import Any


def end_writer_with_rank() -> None:
    """Let the process behind Megatron's queue of write results end when this process does, however that happens.

    megatron-core 0.15.3, dist_checkpointing/strategies/filesystem_async.py, ``_get_write_results_queue``: the first
    save starts ``multiprocessing.Manager()``, a server of some 200 MB. It is ended by ``atexit``, which a rank that is
    killed or leaves by ``os._exit`` never reaches, and it then waits for ever. Ours is the same queue of the same kind
    of server, which looks every second whether its parent is still there. A version without that function is left
    alone: it has another writer.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if hasattr(filesystem_async, "_get_write_results_queue"):
        filesystem_async._get_write_results_queue = _write_results_queue


_started: tuple[SyncManager, Any] | None = None


def _write_results_queue() -> Any:
    global _started
    if _started is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=_end_with, initargs=(os.getpid(),))
        _started = manager, manager.Queue()
    return _started[1]


def _end_with(parent: int) -> None:
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)
