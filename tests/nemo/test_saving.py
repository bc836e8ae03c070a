"""A save of the distributed optimizer takes memory on one of the data-parallel ranks, and none of a GPU."""

import pytest

from nemo_eaft.settings import Settings
from tests.nemo import jobs, saving
from tests.nemo.conftest import Workshop
from tests.nemo.ranks import run_ranks

STATE = 12
"""Bytes of a parameter in float32: itself and Adam's two moments."""


def make(workshop: Workshop, name: str) -> Settings:
    return workshop.settings(
        name, "llama", trainer={"max_steps": 1, "save_every": 1, "gpus_per_node": 2, "distributed_optimizer": True}
    )


def test_only_one_rank_holds_the_gathered_state(workshop: Workshop) -> None:
    settings = make(workshop, "saving")
    first, second = run_ranks(saving.train, 2, jobs.Plan(settings, workshop.nemo("llama"), save=True))
    assert len(first) == len(second) == 1
    print(first, second)
    assert not first[0].on_device
    assert not second[0].on_device
    assert first[0].held == pytest.approx(STATE, rel=1e-3)
    assert second[0].held == 0
    # Beside the whole state: this rank's half of it, and two of its three tensors as they arrive, in parts and joined.
    assert first[0].peak < 2.6 * STATE
    # Its own half of the state, on its way.
    assert second[0].peak < 0.6 * STATE
