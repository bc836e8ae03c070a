"""The processes of Megatron's checkpoint writer end with their rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.harness import alive, kill

ROOT = Path(__file__).parent.parent

CODE = """
    import multiprocessing, os, signal, sys
    if __name__ == "__main__":
        if sys.argv[1] == "ours":
            from nemo_eaft import writer
            queue = writer._write_results_queue()
            assert writer._write_results_queue() is queue
        elif "file" in sys.argv[1]:
            import time
            from nemo_eaft.writer import ending_with_parent
            run = ending_with_parent(time.sleep) if sys.argv[1] == "our file" else time.sleep
            child = multiprocessing.get_context("fork").Process(target=run, args=(60,))
            child.start()
            print(child.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        else:  # as Megatron does it
            manager = multiprocessing.get_context("spawn").Manager()
            queue = manager.Queue()
        queue.put({"written": 1})
        assert queue.get_nowait() == {"written": 1}
        print(multiprocessing.active_children()[0].pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "whose, ends", [("ours", True), ("Megatron's", False), ("our file", True), ("Megatron's file", False)]
)
def test_what_is_left_of_a_killed_rank(tmp_path: Path, whose: str, ends: bool) -> None:
    (tmp_path / "rank.py").write_text(textwrap.dedent(CODE))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Into a file: the server holds the other end of a pipe open.
    with (tmp_path / "out").open("w") as out:
        rank = subprocess.run(
            [sys.executable, str(tmp_path / "rank.py"), whose], stdout=out, env=environment, timeout=60, check=False
        )
    assert rank.returncode == -signal.SIGKILL
    server = int((tmp_path / "out").read_text())
    deadline = time.monotonic() + (60 if ends else 3)
    while alive(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        assert alive(server) == (not ends)
    finally:
        kill([server])
