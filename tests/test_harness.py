"""The harness itself: failures and hangs of ranks end the test, and say why."""

import math
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import poisoned_empty, run_ranks, run_threads


def failing(rank: int, how: str) -> None:
    if rank == 1:
        if how == "raise":
            raise LookupError("the first cause")
        os._exit(3)
    if how == "raise":
        dist.all_reduce(torch.ones(1))  # the other rank never comes
    time.sleep(90)


@pytest.mark.parametrize(
    "how, message", [("raise", "LookupError: the first cause"), ("die", r"exit codes by rank: \[None, 3\]")]
)
def test_the_harness_reports_the_first_failure_and_ends_the_others(how: str, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        run_ranks(failing, 2, how)
    assert time.monotonic() - begin < 60  # without the sleep of a minute, whatever else the machine does


def test_the_harness_ends_ranks_that_hang() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] still ran after 0.5 s"):
        run_ranks(time.sleep, 2, timeout=0.5)


def test_threads_are_ranks_of_one_group() -> None:
    def work(rank: int, offset: int) -> float:
        value = torch.tensor(float(rank + offset))
        dist.all_reduce(value)
        return value.item()

    assert run_threads(work, 4, 1) == [10.0] * 4
    assert not dist.is_initialized()


def test_threads_report_the_first_failure() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise LookupError("the first cause")
        dist.all_reduce(torch.ones(1))

    with pytest.raises(RuntimeError, match="LookupError: the first cause"):
        run_threads(work, 2)
    assert run_threads(lambda rank: rank, 2) == [0, 1]


def test_threads_that_hang_are_noticed() -> None:
    def work(rank: int) -> None:
        if rank == 0:
            dist.all_reduce(torch.ones(1))  # the other rank never comes

    with pytest.raises(TimeoutError, match=r"ranks \[0\] still ran after 0.5 s"):
        run_threads(work, 2, timeout=0.5)
    assert run_threads(lambda rank: rank, 2) == [0, 1]


@pytest.mark.unpoisoned
def test_empty_is_poisoned_for_the_package_only() -> None:
    original = torch.empty
    package = {"torch": torch, "__name__": "nemo_eaft.anything"}
    with poisoned_empty():
        made = eval("torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(2).new_empty(2)", package)
        assert all(math.isnan(value) for tensor in made for value in tensor)
        assert eval("torch.empty(2, dtype=torch.int64)", package).tolist() == [-(2**63)] * 2
        elsewhere = eval("torch.empty(4)", {"torch": torch, "__name__": "other"})
        assert elsewhere.shape == (4,)
    assert torch.empty is original
