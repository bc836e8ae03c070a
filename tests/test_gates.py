"""Each gate against its formula in plain Python."""

import math
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from nemo_eaft import EAFTConfig
from nemo_eaft.config import GATES
from nemo_eaft.gates import gate_weight, is_conflict
from nemo_eaft.settings import Gate, LossSettings, known_keys

# (cross-entropy in nats, H / normaliser)
POINTS = [(0.0, 0.0), (0.01, 0.3), (2.0, 0.19), (2.5, 0.19), (2.5, 0.21), (7.0, 1.0), (30.0, 0.0), (1.0, 0.5)]


def by_hand(config: EAFTConfig, ce: float, ratio: float) -> float:
    p = math.exp(-ce)
    return {
        "eaft": lambda: ratio**config.alpha,
        "none": lambda: 1.0,
        "dft": lambda: p,
        "mask": lambda: float(not (p < config.conflict_probability and ratio < config.conflict_entropy)),
        "sigmoid": lambda: 1 / (1 + math.exp(-config.gate_slope * (ratio - config.gate_centre))),
    }[config.gate]()


@pytest.mark.parametrize(
    "config",
    [
        *[EAFTConfig(gate=gate) for gate in GATES],  # type: ignore[arg-type]
        EAFTConfig(alpha=0.5),
        EAFTConfig(alpha=3.0),
        EAFTConfig(gate="mask", conflict_probability=0.2, conflict_entropy=0.6),
        EAFTConfig(gate="sigmoid", gate_slope=2.0, gate_centre=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formula(config: EAFTConfig, dtype: torch.dtype) -> None:
    ce, ratio = torch.tensor(POINTS, dtype=dtype).unbind(-1)
    weight = gate_weight(ce, ratio, config)
    want = torch.tensor([by_hand(config, *point) for point in POINTS], dtype=torch.float64)
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.double(), want, rtol=3e-7, atol=1e-7)


def test_alpha_zero_is_one_by_arithmetic() -> None:
    ratio = torch.tensor([0.0, 1e-30, 0.5, 1.0, math.nan])
    weight = gate_weight(torch.ones(5), ratio, EAFTConfig(alpha=0.0))
    assert torch.equal(weight, torch.ones(5))
    assert torch.equal(weight, gate_weight(torch.ones(5), ratio, EAFTConfig(gate="none")))


def test_a_nan_entropy_is_never_hidden_by_an_entropy_gate() -> None:
    for config in (EAFTConfig(), EAFTConfig(gate="sigmoid")):
        assert gate_weight(torch.ones(1), torch.tensor([math.nan]), config).isnan().all()


def test_conflict_is_strict_on_both_sides_and_false_for_nan() -> None:
    config = EAFTConfig(conflict_probability=0.5, conflict_entropy=0.25)
    ce = torch.tensor([math.log(2), 0.7, 0.7, 0.6, math.nan, 0.7], dtype=torch.float64)
    ratio = torch.tensor([0.1, 0.1, 0.25, 0.1, 0.1, math.nan], dtype=torch.float64)
    assert is_conflict(ce, ratio, config).tolist() == [False, True, False, False, False, False]
    # The mask gate removes exactly the conflicts.
    mask = gate_weight(ce, ratio, EAFTConfig(gate="mask", conflict_probability=0.5, conflict_entropy=0.25))
    assert torch.equal(mask == 0, is_conflict(ce, ratio, config))


def test_the_page_has_every_gate_with_its_formula_and_its_keys() -> None:
    text = (Path(__file__).parent.parent / "docs" / "gates.md").read_text()
    rows = {cells[1].strip(" `"): cells for cells in map(_cells, text.splitlines()) if len(cells) == 6}
    assert set(get_args(Gate)) == rows.keys() - {"loss.gate", "---"}
    for gate in rows.keys() - {"loss.gate", "---"}:
        _, _, formula, keys, source, _ = rows[gate]
        assert source.strip()
        for key, value in re.findall(r"`loss\.(\w+)` \(([0-9.]+)\)", keys):
            assert f"loss.{key}" in known_keys()
            assert getattr(LossSettings(), key) == float(value)
        if gate in ("mask", "stock"):
            continue
        code = formula.strip(" `")
        config = EAFTConfig(gate=gate)  # type: ignore[arg-type]
        for ce, ratio in POINTS:
            names = {"p": math.exp(-ce), "h": ratio, "exp": math.exp, "alpha": config.alpha}
            names |= {"gate_slope": config.gate_slope, "gate_centre": config.gate_centre}
            assert eval(code, {}, names) == pytest.approx(by_hand(config, ce, ratio))


def _cells(line: str) -> list[str]:
    return line.split("|")
