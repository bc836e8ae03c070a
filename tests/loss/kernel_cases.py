"""The kernels' numbers: against the formulas in float64, over layouts, shards and special values.

``test_kernels.py`` runs this file, in Triton's interpreter and on a GPU.
"""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig, eaft_loss
from nemo_eaft.loss import kernels
from nemo_eaft.loss import records as torch_records
from nemo_eaft.loss.shard import ELSEWHERE, IGNORED, Shard
from tests.harness import poisoned_empty, run_threads
from tests.loss.formulas import expected, pad, shard
from tests.loss.kernel_passes import DEVICE, _triton, records, run  # noqa: F401
from tests.loss.parallel import GRADIENT, LOSS, STATISTIC, Ranked, bits_equal, layouts

INF, NAN = math.inf, math.nan
TOP = EAFTConfig(top_k=3)
WHOLE = EAFTConfig(top_k=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Between neighbours of the dtype, relative: a gradient may be rounded the other way, and no further.
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 0.0}


def assert_right(
    got: Ranked, logits: Tensor, labels: Tensor, config: EAFTConfig, vocab: int, upstream: Tensor | None = None
) -> None:
    want = expected(logits, labels, config, vocab, upstream=upstream)
    got.assert_ranks_identical()
    assert got.gradient.dtype == logits.dtype
    exact: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    loss, statistic, gradient = LOSS, STATISTIC, {**GRADIENT, "rtol": ULP.get(logits.dtype, 0.0)}
    if logits.dtype == torch.float64:
        loss = statistic = gradient = exact
    torch.testing.assert_close(got.out.loss.double(), want.loss, **loss)
    torch.testing.assert_close(got.out.cross_entropy.double(), want.cross_entropy, **loss)
    torch.testing.assert_close(got.out.entropy.double(), want.entropy, **statistic)
    torch.testing.assert_close(got.gradient.double(), want.gradient, **gradient)
    assert not got.gradient[..., vocab:].any()
    assert not torch.signbit(got.gradient[..., vocab:]).any()


def batch(vocab: int, tokens: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(vocab)
    return (torch.randn(tokens, vocab) * 3).to(dtype), torch.randint(0, vocab, (tokens,))


WIDTHS = [2, 7, 20, 40, 127, 128, 129, 1000, 1003]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("vocab", WIDTHS)
def test_every_width_and_size(vocab: int, world_size: int) -> None:
    """Each dtype and each kind of entropy meets each size and most widths."""
    turn = WIDTHS.index(vocab) + {1: 0, 2: 1, 4: 2, 8: 3}[world_size]
    dtype = DTYPES[turn % 4]
    logits, labels = batch(vocab, dtype=dtype)
    labels[1], labels[2] = 0, vocab - 1
    logits = pad(logits, world_size, value=50.0)
    upstream = torch.tensor([1.0, -0.25, 3.0])
    for config in (TOP, WHOLE, EAFTConfig()) if world_size == 1 else (TOP, WHOLE):
        got = run(logits, labels, config, world_size, vocab=vocab, upstream=upstream)
        assert_right(got, logits, labels, config, vocab, upstream)


@pytest.mark.parametrize(
    "vocab, dtype, tokens",
    [
        (8192, torch.float16, 2),
        (18993, torch.bfloat16, 2),
        (60001, torch.float32, 2),
        (151936, torch.bfloat16, 2),
        (151936, torch.float32, 1),
        (18993, torch.float64, 1),
    ],
)
@pytest.mark.parametrize("config", [EAFTConfig(), WHOLE], ids=["20", "whole"])
def test_wide_rows(vocab: int, dtype: torch.dtype, tokens: int, config: EAFTConfig) -> None:
    logits, labels = batch(vocab, tokens, dtype)
    assert_right(run(logits, labels, config, vocab=vocab), logits, labels, config, vocab)


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("config", [TOP, WHOLE], ids=["3", "whole"])
def test_offsets_and_scales(world_size: int, config: EAFTConfig) -> None:
    base, labels = batch(1003, 6)
    logits = pad(base, 8)
    logits[0] += 1e6
    logits[1] -= 1e6
    logits[2] *= 1e4 / 3
    logits[3] = 1e4
    logits[4, ::2] = -1e4
    logits[5] = 0
    logits[5, 17] = 60
    got = run(logits, labels, config, world_size, vocab=1003)
    assert_right(got, logits, labels, config, 1003)
    assert bool((got.out.entropy >= 0).all())


def minus_infinite() -> Tensor:
    """[6, 9216]: -Inf in the first blocks, in whole shards of 2 to 8, in whole groups, nearly everywhere."""
    torch.manual_seed(0)
    logits = torch.randn(6, 9216) * 4
    logits[0, :8200] = -INF
    logits[1, 4608:] = -INF
    logits[2, 64:640] = -INF
    logits[3, 1:] = -INF
    logits[4, ::2] = -INF
    logits[5, :9215] = -INF
    logits[5, 4000] = 1.0
    return logits


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("config", [TOP, WHOLE], ids=["3", "whole"])
def test_minus_infinity(world_size: int, config: EAFTConfig) -> None:
    logits, labels = minus_infinite(), torch.tensor([9000, 0, 63, 0, 1, 9215])
    got = run(logits, labels, config, world_size, vocab=9216)
    assert_right(got, logits, labels, config, 9216)
    assert not got.gradient[logits == -INF].any()


@pytest.mark.parametrize("config", [TOP, WHOLE, EAFTConfig()], ids=["3", "whole", "20"])
def test_shards_of_nothing_but_padding(config: EAFTConfig) -> None:
    """V = 9 in shards of 3 on 8 ranks, labels at every edge; what the padding holds does not matter."""
    torch.manual_seed(2)
    real, labels = torch.randn(6, 9), torch.tensor([0, 2, 3, 5, 6, 8])
    for filling in (NAN, INF, 99.0):
        logits = pad(real, 24, value=filling)
        assert_right(run(logits, labels, config, 8, vocab=9), logits, labels, config, 9)


@pytest.mark.parametrize("world_size", [1, 2])
def test_ignored_rows_are_set_aside(world_size: int) -> None:
    logits, labels = batch(1000, 4, torch.bfloat16)
    logits[1], logits[2, 3] = NAN, INF
    labels[1:3] = -100
    for config in (TOP, WHOLE):
        got = run(logits, labels, config, world_size, vocab=1000)
        assert_right(got, logits, labels, config, 1000)
        for value in (*got.out, got.gradient):
            assert not value[1:3].any()
            assert not torch.signbit(value[1:3]).any()
    for top_k in (None, 4):
        record = records(logits, [1, IGNORED, IGNORED, ELSEWHERE], 1000, top_k)
        assert not record[1:3].any()
        assert record.isfinite().all()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("config", [TOP, WHOLE], ids=["3", "whole"])
def test_nan_and_infinity_in_a_counted_row_make_its_loss_nan(world_size: int, config: EAFTConfig) -> None:
    logits, labels = batch(1000, 8)
    logits[0, 999], logits[1], logits[2, 5], logits[3] = NAN, NAN, INF, -INF
    logits[4, :70] = NAN
    logits[5, 500:] = -INF
    logits[5, 700] = NAN
    logits[6, 9], logits[6, 800] = NAN, INF
    got = run(logits, labels, config, world_size, vocab=1000)
    got.assert_ranks_identical()
    assert got.out.loss[:7].isnan().all()
    assert got.gradient[:7].isnan().all()
    assert_right(
        Ranked([type(got.out)(*(value[7:] for value in got.out))], got.gradient[7:]),
        logits[7:],
        labels[7:],
        config,
        1000,
    )


def test_the_record_is_the_torch_paths() -> None:
    logits = torch.cat((torch.randn(4, 1003) * 9, torch.full((1, 1003), -INF)))
    logits[2, :900] = -INF
    target = [5, ELSEWHERE, 1001, IGNORED, 0]
    for dtype, columns, top_k in [
        *((dtype, columns, 4) for dtype in DTYPES for columns in (1003, 65, 1, 0)),
        *((dtype, columns, None) for dtype in DTYPES for columns in (1003, 1002, 1, 0)),
        *((torch.float32, columns, top_k) for columns in (1003, 1002, 65) for top_k in (1, 20)),
        (torch.float32, 1003, 130),
        (torch.bfloat16, 65, 130),
        (torch.float64, 1, 40),
    ]:
        part = [min(label, columns - 1) if label >= 0 else label for label in target]
        rows = logits.to(dtype)
        got = records(rows, part, columns, top_k)
        local = torch.tensor(part, dtype=torch.int32)
        want = torch_records.local_records(rows, local, Shard(0, columns, max(columns, 2)), top_k)
        assert got.dtype == want.dtype
        close: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-13}
        if dtype != torch.float64:
            close = {"rtol": 2e-6, "atol": 5e-6}
        exact = [0, 2] if top_k is None else [0, 2, *range(3, 3 + top_k)]
        assert bits_equal(got[:, exact], want[:, exact]), (dtype, columns, top_k)
        torch.testing.assert_close(got[:, 1], want[:, 1], **close)
        if top_k is None:
            torch.testing.assert_close(got[:, 3], want[:, 3], **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_of_the_same_values_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(3, 1000) * 3).to(dtype).to(DEVICE)
    target = torch.tensor([5, ELSEWHERE, 999], dtype=torch.int32, device=DEVICE)
    maximum = logits.float().amax(-1)
    log_sum = (logits.float() - maximum[:, None]).exp().sum(-1).log()
    coefficient = torch.tensor([0.7, -1.3, 1e-3], device=DEVICE)
    gradients = []
    for z in (logits, logits.float()):
        gradient = torch.full_like(z, NAN)
        kernels.write_gradient(gradient, z, target, Shard(0, 1000, 1000), maximum, log_sum, coefficient)
        gradients.append(gradient)
    assert torch.equal(gradients[0], gradients[1].to(dtype))


def more_layouts() -> dict[str, Tensor]:
    """Also two more token dimensions that nothing joins."""
    four = layouts()["contiguous"].view(3, 2, 2, 2, 40).permute(3, 2, 1, 0, 4).contiguous().permute(3, 2, 1, 0, 4)
    return layouts() | {"four dimensions reversed": four}


class _Restride(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, like):
        out = torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device)
        return out.copy_(x.view(like.shape))

    @staticmethod
    def backward(ctx, grad):
        return grad.reshape(6, 4, 40).clone(), None


@pytest.mark.parametrize("name", more_layouts())
def test_any_strides(name: str) -> None:
    """In place and out of place give the same bits, the logits are kept, and all is as from contiguous logits."""
    like = more_layouts()[name]
    values = layouts()["contiguous"].bfloat16()
    labels = torch.randint(0, 37, (6, 4))
    labels[2, 1] = -100
    upstream = torch.randn(4, 6).t()
    results = []
    for inplace in (False, True):
        start = values.clone().to(DEVICE).requires_grad_()
        logits = _Restride.apply(start, like)
        assert logits.stride() == like.stride()
        before = logits.detach().clone()
        shape = like.shape[:-1]
        out = eaft_loss(logits, labels.to(DEVICE).view(shape), TOP, vocab_size=37, inplace_backward=inplace)
        assert torch.equal(logits.detach(), before)
        out.loss.backward(upstream.reshape(shape).to(DEVICE))
        assert start.grad is not None
        assert torch.equal(logits.detach(), before) == (not inplace)
        results.append(Ranked([type(out)(*(value.detach().cpu().view(6, 4) for value in out))], start.grad.cpu()))
    assert torch.equal(results[0].gradient, results[1].gradient)
    assert all(torch.equal(a, b) for a, b in zip(results[0].out, results[1].out, strict=True))
    assert_right(results[0], values, labels, TOP, 37, upstream)


def test_upstream_gradients_of_any_kind() -> None:
    logits, labels = batch(129, 6)
    for upstream in (torch.tensor(0.5).expand(6), torch.linspace(-2, 2, 12)[::2], torch.zeros(6)):
        got = run(logits, labels, TOP, vocab=129, upstream=upstream)
        assert_right(got, logits, labels, TOP, 129, upstream)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0, 2), (2, 1, 3)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_any_number_of_tokens(shape: tuple[int, ...], world_size: int) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(*shape, 40), torch.randint(0, 40, shape)
    for config in (TOP, WHOLE):
        got = run(logits, labels, config, world_size, vocab=40)
        assert all(value.shape == shape for value in got.out)
        assert_right(got, logits, labels, config, 40)


def test_twice_is_the_same_and_the_logits_stay() -> None:
    values, labels = batch(1003, 4, torch.bfloat16)
    values[2, 7] = NAN
    values, labels = values.to(DEVICE), labels.to(DEVICE)
    runs = []
    for _ in range(2):
        logits = values.clone().requires_grad_()
        loss = eaft_loss(logits, labels, TOP).loss
        (first,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        (second,) = torch.autograd.grad(loss.sum(), logits)
        assert bits_equal(first, second)
        assert torch.equal(logits.detach().view(torch.int16), values.view(torch.int16))
        runs.append((loss.detach(), first))
    assert all(bits_equal(a, b) for a, b in zip(*runs, strict=True))


def test_nothing_unwritten_shows() -> None:
    """Empty tensors of this package hold NaN here, and yet every result is finite."""
    with poisoned_empty():
        probe: dict[str, Any] = {"__name__": "nemo_eaft.loss.kernels", "torch": torch}
        assert eval("torch.empty(3)", probe).isnan().all()
        for vocab in (40, 1003):
            logits, labels = pad(batch(vocab)[0], 8, NAN), batch(vocab)[1]
            labels[0] = -100
            for config in (TOP, WHOLE):
                got = run(logits, labels, config, vocab=vocab)
                assert all(value.isfinite().all() for value in (*got.out, got.gradient))


def test_offsets_above_two_to_the_31() -> None:
    """Rows 2**30 elements apart; pages between them are never touched."""
    apart, vocab = 2**30, 1000
    try:
        room = torch.empty(2 * apart + vocab, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("this machine does not promise 4.3 GB")
    logits = room.as_strided((3, vocab), (apart, 1))
    logits.copy_(torch.randn(3, vocab))
    target = torch.tensor([3, 4, 5], dtype=torch.int32, device=DEVICE)
    full = Shard(0, vocab, vocab)
    near = logits.clone()
    got, want = (kernels.local_records(each, target, full, 3) for each in (logits, near))
    assert torch.equal(got, want)
    m, log_d, one = got[:, 0].contiguous(), got[:, 1].log(), torch.ones(3, device=DEVICE)
    for each in (logits, near):
        kernels.write_gradient(each, each, target, full, m, log_d, one)
    assert torch.equal(logits, near)
    # Columns that far apart, too.
    across = room.as_strided((2, 3), (1, apart))
    across.copy_(torch.randn(2, 3))
    got, want = (kernels.local_records(each, target[:2] - 3, Shard(0, 3, 3), 2) for each in (across, across.clone()))
    assert torch.equal(got, want)


def test_ranks_agree_on_the_collective_with_nothing_to_send() -> None:
    """Zero tokens, all ignored, NaN: every rank reaches its all-gather, or this would time out."""

    def rank_loss(rank: int) -> None:
        for logits, labels in (
            (torch.randn(0, 20), torch.zeros(0, dtype=torch.int64)),
            (torch.randn(2, 20), torch.full((2,), -100)),
            (torch.full((2, 20), NAN), torch.tensor([1, 19])),
        ):
            part = shard(logits.to(DEVICE), rank, 2)
            out = eaft_loss(part, labels.to(DEVICE), TOP, vocab_size=20, group=dist.group.WORLD)
            out.loss.sum().backward()

    run_threads(rank_loss, 2)
