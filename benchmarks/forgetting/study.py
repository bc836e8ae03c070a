"""Make the runs that are left, one at a time, each kept when it is finished."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.forgetting import design, plan, results, rows
from benchmarks.forgetting.inputs import find_inputs
from benchmarks.forgetting.results import BASE, Line, Wanted, WrongInput
from benchmarks.forgetting.training import Mass, train
from benchmarks.machine import device_name
from nemo_eaft.compare.cache import digest
from nemo_eaft.compare.drift import measure_drift, reference
from nemo_eaft.compare.measure import Task, load_model
from nemo_eaft.compare.probe import measure_probe
from nemo_eaft.compare.record import Measures, to_json
from nemo_eaft.compare.target import measure_target
from nemo_eaft.compare.text import measure_text, windows


def general_text(tokenizer: Any) -> list[list[int]]:
    """Windows of Python's own help topics (``pydoc_data.topics``, PSF licence), which every machine that runs this has:
    one from each of the longest."""
    from pydoc_data.topics import topics

    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))[: design.WINDOWS]
    return [piece for name in sorted(longest) for piece in windows(tokenizer, topics[name], 1, design.WINDOW_TOKENS)]


class Study:
    """The base model and what is measured on."""

    def __init__(self, demo: Path, folder: Path, steps: int = design.STEPS) -> None:
        """demo: where ``nemo_eaft.demo_data`` has written; folder: of the results; steps: of each run."""
        from transformers import AutoTokenizer

        self.demo, self.folder, self.steps = demo, folder, steps
        self.tokenizer = AutoTokenizer.from_pretrained(demo / "model")
        self.inputs = find_inputs(folder, lambda: self.base, self.tokenizer, rows.user_questions(demo))
        self._tasks: dict[str, Task] = {}

    @cached_property
    def base(self) -> Any:
        return load_model(self.demo / "model", "float32", "cpu")

    @cached_property
    def weights(self) -> dict[str, Any]:
        """The base model's weights, to begin each run with."""
        return {name: each.clone() for name, each in self.base.state_dict().items()}

    @cached_property
    def reference(self) -> list[Any]:
        self._restore()
        return reference(self.base, self.inputs.samples)

    def pools(self, setting: str) -> rows.Pools:
        return rows.pools(setting, self.demo, self.tokenizer, self.inputs)

    def task(self, setting: str) -> Task:
        """What a setting is measured on."""
        if setting not in self._tasks:
            self._tasks[setting] = Task(
                self.pools(setting).held_out,
                self.inputs.samples,
                general_text(self.tokenizer),
                rows.probe(self.tokenizer, self.inputs),
                "first",
            )
        return self._tasks[setting]

    def digest(self, setting: str) -> str:
        """Of all rows of a setting, for training and for measuring, and of how a run is made."""
        pools, task = self.pools(setting), self.task(setting)
        trained = [[row.tokens.input_ids, row.tokens.answers, row.planted] for row in pools.clean + pools.conflicts]
        measured = [[row.input_ids, row.answers] for row in task.rows]
        asked = [[each.prompt, each.answers, each.right] for each in task.questions]
        how = [pools.share, self.steps, self.checkpoints, design.BATCH, design.CLIP, "bf16-mixed"]
        return digest([trained, measured, task.samples, task.pieces, asked, how])[:16]

    @property
    def checkpoints(self) -> list[int]:
        return sorted({step for step in design.CHECKPOINTS if step < self.steps} | {self.steps})

    def measure(self, setting: str) -> Measures:
        """Of the model as it is now. Cross-entropies are means over many tokens and are measured as the model is
        trained, in bfloat16; drift and probe in float32, for a small difference counts there."""
        task = self.task(setting)
        with torch.autocast("cpu", torch.bfloat16):
            found = measure_target(self.base, task.rows) | {"text": measure_text(self.base, task.pieces)}
        found["drift"] = measure_drift(self.base, task.samples, lambda number: self.reference[number])
        return found | measure_probe(self.base, task.questions, task.scoring)

    def start(self, setting: str) -> None:
        """Write the base model's line, or find that it was measured on the same rows.

        Raises:
            WrongInput: the results are of other rows.
        """
        lines = results.read(self.folder, setting)
        expected = self.digest(setting)
        for line in lines:
            if line.digest != expected:
                raise WrongInput(
                    f"{self.folder / setting}.jsonl holds runs on other rows or of other lengths ({line.digest}, here "
                    f"{expected}); choose another folder with --results"
                )
        if not lines:
            self._restore()
            point = {"step": 0, "measures": to_json(self.measure(setting))}
            results.append(self.folder, self._line(Wanted(setting, BASE, 0.0, 0), {}, [point], {}))

    def run(self, wanted: Wanted) -> Line:
        """Train and measure one run, and keep its line."""
        self.start(wanted.setting)
        # Both before the clock starts: they are of the process, not of the run.
        self._restore()
        pools, task = self.pools(wanted.setting), self.task(wanted.setting)
        assert len(self.reference) == len(task.samples)
        points: list[dict[str, Any]] = []
        measuring = 0.0

        def at_checkpoint(step: int, mass: Mass) -> None:
            nonlocal measuring
            began = time.perf_counter()
            points.append({"step": step, "measures": to_json(self.measure(wanted.setting)), "mass": _short(mass)})
            measuring += time.perf_counter() - began

        began = time.perf_counter()
        order = pools.order(self.steps * design.BATCH, wanted.seed)
        config = design.METHODS[wanted.method]
        train(self.base, order, config, wanted.learning_rate, self.checkpoints, at_checkpoint)
        seconds = {"training": time.perf_counter() - began - measuring, "measuring": measuring}
        line = self._line(wanted, asdict(config), points, {name: round(value, 1) for name, value in seconds.items()})
        results.append(self.folder, line)
        return line

    def _line(
        self, wanted: Wanted, config: dict[str, Any], points: list[dict[str, Any]], seconds: dict[str, float]
    ) -> Line:
        versions = {name: version(name) for name in ("torch", "transformers")}
        setting, method = wanted.setting, wanted.method
        return Line(
            setting,
            method,
            wanted.learning_rate,
            wanted.seed,
            config,
            points,
            device_name(torch.device("cpu")),
            versions,
            self.digest(setting),
            seconds,
        )

    def _restore(self) -> None:
        self.base.load_state_dict(self.weights)


def _short(mass: Mass) -> Mass:
    return {name: {kind: float(f"{value:.6g}") for kind, value in kinds.items()} for name, kinds in mass.items()}


def all_lines(folder: Path) -> list[Line]:
    """Every line of every setting."""
    return [line for setting in design.SETTINGS for line in results.read(folder, setting)]


def make_runs(
    study: Study,
    only: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int] | None,
    until: float | None,
) -> None:
    """Run what is left until nothing is, or until a run would not end in time.

    until: on the clock of ``time.monotonic``; None: no end.
    """
    while True:
        lines = all_lines(study.folder)
        left = plan.left(lines, only, methods, seeds)
        if not left:
            return
        expected = plan.minutes(lines, 1)
        if until is not None and time.monotonic() + 60 * (expected or 0.0) > until:
            print(f"no time for another run of about {expected or 0.0:.1f} minutes; {len(left)} can go on later")
            return
        wanted = left[0]
        line = study.run(wanted)
        end = plan.best_target(line)
        taken = " + ".join(f"{value:.0f} s {name}" for name, value in line.seconds.items())
        name = f"{wanted.setting}, {wanted.method}, {wanted.learning_rate:g}, seed {wanted.seed}"
        with contextlib.suppress(BrokenPipeError):  # nobody reads what a run in the background says
            print(f"{name}: target {end:.3f}; {taken}; {len(left) - 1} left", flush=True)
