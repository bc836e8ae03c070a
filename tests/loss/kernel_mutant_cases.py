"""Deliberately wrong kernels, each a line away from the right ones, and the property that must catch it.

``test_kernels.py`` runs this file, in Triton's interpreter and on a GPU.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_eaft.loss import kernels
from nemo_eaft.loss.shard import ELSEWHERE, Shard
from tests.loss.kernel_passes import DEVICE, _triton, mutated, records  # noqa: F401
from tests.loss.parallel import bits_equal

INF, NAN = math.inf, math.nan


def failures(passes: Any) -> set[str]:
    """The names of the properties that ``local_records`` and ``write_gradient`` of ``passes`` do not have."""
    torch.manual_seed(0)
    failed: set[str] = set()

    def check(name: str, right: bool | Tensor) -> None:
        if not bool(right):
            failed.add(name)

    # Ascending, so that the maximum moves in every block; ties in a group and between groups.
    rows = torch.randn(4, 9000) + torch.linspace(0, 9, 9000)
    rows[1] = rows[1].round()
    rows[2, :8300] = -INF
    rows[2, 8400:8800] = -INF
    rows[3] = torch.randn(9000) * 30
    rows[3, 100:105] = 200
    columns, target = 8990, [8989, ELSEWHERE, 8310, 3]
    z = rows[:, :columns].double()
    m = z.amax(-1)
    shifted = z - m[:, None]
    d, u = shifted.exp().sum(-1), torch.where(shifted.exp() == 0, 0.0, shifted * shifted.exp()).sum(-1)
    top = records(rows, target, columns, 12, passes).double()
    whole = records(rows, target, columns, None, passes).double()
    for got in (top, whole):
        check("maximum", torch.equal(got[:, 0], m))
        check("sum", torch.allclose(got[:, 1], d, rtol=2e-6, atol=0))
    check("label", torch.equal(top[:, 2], torch.tensor([z[0, 8989], 0.0, z[2, 8310], z[3, 3]], dtype=torch.float64)))
    check("top-K", torch.equal(top[:, 3:], z.topk(12).values))
    check("entropy sum", torch.allclose(whole[:, 3], u, rtol=2e-6, atol=1e-9))
    empty = records(torch.full((1, 100), -INF), [ELSEWHERE], 100, 2, passes)
    check("empty", bits_equal(empty, torch.tensor([[-INF, 0.0, 0.0, -INF, -INF]])))
    dirty = rows[:2].clone()
    dirty[0, 5], dirty[1, 8500] = NAN, INF
    check("NaN", records(dirty, target[:2], columns, 2, passes)[:, 1].isnan().all())

    coefficient = torch.tensor([0.7, -1.3, 0.01, 1.0])
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        logits = rows.bfloat16().to(dtype).to(DEVICE)
        gradient = torch.full_like(logits, NAN)
        statistics = [v.float().to(DEVICE) for v in (m, d.log(), coefficient)]
        local = torch.tensor(target, dtype=torch.int32, device=DEVICE)
        passes.write_gradient(gradient, logits, local, Shard(0, columns, columns), *statistics)
        gradients.append(gradient.cpu())
    p = (rows.bfloat16().double()[:, :columns] - m[:, None] - d.log()[:, None]).exp()
    for row, label in enumerate(target):
        if label >= 0:
            p[row, label] -= 1
    check("gradient", torch.allclose(gradients[0][:, :columns].double(), coefficient[:, None] * p, rtol=0, atol=1e-6))
    check("padding gradient", not gradients[0][:, columns:].any())
    check("one rounding", torch.equal(gradients[0].bfloat16(), gradients[1]))
    return failed


MUTANTS: dict[str, tuple[str, str, str, str]] = {
    # name: (module, right source, wrong source, a property that must fail)
    "padding counted": ("kernels", "columns = shard.columns", "columns = logits.shape[-1]", "sum"),
    "padding counted as 0": ("kernels", 'z = tl.where(real, z, float("-inf"))', "z = tl.where(real, z, 0.0)", "sum"),
    "no rescaling to the new maximum": (
        "kernels",
        "d = d * scale[:, None] + tl.sum(exponential, 2)",
        "d = d + tl.sum(exponential, 2)",
        "sum",
    ),
    "entropy sum not moved with the maximum": ("kernels", "(u + step[:, None] * d)", "u", "entropy sum"),
    "0 times -Inf": (
        "kernels",
        "tl.where(exponential == 0, 0.0, shifted * exponential)",
        "(shifted * exponential)",
        "entropy sum",
    ),
    "-Inf minus -Inf": ("kernels", 'return tl.where(m == float("-inf"), 0.0, m)', "return m", "empty"),
    "NaN hidden": (
        "kernels",
        "tl.store(record + 1, total)",
        "tl.store(record + 1, tl.where(total == total, total, 1.0))",
        "NaN",
    ),
    "rounding before scaling": (
        "kernels",
        "return tl.where(is_label, probability - 1.0, probability) * scale",
        "return tl.where(is_label, probability - 1.0, probability).to(tl.bfloat16).to(tl.float32) * scale",
        "gradient",
    ),
    "padding in the gradient": (
        "kernels",
        "tl.where(real, _gradient_of(z, m, log_d, scale, column == label), 0.0)",
        "_gradient_of(z, m, log_d, scale, column == label)",
        "padding gradient",
    ),
    "ties in a group lost": ("selection", " | ((key == taken) & (column > taken_column))", "", "top-K"),
    "groups of one maximum lost": (
        "selection",
        " | ((others_key == best_closed) & (member > group))",
        "",
        "top-K",
    ),
    "negative numbers in reverse": ("selection", "0, bits ^ ((bits >> SIGN_SHIFT) & LARGEST))", "0, bits)", "empty"),
}


def test_the_right_kernels_have_every_property() -> None:
    assert failures(kernels) == set()


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_caught(name: str, tmp_path: Path) -> None:
    module, old, new, caught_by = MUTANTS[name]
    with mutated(module, old, new, tmp_path) as wrong:
        assert caught_by in failures(wrong)
