"""A checkpoint of one layout goes on under another: the same rows, the same losses, the same weights."""

import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.nemo.conftest import Run, Workshop, assemble

STEPS = 6
SAVED = 3


@dataclass(frozen=True)
class Layout:
    """One way to split a training; nothing in it is mathematics."""

    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)


SHARED = {"distributed_optimizer": True}
SOURCES = {
    "tp2": Layout(2, {"tensor": 2}),
    "tp2-dp2-shared": Layout(4, {"tensor": 2}, SHARED),
}
TARGETS = {
    "one": ("tp2", Layout(1, {}, {"micro_batch_size": 4}, {"fused_linear": True})),
    "pp2-uneven": ("tp2", Layout(2, {"pipeline": 2, "last_stage_layers": 1}, {"micro_batch_size": 1})),
    "dp2": ("tp2", Layout(2)),
    "tp2-sequence-recompute": ("tp2", Layout(2, {"tensor": 2, "sequence": True}, {"recompute": "full"})),
    "one-shared": ("tp2-dp2-shared", Layout(1, {}, SHARED)),
    "dp2-shared": ("tp2-dp2-shared", Layout(2, {}, SHARED)),
    "vpp2-dp2-shared": ("tp2-dp2-shared", Layout(4, {"pipeline": 2, "virtual_pipeline": 2}, SHARED)),
}


def train(workshop: Workshop, name: str, layout: Layout) -> Run:
    return workshop.train(
        f"layout-{name}",
        world=layout.world,
        parallel=layout.parallel,
        loss=layout.loss,
        trainer={"max_steps": STEPS, "save_every": SAVED} | layout.trainer,
        plan={"save": True},
    )


def resume(workshop: Workshop, name: str, layout: Layout, source: Run) -> Run:
    """Steps after the third, from a copy of the source's checkpoint."""
    folder = workshop.root / "runs" / f"layout-{name}" / "checkpoints"
    folder.mkdir(parents=True)
    (saved,) = (path for path in (source.dir / "checkpoints").iterdir() if path.name == f"step={SAVED - 1}")
    shutil.copytree(saved, folder / saved.name)
    return train(workshop, name, layout)


@pytest.mark.parametrize("name", TARGETS)
def test_another_layout_goes_on(workshop: Workshop, name: str) -> None:
    source_name, layout = TARGETS[name]
    source = train(workshop, source_name, SOURCES[source_name])
    run = resume(workshop, f"{source_name}-to-{name}", layout, source)
    assert len(run.losses) == STEPS - SAVED
    for step in range(STEPS - SAVED):
        assert run.answers(step) == source.answers(SAVED + step)
    assert run.losses[0] == pytest.approx(source.losses[SAVED], rel=1e-5)
    assert run.ranks[0].gradient_norms[0] == pytest.approx(source.ranks[0].gradient_norms[SAVED], rel=1e-5)
    assert run.losses == pytest.approx(source.losses[SAVED:], rel=1e-4)
    start, before, expected, after = (
        assemble([getattr(rank, part) for rank in which.ranks])
        for which, part in ((source, "initial"), (run, "initial"), (source, "final"), (run, "final"))
    )
    assert start.keys() == before.keys() == expected.keys() == after.keys()
    for key, weight in expected.items():
        assert not torch.equal(before[key], start[key]), f"{key} is that of the imported model"
        apart = float((after[key] - weight).norm() / (weight - before[key]).norm())
        assert apart < 1e-4, key
        print(name, key, apart)
