"""NeMo's callbacks of ours, called as NeMo does, without a training."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft.compose import compose
from nemo_eaft.train import build_watch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stall_seconds", [0, None])
def test_a_save_may_take_long_where_nothing_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stall_seconds: int | None
) -> None:
    """NCCL would end it after 600 s."""
    from nemo_eaft import watchdog_callback

    raised: list[float] = []
    monkeypatch.setattr(watchdog_callback, "raise_timeouts", raised.append)
    settings = compose("smollm2-135m", [f"run.dir={tmp_path}", "run.save_seconds=5000"])
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, stall_seconds=stall_seconds))
    watch: Any = build_watch(settings, tmp_path)
    watch.on_train_start(None, None)
    assert raised == [5060]

    said: list[str] = []

    def refuse(seconds: float) -> None:
        raise RuntimeError("torch 9.9: no such thing")

    monkeypatch.setattr(watchdog_callback, "raise_timeouts", refuse)
    monkeypatch.setattr("nemo_eaft.watchdog_callback.logging.warning", said.append)
    watch.on_train_start(None, None)
    assert ["could not be raised (torch 9.9: no such thing)" in line for line in said] == [True]


def test_a_limit_for_saves_that_has_no_effect_is_said(tmp_path: Path) -> None:
    from nemo_eaft.watchdog_callback import EndStalled

    with pytest.warns(UserWarning, match="save_seconds=60 has no effect below stall_seconds=900"):
        EndStalled(tmp_path, save_seconds=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EndStalled(tmp_path, stall_seconds=7200)
        EndStalled(tmp_path, stall_seconds=60, save_seconds=60)


@pytest.mark.parametrize("device, on_gpu", [("cpu", False), ("cuda", True)])
def test_who_watches_knows_where_collectives_run_and_which_job_it_is(tmp_path: Path, device: str, on_gpu: bool) -> None:
    from nemo_eaft.watchdog_callback import EndStalled

    trainer: Any = types.SimpleNamespace(
        global_rank=0,
        world_size=1,
        global_step=0,
        strategy=types.SimpleNamespace(root_device=types.SimpleNamespace(type=device)),
    )
    jobs = set()
    for _ in range(2):
        callback: Any = EndStalled(tmp_path)
        callback.on_train_start(trainer, None)
        try:
            assert callback._watchdog.on_gpu == on_gpu
            jobs.add(callback._watchdog.job)
        finally:
            callback.teardown(trainer, None, "fit")
    assert len(jobs) == 2
    assert "" not in jobs


@pytest.mark.parametrize("broken", ["record", "sums"])
def test_a_whole_checkpoint_is_not_called_unwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Where it is `saved.json` that cannot be written."""
    import nemo.lightning as nl

    from nemo_eaft import model_checkpoint
    from nemo_eaft.model_checkpoint import ModelCheckpoint, RecordError

    def save(self: Any, trainer: Any, filepath: str) -> None:
        self._get_finalize_save_checkpoint_callback(trainer, filepath, 3)()

    def finalize(self: Any, *_: Any) -> Callable[[], None]:
        return lambda: None

    def seal(trainer: Any, folder: Path) -> None:
        if broken == "sums":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(nl.ModelCheckpoint, "_save_checkpoint", save)
    monkeypatch.setattr(nl.ModelCheckpoint, "_get_finalize_save_checkpoint_callback", finalize)
    monkeypatch.setattr(model_checkpoint, "seal", seal)
    monkeypatch.setattr(model_checkpoint, "_dump_context", lambda trainer, folder: None)
    folder, record = tmp_path / "step=2", tmp_path / "saved.json"
    record.mkdir()
    callback: Any = ModelCheckpoint(dirpath=str(tmp_path), record=record)
    monkeypatch.setattr(callback, "set_checkpoint_unfinished_marker", lambda filepath, barrier_after: None)
    monkeypatch.setattr(callback, "_ema_callback", lambda trainer: None)
    with pytest.raises(RuntimeError) as caught:
        callback._save_checkpoint(None, str(folder))
    whole = f"checkpoint {folder} is whole, but {record} could not be written ("
    cut = f"checkpoint {folder} could not be written ("
    assert str(caught.value).startswith(whole if broken == "record" else cut)
    assert ("[Errno 21] Is a directory" if broken == "record" else "[Errno 5] Input/output") in str(caught.value)
    assert isinstance(caught.value, RecordError) == (broken == "record")
