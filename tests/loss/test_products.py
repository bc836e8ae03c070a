"""Products that add into a tensor: by oneDNN, and by whatever PyTorch takes where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


class _Calls(TorchDispatchMode):
    """Names of what was computed, and the largest result in bytes that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.append(function._schema.name)
        if isinstance(result, Tensor) and not function.is_view and function._schema.name[-1] != "_":
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


@pytest.mark.filterwarnings("ignore:TF32")
def test_float32_on_a_cpu_is_onednns_where_there_is_one(by_onednn: bool) -> None:
    """PyTorch's own, MKL's, takes twice as long on some processors."""
    for dtype in FACTORS:
        a, b = factors((5, 6, 7), dtype, False)
        with _Calls() as added:
            products.add_product(torch.zeros(5, 7, dtype=products.wide_dtype(dtype)), a, b, fresh=False)
        # float64 has none; bfloat16 and float16 are multiplied as float32.
        assert ("mkldnn::_linear_pointwise" in added.names) == (by_onednn and dtype != torch.float64)
        with _Calls() as written:
            products.product_in(products.piece_buffer(35, a), a, b)
        assert ("mkldnn::_linear_pointwise" in written.names) == (by_onednn and dtype == torch.float32)
    a, b = factors((5, 6, 7), torch.float32, False)
    with torch.backends.mkldnn.flags(enabled=False), _Calls() as switched_off:
        products.add_product(torch.zeros(5, 7), a, b, fresh=False)
    assert "mkldnn::_linear_pointwise" not in switched_off.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 512, 1024), (4096, 2048, 64)], ids=str)
def test_nothing_of_the_size_of_the_sum_is_made(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """16 MiB, or 32 MiB of a factor in float32."""
    if not products._by_onednn(torch.empty(1)):
        pytest.skip("this PyTorch has no oneDNN")
    a, b = factors(shape, dtype, True)
    total = torch.zeros(shape[0], shape[2])
    with _Calls() as calls:
        products.add_product(total, a, b, fresh=True)
    widened = b.numel() * 4 if dtype != torch.float32 else 0
    assert 0 < calls.largest <= max(8 * 2**20, widened)
    assert close(total, a, b, a.double() @ b.double())


def test_factors_are_parts_of_what_is_there(by_onednn: bool) -> None:
    """Real columns of the logits, rows of the weight, one hidden state for all."""
    torch.manual_seed(5)
    logits, weight = torch.randn(9, 40), torch.randn(40, 6)
    hidden = torch.randn(1, 6).expand(9, 6)
    real = 33
    total = torch.zeros(9, 6)
    products.add_product(total, logits[:, :real], weight[:real], fresh=True)
    assert close(total, logits[:, :real], weight[:real], logits[:, :real].double() @ weight[:real].double())
    grown = torch.ones(40, 6)
    products.add_product(grown[:real], logits[:, :real].t(), hidden, fresh=False)
    assert close(grown[:real], logits[:, :real].t(), hidden, 1 + logits[:, :real].double().t() @ hidden.double())
    assert (grown[real:] == 1).all()
