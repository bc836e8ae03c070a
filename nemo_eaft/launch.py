"""Starting ranks, being a rank, and telling the launcher what went wrong in one.

``torchrun`` turns every failure of a child into exit code 1, so a rank that fails leaves ``error.json`` in
``run.dir``; the first one of a job wins, for the others mostly fail because a peer is gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from nemo_eaft.settings import Settings

ERROR = "error.json"
_PACKAGE = str(Path(__file__).parent) + os.sep


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Rank and number of ranks if ``torchrun`` or ``srun`` started this process as one of several, else None.

    A SLURM batch script itself has ``SLURM_PROCID`` too; only tasks of a step have ``SLURM_STEP_NUM_TASKS``.
    """
    if all(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" in environment and tasks.isdigit() and int(tasks) > 1:
        return int(environment["SLURM_PROCID"]), int(tasks)
    return None


def job_identity(environment: Mapping[str, str] = os.environ) -> str:
    """What all ranks of a job have in common and those of another job, or of the same one requeued, have not.

    Empty where nothing tells jobs apart, which is so with a launcher other than ``torchrun`` and SLURM, and with
    ``torchrun`` on several machines without ``--rdzv-id``.
    """
    parts = {name: environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")}
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    if run_id != "none":  # torchrun's default, the same for every job
        parts["TORCHELASTIC_RUN_ID"] = run_id
    elif (file := environment.get("TORCHELASTIC_ERROR_FILE")) and (
        environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
    ):
        # <new folder of this torchrun>/attempt_<n>/<local rank>/error.json
        parts["TORCHELASTIC_ERROR_FILE"] = str(Path(file).parent.parent.parent)
    return " ".join(f"{name}={value}" for name, value in parts.items() if value)


def _attempt(environment: Mapping[str, str] = os.environ) -> str:
    """The job and how often ``torchrun`` has restarted its ranks. Machines may count differently: only for errors."""
    return f"{job_identity(environment)} restart={environment.get('TORCHELASTIC_RESTART_COUNT', '0')}".strip()


def check_world(settings: Settings, ranks: int) -> None:
    """Refuse a job whose size is not that of the settings.

    Raises:
        ValueError: naming both.
    """
    if ranks != settings.world_size:
        trainer = settings.trainer
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes} x trainer.gpus_per_node={trainer.gpus_per_node} = "
            f"{settings.world_size} ranks, but the job was started with {ranks}"
        )


def run_local(settings: Settings, arguments: list[str], module: str = "nemo_eaft.train") -> int:
    """Start the ranks of a one-machine run with ``torchrun`` and wait for them.

    Args:
        settings: checked and made ready.
        arguments: configuration and overrides, for each rank.
        module: what each rank runs.

    Returns:
        0, or 1 or 2 by the first rank that failed; its message is printed.

    Raises:
        ValueError: the run needs several machines.
    """
    trainer = settings.trainer
    if trainer.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes}: several machines need one torchrun (or srun) on each, "
            f"torchrun ... -m nemo_eaft.train CONF; see examples/slurm"
        )
    run_dir = Path(settings.run.dir)
    (run_dir / ERROR).unlink(missing_ok=True)
    # --standalone: the system chooses the port, so two runs on a machine do not meet.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    command += [f"--nproc-per-node={trainer.gpus_per_node}", "-m", module, *arguments]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    if settings.parallel.tensor > 1 or settings.parallel.context > 1:
        # Megatron's overlapped communication relies on the order in which kernels are issued (Hopper and
        # before).
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    child = subprocess.Popen(command, env=environment)

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    def outlive(number: int, frame: FrameType | None) -> None:
        pass

    # The launcher outlives torchrun, to say why it ended. A terminal sends SIGINT to both, a batch system
    # SIGTERM to one.
    before = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGTERM, pass_on), (signal.SIGINT, outlive))
    }
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.terminate()
            child.wait()
    return 0 if code == 0 else _explain(run_dir / ERROR, code)


def _explain(path: Path, code: int) -> int:
    try:
        error = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        print(f"nemo-eaft: a rank ended with exit code {code} and left no message; see above", file=sys.stderr)
        return 1
    if error["kind"] == "input":
        print(f"nemo-eaft: rank {error['rank']}: {error['message']}", file=sys.stderr)
        return 2
    print(
        f"{error['traceback']}\nnemo-eaft: rank {error['rank']} failed first: {error['message']}",
        file=sys.stderr,
    )
    return 1


def is_users(error: BaseException) -> bool:
    """Whether an error is about the user's input: a ``ValueError`` that this package raised itself, not a
    library."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return isinstance(error, ValueError) and last is not None and last.tb_frame.f_code.co_filename.startswith(_PACKAGE)


def write_error(run_dir: Path, rank: int, error: BaseException) -> None:
    """Leave ``error.json``, unless another rank of this job was first; what an older job left is replaced.

    Creates no ``run_dir``. Never raises: the error itself matters more.
    """
    content: dict[str, Any] = {
        "job": _attempt(),
        "rank": rank,
        "kind": "input" if is_users(error) else "failure",
        "message": f"{error}" if is_users(error) else f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
    }
    temporary = run_dir / f".{ERROR}.{rank}.{os.getpid()}"
    with suppress(OSError):
        try:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
            _remove_stale(run_dir / ERROR, content["job"], temporary.with_suffix(".old"))
            os.link(temporary, run_dir / ERROR)  # fails if it exists: whole, and by one rank only
        finally:
            temporary.unlink(missing_ok=True)


def _remove_stale(path: Path, job: str, aside: Path) -> None:
    """Remove the error of another job. Several ranks may do so at once."""
    if not path.exists() or _job_of(path) == job:
        return
    path.rename(aside)
    try:
        if _job_of(aside) == job:  # since the look at it, a rank of this job put its own there: that one stays
            os.link(aside, path)
    finally:
        aside.unlink()


def _job_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("job")
    except (OSError, ValueError, AttributeError):
        return None
