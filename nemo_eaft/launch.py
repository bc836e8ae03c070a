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
import tempfile
import time
import traceback
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from nemo_eaft.atomic import replacing
from nemo_eaft.settings import Settings

if TYPE_CHECKING:
    from nemo_eaft.agent import Killed

ERROR = "error.json"
LAUNCHER = "NEMO_EAFT_LAUNCHER"
"""Environment variable: :data:`PROCESS` of the launcher that has made a run ready and then started this rank."""
START = "NEMO_EAFT_START"
"""Environment variable: what the ranks of one start have agreed on (:func:`nemo_eaft.restart.name_this_start`)."""
PROCESS = uuid.uuid4().hex
"""This process, and no other."""
_PROMPT = 5.0
"""Seconds: an error older than that when the agent saw a rank killed was not its consequence."""
_PACKAGE = str(Path(__file__).parent) + os.sep


@dataclass(frozen=True)
class Program:
    """What the ranks of a job run, and how its messages speak of it."""

    module: str = "nemo_eaft.train"
    arguments: str = "CONF"
    unit: str = "step"
    """What `stopped.json` counts."""
    stops: str = "at the next step"
    """When a request to stop is heeded."""


TRAINING = Program()


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


@contextmanager
def warned_once() -> Iterator[None]:
    """For reading settings, which warn: ranks are silent where their launcher has read the same ones."""
    with warnings.catch_warnings():
        if LAUNCHER in os.environ:
            warnings.simplefilter("ignore", UserWarning)
        yield


def job_identity(environment: Mapping[str, str] = os.environ) -> str:
    """What all ranks of a job have in common and those of another job, or of the same one requeued, have not.

    Ranks that ``torchrun`` starts again are another job. On one machine it counts them; several machines count each
    for itself, so there it is the port of the store, new with each start, or where a port is given (torchrun's static
    rendezvous, its default) a name that the ranks find in that store (:mod:`nemo_eaft.restart`).
    Empty where nothing tells jobs apart, which is so with a launcher other than ``torchrun`` and SLURM.
    """
    parts = {name: environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")}
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    one_machine = environment.get("LOCAL_WORLD_SIZE", "") == environment.get("WORLD_SIZE", "?")
    if several_machines(environment) and "TORCHELASTIC_RUN_ID" in environment:
        parts |= {name: environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", START)}
    if run_id != "none":  # torchrun's default, the same for every job
        parts["TORCHELASTIC_RUN_ID"] = run_id
    # Also with a run id: the next start may have the same.
    if one_machine and (file := environment.get("TORCHELASTIC_ERROR_FILE")):
        # <new folder of this torchrun>/attempt_<n>/<local rank>/error.json
        parts["TORCHELASTIC_ERROR_FILE"] = str(Path(file).parent.parent.parent)
    if one_machine and environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        parts["TORCHELASTIC_RESTART_COUNT"] = environment["TORCHELASTIC_RESTART_COUNT"]
    return " ".join(f"{name}={value}" for name, value in parts.items() if value)


def several_machines(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether ``torchrun`` started the ranks of this job on more than one machine."""
    return environment.get("LOCAL_WORLD_SIZE", "1") != environment.get("WORLD_SIZE", "1")


def _attempt(environment: Mapping[str, str] = os.environ) -> str:
    """The job and how often ``torchrun`` has restarted its ranks, where that is one count."""
    if several_machines(environment):
        return job_identity(environment)
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


def run_local(settings: Settings, arguments: list[str], program: Program = TRAINING) -> int:
    """Start the ranks of a one-machine run with ``torchrun`` and wait for them.

    SIGTERM or SIGUSR1 to this process asks the run to stop (:mod:`nemo_eaft.stop`), a second one ends it at once.

    Args:
        settings: checked and made ready.
        arguments: configuration and overrides, for each rank.
        program: what each rank runs.

    Returns:
        0; 75 if the run was stopped on request; 1 or 2 by the rank that failed first. The reason is printed.

    Raises:
        ValueError: the run needs several machines.
    """
    from nemo_eaft import stop
    from nemo_eaft.agent import read_report

    trainer = settings.trainer
    if trainer.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes}: several machines need one torchrun (or srun) on each, "
            f"torchrun ... -m {program.module} {program.arguments}; see examples/slurm"
        )
    run_dir = Path(settings.run.dir)
    (run_dir / ERROR).unlink(missing_ok=True)
    stop.clear(run_dir)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", stop.CLEARED: "1", LAUNCHER: PROCESS}
    if settings.parallel.tensor > 1 or settings.parallel.context > 1:
        # Megatron's overlapped communication relies on the order in which kernels are issued (Hopper and
        # before).
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with tempfile.TemporaryDirectory(prefix="nemo-eaft-") as folder:
        report = Path(folder) / "killed.json"
        # --standalone: the system chooses the port, so two runs on a machine do not meet.
        command = [sys.executable, "-m", "nemo_eaft.agent", str(report), str(os.getpid()), "--standalone", "--nnodes=1"]
        command += [f"--nproc-per-node={trainer.gpus_per_node}", f"--max-restarts={settings.run.max_restarts}"]
        ranks = subprocess.Popen([*command, "-m", program.module, *arguments], env=environment)
        code = _wait(ranks, run_dir, program)
        killed = read_report(report)
    if code != 0:
        return _explain(run_dir / ERROR, code, killed)
    stopped = stop.read_stopped(run_dir)
    if stopped is None:
        return 0
    where = f", saved in {stopped.checkpoint}" if stopped.checkpoint else ", not saved: the run keeps no checkpoints"
    print(
        f"nemo-eaft: stopped on request ({stopped.reason}) after {program.unit} {stopped.step}{where}; "
        f"the same command continues the run",
        file=sys.stderr,
    )
    return stop.EXIT_STOPPED


def _wait(child: subprocess.Popen[bytes], run_dir: Path, program: Program) -> int:
    """Exit code of torchrun, which this process outlives to say why it ended."""
    from nemo_eaft import stop

    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        name = signal.Signals(number).name
        if asked:
            child.send_signal(signal.SIGTERM)
            return
        asked = True
        try:
            stop.request(run_dir, f"{name} to the launcher, process {os.getpid()}")
        except OSError as error:
            print(f"nemo-eaft: {name}: {run_dir / stop.REQUEST} cannot be written: {error}", file=sys.stderr)
            child.send_signal(signal.SIGTERM)
            return
        text = f"nemo-eaft: {name}: the run is asked to stop {program.stops}; {name} once more ends it at once"
        print(text, file=sys.stderr, flush=True)

    def outlive(number: int, frame: FrameType | None) -> None:
        pass

    # A terminal sends SIGINT to launcher and ranks, a batch system SIGTERM to one.
    handlers = ((signal.SIGTERM, ask), (signal.SIGUSR1, ask), (signal.SIGINT, outlive))
    before = {number: signal.signal(number, handler) for number, handler in handlers}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.terminate()
            child.wait()


def _explain(path: Path, code: int, killed: Killed | None) -> int:
    """Print who began it: a rank that a signal ended, unless an error was there well before."""
    error = _read(path)
    if killed is not None and (error is None or error["time"] > killed.time - _PROMPT):
        if error is not None:
            print(f"{error['traceback']}\nnemo-eaft: rank {error['rank']}, then: {error['message']}", file=sys.stderr)
        print(f"nemo-eaft: {killed}", file=sys.stderr)
        return 1
    if error is None:
        print(f"nemo-eaft: a rank ended with exit code {code} and left no message; see above", file=sys.stderr)
        return 1
    if error["kind"] == "input":
        print(f"nemo-eaft: rank {error['rank']}: {error['message']}", file=sys.stderr)
        return 2
    first = f"{error['message']}" if error["kind"] == "stall" else f"failed first: {error['message']}"
    print(f"{error['traceback']}\nnemo-eaft: rank {error['rank']} {first}", file=sys.stderr)
    return 1


def _read(path: Path) -> dict[str, Any] | None:
    try:
        error: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return error


def is_users(error: BaseException) -> bool:
    """Whether an error is about the user's input: a ``ValueError`` that this package raised itself, not a
    library."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return isinstance(error, ValueError) and last is not None and last.tb_frame.f_code.co_filename.startswith(_PACKAGE)


def write_error(run_dir: Path, rank: int, error: BaseException) -> None:
    """Leave ``error.json``, unless another rank of this job was first, and torchrun's own error file.

    What an older job left is replaced. Creates no ``run_dir``. Never raises: the error itself matters more.
    """
    tell_torchrun(error)
    leave_error(
        run_dir,
        rank,
        kind="input" if is_users(error) else "failure",
        message=f"{error}" if is_users(error) else f"{type(error).__name__}: {error}",
        text="".join(traceback.format_exception(error)),
    )


def tell_torchrun(error: BaseException) -> None:
    """Write the error file that ``torchrun`` reads, so that its own table shows the traceback. Never raises.

    ``torch.distributed.elastic.multiprocessing.errors.record`` writes the same, but it never sees an error that became
    an exit code, and it rounds its time down to a second: a rank that failed because another was killed then seems to
    have failed before it, which torchrun dates when it looks, a tenth of a second later. Nor does it write whole or not
    at all: half a file, of a rank that torchrun ends while it writes, ends torchrun itself, and then nobody is named.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    more = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(time.time()) + 1)}
    content = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": more}}
    with suppress(OSError), replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def leave_error(run_dir: Path, rank: int, *, kind: str, message: str, text: str) -> None:
    """Leave ``error.json``, unless another rank of this job was first. Never raises.

    kind: ``input``, ``failure`` or ``stall``; text: the traceback.
    """
    content: dict[str, Any] = {
        "job": _attempt(),
        "rank": rank,
        "kind": kind,
        "message": message,
        "traceback": text,
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


def error_of_this_job(run_dir: Path) -> dict[str, Any] | None:
    """What the first rank of this job to fail has left in ``error.json``, as :func:`leave_error` writes it.

    None where none has, or where nothing tells this job from an older one.
    """
    error = _read(run_dir / ERROR)
    return error if error is not None and job_identity() and error.get("job") == _attempt() else None


def forget_errors(run_dir: Path) -> None:
    """Remove ``error.json`` where nothing tells jobs apart, or an older job's would stay for ever. Rank 0 calls it."""
    if not job_identity():
        (run_dir / ERROR).unlink(missing_ok=True)


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
