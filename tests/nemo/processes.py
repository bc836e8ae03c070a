"""What ranks do in `test_ranks.py`: speak to each other, fail, or never end."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def report() -> dict[str, Any]:
    """Who this rank is, and that it can speak to the others."""
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    torch.distributed.init_process_group("gloo")
    total = torch.tensor([float(os.environ["RANK"]) + 1])
    torch.distributed.all_reduce(total)
    return {
        "rank": torch.distributed.get_rank(),
        "sum": float(total),
        "pid": os.getpid(),
        "server": os.getppid(),
        "environment": "TorchElasticEnvironment" if TorchElasticEnvironment.detect() else "none",
        "threads": torch.get_num_threads(),
    }


def fail_on_rank_one(folder: Path) -> None:
    """Rank 1 raises while rank 0 waits for it, and then fails because it is gone."""
    (folder / str(os.getpid())).touch()
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        print("what it printed before")
        raise ZeroDivisionError("the cause")
    torch.distributed.all_reduce(torch.ones(1))


def hang(folder: Path) -> None:
    """Never ends, and has started a process that does not either."""
    child = subprocess.Popen(["sleep", "600"])
    for pid in (os.getpid(), child.pid):
        (folder / str(pid)).touch()
    time.sleep(600)
