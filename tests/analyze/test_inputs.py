"""What MODEL, DATA and settings mean."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from nemo_eaft import cli, compose
from nemo_eaft.analyze import job
from nemo_eaft.analyze.inputs import WITHOUT_EFFECT, check_folder, settings_of, spoken, warn_without_effect
from nemo_eaft.analyze.report import FILES
from nemo_eaft.launch import Program
from nemo_eaft.settings import Settings, known_keys
from tests.commands import home, make_checkpoint, run  # noqa: F401, a fixture

CPU = ["run.backend=cpu", "trainer.precision=fp32"]
# What an analysis reads or refuses, or the settings themselves warn of where it has no effect.
READ = {
    *("data.train_rows", "model.hf", "model.imported", "model.tokenizer", "model.trust_remote_code"),
    *("data.train", "data.validation", "data.train_split", "data.subset", "data.mapping", "data.messages_column"),
    *("data.tools_column", "data.prompt_column", "data.response_column", "data.reasoning_column", "data.system_column"),
    *("data.system", "data.prompt_template", "data.packed", "data.packed_size", "data.on_bad_row", "data.num_workers"),
    *("loss.gate", "loss.alpha", "loss.top_k", "loss.normalizer", "loss.gate_slope", "loss.gate_centre"),
    *("loss.conflict_probability", "loss.conflict_entropy", "loss.fused_linear"),
    *("parallel.tensor", "parallel.pipeline", "parallel.last_stage_layers", "parallel.virtual_pipeline"),
    *("parallel.context", "parallel.expert", "parallel.sequence"),
    *("trainer.num_nodes", "trainer.gpus_per_node", "trainer.micro_batch_size", "trainer.global_batch_size"),
    *("trainer.seq_length", "trainer.precision", "trainer.val_every"),
    *("run.dir", "run.resume", "run.backend", "run.max_restarts"),
}


@pytest.fixture
def trained(home: Path) -> Path:  # noqa: F811
    """A run of own.yaml with two checkpoints."""
    settings = compose.compose(str(home / "own.yaml"), ["run.name=mine"])
    compose.save(settings, home / "run" / "config.yaml")
    for step in (1, 3):
        make_checkpoint(home / "run" / "checkpoints" / f"model-step={step}")
    return home / "run"


def test_a_name_and_a_folder(tmp_path: Path) -> None:
    settings, weights = settings_of("org/Model-1.5B", "rows.jsonl", CPU)
    assert (settings.model.hf, settings.data.train, weights) == ("org/Model-1.5B", "rows.jsonl", None)
    assert settings.run.dir == "runs/analyze-Model-1.5B-rows"
    (tmp_path / "my model").mkdir()
    settings, weights = settings_of(str(tmp_path / "my model"), "a=b.jsonl", ["run.dir=elsewhere", *CPU])
    assert (settings.model.hf, settings.data.train) == (str(tmp_path / "my model"), "a=b.jsonl")
    assert (settings.run.dir, weights) == ("elsewhere", None)
    # Of the data as well: another file is another analysis.
    for data, name in (("d", "d"), ("org/set.v2", "set.v2"), (f"{tmp_path}/x/a b.json", "a-b"), ("../", None)):
        found = settings_of(str(tmp_path / "my model"), data, CPU)[0].run.dir
        assert found == f"runs/analyze-my-model-{name or Path('..').resolve().name}"


@pytest.mark.parametrize(
    "overrides, batch",
    [
        ([], 4),
        (["trainer.gpus_per_node=6"], 24),
        (["trainer.gpus_per_node=6", "parallel.tensor=3", "trainer.micro_batch_size=5"], 10),
        (["trainer.gpus_per_node=2", "trainer.global_batch_size=16"], 16),
        # Primes that no number chosen beforehand would be a multiple of.
        (["trainer.gpus_per_node=26", "trainer.micro_batch_size=11"], 286),
    ],
)
def test_a_batch_is_one_pass_unless_said(overrides: list[str], batch: int) -> None:
    assert settings_of("m", "d", [*CPU, *overrides])[0].trainer.global_batch_size == batch


def test_a_run_and_its_checkpoints(trained: Path) -> None:
    newest, first = (trained / "checkpoints" / f"model-step={step}" for step in (3, 1))
    settings, weights = settings_of(str(trained), "d", CPU)
    assert weights == newest.resolve()
    assert (settings.model.hf, settings.model.imported) == (str(trained.parent / "model"), f"{trained.parent}/imported")
    # Of the run its model alone: the rest would belong to the training.
    assert (settings.trainer.seq_length, settings.run.dir) == (2048, "runs/analyze-run-d")
    settings, weights = settings_of(str(first), "d", CPU)
    assert (weights, settings.run.dir) == (first.resolve(), "runs/analyze-run-model-step=1-d")
    # In titles: of which run a checkpoint is, for every run has a step=1.
    assert spoken(settings.model.hf, weights) == "run/model-step=1"
    assert spoken("org/Model", None) == "org/Model"
    assert spoken("/models/org/Model", None) == "org/Model"


def test_what_is_no_model_and_no_data(trained: Path, tmp_path: Path) -> None:
    make_checkpoint(trained / "checkpoints" / "model-step=5", unfinished=True)
    make_checkpoint(tmp_path / "alone")
    (tmp_path / "empty").mkdir()
    compose.save(compose.load(trained / "config.yaml"), tmp_path / "empty" / "config.yaml")
    for model, data, said in (
        (str(trained / "checkpoints" / "model-step=5"), "d", "was not finished"),
        (str(tmp_path / "empty"), "d", "a run without a finished checkpoint"),
        (" ", "d", "MODEL is empty"),
        ("m", "", "DATA is empty"),
        ("m", "loss.alpha=2", "DATA is loss.alpha=2"),
    ):
        with pytest.raises(ValueError, match=said):
            settings_of(model, data, CPU)
    (trained / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"give the run\.dir"):
        settings_of(str(tmp_path / "alone"), "d", CPU)


@pytest.mark.parametrize(
    "override, said",
    [
        ("data.packed=true", "allowed is false"),
        ("parallel.context=2", "allowed is 1"),
        ("loss.fused_linear=true", "allowed are false and auto"),
        ("data.validation=x.jsonl", "allowed is null"),
        ("loss.aplha=2", "did you mean loss.alpha"),
        ("data.train_rows=0", "data.train_rows=0 must be 1 or more"),
        ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline=2: analyze takes"),
        # Of ranks and model it is the ranks that are wrong, not a batch that nobody gave.
        ("parallel.tensor=3", "must be a multiple of parallel.tensor=3"),
    ],
)
def test_settings_that_are_refused(override: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["trainer.gpus_per_node=2", "parallel.pipeline=2"] if override.startswith("parallel.v") else []
    more = ["trainer.gpus_per_node=2"] if override.startswith("parallel.c") else more
    if override == "data.packed=true":
        more = ["trainer.micro_batch_size=1"]
    code, _, error = run(capsys, "analyze", "m", "d", override, *more, *CPU)
    assert (code, "Traceback" in error) == (2, False)
    assert said in error


def test_each_setting_is_read_or_warned_of() -> None:
    """A new setting belongs in one of the two lists."""
    assert sorted([*READ, *WITHOUT_EFFECT]) == sorted(known_keys())


def test_settings_without_effect_are_named_once() -> None:
    given = ["run.stall_seconds=900", *CPU, "+trainer.max_steps=7", "loss=sft", "data.subset=run.name=x"]
    with pytest.warns(UserWarning, match="no effect") as said:
        warn_without_effect(given)
    assert [str(warning.message).partition(":")[0] for warning in said] == [
        "trainer.max_steps, run.stall_seconds have no effect"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_without_effect([*CPU, "loss.alpha=2", "run.max_restarts=1", "data.subset=run.name=x"])


def test_a_damaged_checkpoint_and_a_missing_file_are_told_before_anything_is_written(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def launch(settings: Settings, words: list[str], program: Program) -> int:
        started.extend(words)
        return 1

    monkeypatch.setattr(job, "run_local", launch)
    monkeypatch.chdir(trained.parent)
    rows, words = str(trained.parent / "train.jsonl"), ["trainer.seq_length=64", *CPU]
    assert cli.main(["analyze", str(trained), "nowhere.jsonl", *words, "run.stall_seconds=60"]) == 2
    error = capsys.readouterr().err
    assert "no such file" in error
    assert error.count("nemo-eaft: warning: run.stall_seconds has no effect") == 1
    (trained / "checkpoints" / "model-step=3" / "weights" / "common.pt").write_text("other")
    assert cli.main(["analyze", str(trained), rows, *words]) == 2
    assert "common.pt" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert started == []
    # The one before it is whole.
    whole = str(trained / "checkpoints" / "model-step=1")
    assert cli.main(["analyze", whole, rows, *words]) == 1
    assert started[:2] == [whole, rows]
    # A state that is none is told, and gone.
    run_dir = Path("runs/analyze-run-model-step=1-train")
    left = [run_dir / name for name in ("analyze.state.json", *FILES)]
    for again, said in (([], True), (["run.resume=false"], False), (["run.resume=false", "loss.alpha=2"], False)):
        for path in left:
            path.write_text("{")
        capsys.readouterr()
        assert cli.main(["analyze", whole, rows, *words, *again]) == 1
        assert ("starts anew" in capsys.readouterr().out) == said
        # Results that stay would look like those of this start.
        assert not [path for path in left if path.exists()]


def test_settings_of_a_training_alone_contradict_nothing() -> None:
    """Their defaults would: 50 steps of warm-up are more than 10 of training."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings, _ = settings_of("m", "d", [*CPU, "trainer.max_steps=1", "trainer.learning_rate=1e-12"])
    assert settings.trainer.max_steps == 1


def test_what_another_start_may_change(tmp_path: Path) -> None:
    folder = f"run.dir={tmp_path / 'run'}"

    def begin(*words: str, data: str = "d.jsonl") -> None:
        check_folder(settings_of("m", data, [*CPU, folder, *words])[0], "m", None)

    begin()
    compose.save(settings_of("m", "d.jsonl", [*CPU, folder])[0], tmp_path / "run" / "config.yaml")
    # How the work is cut, above all after a batch was too large for the memory; and what is not read.
    begin("trainer.micro_batch_size=1")
    begin("trainer.gpus_per_node=6", "parallel.tensor=2")
    begin("trainer.max_steps=7", "run.stall_seconds=60", "trainer.global_batch_size=64")
    for word, said in (
        ("loss.alpha=2", r"loss.alpha: 1.0 -> 2.0"),
        ("trainer.precision=bf16", r'trainer.precision: "fp32" -> "bf16"'),
        ("data.train_rows=9", r"data.train_rows: null -> 9"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            begin(word)
        assert str(refused.value).startswith(f"{folder} holds another analysis; choose another run.dir")
        assert "allow-config-change" not in str(refused.value)
        assert len(str(refused.value).splitlines()) == 2
        begin(word, "run.resume=false")
    with pytest.raises(ValueError, match=r'data.train: "d.jsonl" -> "e.jsonl"'):
        begin(data="e.jsonl")
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds a training"):
        begin("run.resume=false")
