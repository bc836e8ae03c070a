"""The sums and means of a step against plain Python loops in float64."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_eaft import EAFTConfig, TokenLoss, eaft_loss
from nemo_eaft.metrics import METRIC_SUMS, StepMetrics, reduce_sums, sums_and_counts, token_sums, zero_sums

VOCAB = 1000


def random_out(shape: tuple[int, ...], seed: int = 0) -> TokenLoss:
    """Values in the ranges the loss gives, about a quarter of them confident conflicts."""
    generator = torch.Generator().manual_seed(seed)
    cross_entropy = 8 * torch.rand(shape, generator=generator)
    entropy = 3 * torch.rand(shape, generator=generator) ** 3
    weight = entropy / math.log(20)
    return TokenLoss(loss=weight * cross_entropy, cross_entropy=cross_entropy, entropy=entropy, weight=weight)


def loop_sums(out: TokenLoss, valid: Tensor, probability: float, ratio: float, normaliser: float) -> list[float]:
    """The definition, one token at a time."""
    values = zip(*(value.flatten().tolist() for value in out), strict=True)
    sums = [0.0] * 6
    for (loss, cross_entropy, entropy, weight), counts in zip(values, valid.flatten().tolist(), strict=True):
        if not counts:
            continue
        conflict = math.exp(-cross_entropy) < probability and entropy / normaliser < ratio
        for place, value in enumerate((loss, cross_entropy, entropy, weight, float(conflict), 1.0)):
            sums[place] += value
    return sums


def test_sums_with_their_count_divide_to_the_means() -> None:
    sums = torch.tensor([1.0, 8.0, 6.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    pairs = sums_and_counts(sums)
    means = StepMetrics.from_sums(sums).as_dict()
    assert {name: float(pair[0] / pair[1]) for name, pair in pairs.items()} == {
        name: means[name] for name in ("cross_entropy", "entropy", "weight", "conflict_fraction")
    }
    assert all(pair.dtype == torch.float64 and pair[1] == 4 for pair in pairs.values())


@pytest.mark.parametrize(
    "config, probability, ratio, normaliser",
    [
        (EAFTConfig(), 0.1, 0.2, math.log(20)),
        (EAFTConfig(normalizer=3.0), 0.1, 0.2, 3.0),
        (EAFTConfig(top_k=None), 0.1, 0.2, math.log(VOCAB)),
        (EAFTConfig(conflict_probability=0.5, conflict_entropy=0.05), 0.5, 0.05, math.log(20)),
        (EAFTConfig(top_k=5000), 0.1, 0.2, math.log(VOCAB)),
    ],
)
@pytest.mark.parametrize("shape", [(257,), (7, 61), (3, 5, 11)])
def test_sums_are_those_of_the_loop(
    config: EAFTConfig, probability: float, ratio: float, normaliser: float, shape: tuple[int, ...]
) -> None:
    out = random_out(shape)
    valid = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    sums = token_sums(out, valid, config, VOCAB)
    expected = torch.tensor(loop_sums(out, valid, probability, ratio, normaliser), dtype=torch.float64)
    assert len(METRIC_SUMS) == 6
    # Only the order of the additions, in float64, differs from the loop's.
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(sums[4:], expected[4:])
    assert 0 < sums[4] < sums[5], "the case must hold conflicts and others"


def test_thresholds_take_part() -> None:
    out = random_out((4000,))
    valid = torch.ones(4000, dtype=torch.bool)
    counts = {
        name: token_sums(out, valid, config, VOCAB)[4].item()
        for name, config in {
            "default": EAFTConfig(),
            "probability": EAFTConfig(conflict_probability=0.01),
            "entropy": EAFTConfig(conflict_entropy=0.1),
            "normaliser": EAFTConfig(normalizer=1.0),
        }.items()
    }
    assert len(set(counts.values())) == len(counts), counts


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_masked_never_leaks(bad: float) -> None:
    out = random_out((64,))
    valid = torch.arange(64) % 3 != 0
    clean = token_sums(out, valid, EAFTConfig(), VOCAB)
    poisoned = TokenLoss(*(torch.where(valid, value, bad) for value in out))
    assert torch.equal(token_sums(poisoned, valid, EAFTConfig(), VOCAB), clean)
    # The usual wrong way, masking by a product, must fail on this input.
    assert not (poisoned.loss * valid).sum().isfinite()


def test_a_nan_at_a_valid_token_is_not_hidden() -> None:
    out = random_out((64,))
    valid = torch.ones(64, dtype=torch.bool)
    out.cross_entropy[5] = math.nan
    sums = token_sums(out, valid, EAFTConfig(), VOCAB)
    metrics = StepMetrics.from_sums(sums)
    assert math.isnan(metrics.cross_entropy)
    assert math.isfinite(metrics.entropy)
    assert metrics.tokens == 64


def test_sums_are_detached_and_leave_the_graph_alone() -> None:
    source = torch.rand(8, requires_grad=True)
    out = random_out((8,))._replace(loss=source * 2)
    sums = token_sums(out, torch.ones(8, dtype=torch.bool), EAFTConfig(), VOCAB)
    assert not sums.requires_grad
    out.loss.sum().backward()
    assert source.grad is not None
    assert torch.equal(source.grad, torch.full((8,), 2.0))


def test_no_wait_for_the_device() -> None:
    # A meta tensor has no values: whatever needed one on the host (item, boolean indexing) raises here.
    out = TokenLoss(*(torch.empty(4, 8, device="meta") for _ in range(4)))
    valid = torch.empty(4, 8, dtype=torch.bool, device="meta")
    sums = token_sums(out, valid, EAFTConfig(), VOCAB)
    assert sums.device.type == "meta"
    assert sums.dtype == torch.float64
    assert (sums + zero_sums("meta")).shape == (6,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        out.loss[valid].sum().item()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_no_tokens_at_all(shape: tuple[int, ...]) -> None:
    out = TokenLoss(*(torch.zeros(shape) for _ in range(4)))
    sums = token_sums(out, torch.zeros(shape, dtype=torch.bool), EAFTConfig(), VOCAB)
    assert torch.equal(sums, zero_sums("cpu"))


def test_a_float_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.bool, got torch\.float32"):
        token_sums(random_out((4,)), torch.ones(4), EAFTConfig(), VOCAB)


def test_another_shape_is_refused_and_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(4, 1\), got \(1, 4\)"):
        token_sums(random_out((4, 1)), torch.ones(1, 4, dtype=torch.bool), EAFTConfig(), VOCAB)


def test_zero_valid_tokens_give_zeros_and_one_warning() -> None:
    out = TokenLoss(*(torch.full((5,), math.nan) for _ in range(4)))
    sums = token_sums(out, torch.zeros(5, dtype=torch.bool), EAFTConfig(), VOCAB)
    with pytest.warns(RuntimeWarning, match="step 17: no token") as caught:
        metrics = StepMetrics.from_sums(sums, step=17)
    assert len(caught) == 1
    assert set(metrics.as_dict().values()) == {0}
    assert isinstance(metrics.tokens, int)


def test_ranks_that_do_not_log_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StepMetrics.from_sums(zero_sums("cpu"))
        StepMetrics.from_sums(zero_sums("cpu") + 1, step=3)


def test_divided_once_by_the_tokens_of_all_micro_batches() -> None:
    micro_batches = [random_out((length,), seed=length) for length in (1, 3, 40)]
    sums = zero_sums("cpu")
    for out in micro_batches:
        sums += token_sums(out, torch.ones_like(out.loss, dtype=torch.bool), EAFTConfig(), VOCAB)
    metrics = StepMetrics.from_sums(sums)
    losses = [value for out in micro_batches for value in out.loss.tolist()]
    assert metrics.tokens == 44
    assert metrics.loss == pytest.approx(math.fsum(losses) / 44, rel=1e-12)
    # The usual wrong way, a mean of means, must not pass.
    means = [out.loss.mean().item() for out in micro_batches]
    assert metrics.loss != pytest.approx(sum(means) / 3, rel=1e-3)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_any_split_gives_the_sums_of_the_whole(lengths: list[int], density: float, seed: int) -> None:
    config = EAFTConfig()
    out = random_out((sum(lengths),), seed)
    valid = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed + 1)) < density
    whole = token_sums(out, valid, config, VOCAB)
    parts = zip(*(value.split(lengths) for value in (*out, valid)), strict=True)
    added = zero_sums("cpu")
    for *values, part_valid in parts:
        added += token_sums(TokenLoss(*values), part_valid, config, VOCAB)
    torch.testing.assert_close(added, whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(added[4:], whole[4:])


def test_counts_stay_exact_where_float32_does_not() -> None:
    tokens = 2**24 + 1
    one = torch.zeros(())
    out = TokenLoss(*(one.expand(tokens) for _ in range(4)))
    sums = token_sums(out, torch.ones((), dtype=torch.bool).expand(tokens), EAFTConfig(), VOCAB)
    assert StepMetrics.from_sums(sums).tokens == tokens
    assert int(torch.tensor(float(tokens), dtype=torch.float32).item()) != tokens


def test_counts_add_up_exactly_to_two_to_the_53() -> None:
    sums = zero_sums("cpu")
    sums[5] = 2.0**53 - 1
    one = zero_sums("cpu")
    one[5] = 1
    assert StepMetrics.from_sums(sums).tokens == 2**53 - 1
    assert StepMetrics.from_sums(sums + one).tokens == 2**53


def test_fields_and_dict() -> None:
    sums = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 8.0], dtype=torch.float64)
    metrics = StepMetrics.from_sums(sums)
    assert metrics.as_dict() == {
        "loss": 0.125,
        "cross_entropy": 0.25,
        "entropy": 0.375,
        "weight": 0.5,
        "conflict_fraction": 0.625,
        "tokens": 8,
    }
    assert list(metrics.as_dict()) == [field.name for field in dataclasses.fields(StepMetrics)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        metrics.loss = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "sums",
    [
        torch.zeros(6),
        torch.zeros(5, dtype=torch.float64),
        torch.tensor([0, 0, 0, 0, 0, -1.0], dtype=torch.float64),
        torch.tensor([0, 0, 0, 0, 0, 1.5], dtype=torch.float64),
    ],
)
def test_what_is_not_a_vector_of_sums_is_not_taken(sums: Tensor) -> None:
    with pytest.raises(AssertionError):
        StepMetrics.from_sums(sums)


def test_one_process_reduces_to_a_copy() -> None:
    sums = torch.arange(6, dtype=torch.float64)
    total = reduce_sums(sums, None, None, None)
    assert torch.equal(total, sums)
    total += 1
    assert sums[0] == 0
    with pytest.raises(AssertionError, match="come together"):
        reduce_sums(sums, None, None, 3)


def test_with_the_real_loss_on_logits() -> None:
    """From logits with a NaN row under the mask to the means, against a loop over rows in float64."""
    generator = torch.Generator().manual_seed(3)
    vocab, tokens, top_k = 50, 40, 20
    # Peaked rows with random labels: confident and wrong, so that conflicts occur.
    logits = torch.randn(tokens, vocab, generator=generator) * torch.linspace(0.5, 9, tokens)[:, None]
    labels = torch.randint(vocab, (tokens,), generator=generator)
    valid = torch.rand(tokens, generator=generator) < 0.7
    logits[~valid] = math.nan
    config = EAFTConfig()

    out = eaft_loss(logits, labels, config, vocab_size=vocab, loss_mask=valid.float())
    metrics = StepMetrics.from_sums(token_sums(out, valid, config, vocab))

    rows = []
    for row, label in zip(logits[valid].double().tolist(), labels[valid].tolist(), strict=True):
        cross_entropy = math.log(math.fsum(math.exp(z) for z in row)) - row[label]
        top = sorted(row, reverse=True)[:top_k]
        total = math.fsum(math.exp(z) for z in top)
        entropy = -math.fsum(math.exp(z) / total * (z - math.log(total)) for z in top)
        weight = entropy / math.log(top_k)
        conflict = math.exp(-cross_entropy) < 0.1 and weight < 0.2
        rows.append((weight * cross_entropy, cross_entropy, entropy, weight, conflict))
    means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    assert metrics.tokens == len(rows)
    assert 0 < metrics.conflict_fraction == pytest.approx(means[4], abs=0)
    # float32 statistics of the loss, hence the float32 tolerance.
    assert [metrics.loss, metrics.cross_entropy, metrics.entropy, metrics.weight] == pytest.approx(
        means[:4], rel=1.3e-6, abs=1e-5
    )
