"""Which settings decide the held-out rows."""

from __future__ import annotations

from dataclasses import fields

from nemo_eaft.compare import runs
from nemo_eaft.settings_data import DataSettings

TRAINED_ON = {"train", "train_split", "train_rows"}


def test_every_setting_of_the_data_has_its_place() -> None:
    """A new one must be put among those that training alone reads, or two runs that differ in it are refused."""
    held_out = {name.removeprefix("data.") for name in runs._SAME_ROWS if name.startswith("data.")}
    assert held_out | TRAINED_ON == {entry.name for entry in fields(DataSettings)}
    assert not held_out & TRAINED_ON
    assert {entry.name for entry in fields(DataSettings) if entry.name.startswith("train")} == TRAINED_ON
    assert not {f"data.{name}" for name in TRAINED_ON} & runs._NOT_THE_METHOD
