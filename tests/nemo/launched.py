"""Runs of the real launcher or torchrun, with real ranks, in tests."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nemo_eaft import compose
from nemo_eaft.settings import Settings
from tests.harness import kill
from tests.nemo.sabotage import NAME, Sabotage

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.nemo.sabotage"


@dataclasses.dataclass
class Job:
    """A started launcher."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    log: Path
    started: float

    def wait(self, timeout: float) -> int:
        """Exit code. Everything that it started is ended if it takes longer."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise TimeoutError(f"still running after {timeout} s\n{self.output()[-4000:]}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        return self.output().strip().splitlines()[-1]

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def until(self, condition: Any, timeout: float = 120.0) -> None:
        """Wait for a condition while the job runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended early\n{self.output()[-4000:]}"
            if time.monotonic() > deadline:
                self.end()
                raise TimeoutError(f"waited {timeout} s\n{self.output()[-4000:]}")
            time.sleep(0.1)

    def steps(self) -> int:
        """Steps in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if '"loss"' in line), default=0)

    def seconds_since_mark(self) -> float:
        """Since the sabotage happened (the last save began, where saves are slow)."""
        return time.time() - float(self.log.with_suffix(".mark").read_text())

    def until_gone(self, timeout: float) -> None:
        """No process of the job is left, after so many seconds at most."""
        deadline = time.monotonic() + timeout
        while left := processes_with(str(self.run_dir)):
            if time.monotonic() > deadline:
                said = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in left]
                self.end()
                raise AssertionError(f"left behind: {said}")
            time.sleep(0.2)

    def end(self) -> None:
        """End the launcher and whatever has the run's folder among its arguments."""
        self.process.kill()
        self.process.wait()
        kill(processes_with(str(self.run_dir)))


def processes_with(text: str) -> list[int]:
    """Processes that have a text among their arguments or in the variable RUN_MARK."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            alive = "\nState:\tZ" not in (entry / "status").read_text()
            said = (entry / "cmdline").read_text() + (entry / "environ").read_text(errors="replace")
        except OSError:
            continue
        if alive and text in said:
            found.append(int(entry.name))
    return found


def start(settings: Settings, checkpoint: Path, sabotage: Sabotage | None = None, torchrun: int | None = None) -> Job:
    """Start the launcher, or with a number of restarts a plain `torchrun` as a user would."""
    run_dir = Path(settings.run.dir)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, imported=str(checkpoint)))
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    conf = run_dir.with_name(run_dir.name + ".yaml")
    compose.save(settings, conf)
    ranks = settings.trainer.gpus_per_node
    if torchrun is None:
        code = (
            "import sys; from nemo_eaft.compose import compose; from nemo_eaft.launch import Program, run_local; "
            "from nemo_eaft.ready import make_ready; settings = compose(sys.argv[1], []); make_ready(settings); "
            f"sys.exit(run_local(settings, sys.argv[1:], Program({MODULE!r})))"
        )
        command = [sys.executable, "-c", code, str(conf)]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [f"--max-restarts={torchrun}", "-m", MODULE, str(conf)]
    environment = {"SABOTAGE_MARK": str(run_dir.with_name(run_dir.name + ".mark")), "SABOTAGE_CPU": "1"}
    if sabotage is not None:
        environment[NAME] = json.dumps(dataclasses.asdict(sabotage))
    return _start(command, run_dir, environment)


def start_command(words: list[str], run_dir: Path) -> Job:
    """Start `nemo-eaft` with these words, which are to write into `run_dir`."""
    return _start([sys.executable, "-m", "nemo_eaft.cli", *words], run_dir, {})


def _start(command: list[str], run_dir: Path, more: dict[str, str]) -> Job:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RUN_MARK": str(run_dir)}
    environment.pop(NAME, None)
    environment |= more
    log = run_dir.with_name(run_dir.name + ".log")
    with log.open("ab") as out:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
    return Job(process, run_dir, log, started)


def checkpoints(run_dir: Path) -> list[str]:
    """Names of the finished checkpoints, without the link to the newest."""
    folder = run_dir / "checkpoints"
    return sorted(
        path.name
        for path in (folder.iterdir() if folder.exists() else [])
        if path.is_dir() and not path.is_symlink() and not path.with_name(path.name + "-unfinished").exists()
    )


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a distributed checkpoint: weights and optimizer."""
    from torch.distributed.checkpoint import FileSystemReader  # type: ignore[attr-defined]
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint / "weights")
    found = {
        name: torch.empty(data.size, dtype=data.properties.dtype)
        for name, data in reader.read_metadata().state_dict_metadata.items()
        if isinstance(data, TensorStorageMetadata)
    }
    load(found, storage_reader=FileSystemReader(checkpoint / "weights"), no_dist=True)
    return found


def assert_same_checkpoint(left: Path, right: Path) -> None:
    """Bit for bit: weights and optimizer state."""
    one, other = saved_tensors(left), saved_tensors(right)
    assert one.keys() == other.keys()
    assert any("optimizer" in name for name in one)
    assert any("optimizer" not in name for name in one)
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different[:5]
