"""The kernels' K largest values against ``torch.topk``, bit for bit, over 2,000 random configurations.

A configuration is a width, a K, a dtype, a kind of values and a number of ranks, drawn at random; its row is split over
the ranks, and each rank's values and those merged from all of them are compared. ``test_kernels.py`` runs this file, in
Triton's interpreter and on a GPU.
"""

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nemo_eaft.loss import kernels
from nemo_eaft.loss.shard import ELSEWHERE
from tests.loss.kernel_passes import _triton, records  # noqa: F401
from tests.loss.parallel import bits_equal

INF = math.inf
PARTS = 8
CONFIGURATIONS = 2000

MAKERS: dict[str, Callable[[int], Tensor]] = {
    "random": lambda width: torch.randn(width) * 3,
    "ties": lambda width: torch.randint(-2, 2, (width,)).float(),
    "equal": lambda width: torch.full((width,), -0.25),
    "zeros of both signs": lambda width: (
        torch.randint(0, 2, (width,)).float() * -0.0 + torch.randint(0, 2, (width,)) * 0.0
    ),
    "one group": lambda width: torch.randn(width).index_fill_(0, torch.arange(min(30, width)), 9.0),
    "ascending": lambda width: torch.arange(width).float(),
    "descending": lambda width: -torch.arange(width).float(),
    "offset": lambda width: torch.randn(width) - 5000,
    "huge and tiny": lambda width: torch.randn(width) * torch.randint(-30, 4, (width,)).float().exp2(),
    "mostly -inf": lambda width: torch.randn(width).masked_fill_(torch.rand(width) < 0.9, -INF),
    "all -inf": lambda width: torch.full((width,), -INF),
    "+inf": lambda width: torch.randn(width).index_fill_(0, torch.randint(0, width, (2,)), INF),
}


def configurations(part: int) -> list[tuple[str, int, int, torch.dtype, int]]:
    """(kind, V, K, dtype, ranks), every eighth."""
    draw = random.Random(0)
    all_of_them = []
    for number in range(CONFIGURATIONS):
        ranks = draw.choices([1, 2, 4, 8], [10, 4, 2, 1])[0]
        # A few groups of 64 columns, or past 64 groups, where the maxima themselves are in groups.
        width = draw.choice([draw.randint(1, 40), draw.randint(41, 700), 2 * draw.randint(200, 3000) + 1])
        k = draw.choices([1, 2, 3, 5, 20, 70], [4, 6, 6, 3, 0.5, 0.1])[0]
        dtype = [torch.float32, torch.bfloat16, torch.float16][number % 3]
        all_of_them.append((list(MAKERS)[number % len(MAKERS)], width, k, dtype, ranks))
    return all_of_them[part::PARTS]


def top_values(rows: Tensor, k: int) -> Tensor:
    """``torch.topk`` of [..., width], filled up with -Inf."""
    width = rows.shape[-1]
    values = rows.topk(min(k, width), dim=-1).values
    return torch.nn.functional.pad(values, (0, max(k - width, 0)), value=-INF)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_configurations(part: int) -> None:
    torch.manual_seed(part)
    for kind, width, k, dtype, ranks in configurations(part):
        row = MAKERS[kind](width).to(dtype)
        vp_width = -(-width // ranks)
        padded = torch.nn.functional.pad(row, (0, vp_width * ranks - width), value=INF)
        shards = padded.view(ranks, vp_width)
        # The ranks without padding at once, then each of the others.
        full = width // vp_width
        parts = [(rank, rank + 1, min(max(width - rank * vp_width, 0), vp_width)) for rank in range(full, ranks)]
        merged = []
        for first, stop, columns in [(0, full, vp_width), *parts]:
            got = records(shards[first:stop], [ELSEWHERE] * (stop - first), columns, k)
            real = shards[first:stop, :columns].float()
            assert bits_equal(got[:, 3:], top_values(real, k)), (kind, width, k, dtype, ranks, first)
            highest = [max(values, default=-INF) for values in real.tolist()]
            assert got[:, 0].tolist() == highest, (kind, width, k, dtype, ranks, first)
            merged.append(got[:, 3:].flatten())
        assert bits_equal(torch.cat(merged).topk(k).values, top_values(row.float(), k))


def test_the_configurations_are_what_they_claim() -> None:
    drawn = [configuration for part in range(PARTS) for configuration in configurations(part)]
    assert len(drawn) == CONFIGURATIONS
    assert len(set(drawn)) > CONFIGURATIONS * 0.9
    for field in (0, 3, 4):
        assert min(Counter(configuration[field] for configuration in drawn).values()) > CONFIGURATIONS / 30
    assert sum(width > 64 * kernels._CLUSTER for _, width, _, _, ranks in drawn if ranks == 1) > 50
    assert sum(k > width for _, width, k, _, _ in drawn) > 20


@pytest.mark.parametrize(
    "width, k, dtype",
    [
        (60001, 20, torch.bfloat16),
        (151936, 20, torch.float32),
        (262144 + 5, 6, torch.float16),
        (600000, 4, torch.bfloat16),
        (1003, 200, torch.float32),
        (9000, 150, torch.bfloat16),
        (3, 300, torch.float32),
        (1003, 40, torch.float64),
    ],
)
def test_wide_rows_and_many_values(width: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    rows = torch.stack((torch.randn(width), torch.randint(-300, 300, (width,)).float())).to(dtype)
    got = records(rows, [ELSEWHERE, ELSEWHERE], width, k)[:, 3:]
    assert bits_equal(got.to(dtype), top_values(rows, k))
