"""Plan's activations and loss against the live tensors of small real Megatron models, on the CPU.

The CPU backend has unfused attention and Megatron's local layers; what plan says of Transformer Engine's layers and of
flash attention has been measured by nobody here.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch

from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.memory import state_bytes
from nemo_eaft.plan.parameters import rank_parameters
from nemo_eaft.plan.shape import find_shape
from tests.nemo.models import run_settings
from tests.nemo.ranks import run_ranks
from tests.plan.measured import CASES, SHAPES, Case, Measured, measure
from tests.plan.tracking import LiveTensors

TOLERANCE = 0.1


@pytest.fixture(scope="module")
def real() -> Measured:
    (result,) = run_ranks(measure, 1, timeout=240)
    return result


def off(case: Case, peak: int, **changes: Any) -> float:
    """Distance of plan's number, of another case with `changes`, from the measured one; relative."""
    return abs(case.planned(**changes) / peak - 1)


@pytest.mark.slow
def test_activations_and_loss_are_within_ten_percent(real: Measured) -> None:
    found = {tuple(case): off(case, peak) for case, peak in zip(CASES, real.peaks, strict=True)}
    for case, peak in zip(CASES, real.peaks, strict=True):
        print(f"{tuple(case)}: {peak / 1e6:.2f} MB measured, {case.planned() / 1e6:.2f} planned")
    assert {case: distance for case, distance in found.items() if distance > TOLERANCE} == {}


@pytest.mark.slow
def test_another_recompute_attention_or_loss_is_further_off(real: Measured) -> None:
    """What the comparison above would not find would be worth nothing."""
    peaks = dict(zip(CASES, real.peaks, strict=True))
    for case, peak in peaks.items():
        if case.recompute == "none" and case.shape != "experts":
            assert off(case, peak, recompute="full") > TOLERANCE, case
            assert off(case, peak, precision="fp32" if case.precision == "bf16" else "bf16") > TOLERANCE, case
            assert off(case, peak, attention="flash") > 0.05, case
    for precision in ("fp32", "bf16"):
        unfused = Case("wide", precision, "full", "eaft_unfused")
        assert off(unfused, peaks[unfused], path="stock_unfused") > TOLERANCE
        fused = Case("wide", precision, "full", "eaft_fused_linear")
        assert off(fused, peaks[fused], one_pass=False) > TOLERANCE


@pytest.mark.slow
def test_buffers_are_those_of_megatron(real: Measured, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Weights and gradients under the distributed optimizer, padding included."""
    folder = tmp_path_factory.mktemp("run")
    settings = run_settings(folder, folder, folder, trainer={"distributed_optimizer": True})
    layout = Layout(world_size=1)
    for name, (weights, gradients) in real.buffers.items():
        shape = Case(name, "fp32", "none", "eaft_unfused").model
        parameters = rank_parameters(shape, layout, 0)
        state = state_bytes(parameters, settings, layout)
        assert (state.weights, state.gradients) == (4 * weights, 4 * gradients), name
        assert parameters.total <= weights
    assert real.buffers.keys() == SHAPES.keys()


@pytest.mark.slow
def test_shipped_sizes_are_those_of_nemo(real: Measured) -> None:
    for name, sizes in real.nemo_sizes.items():
        shape = dataclasses.asdict(find_shape(name))
        assert {key: shape[key] for key in sizes} == sizes, name


def test_live_tensors_counts_what_is_made_until_it_is_freed() -> None:
    before = torch.zeros(1000)
    with LiveTensors() as live:
        made = before + 1
        assert live.live == 4000
        view, same = made.view(10, 100), made.add_(1)
        assert live.live == 4000
        more = torch.cat([made, made])
        assert live.live == 12000
        del more
        gc.collect()
        assert (live.live, live.peak) == (4000, 12000)
        del made, view, same
        gc.collect()
        assert (live.live, live.peak) == (0, 12000)


def test_live_tensors_sees_what_autograd_keeps() -> None:
    x = torch.ones(500, requires_grad=True)
    with LiveTensors() as live:
        y = x.exp().sum()
        kept = live.live
        assert kept == 2000 + 4
        y.backward()
    assert live.peak > kept
