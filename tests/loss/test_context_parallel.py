"""Context parallelism: whatever ranks hold the tokens, sums, count and gradients are those of the uncut batch.

The loss needs nothing for it but that sums and counts, not means, leave each rank. Ranks hold zig-zag slices with
unequal numbers of valid tokens; in two of the cases some hold none, and NaN where nothing counts.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nemo_eaft import EAFTConfig, TokenLoss, eaft_linear_loss, eaft_loss
from nemo_eaft.metrics import StepMetrics, reduce_sums, token_sums
from tests.harness import run_threads
from tests.loss.context import place, zigzag
from tests.loss.formulas import Expected, expected, shard
from tests.loss.parallel import GRADIENT, LOSS, bits_equal

LENGTH, ROWS, VOCAB, PADDED, WIDTH = 16, 3, 37, 40, 10
CASES = ("ragged", "one rank masked", "one rank counts")
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}

layouts = pytest.mark.parametrize("context, tensor", [(2, 1), (2, 2), (4, 1), (4, 2)])
cases = pytest.mark.parametrize("case", CASES)


class Batch(NamedTuple):
    """hidden [s, b, D], weight [padded V, D], logits [s, b, padded V]; labels and mask [s, b]."""

    hidden: Tensor
    weight: Tensor
    logits: Tensor
    labels: Tensor
    mask: Tensor


def batch(case: str, context: int, dtype: torch.dtype = torch.float64) -> Batch:
    torch.manual_seed(0)
    hidden, weight = torch.randn(LENGTH, ROWS, WIDTH).to(dtype), torch.randn(PADDED, WIDTH).to(dtype)
    labels = torch.randint(0, VOCAB, (LENGTH, ROWS))
    # Prompts of different lengths, then the answer, then padding: other counts on every rank.
    mask = torch.zeros(LENGTH, ROWS)
    for row, (start, stop) in enumerate(((1, 16), (6, 14), (9, 12))):
        mask[start:stop, row] = 1
    if case == "one rank masked":
        mask[zigzag(LENGTH, context, 1)] = 0
    if case == "one rank counts":
        for rank in range(1, context):
            mask[zigzag(LENGTH, context, rank)] = 0
    hidden[mask == 0] = math.nan
    return Batch(hidden, weight, hidden @ weight.t(), labels, mask)


def counts(data: Batch, context: int) -> list[int]:
    return [int(data.mask[zigzag(LENGTH, context, rank)].sum()) for rank in range(context)]


def test_the_slices_are_a_partition_and_carry_unequal_counts() -> None:
    assert zigzag(16, 2, 0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert zigzag(16, 2, 1).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert zigzag(16, 4, 2).tolist() == [4, 5, 10, 11]
    for context in (2, 4):
        everything = torch.cat([zigzag(LENGTH, context, rank) for rank in range(context)])
        assert everything.sort().values.tolist() == list(range(LENGTH))
        assert len(set(counts(batch("ragged", context), context))) == context
        assert counts(batch("one rank masked", context), context)[1] == 0
        assert counts(batch("one rank counts", context), context)[1:] == [0] * (context - 1)


class Step(NamedTuple):
    """What one rank brings home of a step."""

    out: TokenLoss
    sums: Tensor
    mean_of_means: float
    gradients: tuple[Tensor, ...]


def finish(out: TokenLoss, mask: Tensor, config: EAFTConfig, context: int, group: Any, *leaves: Tensor) -> Step:
    """Sums over the context group; the gradient of the sum divided once by the count of all ranks."""
    total = reduce_sums(token_sums(out, mask.bool(), config, VOCAB), group, None, None)
    own = out.loss.sum() / mask.sum().clamp(min=1)
    means = torch.zeros(6, dtype=torch.float64)
    means[0] = own.detach() / context
    (out.loss.sum() / total[5].clamp(min=1)).backward()
    gradients = tuple(leaf.grad for leaf in leaves if leaf.grad is not None)
    assert len(gradients) == len(leaves)
    detached = TokenLoss(*(value.detach() for value in out))
    return Step(detached, total, float(reduce_sums(means, group, None, None)[0]), gradients)


def logits_step(rank: int, data: Batch, config: EAFTConfig, context: int, tensor: int) -> Step:
    here = place(rank, tensor, context)
    mine = zigzag(LENGTH, context, here.context_rank)
    part = shard(data.logits[mine], here.tensor_rank, tensor)
    out = eaft_loss(
        part,
        data.labels[mine],
        config,
        vocab_size=VOCAB,
        group=here.tensor_group,
        loss_mask=data.mask[mine],
    )
    return finish(out, data.mask[mine], config, context, here.context_group, part)


def on_logits(data: Batch, config: EAFTConfig, context: int, tensor: int) -> list[Step]:
    return run_threads(logits_step, context * tensor, data, config, context, tensor)


def on_hidden_states(data: Batch, config: EAFTConfig, context: int, tensor: int, sequence: bool) -> list[Step]:
    def step(rank: int) -> Step:
        here = place(rank, tensor, context)
        mine = zigzag(LENGTH, context, here.context_rank)
        hidden = data.hidden[mine]
        if sequence:
            hidden = hidden.chunk(tensor)[here.tensor_rank]
        hidden = hidden.clone().requires_grad_()
        weight = data.weight.chunk(tensor)[here.tensor_rank].clone().requires_grad_()
        out = eaft_linear_loss(
            hidden,
            weight,
            data.labels[mine],
            config,
            vocab_size=VOCAB,
            group=here.tensor_group,
            loss_mask=data.mask[mine],
            sequence_parallel=sequence,
        )
        return finish(out, data.mask[mine], config, context, here.context_group, hidden, weight)

    return run_threads(step, context * tensor)


def uncut(data: Batch, config: EAFTConfig) -> tuple[Expected, int]:
    return expected(data.logits, data.labels, config, VOCAB, data.mask), int(data.mask.sum())


def assert_sums(steps: list[Step], want: Expected, count: int, rtol: float) -> None:
    for step in steps:
        assert torch.equal(step.sums, steps[0].sums), "not the same on every rank, bit for bit"
    sums = steps[0].sums
    assert sums[5] == count
    reference = torch.stack([want.loss.sum(), want.cross_entropy.sum(), want.entropy.sum(), want.weight.sum()])
    torch.testing.assert_close(sums[:4], reference, rtol=rtol, atol=0)
    assert StepMetrics.from_sums(sums).loss == pytest.approx(float(want.loss.sum()) / count, rel=rtol)


def joined(steps: list[Step], context: int, tensor: int) -> Tensor:
    """The gradient of the whole batch's logits from those of all ranks."""
    whole = torch.full((LENGTH, ROWS, PADDED), math.nan, dtype=steps[0].gradients[0].dtype)
    width = PADDED // tensor
    for rank, step in enumerate(steps):
        mine, first = zigzag(LENGTH, context, rank // tensor), rank % tensor * width
        whole[mine, :, first : first + width] = step.gradients[0]
    return whole


CONFIGS = [EAFTConfig(), EAFTConfig(top_k=None, alpha=0.5), EAFTConfig(gate="none"), EAFTConfig(gate="sigmoid")]
configs = pytest.mark.parametrize("config", CONFIGS, ids=["eaft", "full", "none", "sigmoid"])


@layouts
@cases
@configs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_count_and_gradient_are_the_uncut_ones(
    case: str, context: int, tensor: int, config: EAFTConfig, dtype: torch.dtype
) -> None:
    data = batch(case, context, dtype)
    assert_uncut(on_logits(data, config, context, tensor), data, config, context, tensor)


def assert_uncut(steps: list[Step], data: Batch, config: EAFTConfig, context: int, tensor: int) -> None:
    want, count = uncut(data, config)
    double = data.logits.dtype == torch.float64
    assert_sums(steps, want, count, 1e-12 if double else 1.3e-6)
    gradient = joined(steps, context, tensor)
    tolerance = TIGHT if double else GRADIENT
    torch.testing.assert_close(gradient.double(), want.gradient / count, **tolerance)
    assert (gradient[data.mask == 0] == 0).all()
    for rank, step in enumerate(steps):
        mine = zigzag(LENGTH, context, rank // tensor)
        tokens = TIGHT if double else LOSS
        torch.testing.assert_close(step.out.loss.double(), want.loss[mine], **tokens)
        first = steps[rank // tensor * tensor]
        assert all(bits_equal(a, b) for a, b in zip(step.out, first.out, strict=True)), "tensor ranks differ"


@layouts
@cases
@configs
@pytest.mark.parametrize("sequence", [False, True])
def test_hidden_states_and_output_weight_get_the_uncut_gradient(
    case: str, context: int, tensor: int, config: EAFTConfig, sequence: bool
) -> None:
    data = batch(case, context)
    steps = on_hidden_states(data, config, context, tensor, sequence)
    want, count = uncut(data, config)
    assert_sums(steps, want, count, 1e-12)
    grad = want.gradient / count
    hidden, weight = torch.full_like(data.hidden, math.nan), torch.zeros_like(data.weight)
    for rank, step in enumerate(steps):
        mine, t = zigzag(LENGTH, context, rank // tensor), rank % tensor
        part = mine.chunk(tensor)[t] if sequence else mine
        if t > 0 and not sequence:
            assert torch.equal(hidden[mine], step.gradients[0]), "tensor ranks differ"
        hidden[part] = step.gradients[0]
        # What data parallelism sums over the context ranks.
        weight.chunk(tensor)[t].add_(step.gradients[1])
    known = torch.where(data.mask.unsqueeze(-1) == 1, data.hidden, 0.0)
    torch.testing.assert_close(hidden, grad @ data.weight, **TIGHT)
    torch.testing.assert_close(weight, grad.flatten(0, 1).t() @ known.flatten(0, 1), **TIGHT)


@layouts
@cases
def test_a_mean_of_the_ranks_means_fails_the_same_comparison(case: str, context: int, tensor: int) -> None:
    """The mistake, in the loss that is reported and in the gradient."""
    data, config = batch(case, context), EAFTConfig()
    steps = on_logits(data, config, context, tensor)
    want, count = uncut(data, config)
    wrong = [step._replace(sums=step.sums.clone()) for step in steps]
    for step in wrong:
        step.sums[0] = step.mean_of_means * count
    with pytest.raises(AssertionError):
        assert_sums(wrong, want, count, 1.3e-6)
    # Each rank divides by its own count, and data parallelism averages over the ranks.
    own = counts(data, context)
    biased = joined(
        [
            step._replace(gradients=(step.gradients[0] * count / max(own[rank // tensor], 1) / context,))
            for rank, step in enumerate(steps)
        ],
        context,
        tensor,
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(biased, want.gradient / count, **GRADIENT)


def test_contiguous_slices_would_be_seen() -> None:
    """Labels cut zig-zag and logits cut in order: what a forgotten reordering does."""
    data, config = batch("ragged", 2), EAFTConfig()
    mine = zigzag(LENGTH, 2, 0)
    straight = data.logits.nan_to_num()[: LENGTH // 2]
    wrong = eaft_loss(straight, data.labels[mine], config, vocab_size=VOCAB, loss_mask=data.mask[mine])
    want = uncut(data, config)[0].loss[mine]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong.loss, want, **LOSS)
