"""The command line: exit codes, messages, and that nothing is written or started when something is wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_eaft import cli, launch, ready, run_dir
from nemo_eaft.checkpoints import checkpoints_in
from nemo_eaft.compose import compose, save
from nemo_eaft.convert import MANIFEST
from nemo_eaft.settings import known_keys
from tests.commands import home, make_checkpoint, run, started  # noqa: F401, fixtures

ROOT = Path(__file__).parent.parent


def test_train_checks_prepares_and_launches(
    home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    conf = str(home / "own.yaml")
    code, out, _ = run(capsys, "train", conf, "loss=sft", "trainer.max_steps=1")
    assert code == 0
    assert started == [[conf, "loss=sft", "trainer.max_steps=1"]]
    assert "4 training rows" in out
    assert (home / "run" / "data" / "training.jsonl").is_file()
    assert compose(str(home / "run" / "config.yaml")) == compose(conf, ["loss=sft", "trainer.max_steps=1"])
    # and again, which is how a run is resumed
    assert run(capsys, "train", conf, "loss=sft", "trainer.max_steps=1")[0] == 0
    assert len(started) == 2


@pytest.mark.parametrize(
    "override, named",
    [
        ("trainer.max_stpes=5", "unknown key trainer.max_stpes, did you mean trainer.max_steps?"),
        ("trainer.max_steps=many", 'trainer.max_steps="many" must be a whole number'),
        ("trainer.global_batch_size=3", "trainer.global_batch_size=3 must be a multiple"),
        ("parallel.tensor=3", "must be a multiple of parallel.tensor=3"),
        (
            "trainer.gpus_per_node=4 parallel.tensor=4",
            "parallel.tensor=4 must divide the 4 attention heads and 2",
        ),
        ("trainer.seq_length=4", "4 of 4 rows cannot be used"),
        ("data.train=nowhere.jsonl", "data.train=nowhere.jsonl: no such file"),
        ("data.validation=nowhere.jsonl", "data.validation=nowhere.jsonl: no such file"),
        ("model.hf=/nowhere/model", "model.hf=/nowhere/model: no such folder"),
        ("model.tokenizer=/nowhere/model", "model.tokenizer=/nowhere/model: no tokenizer"),
        ("run.backend=cuda", "run.backend"),
        ("loss._target_=os.system", "unknown key loss._target_"),
    ],
)
def test_wrong_input_is_code_2_one_message_and_nothing_done(
    home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str], override: str, named: str
) -> None:
    if override == "run.backend=cuda":
        import torch

        if torch.cuda.is_available():
            pytest.skip("a GPU is here")
    code, _, err = run(capsys, "train", str(home / "own.yaml"), *override.split())
    assert code == 2
    assert err.startswith("nemo-eaft: ")
    assert named in err
    assert "Traceback" not in err
    assert started == []
    assert not (home / "run").exists()


def test_demo_without_its_files_says_what_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEMO_EAFT_HOME", str(tmp_path))
    code, _, err = run(capsys, "train", "demo", f"run.dir={tmp_path}/run")
    assert code == 2
    assert "python -m nemo_eaft.demo_data" in err or "run.backend=cpu is for machines without a GPU" in err


def test_a_tokenizer_with_more_tokens_than_the_model(
    home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((home / "model" / "config.json").read_text())
    (home / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    code, _, err = run(capsys, "train", str(home / "own.yaml"))
    assert code == 2
    assert "only 100 rows (vocab_size)" in err


def test_a_run_dir_with_another_configuration(
    home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    conf = str(home / "own.yaml")
    assert run(capsys, "train", conf)[0] == 0
    before = (home / "run" / "config.yaml").read_text()
    code, _, err = run(capsys, "train", conf, "trainer.learning_rate=1e-3", "loss.alpha=0.5")
    assert code == 2
    assert "loss.alpha: 1.0 -> 0.5\n  trainer.learning_rate: 5e-06 -> 0.001" in err
    assert (home / "run" / "config.yaml").read_text() == before
    assert len(started) == 1
    # What touches no number may change.
    assert run(capsys, "train", conf, "trainer.log_every=5", "data.num_workers=0")[0] == 0
    assert set(run_dir.MAY_DIFFER) <= set(known_keys())


def test_checkpoints_of_a_run_are_found_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step=9", "step=10", "step=100-last"):
        make_checkpoint(folder / name)
    make_checkpoint(folder / "step=200", unfinished=True)
    (folder / "step=300").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step=9", "step=10", "step=100-last"]
    assert checkpoints_in(tmp_path / "nowhere") == []


def test_checkpoints_are_neither_ignored_nor_taken_for_ones_own(
    home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    conf = str(home / "own.yaml")
    make_checkpoint(home / "run" / "checkpoints" / "step=1")
    code, _, err = run(capsys, "train", conf)
    assert code == 2
    assert "holds checkpoints but no config.yaml" in err
    assert run(capsys, "import", "--data", conf)[0] == 2
    ready.prepare_rows(compose(conf), ready.open_model(compose(conf)))
    save(compose(conf), home / "run" / "config.yaml")
    code, _, err = run(capsys, "train", conf, "run.resume=false")
    assert code == 2
    assert "run.resume=false" in err
    assert run(capsys, "train", conf)[0] == 0


def test_a_folder_that_is_no_checkpoint_is_not_written_into(
    home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "other").mkdir()
    (home / "other" / "thesis.txt").write_text("mine")
    code, _, err = run(capsys, "train", str(home / "own.yaml"), f"model.imported={home}/other")
    assert code == 2
    assert "neither a NeMo checkpoint nor an empty or new folder" in err
    assert os.listdir(home / "other") == ["thesis.txt"]


def test_under_torchrun_it_joins(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_eaft import train

    trained: list[tuple[Path, Path | None]] = []
    monkeypatch.setattr(train, "run_training", lambda settings, *where: trained.append(where))
    monkeypatch.setattr(launch, "run_local", lambda *_: pytest.fail("a rank must not launch"))
    conf = str(home / "own.yaml")
    for rank in "01":  # rank 1 finds what rank 0 made ready
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        assert cli.run_rank([conf]) == 0
    assert trained == [(home / "imported", None)] * 2


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_refused_rank_leaves_another_runs_folder_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    conf = str(home / "own.yaml")
    for name, value in (("RANK", rank), ("WORLD_SIZE", "3"), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, value)
    code, _, err = run(capsys, "train", conf)
    assert code == 2
    assert "2 ranks, but the job was started with 3" in err
    assert not (home / "run").exists()
    ready.make_ready(compose(conf))
    before = {path.name: path.stat().st_mtime_ns for path in (home / "run").iterdir()}
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(capsys, "train", conf, "loss.alpha=0.5")
    assert code == 2
    assert "holds a run with another configuration" in err
    assert {path.name: path.stat().st_mtime_ns for path in (home / "run").iterdir()} == before


def test_a_rank_waits_for_rank_0_of_its_own_job(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older job left behind in the folder is not taken for the work of this one's rank 0."""
    settings = compose(str(home / "own.yaml"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    made = ready.make_ready(settings)
    assert made == ready.wait_ready(settings) == ready.Ready(home / "imported", finished=False)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    make_checkpoint(home / "run" / "checkpoints" / "step=1")
    waits: list[float] = []

    def rank_0_at_work(seconds: float) -> None:
        waits.append(seconds)
        ready.make_ready(settings)

    monkeypatch.setattr("nemo_eaft.ready.time.sleep", rank_0_at_work)
    # The model's files look another way from this machine: it is rank 0 that names the checkpoint.
    os.utime(home / "model" / "config.json", (1, 1))
    resume_from = home / "run" / "checkpoints" / "step=1"
    assert ready.wait_ready(settings) == ready.Ready(home / "imported", True, resume_from)
    assert len(waits) == 1


@pytest.mark.parametrize(
    "absent, named",
    [
        ("run/ready.json", "rank 0 to make {0}/run ready"),
        ("run/config.yaml", "the settings of rank 0 in {0}/run/config.yaml"),
        ("run/data/training.jsonl", "the rows in {0}/run/data"),
        ("imported/" + MANIFEST, "the converted checkpoint {0}/imported"),
    ],
)
def test_waiting_says_for_what_and_ends(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], absent: str, named: str
) -> None:
    settings = compose(str(home / "own.yaml"))
    ready.make_ready(settings)
    (home / absent).unlink()
    capsys.readouterr()
    clock = [0.0]
    monkeypatch.setattr("nemo_eaft.ready.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("nemo_eaft.ready.time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setenv(ready.PATIENCE, "200")
    with pytest.raises(TimeoutError, match="waited 200 s for"):
        ready.wait_ready(settings)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("waiting for " + named.format(home))
    assert lines[0].endswith("60 s so far")
    monkeypatch.setenv(ready.PATIENCE, "soon")
    with pytest.raises(ValueError, match="NEMO_EAFT_WAIT_SECONDS=soon must be a number of seconds"):
        ready.wait_ready(settings)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_finished_run_trains_on_no_rank(home: Path, monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    from nemo_eaft import train

    settings = compose(str(home / "own.yaml"))
    ready.make_ready(settings)
    checkpoint = make_checkpoint(home / "run" / "checkpoints" / "step=1")
    ready.make_ready(settings)
    if rank == "1":  # what it sees itself does not count
        checkpoint.rename(checkpoint.with_name("step=0"))
    monkeypatch.setattr(train, "run_training", lambda *_: pytest.fail("all steps are done"))
    for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, value)
    assert cli.run_rank([str(home / "own.yaml")]) == 0


def test_import_prepares_the_rows_when_asked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf = str(home / "own.yaml")
    # A login node has not the GPUs of the run.
    code, out, _ = run(capsys, "import", conf, "run.backend=cuda", "trainer.gpus_per_node=4")
    assert (code, out) == (0, f"{home}/imported\n")
    assert not (home / "run").exists()
    code, out, _ = run(capsys, "import", "--data", conf, "run.backend=cuda", "trainer.gpus_per_node=4")
    assert code == 0
    assert out.splitlines()[0].startswith("data: 4 training rows")
    assert out.splitlines()[-1] == f"{home}/imported"
    assert os.listdir(home / "run") == ["data"]
    # The run itself finds them.
    before = (home / "run" / "data" / "prepared.json").stat().st_mtime_ns
    ready.make_ready(compose(conf, ["trainer.gpus_per_node=4"]))
    assert (home / "run" / "data" / "prepared.json").stat().st_mtime_ns == before
    code, _, err = run(capsys, "import", "--data", conf, "loss.alpha=0.5")
    assert code == 2
    assert "holds a run with another configuration" in err


def test_a_warning_is_one_line() -> None:
    """In a process of its own: pytest records warnings instead of showing them."""
    words = [
        "import",
        "qwen3-0.6b",
        "data.train=nowhere.jsonl",
        "loss.gate=stock",
        "loss.alpha=0.25",
        "model.hf=/nowhere",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "nemo_eaft.cli", *words], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    said = [line for line in done.stderr.splitlines() if "no effect" in line]
    assert said == [
        "nemo-eaft: warning: loss.alpha=0.25 has no effect: gate='stock' does not read it, only gate='eaft' does"
    ]
    assert "warnings.warn" not in done.stderr


def test_a_failure_in_training_leaves_the_cause(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_eaft import train

    def fail(settings: Any, checkpoint: Path, resume_from: Path | None) -> None:
        int("a library's ValueError is not the user's fault")

    monkeypatch.setattr(train, "run_training", fail)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.run_rank([str(home / "own.yaml")])
    error = json.loads((home / "run" / "error.json").read_text())
    assert (error["kind"], error["rank"]) == ("failure", 0)
    assert "invalid literal" in error["message"]


def test_import_needs_no_data(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf = home / "without_data.yaml"
    lines = [line for line in (home / "own.yaml").read_text().splitlines() if not line.startswith("data:")]
    conf.write_text("\n".join([*lines, "data: {train: '???'}"]))
    code, out, _ = run(capsys, "import", str(conf))
    assert (code, out) == (0, f"{home}/imported\n")
    for words in (("import", "--data"), ("train",)):
        code, _, err = run(capsys, *words, str(conf))
        assert (code, "data.train must be given" in err) == (2, True)


def test_import_uses_the_backend_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login node converts for the cluster's GPUs and has none."""
    from nemo_eaft import convert

    commands: list[list[str]] = []

    def finished(command: list[str]) -> tuple[int, str]:
        commands.append(command)
        return 0, ""

    monkeypatch.setattr(convert, "run_to_its_end", finished)
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        convert.run_in_own_process(["to-nemo"])
    assert [command[3:5] for command in commands] == [["--backend", "cpu"], ["--backend", "cuda"]]
    assert all(command[5:7] == ["--parent", str(os.getpid())] for command in commands)


@pytest.mark.parametrize(
    "module, version, reason",
    [
        ("transformer_engine", "2.7.3", "Transformer Engine is installed"),
        ("apex", "2.7.3", "Apex is installed"),
        (None, "2.6.0", r"nemo_toolkit is 2\.6\.0, not 2\.7"),
    ],
)
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_a_conversion_without_a_gpu_in_an_image_that_needs_one_is_not_started(
    monkeypatch: pytest.MonkeyPatch, module: str | None, version: str, reason: str, backend: str | None
) -> None:
    from nemo_eaft import convert

    find, say = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json" if name == module else name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if "nemo" in name else say(name))
    started: list[object] = []
    monkeypatch.setattr(convert, "run_to_its_end", lambda command: started.append(command))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"needs a GPU in this environment, .*: {reason}"):
        convert.run_in_own_process(["to-nemo"], backend)
    assert started == []
