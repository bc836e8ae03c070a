"""Signals that come two at a time end a process in which other threads wait, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft.threads import start_in_background
from tests.harness import wait_for

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}

# Once in six or seven times the kernel gave both signals to a thread that was started as usual.
TIMES = 40

WAITING = """
    import os, signal, time
    from nemo_eaft.threads import start_in_background

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(3))
    start_in_background(time.sleep, 600)
    print("up", flush=True)
    time.sleep(600)
"""

STARTER = """
    import signal, sys
    from nemo_eaft.own_process import run_to_its_end

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_to_its_end([sys.executable, "-c", sys.argv[1]])
"""

# As a thread of a library's: with the main thread's signals.
WITH_A_LIBRARY = """
    import os, threading, time
    from nemo_eaft.own_process import end_cleanly_with

    end_cleanly_with(os.getppid())
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.mark.timeout(300)
def test_a_thread_in_the_background_is_given_no_signals() -> None:
    for attempt in range(TIMES):
        words = [sys.executable, "-c", textwrap.dedent(WAITING)]
        with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "up\n"
                time.sleep(0.02)  # until both threads wait
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 3, attempt
            finally:
                process.kill()


def test_who_starts_one_gets_its_signals_as_before() -> None:
    """And what a fault raises is not kept from faulthandler."""
    found: list[set[Any]] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    thread = start_in_background(lambda: found.append(signal.pthread_sigmask(signal.SIG_BLOCK, ())), name="a name")
    thread.join(20)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert found[0] - before == {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2} - before
    assert (thread.name, thread.daemon) == ("a name", True)
    assert thread is not threading.main_thread()


@pytest.mark.timeout(300)
def test_ctrl_c_ends_a_process_of_its_own_whose_libraries_have_threads() -> None:
    """The terminal's SIGINT and, from who started it, SIGTERM."""
    for attempt in range(TIMES // 2):
        words = [sys.executable, "-c", *map(textwrap.dedent, (STARTER, WITH_A_LIBRARY))]
        with subprocess.Popen(
            words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as starter:
            try:
                assert starter.stdout is not None
                assert starter.stdout.readline() == "up\n"
                os.killpg(starter.pid, signal.SIGINT)
                assert starter.wait(20) == -signal.SIGINT, attempt
                wait_for(lambda: not group(starter.pid))
            finally:
                if group(starter.pid):
                    os.killpg(starter.pid, signal.SIGKILL)


def group(number: int) -> bool:
    """Whether a process of this group is there."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True
