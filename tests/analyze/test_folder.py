"""Which analysis a folder holds: another one is never replaced unasked, and the same one is known by any spelling."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_eaft import compose
from nemo_eaft.analyze import job, state
from nemo_eaft.analyze.report import FILES
from nemo_eaft.launch import Program
from nemo_eaft.ready import read_ready
from nemo_eaft.settings import Settings
from tests.commands import home, make_checkpoint, run  # noqa: F401, a fixture

CPU = ["run.backend=cpu", "trainer.precision=fp32", "trainer.seq_length=64"]


class Desk:
    """Starts analyses whose ranks get half way and leave results."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys
        self.folder = root / "out"

    def ranks(self, settings: Settings, words: list[str], program: Program) -> int:
        self.folder = Path(settings.run.dir).absolute()
        ready = read_ready(self.folder)
        assert ready is not None
        reached = state.load(settings, ready)
        reached.rows_done = 2
        state.save(reached, self.folder)
        for name in FILES:
            (self.folder / name).write_text("result")
        return 1

    def start(self, *words: str) -> str:
        """What is said: `begins`, `goes on`, `anew`, or why it is refused, after which all is as it was."""
        files = [self.folder / name for name in (state.FILE, *FILES, "config.yaml", "analyze.inputs.json")]
        before = [path.read_bytes() if path.exists() else None for path in files]
        code, said, error = run(self._capsys, "analyze", *words, *CPU)
        if code == 2:
            assert before == [path.read_bytes() if path.exists() else None for path in files]
            return error
        assert code == 1, error
        return "goes on" if "goes on after 2 of 4 rows" in said else "anew" if "starts anew" in said else "begins"


@pytest.fixture
def desk(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:  # noqa: F811
    """In a folder with a run of two checkpoints and the model that it is of."""
    compose.save(compose.compose(str(home / "own.yaml"), []), home / "run" / "config.yaml")
    for step in (1, 3):
        make_checkpoint(home / "run" / "checkpoints" / f"model-step={step}")
    found = Desk(home, capsys)
    monkeypatch.setattr(job, "run_local", found.ranks)
    monkeypatch.chdir(home)
    return found


def test_another_checkpoint_is_another_analysis(desk: Desk) -> None:
    first, newest = (f"run/checkpoints/model-step={step}" for step in (1, 3))
    more = ["train.jsonl", "run.dir=out"]
    assert desk.start(first, *more) == "begins"
    for other in (newest, "run", "model"):
        refused = desk.start(other, *more)
        assert "run.dir=out holds another analysis; choose another run.dir" in refused
        assert "run.resume=false" in refused
        assert f'MODEL: "{desk.root / first}" -> "{desk.root / other}"' in refused
    assert desk.start(first, *more) == "goes on"
    assert desk.start(newest, *more, "run.resume=false") == "begins"
    # The run's newest is that very checkpoint.
    assert desk.start("run", *more) == "goes on"
    # The same place with other content.
    (desk.root / newest / "SHA256SUMS").unlink()
    assert desk.start(newest, *more) == "anew"


def test_a_newer_checkpoint_of_a_run_replaces_the_older_ones_numbers(desk: Desk) -> None:
    assert desk.start("run", "train.jsonl") == "begins"
    assert desk.start("run", "train.jsonl") == "goes on"
    make_checkpoint(desk.root / "run" / "checkpoints" / "model-step=5")
    assert desk.start("run", "train.jsonl") == "anew"
    assert desk.start("run", "train.jsonl") == "goes on"


def test_namesakes_are_another_analysis(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have one default run.dir."""
    for name in ("run", "model", "train.jsonl"):
        copy = shutil.copytree if (desk.root / name).is_dir() else shutil.copy
        (desk.root / "other").mkdir(exist_ok=True)
        copy(desk.root / name, desk.root / "other" / name)
    assert desk.start("run", "train.jsonl") == "begins"
    assert f'MODEL: "{desk.root}/run" -> "{desk.root}/other/run"' in desk.start("other/run", "train.jsonl")
    assert f'data.train: "{desk.root}/train.jsonl" -> "{desk.root}/other/' in desk.start("run", "other/train.jsonl")
    # Nor is the same word the same, seen from another folder.
    out = f"run.dir={desk.folder}"
    monkeypatch.chdir("other")
    refused = desk.start("run", "train.jsonl", out)
    assert ("MODEL: " in refused, "data.train: " in refused) == (True, True)
    monkeypatch.chdir(desk.root)
    imported = "model.imported=imported"
    assert desk.start("model", "train.jsonl", imported) == "begins"
    assert f'model.hf: "{desk.root}/model" -> "{desk.root}/other/model"' in desk.start(
        "other/model", "train.jsonl", imported
    )


@pytest.mark.parametrize("model", ["run", "run/checkpoints/model-step=1", "model"])
def test_a_path_may_be_written_in_any_way(desk: Desk, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["model.imported=imported"] if model == "model" else []
    assert desk.start(model, "train.jsonl", "run.dir=out", *own) == "begins"
    (desk.root / "link").symlink_to(desk.root)
    for words in (
        (f"./{model}", "./train.jsonl", "run.dir=./out"),
        (f"{model}/", f"{desk.root}/train.jsonl", f"run.dir={desk.root}/out/"),
        (f"{desk.root}/link/{model}", "link/train.jsonl", "run.dir=link/out"),
    ):
        assert desk.start(*words, *own) == "goes on"
    (desk.root / "below").mkdir()
    monkeypatch.chdir("below")
    own = ["model.imported=../imported"] if own else []
    assert desk.start(f"../{model}", "../train.jsonl", "run.dir=../out", *own) == "goes on"
    # A missing file is told as that.
    (desk.root / "train.jsonl").unlink()
    assert "no such file" in desk.start(f"../{model}", "../train.jsonl", "run.dir=../out", *own)
