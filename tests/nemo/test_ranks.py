"""The harness itself: a failing rank is named, a hanging one is ended, nothing stays behind."""

import os
import time
from pathlib import Path

import pytest

from tests.nemo import processes
from tests.nemo.ranks import run_ranks


def there(pid: int) -> bool:
    """Stricter than `tests.harness.alive`: one that has ended, and that nobody has waited for, is there as well."""
    return Path(f"/proc/{pid}").exists()


def ends(pids: list[int]) -> bool:
    deadline = time.monotonic() + 60
    while any(there(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(there(pid) for pid in pids)


def test_results_come_in_rank_order_from_processes_that_share_one_import(tmp_path: Path) -> None:
    seen = run_ranks(processes.report, 3)
    assert [one["rank"] for one in seen] == [0, 1, 2]
    assert [one["sum"] for one in seen] == [6.0, 6.0, 6.0]
    assert len({one["pid"] for one in seen} | {os.getpid()}) == 4
    assert len({one["server"] for one in seen}) == 1
    assert all(one["environment"] == "TorchElasticEnvironment" for one in seen)
    assert all(one["threads"] == 1 for one in seen)


def test_the_first_failure_is_raised_not_its_consequences(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2(.|\n)*ZeroDivisionError: the cause") as caught:
        run_ranks(processes.fail_on_rank_one, 2, tmp_path)
    assert "what it printed before" in str(caught.value)
    assert ends([int(path.name) for path in tmp_path.iterdir()])


def test_ranks_that_hang_are_ended_with_what_they_started(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] still ran after 8"):
        run_ranks(processes.hang, 2, tmp_path, timeout=8.0)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 4
    assert ends(pids)


def test_a_death_that_does_not_come_is_an_error() -> None:
    with pytest.raises(AssertionError, match="every rank finished"):
        run_ranks(processes.report, 1, dies=True)
