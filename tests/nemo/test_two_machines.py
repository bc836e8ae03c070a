"""A training on two machines by examples/torchrun.sh: one loses power, is switched on again, and both go on.

The two are network namespaces with names and addresses of their own on a switch (`tests/machines.py`), tensor-parallel
across it, with the folder of the run shared as on a cluster.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from nemo_eaft import compose, launch, recorder, saved
from nemo_eaft.ready import READY
from tests.machines import Machine, exit_code, free_port, rack
from tests.nemo.conftest import Workshop
from tests.nemo.launched import ROOT, assert_same_checkpoint, checkpoints

# More than the limits inside together: this one ends pytest, they end the test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 12
SAVE_EVERY = 4
STALL_SECONDS = 8
TRAINER = {"max_steps": STEPS, "save_every": SAVE_EVERY}
PARALLEL = {"tensor": 2, "sequence": True}


def losses(run_dir: Path) -> dict[int, float]:
    """By step, of the step's last line."""
    path = run_dir / "metrics.jsonl"
    return {row["step"]: row["loss"] for row in recorder.read(path) if "loss" in row} if path.exists() else {}


def test_a_machine_that_is_lost_and_comes_back(workshop: Workshop, tmp_path: Path) -> None:
    one = workshop.train("machines-one", world=2, parallel=PARALLEL, trainer=TRAINER, plan={"save": True})

    settings = workshop.settings("machines-two", "llama", parallel=PARALLEL, trainer=TRAINER | {"gpus_per_node": 2})
    settings = dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, imported=str(workshop.nemo("llama"))),
        run=dataclasses.replace(settings.run, stall_seconds=STALL_SECONDS),
    )
    run_dir = Path(settings.run.dir)
    conf = tmp_path / "two.yaml"
    compose.save(settings, conf)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        # Each would take all cores, which they share here.
        "OMP_THREAD_LIMIT": "1",
        "NODES": "2",
        "GPUS": "1",
        "RESTARTS": "1",
        "PORT": str(free_port()),
    }
    command = [str(ROOT / "examples" / "torchrun.sh"), str(conf)]
    timeline = [time.monotonic()]
    with rack(tmp_path) as machines:
        first, second = machines.boot(0), machines.boot(1)
        environment["HEAD"] = first.name
        logs = [tmp_path / "first.log", tmp_path / "second.log"]
        agent = first.start(command, logs[0], environment)
        lost = second.start(command, logs[1], environment)

        def until(condition: object, timeout: float) -> None:
            deadline = time.monotonic() + timeout
            while not condition():  # type: ignore[operator]
                said = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
                assert agent.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.02)

        until(lambda: max(losses(run_dir), default=0) > SAVE_EVERY, 150)
        before = json.loads((run_dir / READY).read_text())
        if isinstance(second, Machine):
            # A rank's half of the activations, back and forth, in each of the four layers.
            assert second.received() > 1_000_000
        second.lose_power()
        timeline.append(time.monotonic())
        done = max(losses(run_dir))
        assert done < STEPS
        until((run_dir / launch.ERROR).exists, STALL_SECONDS + 30)
        timeline.append(time.monotonic())
        error = json.loads((run_dir / launch.ERROR).read_text())
        # Nothing is saved any more. The line of a step is there before that step is saved, so the lines do not tell.
        kept = saved.read(run_dir / saved.SAVED)
        assert kept is not None
        assert SAVE_EVERY <= kept.steps <= done

        # The agent of the machine that is left waits for the other one.
        second = machines.boot(1)
        again = second.start(command, logs[1], environment)
        assert exit_code(agent, 150, *logs) == 0, logs[0].read_text()[-4000:]
        assert exit_code(again, 30, *logs) == 0, logs[1].read_text()[-4000:]
        assert lost.wait(10) != 0
        trained, noticed, ended = (later - earlier for earlier, later in pairwise([*timeline, time.monotonic()]))
        print(
            f"real machines: {machines.real}; {done} steps in {trained:.0f} s, the loss noticed after {noticed:.1f} s,"
        )
        print(f"ended {ended:.0f} s later; rank {error['rank']} {error['message']}")

    after = json.loads((run_dir / READY).read_text())
    assert before["resume_from"] is None
    assert after["resume_from"].endswith(f"step={kept.steps - 1}")
    assert after["job"] != before["job"], "a rank could have taken the first start's note for the second's"
    if machines.real:
        assert (error["kind"], error["rank"]) == ("stall", 1)
        assert "does not answer" in error["message"]
    got, wanted = losses(run_dir), losses(one.dir)
    assert sorted(got) == list(range(1, STEPS + 1))
    assert got == pytest.approx(wanted, rel=1e-5)
    assert f"step={STEPS - 1}" in checkpoints(run_dir)
    assert_same_checkpoint(run_dir / f"checkpoints/step={STEPS - 1}", one.dir / f"checkpoints/step={STEPS - 1}")
