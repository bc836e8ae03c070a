"""Block maxima against torch.topk: the same values, bit for bit."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_eaft.loss import topk
from nemo_eaft.loss.topk import block_top_values, top_values
from tests.loss.parallel import bits_equal

MAKERS: dict[str, Callable[[int, int], Tensor]] = {
    "random": lambda rows, width: torch.randn(rows, width),
    "ties": lambda rows, width: torch.randint(0, 4, (rows, width)).float(),
    "equal": lambda rows, width: torch.full((rows, width), 0.25),
    "one block": lambda rows, width: torch.randn(rows, width).index_fill_(1, torch.arange(min(30, width)), 9.0),
    "ascending": lambda rows, width: torch.arange(width).float().expand(rows, width).clone(),
    "descending": lambda rows, width: -torch.arange(width).float().expand(rows, width).clone(),
    "offset": lambda rows, width: torch.randn(rows, width) - 5000,
    "mostly -inf": lambda rows, width: torch.randn(rows, width).masked_fill_(
        torch.rand(rows, width) < 0.98, -torch.inf
    ),
    "all -inf": lambda rows, width: torch.full((rows, width), -torch.inf),
    "+inf": lambda rows, width: torch.randn(rows, width).index_fill_(1, torch.tensor([width - 1]), torch.inf),
    "nan": lambda rows, width: torch.randn(rows, width).index_fill_(1, torch.tensor([width // 2]), torch.nan),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width, block", [(1000, 16), (1024, 32), (129, 64), (127, 64), (641, 31), (25, 1)])
def test_block_maxima_are_exact(maker: str, dtype: torch.dtype, width: int, block: int) -> None:
    torch.manual_seed(0)
    rows = MAKERS[maker](4, width).to(dtype)
    before = rows.clone()
    for k in (2, 20):
        assert bits_equal(block_top_values(rows, k, block), rows.topk(k).values)
    assert bits_equal(rows, before)


@settings(max_examples=150)
@given(st.data())
def test_block_maxima_are_exact_for_any_shape(data: st.DataObject) -> None:
    width = data.draw(st.integers(2, 400))
    k = data.draw(st.integers(1, width))
    block = data.draw(st.integers(1, 64))
    values = st.sampled_from([0.0, 1.0, 1.0, 2.0, -3.5, float("-inf"), float("inf"), float("nan")])
    row = torch.tensor([data.draw(st.lists(values, min_size=width, max_size=width))])
    assert bits_equal(block_top_values(row, k, block), row.topk(k).values)


@pytest.mark.parametrize("width", [7, 20, 128, 18992, 151936])
def test_every_width_takes_a_right_path(width: int) -> None:
    torch.manual_seed(1)
    rows = torch.randn(2, width)
    got = top_values(rows, 20)
    want = rows.sort(descending=True).values[:, :20]
    assert torch.equal(got[:, : want.shape[1]], want)
    assert torch.isneginf(got[:, want.shape[1] :]).all()
    assert got.shape == (2, 20)


def test_wide_rows_use_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    real = topk.block_top_values

    def blocks(rows: Tensor, k: int, block: int) -> Tensor:
        used.append(block)
        return real(rows, k, block)

    monkeypatch.setattr(topk, "block_top_values", blocks)
    for width in (1000, 18992, 151936):
        top_values(torch.randn(1, width), 20)
    assert used == [64, 128]


def test_searching_too_few_blocks_is_noticed() -> None:
    """The comparison above can fail: K - 1 blocks are not enough."""
    rows = torch.zeros(1, 200)
    rows[0, ::10] = torch.arange(20).float() + 1
    blocks = rows.unflatten(-1, (20, 10))
    few = blocks.amax(-1).topk(19).indices
    wrong = blocks.gather(1, few.unsqueeze(-1).expand(-1, -1, 10)).flatten(1).topk(20).values
    assert not torch.equal(wrong, rows.topk(20).values)
    assert torch.equal(block_top_values(rows, 20, 10), rows.topk(20).values)


def test_two_thousand_random_configurations_are_exact() -> None:
    """Three dtypes, every kind of row, odd widths, K from 1, shards of 1 to 8 ranks whose last may be padding."""
    generator = random.Random(0)
    seen: set[tuple[str, torch.dtype, int, int, int, int]] = set()
    while len(seen) < 2000:
        maker = generator.choice(sorted(MAKERS.keys() - {"nan"}))
        dtype = generator.choice([torch.float32, torch.bfloat16, torch.float16])
        width, k = generator.randint(2, 3000), generator.choice([1, 2, 3, 19, 20, 21, 64, 129, 200])
        ranks, block = generator.randint(1, 8), generator.choice([1, 7, 16, 31, 64, 128])
        if (maker, dtype, width, k, ranks, block) in seen:
            continue
        seen.add((maker, dtype, width, k, ranks, block))
        torch.manual_seed(len(seen))
        rows = MAKERS[maker](2, width).to(dtype)
        k = min(k, width)
        shards = rows.split(-(-width // ranks), dim=-1)
        # What a rank sends: its own K largest, filled up where it has fewer.
        sent = [
            block_top_values(part, k, block) if part.shape[-1] >= k else top_values(part, k).to(dtype)
            for part in shards
        ]
        merged = torch.cat(sent, dim=-1).topk(k, dim=-1).values
        assert bits_equal(merged, rows.topk(k, dim=-1).values), (maker, dtype, width, k, ranks, block)
