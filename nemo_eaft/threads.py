"""Threads beside the main one, which alone can run Python's signal handlers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

_SENT = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
"""What others send for a handler in Python. What a fault raises (SIGSEGV) belongs to the thread that made it, and any
can write stacks (SIGUSR2, :mod:`nemo_eaft.watchdog`)."""


def start_in_background(target: Callable[..., object], *arguments: object, name: str | None = None) -> threading.Thread:
    """Start a daemon thread that is given no signals.

    Of two signals at once the kernel may give both to a thread that only waits. A main thread that waits too is not
    woken then, and never runs their handlers.
    """
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        # Before it starts, for it has the mask of who starts it. A handler may run, and raise, in this call.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SENT)
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread
