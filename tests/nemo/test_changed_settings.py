"""A real run goes on with a changed learning rate when that is accepted; a script's run with another loss does not."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest

from nemo_eaft.ready import make_ready
from nemo_eaft.settings import Settings
from tests.nemo import breaking, jobs
from tests.nemo.conftest import Run, Workshop
from tests.nemo.ranks import run_ranks

STEPS = 6
SAVED = 3
OLD = 1e-3
NEW = 4e-4


def make(workshop: Workshop, name: str, world: int = 1) -> Settings:
    settings = workshop.settings(
        name,
        "llama",
        trainer={
            "max_steps": STEPS,
            "save_every": SAVED,
            "learning_rate": OLD,
            "gpus_per_node": world,
            "distributed_optimizer": True,
        },
    )
    imported = dataclasses.replace(settings.model, imported=str(workshop.nemo("llama")))
    return dataclasses.replace(settings, model=imported)


def half(workshop: Workshop, run: Run, name: str, world: int = 1) -> Settings:
    """The run after its third step."""
    settings = make(workshop, name, world)
    make_ready(settings)
    folder = Path(settings.run.dir)
    shutil.copytree(run.dir / "checkpoints" / f"step={SAVED - 1}", folder / "checkpoints" / f"step={SAVED - 1}")
    shutil.copy(run.dir / "eaft.json", folder)
    return settings


@pytest.fixture(scope="module")
def unchanged(workshop: Workshop) -> Run:
    settings = make(workshop, "changed-not")
    checkpoint = make_ready(settings).checkpoint
    return Run(settings, run_ranks(jobs.train, 1, jobs.Plan(settings, checkpoint, save=True)))


def cosine(highest: float, step: int) -> float:
    return highest * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def test_an_accepted_learning_rate_is_the_one_that_is_used(
    workshop: Workshop, unchanged: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """NeMo and torch would put back the one in the checkpoint."""
    old = half(workshop, unchanged, "changed-rate")
    trainer = dataclasses.replace(old.trainer, learning_rate=NEW, weight_decay=0.0, adam_beta2=0.9)
    settings = dataclasses.replace(old, trainer=trainer)
    with pytest.raises(ValueError, match=r"trainer\.learning_rate: 0\.001 -> 0\.0004"):
        make_ready(settings)
    ready = make_ready(settings, allow_change=True)
    assert "trainer.learning_rate: 0.001 -> 0.0004" in capsys.readouterr().out
    plan = jobs.Plan(settings, ready.checkpoint, resume_from=ready.resume_from, save=True)
    changed = Run(settings, run_ranks(breaking.train_and_show_groups, 1, plan))
    rates = [row["learning_rate"] for row in Run(settings, []).steps]
    assert rates == pytest.approx([cosine(NEW, step) for step in range(SAVED, STEPS)], rel=1e-12)
    assert [row["learning_rate"] for row in unchanged.steps] == pytest.approx(
        [cosine(OLD, step) for step in range(STEPS)], rel=1e-12
    )
    groups = changed.ranks[0]
    assert {group["betas"] for group in groups} == {(0.9, 0.9)}
    assert {group["weight_decay"] for group in groups} == {0.0}


def test_a_script_with_another_loss_is_refused_on_every_rank(workshop: Workshop, unchanged: Run) -> None:
    settings = half(workshop, unchanged, "changed-script", world=2)
    ready = make_ready(settings)
    plan = jobs.Plan(settings, ready.checkpoint, resume_from=ready.resume_from, save=True)
    file = Path(settings.run.dir) / "eaft.json"
    before = file.read_text()
    for text in run_ranks(breaking.train_as_a_script, 2, plan, 0.5, False):
        assert text.startswith(f"ValueError: {file}: the run was trained with another loss up to this checkpoint")
        assert "alpha: 1.0 -> 0.5" in text
        assert "allow_config_change=True" in text
    assert file.read_text() == before
    assert run_ranks(breaking.train_as_a_script, 2, plan, 0.5, True) == ["", ""]
    assert '"alpha": 0.5' in file.read_text()


def test_ranks_that_go_on_from_different_checkpoints_end(workshop: Workshop, unchanged: Run) -> None:
    settings = half(workshop, unchanged, "changed-rank", world=2)
    first = Path(settings.run.dir) / "checkpoints" / f"step={SAVED - 1}"
    plan = jobs.Plan(settings, Path(str(settings.model.imported)), save=True)
    for text in run_ranks(breaking.train_from_different, 2, plan, [first, first.with_name("step=0")]):
        assert text == "RuntimeError: rank 0 goes on from step=2, rank 1 from step=0: start the job again"
