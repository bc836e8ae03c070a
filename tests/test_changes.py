"""A run goes on with other settings or other data only when that is asked for, and says what changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nemo_eaft import cli, ready, run_dir, train
from nemo_eaft.compose import compose, load
from nemo_eaft.hf_model import imported_folder
from nemo_eaft.integrity import SUMS, write_sums
from nemo_eaft.settings import known_keys
from tests.commands import home, make_checkpoint, run, started
from tests.data.support import chat, write_jsonl
from tests.test_integrity import flip

__all__ = ["home", "started"]  # fixtures

ALLOW = "--allow-config-change"


@pytest.fixture
def conf(home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]) -> str:
    """The configuration of a run that has done one of two steps."""
    path = str(home / "own.yaml")
    assert run(capsys, "train", path)[0] == 0
    make_checkpoint(home / "run" / "checkpoints" / "step=0")
    started.clear()
    return path


def answers(home: Path, text: str) -> None:
    write_jsonl(home / "train.jsonl", [{"messages": chat(f"Question {n}?", f"{text} {n}.")} for n in range(4)])


@pytest.mark.parametrize(
    "override, said",
    [
        ("loss.alpha=0.5", "loss.alpha: 1.0 -> 0.5"),
        ("loss.top_k=10", "loss.top_k: 20 -> 10"),
        ("loss.gate=dft", 'loss.gate: "eaft" -> "dft"'),
        ("trainer.learning_rate=1e-3", "trainer.learning_rate: 5e-06 -> 0.001"),
        ("data.train={home}/other.jsonl", "data.train: "),
    ],
)
def test_another_setting_is_an_error_until_it_is_allowed(
    home: Path, conf: str, started: list[list[str]], capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    (home / "other.jsonl").write_bytes((home / "train.jsonl").read_bytes())
    override = override.format(home=home)
    before = (home / "run" / "config.yaml").read_text()
    code, _, err = run(capsys, "train", conf, override)
    assert code == 2
    assert said in err
    assert ALLOW in err
    assert (home / "run" / "config.yaml").read_text() == before
    assert started == []

    code, out, _ = run(capsys, "train", ALLOW, conf, override)
    assert code == 0
    assert said in out
    assert "step 2 follows with these; the order of rows goes on after 1 batches" in out
    # The ranks are told, for each of them looks at the folder.
    assert started == [[ALLOW, conf, override]]
    assert (home / "run" / "config.1.yaml").read_text() == before
    assert load(home / "run" / "config.yaml") == compose(conf, [override])
    # From now on this is the configuration of the run; nothing is left to allow, and nothing more is kept.
    assert run(capsys, "train", conf, override)[0] == 0
    assert not (home / "run" / "config.2.yaml").exists()
    assert run(capsys, "train", ALLOW, conf)[0] == 0
    assert load(home / "run" / "config.2.yaml") == compose(conf, [override])


def test_a_layout_is_no_other_setting(
    home: Path, conf: str, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = (
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "trainer.recompute=full"],
        ["trainer.gpus_per_node=1", "trainer.micro_batch_size=4", "loss.fused_linear=true"],
    )
    for layout in layouts:
        code, out, err = run(capsys, "train", conf, *layout)
        assert (code, err) == (0, "")
        assert "accepts" not in out
    assert len(started) == len(layouts)
    assert load(home / "run" / "config.3.yaml") == compose(conf, layouts[1])
    assert {*run_dir.LAYOUT, *run_dir.FIXED} <= set(known_keys())


@pytest.mark.parametrize("override", ["trainer.precision=fp32", "trainer.distributed_optimizer=false"])
def test_what_the_optimizers_state_is_made_of_stays(
    conf: str, started: list[list[str]], capsys: pytest.CaptureFixture[str], override: str
) -> None:
    code, _, err = run(capsys, "train", ALLOW, conf, override)
    assert code == 2
    assert override.partition("=")[0] in err
    assert "cannot change them" in err
    assert started == []


def test_a_file_with_other_content_is_found_by_its_digest(
    home: Path, conf: str, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / "train.jsonl"
    before, rows = file.stat(), (home / "run" / "data" / "training.jsonl").read_text()
    # Written again, but the same: no change.
    file.write_bytes(file.read_bytes())
    assert run(capsys, "train", conf)[0] == 0
    answers(home, "Answes")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    code, _, err = run(capsys, "train", conf)
    assert code == 2
    assert f"data.train: file {file} sha256 " in err
    assert (home / "run" / "data" / "training.jsonl").read_text() == rows
    code, out, _ = run(capsys, "train", ALLOW, conf)
    assert code == 0
    assert f"data.train: file {file} sha256 " in out
    assert "the order of rows goes on after 1 batches" in out
    assert (home / "run" / "data" / "training.jsonl").read_text() != rows
    assert run(capsys, "train", conf)[0] == 0


def test_before_the_first_checkpoint_data_may_change(
    home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    conf = str(home / "own.yaml")
    assert run(capsys, "train", conf)[0] == 0
    answers(home, "Other")
    assert run(capsys, "train", conf)[0] == 0


def test_rows_that_are_gone_are_not_taken_for_unchanged(
    home: Path, conf: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "run" / "data" / "prepared.json").unlink()
    code, _, err = run(capsys, "train", conf)
    assert code == 2
    assert "it is not known what it was trained on" in err
    assert run(capsys, "train", ALLOW, conf)[0] == 0


def test_rows_of_another_version_are_there_but_not_the_same(
    home: Path, conf: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be written in another order, so nothing is said of it but that."""
    prepared = home / "run" / "data" / "prepared.json"
    written = json.loads(prepared.read_text())
    now = written["identity"]["format"]
    written["identity"]["format"] = now - 1
    prepared.write_text(json.dumps(written))
    code, _, err = run(capsys, "train", conf)
    assert code == 2
    assert f"the rows were written by another version of nemo_eaft (form {now - 1}, now {now})" in err
    assert "not there" not in err
    code, out, _ = run(capsys, "train", ALLOW, conf)
    assert code == 0
    assert "the order of rows is another one and starts after 1 batches" in out
    assert json.loads(prepared.read_text())["identity"]["format"] == now


@pytest.mark.parametrize("first", ["0", "1"])
def test_ranks_accept_it_whoever_looks_first(
    home: Path, conf: str, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Rank 1 may see the old config.yaml or the new one."""
    trained: list[tuple[Path, Path | None]] = []
    monkeypatch.setattr(train, "run_training", lambda settings, *where: trained.append(where))
    settings = compose(conf, ["loss.alpha=0.5"])
    if first == "1":
        monkeypatch.setattr("nemo_eaft.ready.time.sleep", lambda seconds: ready.make_ready(settings, True))
    for rank in (first, str(1 - int(first))):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        (home / "run" / "ready.json").unlink(missing_ok=first == "0" or rank == "0") if rank == first else None
        assert cli.run_rank([ALLOW, conf, "loss.alpha=0.5"]) == 0
    assert trained == [(home / "imported", home / "run" / "checkpoints" / "step=0")] * 2


def test_a_restart_on_one_machine_does_not_believe_the_attempt_before(
    home: Path, conf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another checkpoint may be the newest by now."""
    settings = compose(conf)
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    ready.make_ready(settings)
    newer = make_checkpoint(home / "run" / "checkpoints" / "step=1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr("nemo_eaft.ready.time.sleep", lambda seconds: ready.make_ready(settings))
    assert ready.wait_ready(settings).resume_from == newer


def test_a_damaged_import_is_named(home: Path, capsys: pytest.CaptureFixture[str], started: list[list[str]]) -> None:
    weights = home / "imported" / "weights" / "common.pt"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    write_sums(home / "imported")
    conf = str(home / "own.yaml")
    assert imported_folder(compose(conf).model, home / "model") == home / "imported"
    flip(weights)
    code, _, err = run(capsys, "train", conf)
    assert code == 2
    assert f"{weights}: its bytes are not those that were saved" in err
    # A run that goes on takes the model's description from there, not its weights.
    flip(weights)
    assert run(capsys, "train", conf)[0] == 0
    make_checkpoint(home / "run" / "checkpoints" / "step=0")
    flip(weights)
    assert run(capsys, "train", conf)[0] == 0
    (home / "imported" / SUMS).unlink()
    with pytest.warns(UserWarning, match="has no SHA256SUMS: it is not known whether its files are whole"):
        ready.make_ready(compose(conf))


def test_a_damaged_or_unfinished_checkpoint_is_not_exported(
    home: Path, conf: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = home / "run" / "checkpoints" / "step=0"
    (home / "imported" / "hf").mkdir()
    (home / "imported" / "hf" / "config.json").write_text("{}")
    flip(checkpoint / "weights" / "common.pt")
    for named in (home / "run", checkpoint):
        code, _, err = run(capsys, "export", str(named), str(home / "out"))
        assert code == 2
        assert f"{checkpoint / 'weights' / 'common.pt'}: its bytes are not those that were saved" in err
    flip(checkpoint / "weights" / "common.pt")
    checkpoint.with_name("step=0-unfinished").touch()
    code, _, err = run(capsys, "export", str(checkpoint), str(home / "out"))
    assert code == 2
    assert "step=0 was not finished" in err
    assert not (home / "out").exists()
