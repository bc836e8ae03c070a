"""What an older version wrote lacks the settings that were added since: the run was made with their defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_eaft.config import EAFTConfig
from nemo_eaft.same_config import check_same
from tests.commands import home, make_checkpoint, run, started

__all__ = ["home", "started"]  # fixtures


def of_a_loss(**changes: Any) -> dict[str, Any]:
    """As `EAFTCallback` writes it."""
    config = {entry: getattr(EAFTConfig(), entry) for entry in EAFTConfig.__dataclass_fields__}
    return config | {"fused_linear": False, "measure_only": False} | changes


def write(folder: Path, settings: dict[str, Any], *without: str) -> Path:
    path = folder / "eaft.json"
    path.write_text(json.dumps({key: value for key, value in settings.items() if key not in without}))
    return path


@pytest.mark.parametrize("name", of_a_loss())
def test_a_loss_setting_that_was_added_since_had_its_default(tmp_path: Path, name: str) -> None:
    check_same(write(tmp_path, of_a_loss(), name), of_a_loss())


@pytest.mark.parametrize("name, value", [("alpha", 0.5), ("gate", "dft"), ("top_k", None), ("measure_only", True)])
def test_and_not_another_value(tmp_path: Path, name: str, value: Any) -> None:
    default = of_a_loss()[name]
    with pytest.raises(ValueError, match=rf"eaft\.json: .* checkpoint: {name}: {default} -> {value}; go back"):
        check_same(write(tmp_path, of_a_loss(), name), of_a_loss(**{name: value}))


def test_a_loss_setting_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, of_a_loss(temperature=2.0))
    with pytest.raises(ValueError, match=r"temperature: 2\.0 -> unknown to this version"):
        check_same(path, of_a_loss())


def test_a_run_without_one_is_taken_as_it_is(tmp_path: Path) -> None:
    check_same(tmp_path / "eaft.json", of_a_loss(alpha=0.5))


def test_a_configuration_with_fewer_settings_goes_on_and_one_with_more_does_not(
    home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    conf = str(home / "own.yaml")
    assert run(capsys, "train", conf)[0] == 0
    make_checkpoint(home / "run" / "checkpoints" / "step=0")
    path = home / "run" / "config.yaml"
    written = yaml.safe_load(path.read_text())
    # One at a time would take long; `required` has no default.
    required = {"model.hf", "data.train", "run.dir"}
    set_here = {"model.imported", "data.validation", "run.backend", "trainer.max_steps", "trainer.gpus_per_node"}
    set_here |= {"trainer.global_batch_size", "trainer.seq_length"}
    kept = {
        group: {key: value for key, value in values.items() if f"{group}.{key}" in required | set_here}
        for group, values in written.items()
    }
    path.write_text(yaml.safe_dump(kept))
    code, out, err = run(capsys, "train", conf)
    assert (code, err) == (0, "")
    assert "accepts" not in out
    assert yaml.safe_load(path.read_text()) == written

    path.write_text(yaml.safe_dump(written | {"loss": written["loss"] | {"temperature": 2.0}}))
    code, _, err = run(capsys, "train", conf)
    assert code == 2
    assert "unknown key loss.temperature" in err
    path.write_text(yaml.safe_dump(kept | {"loss": {"alpha": 0.5}}))
    code, _, err = run(capsys, "train", conf)
    assert code == 2
    assert "loss.alpha: 0.5 -> 1.0" in err
