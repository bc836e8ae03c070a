"""Asking a run to stop: a checkpoint at the next step boundary, a clean end, and the same command goes on from there.

torchrun kills its ranks 30 s after SIGTERM, in the middle of a large save, and `sbatch --signal=B:` reaches the batch
shell alone. So a stop is asked for by a file `stop` in the run's folder, or by SIGUSR1 to any rank or to the launcher.
Workers end with exit code 0, for torchrun restarts or blames any other; `stopped.json` in the run's folder tells that
the run was stopped and not finished, and the launcher turns it into exit code 75 (EX_TEMPFAIL).

NeMo's own PreemptionCallback (nemo/lightning/pytorch/callbacks/preemption.py, 2.7.3) cannot serve: it waits for a
signal on rank 0 alone, which under torchrun nobody can send without ending the agent; it asks
torch.cuda.current_device(), so it needs a GPU; it saves only the `-last` checkpoint, a second time where the step was
just saved; and it ends by sys.exit(0) in the middle of the loop, past on_train_end and the loggers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from nemo_eaft.atomic import replacing
from nemo_eaft.launch import job_identity

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

REQUEST = "stop"
"""File in `run.dir` that asks for a stop. What it says is repeated in the note."""

STOPPED = "stopped.json"
"""File in `run.dir` that a stopped run leaves: a :class:`Stopped`. The next start removes it."""

EXIT_STOPPED = 75
"""Exit code of the launcher for a run that was stopped on request and goes on with the same command (EX_TEMPFAIL)."""

CLEARED = "NEMO_EAFT_STOP_CLEARED"
"""Environment variable: whoever started this job has removed an older request, so one that is there is meant."""


@dataclass(frozen=True)
class Stopped:
    """How a run was stopped."""

    step: int
    """Optimizer steps that were done; of an analysis, rows."""
    checkpoint: str | None
    """The folder that holds them; None where the run keeps no checkpoints."""
    reason: str
    """Who asked."""
    job: str
    """`launch.job_identity` of the job that was stopped."""
    time: float
    """Seconds since the epoch."""


_signalled = threading.Event()


def listen() -> None:
    """From here on SIGUSR1 to this process asks for a stop instead of ending it. Main thread only."""
    signal.signal(signal.SIGUSR1, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    _signalled.set()


def request(run_dir: Path, reason: str) -> None:
    """Ask the run in `run_dir` to stop; whole or not at all. An older request is replaced."""
    with replacing(run_dir / REQUEST) as temporary:
        temporary.write_text(reason + "\n", encoding="utf-8")


def clear(run_dir: Path) -> None:
    """Remove the note of an earlier stop, and with a line a request from before this job.

    Called by the launcher of one machine before it starts the ranks, otherwise by rank 0 before it makes the run ready.
    Whoever set :data:`CLEARED` (that launcher, a batch script) has removed an older request: one that is there by now
    was made while the ranks started, and is kept. So is one made while `torchrun` restarts ranks.
    """
    (run_dir / STOPPED).unlink(missing_ok=True)
    if os.environ.get(CLEARED) == "1" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    path = run_dir / REQUEST
    if path.exists():
        path.unlink(missing_ok=True)
        print(f"nemo-eaft: removed {path}: it asked for a stop before this run was started", flush=True)


def read_stopped(run_dir: Path) -> Stopped | None:
    """The note of the last job in `run_dir`, if that was stopped on request."""
    try:
        return Stopped(**json.loads((run_dir / STOPPED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def asked(run_dir: Path, look: bool) -> str | None:
    """Why this process believes that a stop was asked for, or None.

    look: whether to look for the file, too; one rank does it for all. A file system that fails is said once, and is no
        request.
    """
    if _signalled.is_set():
        return f"SIGUSR1 to process {os.getpid()}"
    if not look:
        return None
    try:
        text = (run_dir / REQUEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        # A shared file system that fails for a moment (ESTALE, EIO) is looked at again at the next step.
        _say_once(run_dir / REQUEST, error)
        return None
    return f"file {REQUEST}" + (f": {text[:200]}" if text else "")


_said: set[str] = set()


def _say_once(path: Path, error: OSError) -> None:
    kind = f"{path} {error.errno}"
    if kind not in _said:
        _said.add(kind)
        print(f"nemo-eaft: {path} cannot be looked at: {error}; the run goes on", file=sys.stderr, flush=True)


def save_now(trainer: Trainer) -> str | None:
    """Save this step as a scheduled save would, unless that was done; the path, or None without checkpoint callbacks.

    Every rank calls it. Lightning's callback decides by the step and the clock only inside its own hook, so its two
    parts are called here; in its hook for the same step, which comes later, it sees that the step is saved.
    """
    saved: str | None = None
    for callback in trainer.checkpoint_callbacks:
        keeper: Any = callback
        if keeper._last_global_step_saved != trainer.global_step:
            candidates = keeper._monitor_candidates(trainer)
            keeper._save_topk_checkpoint(trainer, candidates)
            keeper._save_last_checkpoint(trainer, candidates)
            if keeper._last_global_step_saved != trainer.global_step:
                # Not among the best of what it monitors, and no `-last` is kept: without this the step would be lost.
                keeper._save_checkpoint(trainer, keeper.format_checkpoint_name(candidates))
        saved = saved or str(keeper._last_checkpoint_saved).removesuffix(".ckpt")
    return saved


def write_note(run_dir: Path, step: int, checkpoint: str | None, reason: str) -> None:
    """Leave `stopped.json` and take the request away. One rank calls it, when everything else is done."""
    with replacing(run_dir / STOPPED) as temporary:
        note = Stopped(step, checkpoint, reason, job_identity(), time.time())
        temporary.write_text(json.dumps(asdict(note), indent=1) + "\n", encoding="utf-8")
    (run_dir / REQUEST).unlink(missing_ok=True)
