"""Products that add into a tensor: by oneDNN, and by whatever PyTorch takes where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_eaft.loss import products

SHAPES = [(5, 300, 7), (1, 1, 1), (64, 17, 129), (0, 3, 4), (3, 0, 4), (3, 4, 0)]
FACTORS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["onednn", "without"])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    with_it = bool(request.param == "onednn")
    if with_it and not products._by_onednn(torch.empty(1)):
        pytest.skip("this PyTorch has no oneDNN")
    if not with_it:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    return with_it


def factors(shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor]:
    m, k, n = shape
    torch.manual_seed(3)
    if transposed:
        return torch.randn(k, m).to(dtype).t(), torch.randn(n, k).to(dtype).t()
    return torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)


def close(found: Tensor, a: Tensor, b: Tensor, expected: Tensor) -> bool:
    """One rounding to the result's dtype, and a sum of k products in float32 (float64 for float64)."""
    wide = torch.finfo(products.wide_dtype(a.dtype)).eps
    # Products of float16 below its normal range round to a multiple of the least number it has.
    least = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    bound = expected.abs() * torch.finfo(found.dtype).eps + (a.double().abs() @ b.double().abs()) * 8 * wide + least
    return bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FACTORS, ids=str)
@pytest.mark.parametrize("widened", [False, True], ids=["same", "wider"])
def test_a_product_is_added_or_written(
    by_onednn: bool, dtype: torch.dtype, shape: tuple[int, int, int], transposed: bool, widened: bool
) -> None:
    a, b = factors(shape, dtype, transposed)
    product = a.double() @ b.double()
    before = torch.randn(product.shape).to(products.wide_dtype(dtype) if widened else dtype)
    total = before.clone()
    products.add_product(total, a, b, fresh=False)
    assert close(total, a, b, before.double() + product)
    if product.abs().sum() > 1:
        assert not close(total, a, b, product), "the bound would let anything pass"
    total.fill_(float("nan"))
    products.add_product(total, a, b, fresh=True)
    assert close(total, a, b, product)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FACTORS[:3], ids=str)
def test_a_piece_is_the_product(
    by_onednn: bool, dtype: torch.dtype, shape: tuple[int, int, int], transposed: bool
) -> None:
    a, b = factors(shape, dtype, transposed)
    buffer = products.piece_buffer(a.shape[0] * b.shape[1] + 5, a)
    piece = products.product_in(buffer, a, b)
    assert piece.dtype == dtype
    assert close(piece, a, b, a.double() @ b.double())
    assert buffer.numel() == 0 or piece.numel() == 0 or piece.data_ptr() == buffer.data_ptr()


def test_float32_on_a_cpu_is_onednns_where_there_is_one(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own, MKL's, takes twice as long on some processors."""
    calls: list[torch.dtype] = []
    original = products._onednn_product

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append(a.dtype)
        return original(a, b)

    monkeypatch.setattr(products, "_onednn_product", counted)
    for dtype in FACTORS:
        a, b = factors((5, 6, 7), dtype, False)
        products.add_product(torch.zeros(5, 7, dtype=products.wide_dtype(dtype)), a, b, fresh=False)
    # float64 has none; bfloat16 and float16 are multiplied as float32.
    assert calls == [torch.float32] * 3 * by_onednn
