"""A training that is killed again and again ends with the weights of one that nothing happened to.

    python -m tests.soak                       # `make soak`: 500 steps at TP2 x DP2, twelve kills
    python -m tests.soak --steps 40 --kills 2

Each kill is a SIGKILL to one rank at a random moment, with `nemo-eaft train`'s launcher around it; this script starts
the launcher again each time. Seeded: the same arguments give the same plan.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import tempfile
import time
from pathlib import Path
from typing import get_args

from nemo_eaft import recorder
from nemo_eaft.settings import Settings
from tests.nemo import models
from tests.nemo.launched import Job, assert_same_checkpoint, checkpoints, processes_with, start
from tests.nemo.sabotage import Deadly, Sabotage

RANKS = 4
TIMES = ("seconds", "tokens_per_second")


@dataclasses.dataclass(frozen=True)
class Kill:
    """One start that was ended by a kill."""

    plan: Sabotage
    done: int
    """Steps in `metrics.jsonl` when it was over."""
    seconds: float
    """From the start of the launcher to its end."""
    ending: float
    """From the kill to the end of the launcher."""


def plans(kills: int, steps: int, ranks: int, seed: int, start_up: float) -> list[Sabotage]:
    """Every place equally often, in random order, at random steps that grow, on random ranks.

    start_up: seconds that a rank takes until it trains, for the moments of kills in start-up.
    """
    chosen = random.Random(seed)
    places = [place for _ in range(-(-kills // 4)) for place in get_args(Deadly)][:kills]
    chosen.shuffle(places)
    # Not so late that the run would be over before a kill in the next save.
    moments = sorted(chosen.sample(range(2, max(2 + kills, steps * 9 // 10)), kills))
    return [
        Sabotage(
            place,
            step=step,
            rank=chosen.randrange(ranks),
            delay=chosen.uniform(0.0, {"start": start_up, "save": 0.5}.get(place, 0.0)),
        )
        for place, step in zip(places, moments, strict=True)
    ]


def soak(settings: Settings, checkpoint: Path, undisturbed: Path, todo: list[Sabotage]) -> list[Kill]:
    """Train `settings` from `checkpoint` with one kill per start, then to the end, and compare with `undisturbed`.

    Raises:
        AssertionError: a kill was not named, the run ended otherwise, or it is not the undisturbed run bit for bit.
    """
    kills = []
    for plan in todo:
        job = start(settings, checkpoint, plan)
        assert job.wait(600) == 1, f"{plan}: not ended by its kill\n{job.output()[-4000:]}"
        assert f"rank {plan.rank} (pid " in job.last_line(), job.last_line()
        assert "was killed by SIGKILL" in job.last_line(), job.last_line()
        kills.append(Kill(plan, _done(job), job.seconds(), job.seconds_since_mark()))
        print(f"{kills[-1]}", flush=True)
    job = start(settings, checkpoint)
    assert job.wait(3600) == 0, job.output()[-4000:]
    compare(job.run_dir, undisturbed)
    # Known: Megatron forks a process per save to write files; one whose rank is killed meanwhile can stay behind.
    if left := processes_with(str(job.run_dir)):
        print(f"left behind, and ended now: {len(left)} processes", flush=True)
        job.end()
    return kills


def compare(run_dir: Path, undisturbed: Path) -> None:
    """Weights, optimizer state and every line of metrics but its times: bit for bit."""
    newest = checkpoints(undisturbed)[-1]
    assert newest in checkpoints(run_dir)
    assert_same_checkpoint(run_dir / "checkpoints" / newest, undisturbed / "checkpoints" / newest)
    one, other = (_lines(folder) for folder in (run_dir, undisturbed))
    assert one == other, "metrics.jsonl differs"


def _lines(run_dir: Path) -> list[dict[str, object]]:
    rows = recorder.read(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def _done(job: Job) -> int:
    return job.steps()


def make_settings(folder: Path, steps: int) -> Settings:
    """A tiny Llama at TP2 x DP2 with Megatron's distributed optimizer.

    Every parameter's share is a multiple of 64 numbers: otherwise Megatron pads it to that in the optimizer's buckets,
    and saves memory that nobody wrote, different in every run.
    """
    if not (folder / "hf").exists():
        models.save_model("llama", folder / "hf", heads=4)
        models.write_rows(folder / "training.jsonl", 64, seed=1)
        models.write_rows(folder / "validation.jsonl", 16, seed=2)
    return models.run_settings(
        folder / "hf",
        folder,
        folder / "run",
        parallel={"tensor": 2, "sequence": True},
        trainer={
            "max_steps": steps,
            "save_every": max(2, steps // 25),
            "gpus_per_node": RANKS,
            "distributed_optimizer": True,
            "learning_rate": 1e-4,
        },
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep everything there; default: a temporary folder")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="nemo-eaft-soak-") as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        settings = make_settings(folder, arguments.steps)
        checkpoint = folder / "imported"
        began = time.monotonic()
        quiet = models.with_dir(settings, folder / "undisturbed")
        job = start(quiet, checkpoint)
        assert job.wait(7200) == 0, job.output()[-4000:]
        alone = job.seconds()
        print(f"undisturbed: {arguments.steps} steps in {alone:.0f} s", flush=True)
        todo = plans(arguments.kills, arguments.steps, RANKS, arguments.seed, start_up=30.0)
        kills = soak(settings, checkpoint, folder / "undisturbed", todo)
        by_place = collections.Counter(kill.plan.place for kill in kills)
        slowest = max(kill.ending for kill in kills)
        print(
            f"soak: {arguments.steps} steps at TP2 x DP2, {len(kills)} kills ("
            + ", ".join(f"{count} {place}" for place, count in sorted(by_place.items()))
            + f"), each named, the launcher ended at most {slowest:.0f} s after one; last checkpoint and metrics equal "
            f"to the undisturbed run's bit for bit; {time.monotonic() - began:.0f} s in all, undisturbed {alone:.0f} s"
        )
    return 0
