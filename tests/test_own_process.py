"""Signals that come two at a time end a process in which other threads wait, too."""

from __future__ import annotations

import contextlib
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
    from nemo_eaft import own_process

    signal.signal(signal.SIGINT, signal.default_int_handler)
    own_process._PATIENCE = float(sys.argv[2])
    own_process.run_to_its_end([sys.executable, "-c", sys.argv[1]])
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


# What it says while it ends is more than a pipe holds.
SAYS_MUCH = """
    import os, sys, time
    from nemo_eaft.own_process import end_cleanly_with

    end_cleanly_with(os.getppid())
    print("up", flush=True)
    try:
        time.sleep(600)
    finally:
        sys.stderr.write("x" * 300_000)
"""

# As in a library that catches everything.
GOES_ON = """
    import os, time
    from nemo_eaft.own_process import end_cleanly_with

    end_cleanly_with(os.getppid())
    print("up", flush=True)
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass
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
    assert found[0] - before == {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} - before
    assert (thread.name, thread.daemon) == ("a name", True)
    assert thread is not threading.main_thread()


def test_a_signal_on_the_way_leaves_none_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python changes the mask, and then runs handlers, which may raise."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    change = signal.pthread_sigmask

    def interrupted(how: int, which: Any) -> Any:
        change(how, which)
        if which and how == signal.SIG_BLOCK:
            raise KeyboardInterrupt
        return change(signal.SIG_BLOCK, ())

    monkeypatch.setattr(signal, "pthread_sigmask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start_in_background(lambda: None)
    assert change(signal.SIG_BLOCK, ()) == before


def interrupt(child: str, to_all: bool, patience: float, attempt: int = 0) -> None:
    """Ctrl-C in a terminal, or SIGINT to who started `child` alone: both end, that one as by SIGINT."""
    words = [sys.executable, "-c", *map(textwrap.dedent, (STARTER, child)), str(patience)]
    with subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as starter:
        try:
            assert starter.stdout is not None
            assert starter.stdout.readline() == "up\n"
            (os.killpg if to_all else os.kill)(starter.pid, signal.SIGINT)
            assert starter.wait(20) == -signal.SIGINT, attempt
            wait_for(lambda: not group(starter.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(starter.pid, signal.SIGKILL)


@pytest.mark.timeout(300)
def test_ctrl_c_ends_a_process_of_its_own_whose_libraries_have_threads() -> None:
    """The terminal's SIGINT and, from who started it, SIGTERM."""
    for attempt in range(TIMES // 2):
        interrupt(WITH_A_LIBRARY, to_all=True, patience=60, attempt=attempt)


@pytest.mark.parametrize("to_all", [False, True], ids=["starter", "both"])
def test_what_it_says_while_it_ends_does_not_hold_it(to_all: bool) -> None:
    interrupt(SAYS_MUCH, to_all, patience=60)


@pytest.mark.parametrize("to_all", [False, True], ids=["starter", "both"])
def test_one_that_goes_on_is_killed(to_all: bool) -> None:
    interrupt(GOES_ON, to_all, patience=2)


def group(number: int) -> bool:
    """Whether a process of this group is there."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True
