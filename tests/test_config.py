"""EAFTConfig: every field is checked, and the message names field, value and range."""

import dataclasses
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest

from nemo_eaft import EAFTConfig
from nemo_eaft.config import GATES


def test_defaults_are_the_papers() -> None:
    config = EAFTConfig()
    assert dataclasses.asdict(config) == {
        "alpha": 1.0,
        "top_k": 20,
        "normalizer": None,
        "gate": "eaft",
        "gate_slope": 10.0,
        "gate_centre": 0.5,
        "conflict_probability": 0.1,
        "conflict_entropy": 0.2,
        "ignore_index": -100,
    }


NOT_NUMBERS = [True, "1", None, [1.0], math.nan, math.inf, -math.inf]
INVALID: dict[str, list[Any]] = {
    "alpha": [*NOT_NUMBERS, -0.1],
    "top_k": [True, "20", 20.0, math.nan, 1, 0, -3, 2**63],
    "normalizer": [*[value for value in NOT_NUMBERS if value is not None], 0, -1.0],
    "gate": [None, True, "EAFT", "entropy", 1, ["eaft"]],
    "gate_slope": [*NOT_NUMBERS, 0, -1.0],
    "gate_centre": [*NOT_NUMBERS, -0.01],
    "conflict_probability": [*NOT_NUMBERS, -0.01, 1.01],
    "conflict_entropy": [*NOT_NUMBERS, -0.01],
    "ignore_index": [True, "-100", -100.0, None, 2**63, -(2**63) - 1],
}


def test_invalid_values_cover_every_field() -> None:
    assert set(INVALID) == {field.name for field in dataclasses.fields(EAFTConfig)}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in INVALID.items() for value in values])
def test_an_invalid_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .+, got ") as error:
        EAFTConfig(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("alpha", 0),
        ("alpha", 2.5),
        ("top_k", 2),
        ("top_k", None),
        ("normalizer", 3.0),
        ("gate", "none"),
        ("conflict_probability", 0.0),
        ("conflict_probability", 1),
        ("conflict_entropy", 1.5),
        ("ignore_index", -1),
        ("ignore_index", -(2**63)),
    ],
)
def test_the_ends_of_each_range_are_allowed(name: str, value: Any) -> None:
    assert getattr(EAFTConfig(**{name: value}), name) == value


def test_numbers_become_plain_python() -> None:
    config = EAFTConfig(alpha=np.float32(0.5), top_k=np.int64(7), conflict_entropy=0)  # type: ignore[arg-type]
    assert type(config.alpha) is float
    assert type(config.top_k) is int
    assert type(config.conflict_entropy) is float


def test_frozen_keyword_only_slotted() -> None:
    config = EAFTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        EAFTConfig(1.0)  # type: ignore[call-arg]
    assert not hasattr(config, "__dict__")
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(EAFTConfig())


def test_unknown_names_are_errors() -> None:
    with pytest.raises(TypeError, match="alhpa"):
        EAFTConfig(alhpa=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"unknown EAFT setting 'alhpa': did you mean 'alpha'\?"):
        EAFTConfig.from_mapping({"alhpa": 1.0})
    with pytest.raises(ValueError, match=r"'zzz': known settings: alpha, top_k"):
        EAFTConfig.from_mapping({"zzz": 1.0})
    with pytest.raises(ValueError, match="unknown EAFT setting 3"):
        EAFTConfig.from_mapping({3: 1.0})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="alpha must be"):
        EAFTConfig.from_mapping({"alpha": "1"})
    assert EAFTConfig.from_mapping({"alpha": 2, "top_k": None}) == EAFTConfig(alpha=2.0, top_k=None)


@pytest.mark.parametrize(
    "settings",
    [{"gate": "none", "alpha": 2.0}, {"gate_slope": 3.0}, {"gate": "mask", "gate_centre": 0.1}],
)
def test_a_setting_without_effect_warns(settings: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"has no effect: gate=.* does not read it, only gate=") as caught:
        EAFTConfig(**settings)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("gate", GATES)
def test_settings_with_effect_do_not_warn(gate: str) -> None:
    own = {"eaft": {"alpha": 2.0}, "sigmoid": {"gate_slope": 3.0, "gate_centre": 0.1}}.get(gate, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EAFTConfig(gate=gate, top_k=5, normalizer=3.0, conflict_entropy=0.5, **own)  # type: ignore[arg-type]


def test_plain_keeps_the_entropy_and_drops_the_gate() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = EAFTConfig(alpha=2.0, top_k=7, normalizer=3.0, conflict_entropy=0.4, ignore_index=-1).plain()
    assert plain == EAFTConfig(gate="none", top_k=7, normalizer=3.0, conflict_entropy=0.4, ignore_index=-1)


@pytest.mark.parametrize(
    "top_k, normalizer, vocab_size, used, norm, bound",
    [
        (20, None, 1000, 20, math.log(20), math.log(20)),
        (20, None, 7, 7, math.log(7), math.log(7)),
        (20, 3.0, 1000, 20, 3.0, math.log(20)),
        (None, None, 1000, None, math.log(1000), math.log(1000)),
        (None, 1.0, 1000, None, 1.0, math.log(1000)),
    ],
)
def test_normaliser(
    top_k: int | None, normalizer: float | None, vocab_size: int, used: int | None, norm: float, bound: float
) -> None:
    config = EAFTConfig(top_k=top_k, normalizer=normalizer)
    assert config.effective_top_k(vocab_size) == used
    assert config.entropy_normalizer(vocab_size) == norm
    assert config.entropy_bound(vocab_size) == bound
