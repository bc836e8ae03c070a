"""Files and overrides to settings: every shipped file works, every slip is named with what was meant."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemo_eaft import settings_mapping
from nemo_eaft.compose import CONF_DIR, compose, load, save, shipped
from nemo_eaft.settings import TrainerSettings, known_keys
from nemo_eaft.settings_mapping import difference, from_mapping, to_mapping

# What a shipped file leaves for the user to say; the others say everything.
NEEDED = {"qwen2.5-0.5b": ["data.train=t.jsonl"], "qwen3-0.6b": ["data.train=t.jsonl"]}


def error_of(conf: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        compose(conf, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_run_is_whole(name: str) -> None:
    settings = compose(name, NEEDED.get(name, []))
    assert compose(str(CONF_DIR / f"{name}.yaml"), NEEDED.get(name, [])) == settings
    assert settings.run.dir == f"runs/{name}"


@pytest.mark.parametrize("path", sorted(CONF_DIR.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_group_file_fits_some_run(path: Path) -> None:
    group, name = path.parent.name, path.stem
    defaults = {run: yaml.safe_load((CONF_DIR / f"{run}.yaml").read_text())["defaults"] for run in shipped()}
    # A layout and its number of GPUs go together.
    run = next((run for run, files in defaults.items() if {group: name} in files), "qwen3-8b")
    settings = to_mapping(compose(run, [f"{group}={name}", *NEEDED.get(run, [])]))
    for key, value in (yaml.safe_load(path.read_text()) or {}).items():
        if key == "defaults":
            continue
        assert key in settings[group]
        if f"{group}.{key}" not in ("data.train", "data.validation", "model.hf"):
            assert settings[group][key] == value


def test_trainer_files_show_every_setting() -> None:
    """A setting that no file shows is found by nobody. A file on top of another one shows what it changes."""
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF_DIR / "trainer").glob("*.yaml")}
    whole = {name: set(shown) for name, shown in files.items() if "defaults" not in shown}
    assert sorted(whole) == ["demo", "node", "sft"]
    for shown in whole.values():
        assert shown == {entry.name for entry in fields(TrainerSettings)}


def test_every_key_of_the_shipped_files_has_a_comment() -> None:
    for path in CONF_DIR.rglob("*.yaml"):
        commented = False
        for line in path.read_text().splitlines():
            stripped = line.strip()
            if stripped.startswith("#"):
                commented = True
            elif not stripped or stripped == "defaults:":
                commented = False
            elif ":" in stripped and not stripped.startswith("-") and not stripped.endswith(":"):
                assert commented, f"{path.name}: {line}"
                # one comment may stand above keys that follow each other


def test_the_demo_is_what_the_model_allows() -> None:
    settings = compose("demo")
    assert (settings.parallel.tensor, settings.world_size, settings.run.backend) == (3, 3, "cpu")
    assert settings.trainer.precision == "fp32"


def test_overrides_reach_keys_that_no_file_mentions() -> None:
    assert "gate_slope" not in (CONF_DIR / "loss" / "eaft.yaml").read_text()
    assert compose("demo", ["loss.gate_slope=3"]).loss.gate_slope == 3.0


def test_loss_sft_is_stock_training() -> None:
    settings = compose("demo", ["loss=sft", "trainer.max_steps=5"])
    assert settings.loss.gate == "stock"
    assert settings.loss.fused_linear is False
    assert settings.trainer.max_steps == 5
    assert difference(compose("demo"), settings) == [
        'loss.gate: "eaft" -> "stock"',
        'loss.fused_linear: "auto" -> false',
        "trainer.max_steps: 24 -> 5",
    ]


def test_numbers_as_people_write_them() -> None:
    assert compose("demo", ["trainer.learning_rate=1e-4"]).trainer.learning_rate == 1e-4
    assert compose("demo", ["trainer.learning_rate=1"]).trainer.learning_rate == 1.0
    assert compose("demo", ["loss.top_k=null"]).loss.top_k is None
    assert compose("demo", ["loss.normalizer=3"]).loss.normalizer == 3.0


@pytest.mark.parametrize("key", known_keys())
def test_a_missing_letter_is_answered_with_the_key(key: str) -> None:
    group, name = key.split(".")
    slip = f"{group}.{name[:-1]}x" if len(name) < 4 else f"{group}.{name[0]}{name[2:]}"
    if slip in known_keys():
        pytest.skip("another key")
    text = error_of("demo", f"{slip}=1")
    assert f"unknown key {slip}" in text
    assert f"did you mean {key}?" in text or len(name) < 4


@pytest.mark.parametrize(
    "override, named",
    [
        ("trainer.max_stpes=5", "did you mean trainer.max_steps?"),
        ("trainer.lr=1e-5", "did you mean trainer.learning_rate?"),
        ("max_steps=5", "did you mean trainer.max_steps?"),
        ("loss.tensor=2", "unknown key loss.tensor"),
        ("paralel.tensor=2", "did you mean parallel.tensor?"),
        ("loss=sftt", "no such file of group loss, did you mean sft?; there are: eaft, sft"),
        ("loss=3", "takes the name of a file"),
        (
            "loss.gate=eaff",
            'loss.gate="eaff" must be one of eaft, none, dft, mask, sigmoid, stock, did you mean eaft?',
        ),
        ("trainer.max_steps=many", 'trainer.max_steps="many" must be a whole number'),
        ("trainer.max_steps=5.5", "trainer.max_steps=5.5 must be a whole number"),
        ("trainer.max_steps=true", "trainer.max_steps=true must be a whole number"),
        ("trainer.learning_rate=fast", 'trainer.learning_rate="fast" must be a number'),
        ("run.resume=1", "run.resume=1 must be true or false"),
        ("run.dir=null", "run.dir=null must be text"),
        ("loss.fused_linear=maybe", "must be true or false or one of auto"),
        ("trainer.max_steps=1,2", "one value is allowed"),
        ("~loss.alpha", "cannot be removed"),
        ("trainer.max_steps", "is no override"),
        ("hydra.run.dir=x", "unknown key hydra.run.dir"),
        ("hydra/launcher=x", "unknown key hydra/launcher"),
        ("loss@model=eaft", "unknown key"),
        ("loss._target_=os.system", "unknown key loss._target_"),
        ("+loss._target_=os.system", "unknown key loss._target_"),
        ("trainer.seed=${oc.env:NO_SUCH_NAME}", "NO_SUCH_NAME"),
        ("model.hf=${run.nothing}", "run.nothing"),
        ("model.hf=${run.dir", "is no override"),
    ],
)
def test_wrong_overrides(override: str, named: str) -> None:
    assert named in error_of("demo", override)


@pytest.mark.parametrize(
    "text",
    ["a=b", "my run (1), really", "~x/[1]", "{x}", "5", "true", "a,b", "ü", "C:\\x", "it's", "run # 3"],
)
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert compose("demo", [f"run.dir={text}"]).run.dir == text


def test_text_may_be_quoted_null_or_refer() -> None:
    assert compose("demo", ["run.dir='a b'"]).run.dir == "a b"
    assert compose("demo", ["data.validation=null", "trainer.val_every=0"]).data.validation is None
    assert compose("demo", ["run.name=x", "run.dir=runs/${run.name}"]).run.dir == "runs/x"
    assert compose("demo", ["run.dir=a", "run.dir='b'", "run.name='c'", "run.name=d"]).run.dir == "b"


def test_missing_values_are_named() -> None:
    assert "data.train must be given" in error_of("qwen3-0.6b")


@pytest.mark.parametrize(
    "conf, named",
    [
        ("dmeo", "did you mean demo?; there are demo, glm-4-32b-0414, glm-4-9b-0414, qwen2.5-0.5b"),
        ("/nowhere/x.yaml", "no such file"),
        ("./x.yml", "must end with .yaml"),
        ("../demo", "must end with .yaml"),
    ],
)
def test_wrong_names(conf: str, named: str) -> None:
    assert named in error_of(conf)


def own(tmp_path: Path, text: str) -> str:
    path = tmp_path / "my run" / "own.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


BASE = "defaults:\n  - loss: eaft\n  - parallel: single\n  - trainer: sft\n  - _self_\n"
REST = "model: {hf: m}\ndata: {train: t.jsonl}\nrun: {dir: r}\n"


def test_a_file_elsewhere_uses_shipped_groups(tmp_path: Path) -> None:
    conf = own(tmp_path, BASE + REST + "trainer:\n  max_steps: 7\n  warmup_steps: 1\n")
    settings = compose(conf, ["loss=sft"])
    assert (settings.trainer.max_steps, settings.trainer.seq_length, settings.loss.gate) == (7, 2048, "stock")


def test_a_file_elsewhere_brings_groups_of_its_own(tmp_path: Path) -> None:
    conf = own(tmp_path, BASE + REST)
    group = Path(conf).parent / "loss" / "soft.yaml"
    group.parent.mkdir()
    group.write_text("alpha: 0.5\n")
    assert compose(conf, ["loss=soft"]).loss.alpha == 0.5
    assert compose(conf, ["loss=sft"]).loss.gate == "stock"


def test_a_file_without_groups_gets_the_defaults(tmp_path: Path) -> None:
    settings = compose(own(tmp_path, REST))
    assert settings == from_mapping({"model": {"hf": "m"}, "data": {"train": "t.jsonl"}, "run": {"dir": "r"}})
    settings = compose(own(tmp_path, REST), ["loss=sft", "trainer.max_steps=60", "trainer=sft"])
    assert (settings.trainer.max_steps, settings.trainer.warmup_steps, settings.loss.gate) == (
        60,
        50,
        "stock",
    )


@pytest.mark.parametrize(
    "text, named",
    [
        (
            REST + "trainer:\n  max_stpes: 5\n",
            "unknown key trainer.max_stpes, did you mean trainer.max_steps?",
        ),
        (REST + "trianer:\n  max_steps: 5\n", "unknown key trianer, did you mean trainer?"),
        (REST + "loss: {_target_: os.system}\n", "loss._target_ is refused"),
        (REST + "loss: {gate: {_target_: os.system}}\n", "loss.gate._target_ is refused"),
        (REST + "loss: {gate: [{_target_: os.system}]}\n", "loss.gate[0]._target_ is refused"),
        (REST + "loss: {_partial_: true}\n", "is refused"),
        (REST + "loss: eaft\n", 'loss="eaft" must be a group'),
        (REST + "loss: [\n", "own.yaml"),
        (REST + "trainer: {seed: !!python/object/apply:os.getpid []}\n", "own.yaml"),
        ("defaults: [losss: eaft]\n" + REST, "losss"),
        ("model: {hf: m}\n", "data.train must be given"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, named: str) -> None:
    assert named in error_of(own(tmp_path, text))


def test_a_home_folder_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("NEMO_EAFT_HOME", raising=False)
    assert compose("demo").model.hf == "/home/somebody/.cache/nemo_eaft/demo/model"
    monkeypatch.setenv("NEMO_EAFT_HOME", "/large disk")
    assert compose("demo").data.train == "/large disk/demo/train.jsonl"
    assert compose("demo", ["run.dir=~/run"]).run.dir == "/home/somebody/run"


def test_saved_settings_are_plain_and_come_back(tmp_path: Path) -> None:
    settings = compose("demo", ["trainer.learning_rate=1e-5", "loss.top_k=null"])
    path = tmp_path / "run" / "config.yaml"
    save(settings, path)
    assert load(path) == settings
    assert "!" not in path.read_text()
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    # It is a configuration like any other.
    assert compose(str(path)) == settings


@pytest.mark.parametrize("text", ["- a\n", "loss: [\n", "model: {hf: 5}\n", "!!python/object:os.system {}\n"])
def test_a_damaged_saved_file_is_a_value_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError):
        load(path)


@given(
    st.dictionaries(st.sampled_from(known_keys()), st.none() | st.booleans() | st.integers() | st.floats() | st.text())
)
def test_no_value_gets_through_with_a_wrong_type(values: dict[str, Any]) -> None:
    """Whatever a file holds, the answer is settings of the declared types or a ValueError."""
    mapping: dict[str, dict[str, Any]] = {"model": {"hf": "m"}, "data": {"train": "t"}, "run": {"dir": "r"}}
    for key, value in values.items():
        group, name = key.split(".")
        mapping.setdefault(group, {})[name] = value
    try:
        settings = from_mapping(mapping)
    except ValueError:
        return
    for group, content in to_mapping(settings).items():
        for name, value in content.items():
            hint = get_type_hints(type(getattr(settings, group)))[name]
            assert settings_mapping._typed(f"{group}.{name}", value, hint) == value or value != value
