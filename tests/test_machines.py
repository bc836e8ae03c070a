"""torchrun on two machines when a rank or a machine is lost. What a training does then: nemo/test_two_machines.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_eaft.restart import OWN_STORES
from tests.machines import Loopback, Machine, Pretended, Rack, exit_code, free_port, rack

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

# A training that goes on until the file `enough` is there. `kill` is what a rank finds that is to die. Started again,
# rank 0 is there two seconds after the others.
RANKS = """
    import datetime, os, signal, sys, time
    from pathlib import Path
    import torch, torch.distributed as dist
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    if rank == 0 and (folder / "again").exists():
        time.sleep(2)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=4))
    enough = torch.zeros(1)
    while not enough:
        (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
        enough += (folder / "enough").exists()
        dist.all_reduce(enough)
        if rank == 1 and (folder / "kill").exists():
            (folder / "kill").rename(folder / "again")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
    print(f"rank {rank} ended well", flush=True)
    dist.destroy_process_group()
"""


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Rack | Loopback]:
    """Where there can be no namespaces both are the loopback, and a warning says so."""
    with rack(tmp_path) as made:
        yield made


@pytest.mark.parametrize("error", [RuntimeError("no cable"), PermissionError("not allowed"), ValueError("no child")])
def test_where_there_are_no_machines_the_loopback_takes_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Also where only the second step cannot be had: a switch, but no machine on it."""

    def boot(self: Rack, number: int) -> Machine:
        raise error

    monkeypatch.setattr(Rack, "boot", boot)
    with contextlib.ExitStack() as stack:
        with pytest.warns(UserWarning, match="instead of two machines"):
            made = stack.enter_context(rack(tmp_path))
        assert not made.real
        machine = made.boot(0)
        process = machine.start(["sleep", "60"], tmp_path / "log", os.environ)
        machine.lose_power()
        assert process.wait(10) == -signal.SIGKILL


def test_machines_end_with_who_started_them(tmp_path: Path) -> None:
    """Killed, a process cleans up nothing."""
    script = """
        import os, pathlib, signal, sys
        from tests.machines import rack
        with rack(pathlib.Path(sys.argv[1])) as made:
            if made.real:
                print(made.switch.pid, made.boot(0).holder.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == -9
    if not done.stdout:
        pytest.skip("no namespaces here")
    deadline = time.monotonic() + 20
    while left := [pid for pid in done.stdout.split() if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


class Job:
    """The same torchrun on each machine."""

    def __init__(self, folder: Path, restarts: int, own_stores: str) -> None:
        (folder / "ranks.py").write_text(textwrap.dedent(RANKS))
        self.folder = folder
        self.port = free_port()
        self.restarts = restarts
        self.environment = os.environ | {OWN_STORES: own_stores, "OMP_NUM_THREADS": "1"}

    def log(self, machine: Machine | Pretended) -> Path:
        return self.folder / f"{machine.name}-{id(machine)}.log"

    def start(self, machine: Machine | Pretended, head: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        words += ["--rdzv-backend=c10d", "--rdzv-id=one", f"--rdzv-endpoint={head}:{self.port}"]
        words += [f"--max-restarts={self.restarts}", str(self.folder / "ranks.py"), str(self.folder)]
        return machine.start(words, self.log(machine), self.environment)

    def until_both_run(self) -> None:
        """Both ranks say so, newly."""
        for rank in (0, 1):
            (self.folder / f"rank{rank}.pid").unlink(missing_ok=True)
        deadline = time.monotonic() + 60
        while not all((self.folder / f"rank{rank}.pid").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline, [path.read_text() for path in self.folder.glob("*.log")]
            time.sleep(0.05)


def test_ranks_are_started_again_and_a_lost_head_ends_the_job(machines: Rack | Loopback, tmp_path: Path) -> None:
    """With torchrun's default, one store for all starts, the first half fails (measured; `check_store` refuses it)."""
    job = Job(tmp_path, restarts=1, own_stores="1")
    head, other = machines.boot(0), machines.boot(1)
    on_head, on_other = job.start(head, head.name), job.start(other, head.name)
    job.until_both_run()
    (tmp_path / "kill").touch()
    while not (tmp_path / "again").exists():
        time.sleep(0.05)
    job.until_both_run()
    assert on_head.poll() is on_other.poll() is None
    began = time.monotonic()
    head.off()
    assert exit_code(on_other, 60, job.log(other)) != 0
    print(f"the other ended after {time.monotonic() - began:.1f} s; real machines: {machines.real}")


def test_a_machine_that_loses_power_ends_the_job_on_the_head(tmp_path: Path) -> None:
    with rack(tmp_path) as machines:
        job = Job(tmp_path, restarts=0, own_stores="0")
        head, other = machines.boot(0), machines.boot(1)
        on_head, _ = job.start(head, head.name), job.start(other, head.name)
        job.until_both_run()
        began = time.monotonic()
        other.lose_power()
        assert exit_code(on_head, 60, job.log(head)) != 0
        print(f"the head ended after {time.monotonic() - began:.1f} s; real machines: {machines.real}")
