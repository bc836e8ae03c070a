"""What one rank does for all, or may fail at alone: every rank has the result, or the same error, and none waits."""

from __future__ import annotations

import datetime
import errno
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_eaft.loss.collectives import everywhere, on_rank_zero, raise_timeouts
from nemo_eaft.same_config import check_same
from tests.harness import run_ranks

SETTINGS = {"alpha": 0.5, "fused_linear": False}


def outcome(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fail(rank: int) -> int:
    if dist.get_rank() == rank:
        raise OSError(errno.ESTALE, "Stale file handle")
    return dist.get_rank() * 10


def validation_repeated(metrics: Path) -> int:
    """How many validations `RepeatValidation` runs at step 4 of a run that validates every second step."""
    from nemo_eaft.resume import RepeatValidation

    runs: list[int] = []
    loop = types.SimpleNamespace(run=lambda: runs.append(1))
    trainer: Any = types.SimpleNamespace(
        global_step=4,
        val_check_interval=2,
        limit_val_batches=1,
        fit_loop=types.SimpleNamespace(epoch_loop=types.SimpleNamespace(val_loop=loop)),
    )
    RepeatValidation(metrics).on_train_start(trainer, None)
    return len(runs)


def refuse(rank: int, error: Exception) -> int:
    if dist.get_rank() == rank:
        raise error
    return 0


def slow_peer(folder: Path, limit_of_group: bool) -> str | None:
    """An all-reduce that rank 0 waits for longer than its group's limit was; the error, or None."""
    c10d: Any = dist.distributed_c10d
    group = dist.new_group()
    c10d._set_pg_timeout(datetime.timedelta(seconds=1), group)
    if not limit_of_group:
        raise_timeouts(60)
    dist.barrier()
    given_up = folder / "given-up"
    if dist.get_rank() == 1:
        deadline = time.monotonic() + (60 if limit_of_group else 3)
        while not given_up.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    said = outcome(lambda: dist.all_reduce(torch.ones(1), group=group))
    if dist.get_rank() == 0 and said is not None:
        given_up.write_text(said)
    dist.barrier()
    return said


def what_ranks_see(rank: int, folder: str) -> dict[str, Any]:
    root = Path(folder)
    there = root / "there"
    # Of a rank's own place: only rank 0's holds a file, or something that is none.
    mine = root / f"of-rank-{rank}"
    return {
        "everywhere": outcome(lambda: everywhere(lambda: fail(9))),
        "fails on 1": outcome(lambda: everywhere(lambda: fail(1))),
        "refused on 1": outcome(lambda: everywhere(lambda: refuse(1, ValueError("rows: 3 is too few")))),
        "refused by another": outcome(lambda: on_rank_zero(lambda: refuse(0, UnicodeError("no text")))),
        "zero": outcome(lambda: on_rank_zero(lambda: fail(9) + 7)),
        "zero fails": outcome(lambda: on_rank_zero(lambda: fail(0))),
        "zero is not asked for 1": outcome(lambda: on_rank_zero(lambda: fail(1))),
        "config": outcome(lambda: check_same(mine / "eaft.json", SETTINGS)),
        "config is a folder": outcome(lambda: check_same(mine, SETTINGS)),
        "validated": outcome(lambda: validation_repeated(mine / "validated.jsonl")),
        "not validated": outcome(lambda: validation_repeated(there)),
        "metrics are a folder": outcome(lambda: validation_repeated(mine)),
        "limit raised": slow_peer(root, limit_of_group=False),
        "limit of the group": slow_peer(root, limit_of_group=True),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    zero = folder / "of-rank-0"
    zero.mkdir()
    (zero / "eaft.json").write_text('{"alpha": 1.0, "fused_linear": true}')
    (zero / "validated.jsonl").write_text('{"step": 4, "val_loss": 1.0}\n')
    return run_ranks(what_ranks_see, 2, str(folder), timeout=240)


def test_a_result_reaches_every_rank(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["everywhere"] == [0, 10]
        assert rank["zero"] == rank["zero is not asked for 1"] + 7 == 7


def test_an_error_of_one_rank_is_every_ranks(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["fails on 1"] == "RuntimeError: rank 1: OSError: [Errno 116] Stale file handle"
        assert rank["zero fails"] == "RuntimeError: rank 0: OSError: [Errno 116] Stale file handle"


def test_what_is_the_users_to_mend_stays_so(seen: list[dict[str, Any]]) -> None:
    """Exit code 2, not 1, whichever rank is read."""
    for rank in seen:
        assert rank["refused on 1"] == "ValueError: rank 1: rows: 3 is too few"
        assert rank["refused by another"] == "ValueError: rank 0: UnicodeError: no text"


def test_what_rank_0_reads_of_the_settings_counts(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["config"].startswith("ValueError: ")
        assert "alpha: 1.0 -> 0.5" in rank["config"]
        assert rank["config is a folder"].startswith("RuntimeError: rank 0: IsADirectoryError: ")


def test_what_rank_0_reads_of_the_metrics_counts(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["validated"] == 0
        assert rank["not validated"] == 1
        assert rank["metrics are a folder"].startswith("RuntimeError: rank 0: IsADirectoryError: ")


def test_a_groups_limit_is_raised(seen: list[dict[str, Any]]) -> None:
    """So that a stalled rank is named before the backend gives up; without it the same wait ends with an error."""
    assert [rank["limit raised"] for rank in seen] == [None, None]
    assert "imed out" in str(seen[0]["limit of the group"])


def test_one_process_needs_no_other() -> None:
    assert everywhere(lambda: 3) == [3]
    assert on_rank_zero(lambda: 3) == 3
    raise_timeouts(60)
    with pytest.raises(RuntimeError, match="rank 0: ZeroDivisionError"):
        on_rank_zero(lambda: 1 // 0)


def limits_over_nccl(rank: int) -> list[float]:
    """Seconds that the world and a group of its own give a collective, before and after they were raised."""
    dist.destroy_process_group()
    limit = datetime.timedelta(seconds=20)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=limit)
    groups: list[Any] = [dist.group.WORLD, dist.new_group(timeout=datetime.timedelta(seconds=7000))]
    device = torch.device("cuda")

    def limits() -> list[float]:
        return [group._get_backend(device).options._timeout.total_seconds() for group in groups]

    before = limits()
    raise_timeouts(5000)
    dist.all_reduce(torch.ones(1, device=device))
    torch.cuda.synchronize()
    return before + limits()


@pytest.mark.gpu
def test_limits_of_nccl_are_raised() -> None:
    assert run_ranks(limits_over_nccl, 1, timeout=240) == [[20, 7000, 5000, 7000]]
