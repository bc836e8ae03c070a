"""What comes from outside may be made to do harm: it is refused, runs no code, and gives no secret away."""

from __future__ import annotations

import ast
import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import cli
from nemo_eaft.compose import compose, load
from nemo_eaft.convert import hf_folder
from nemo_eaft.launch import write_error
from nemo_eaft.ready import open_model
from tests.data.support import make_tokenizer

ROOT = Path(__file__).parent.parent
REST = "model: {hf: m}\ndata: {train: t.jsonl}\nrun: {dir: r}\n"


def own(folder: Path, text: str) -> str:
    (folder / "own.yaml").write_text(text)
    return str(folder / "own.yaml")


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "text",
    [
        "loss: {_target_: os.system, command: touch MARK}\n",
        "loss: {gate: {_target_: pathlib.Path.touch, _args_: [MARK]}}\n",
        'trainer: {seed: !!python/object/apply:os.system ["touch MARK"]}\n',
        "trainer: {seed: !!python/name:os.system }\n",
        "run: {name: !!python/object/new:type {args: [x, [], {}]}}\n",
        "trainer: {seed: '${eval:1}'}\n",
        "trainer: {seed: '${python:os.getpid}'}\n",
    ],
)
def test_a_configuration_runs_no_code(tmp_path: Path, text: str) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(ValueError) as error:
        compose(own(tmp_path, REST + text.replace("MARK", str(mark))))
    assert "own.yaml" in str(error.value) or "refused" in str(error.value)
    assert not mark.exists()


def test_references_that_multiply_take_neither_time_nor_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    bomb = "\n".join([*lines, "loss: {alpha: *a8}"]) + "\n"
    started = time.monotonic()
    (tmp_path / "saved.yaml").write_text(bomb)
    for read in (load, compose):
        with pytest.raises(ValueError, match=r"saved\.yaml: references \(&name, \*name\) are refused"):
            read(str(tmp_path / "saved.yaml"))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"])
def test_a_secret_of_the_environment_does_not_become_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv(name, "hush-hush-hush")
    for text in (f"${{oc.env:{name}}}", f"run-${{oc.env:{name}}}-1", "prefix hush-hush-hush"):
        assert cli.main(["train", own(tmp_path, REST), f"run.name={text}"]) == 2
        said = capsys.readouterr()
        assert f"run.name holds the value of ${name}" in said.err
        assert "hush" not in said.out + said.err
    # A flag of a library is none.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    assert compose(own(tmp_path, REST), ["run.name=parallel"]).run.name == "parallel"


@pytest.mark.parametrize(
    "setting, message",
    [
        ("run.name=../../x", "run.name='../../x' must be a name, without / and"),
        ("run.name=/etc/x", "run.name='/etc/x' must be a name"),
        ("run.name=..", "run.name='..' must be a name"),
        ("run.name=a\\b", "must be a name"),
        ("run.name=a\nEAFT step 5", "holds a character that cannot be printed"),
        ("run.name=a\x1b[2J", "run.name='a\\x1b[2J' holds a character that cannot be printed"),
        ("run.dir=a\x00b", "run.dir='a\\x00b' holds a character that cannot be printed"),
        ("data.train_split=a\rb", "data.train_split='a\\rb' holds a character that cannot be printed"),
        ("model.hf=a\u202eb", "holds a character that cannot be printed"),
    ],
)
def test_names_neither_leave_their_folder_nor_forge_lines(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        compose(own(tmp_path, REST), [setting])
    assert message in str(error.value)


def tiny(folder: Path) -> Path:
    """Configuration and tokenizer of a Llama that ask for code of their own."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, hidden_size=8, vocab_size=512
    )
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def asking_for_code(folder: Path, mark: Path) -> Path:
    """The same, whose files name classes in a file that creates `mark` when it is imported."""
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": classes}))
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    return folder


def test_code_beside_a_model_does_not_run(tmp_path: Path) -> None:
    model, mark = asking_for_code(tiny(tmp_path / "model"), tmp_path / "mark"), tmp_path / "mark"
    settings = compose(own(tmp_path, REST), [f"model.hf={model}"])
    assert open_model(settings).config.model_type == "llama"
    assert not mark.exists()
    # A model that is nothing without its code is refused, and still runs none.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(ValueError, match=r"model\.hf=.*cannot be used"):
        open_model(settings)
    assert not mark.exists()


def test_the_code_would_run_where_it_is_trusted(tmp_path: Path) -> None:
    """So the test above can fail."""
    from transformers import AutoConfig

    model, mark = asking_for_code(tiny(tmp_path / "model"), tmp_path / "mark"), tmp_path / "mark"
    with pytest.raises(AttributeError):
        AutoConfig.from_pretrained(model, trust_remote_code=True)
    assert mark.exists()
    sys.modules.pop("evil", None)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_and_not_loaded(tmp_path: Path, name: str) -> None:
    model, mark = tiny(tmp_path / "model"), tmp_path / "mark"
    (model / name).write_bytes(pickle.dumps(Touch(mark)))
    for opened in (
        lambda: hf_folder(str(model)),
        lambda: open_model(compose(own(tmp_path, REST), [f"model.hf={model}"])),
    ):
        with pytest.raises(ValueError, match=rf"weights as pickles only \({name}\).*allowed: safetensors"):
            opened()
    (model / "model.safetensors").touch()
    assert hf_folder(str(model)) == model.resolve()
    assert not mark.exists()


def test_the_package_loads_no_pickle() -> None:
    """Every call that could: none. What NeMo and Megatron-Core load is said in README.md, Limits."""
    loaders = {
        "torch.load",
        "pickle.load",
        "pickle.loads",
        "np.load",
        "numpy.load",
        "joblib.load",
        "yaml.load",
        "eval",
        "exec",
    }
    found = []
    for path in sorted((ROOT / "nemo_eaft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # NumPy's refuses pickles where it is told to.
            if isinstance(node, ast.Call) and "allow_pickle=False" in map(ast.unparse, node.keywords):
                continue
            if isinstance(node, ast.Call) and ast.unparse(node.func) in loaders:
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node.func)}")
    assert found == []


def test_a_failure_gives_no_secret_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hush-hush-hush")
    try:
        token = os.environ["HF_TOKEN"]
        assert token
        raise RuntimeError("download failed")
    except RuntimeError as error:
        write_error(tmp_path, 0, error)
    assert "download failed" in (tmp_path / "error.json").read_text()
    assert "hush" not in (tmp_path / "error.json").read_text()
