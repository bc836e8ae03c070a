"""Ranks that torchrun starts again: which store they meet in, and that torch's own would hang them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nemo_eaft.restart import OWN_STORES, check_store, store_of_this_attempt

ROOT = Path(__file__).parent.parent
ALONE = {
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        ALONE,
        ALONE | {"TORCHELASTIC_RESTART_COUNT": "0"},
        ALONE | {"TORCHELASTIC_RESTART_COUNT": "1", "WORLD_SIZE": "4"},
        ALONE | {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"},
    ],
)
def test_otherwise_torch_has_its_own(environment: dict[str, str]) -> None:
    assert store_of_this_attempt(environment) is None


SEVERAL = ALONE | {"WORLD_SIZE": "4", "TORCHELASTIC_MAX_RESTARTS": "2"}


def test_restarts_on_several_machines_need_a_store_each() -> None:
    """What happens otherwise: test_machines.py."""
    with pytest.raises(ValueError, match=rf"--max-restarts=2 on several machines needs {OWN_STORES}=1"):
        check_store(SEVERAL)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        ALONE | {"TORCHELASTIC_MAX_RESTARTS": "2"},
        SEVERAL | {"TORCHELASTIC_MAX_RESTARTS": "0"},
        SEVERAL | {"TORCHELASTIC_USE_AGENT_STORE": "False"},
    ],
)
def test_otherwise_any_store_will_do(environment: dict[str, str]) -> None:
    check_store(environment)


# Rank 1 is killed; started again it is there three seconds before rank 0.
RANKS = """
    import datetime, os, signal, sys, time
    import torch, torch.distributed as dist
    from nemo_eaft.restart import OWN_STORES, check_store, store_of_this_attempt
    rank, again = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
    if again and rank == 0:
        while not os.path.exists(sys.argv[2]):
            time.sleep(0.1)
        time.sleep(3)
    elif again:
        open(sys.argv[2], "w").close()
    store = store_of_this_attempt() if sys.argv[1] == "ours" else None
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=datetime.timedelta(seconds=15))
    total = torch.ones(1)
    dist.all_reduce(total)
    if rank == 1 and not again:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(total)
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=15))
    dist.all_reduce(total, group=group)
    os.write(1, f"added {total.item()}\\n".encode())
    # Threads of gloo that are left at the end of a process can abort it.
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["ours", "torch's"])
def test_ranks_that_come_in_another_order(tmp_path: Path, whose: str) -> None:
    (tmp_path / "ranks.py").write_text(textwrap.dedent(RANKS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*command, str(tmp_path / "ranks.py"), whose, str(tmp_path / "there")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # The day torch's passes, `store_of_this_attempt` is not needed any more.
    assert (done.returncode == 0) == (whose == "ours"), done.stderr[-3000:]
    assert done.stdout.count("added 8.0") == (2 if whose == "ours" else 0), done.stdout + done.stderr[-3000:]
