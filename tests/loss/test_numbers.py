"""What the loss must be at every input that has broken another implementation, at tensor-parallel 1, 2, 4 and
8."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig, eaft_loss
from tests.harness import run_threads
from tests.loss.formulas import expected, pad, shard
from tests.loss.parallel import GRADIENT, LOSS, STATISTIC, Ranked, assert_matches, bits_equal, run_sharded

SIZES = [1, 2, 4, 8]
CONFIGS = [EAFTConfig(), EAFTConfig(top_k=None), EAFTConfig(alpha=0.5), EAFTConfig(gate="none")]
sizes = pytest.mark.parametrize("world_size", SIZES)
configs = pytest.mark.parametrize("config", CONFIGS, ids=["eaft", "full", "half", "none"])


@sizes
@configs
def test_all_tokens_masked(config: EAFTConfig, world_size: int) -> None:
    """Loss exactly 0, attached to the graph, gradient exactly 0; and the next batch is as ever."""
    torch.manual_seed(0)
    logits = torch.randn(5, 2, 40)
    labels = torch.randint(0, 40, (5, 2))
    zeros = torch.zeros(5, 2)
    for ignored, mask in ((torch.full_like(labels, -100), None), (labels, zeros)):
        got = run_sharded(logits, ignored, config, world_size, vocab_size=40, loss_mask=mask)
        assert all(torch.equal(value, zeros) for out in got.outs for value in out)
        assert torch.equal(got.gradient, torch.zeros_like(logits))
    assert_matches(run_sharded(logits, labels, config, world_size, vocab_size=40), logits, labels, config, 40)


def test_a_step_without_any_counted_token_still_has_a_graph() -> None:
    """Summed over micro-batches and divided by max(count, 1), a whole empty step steps by nothing."""
    leaf = torch.randn(4, 30, requires_grad=True)
    total = sum(eaft_loss(leaf, torch.full((4,), -100), EAFTConfig()).loss.sum() for _ in range(3))
    assert isinstance(total, Tensor)
    (total / max(0, 1)).backward()
    assert total.item() == 0
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


POISONS = {"nan": math.nan, "+inf": math.inf, "-inf": -math.inf, "huge": 3e38}


@sizes
@configs
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("by_mask", [True, False])
def test_what_is_at_a_masked_token_reaches_nothing(
    config: EAFTConfig, world_size: int, poison: str, by_mask: bool
) -> None:
    torch.manual_seed(0)
    clean = torch.randn(6, 40)
    labels = torch.randint(0, 40, (6,))
    mask = torch.tensor([1, 0, 1, 0, 0, 1])
    dirty = clean.clone()
    dirty[1] = POISONS[poison]
    dirty[3, 7] = POISONS[poison]
    dirty[4, ::2] = POISONS[poison]
    upstream = torch.where(mask.bool(), torch.randn(6), math.nan)
    if by_mask:
        labels[3] = 10**9  # not a label at all, but masked
        kwargs: dict[str, Any] = {"labels": labels, "loss_mask": mask.float()}
    else:
        kwargs = {"labels": torch.where(mask.bool(), labels, -100), "loss_mask": None}

    def run(logits: Tensor) -> Ranked:
        return run_sharded(logits, config=config, world_size=world_size, vocab_size=40, upstream=upstream, **kwargs)

    got, want = run(dirty), run(clean)
    for out in got.outs:
        assert all(torch.equal(a, b) for a, b in zip(out, want.out, strict=True))
    assert torch.equal(got.gradient, want.gradient)
    for value in (*got.out, got.gradient.sum(-1)):
        assert (value[mask == 0] == 0).all()
    assert (got.gradient[mask == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32])
def test_a_loss_mask_of_any_dtype_selects(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 30), torch.randint(0, 30, (4,))
    mask = torch.tensor([1, 0, 1, 0])
    got = eaft_loss(logits, labels, EAFTConfig(), loss_mask=mask.to(dtype))
    want = eaft_loss(logits, labels.where(mask.bool(), -100), EAFTConfig())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_fractional_mask_selects_and_does_not_weigh() -> None:
    logits, labels = torch.randn(2, 30), torch.tensor([1, 2])
    whole = eaft_loss(logits, labels, EAFTConfig())
    half = eaft_loss(logits, labels, EAFTConfig(), loss_mask=torch.tensor([0.5, 1.0]))
    assert torch.equal(whole.loss, half.loss)


@sizes
@pytest.mark.parametrize(
    "config", [*CONFIGS, EAFTConfig(gate="dft"), EAFTConfig(gate="mask"), EAFTConfig(alpha=0.0)], ids=str
)
def test_not_finite_at_a_counted_token_is_nan_on_every_rank(config: EAFTConfig, world_size: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 40)
    logits[0, 33] = math.nan
    logits[1, 2] = math.inf
    logits[2] = -math.inf
    logits[3, :] = math.nan
    logits[4, 39] = math.inf
    labels = torch.tensor([3, 3, 3, 3, 39, 3])
    got = run_sharded(logits, labels, config, world_size, vocab_size=40)
    got.assert_ranks_identical()
    for out in got.outs:
        assert out.loss[:5].isnan().all()
        assert out.cross_entropy[:5].isnan().all()
        assert out.loss[5].isfinite()
    # Never a plausible update either: some gradient of the token is NaN, and the good token's are not.
    assert got.gradient[:5].isnan().any(dim=-1).all()
    assert got.gradient[5].isfinite().all()


@sizes
@configs
def test_minus_inf_at_some_columns(config: EAFTConfig, world_size: int) -> None:
    """A whole shard, the first block, all but two columns, all but the label: finite, and gradient 0
    there."""
    torch.manual_seed(0)
    logits = torch.randn(5, 40)
    logits[0, :20] = -math.inf
    logits[1, 20:] = -math.inf
    logits[2, 1:39] = -math.inf
    logits[3, :39] = -math.inf
    logits[4, ::3] = -math.inf
    labels = torch.tensor([39, 0, 39, 39, 1])
    got = run_sharded(logits, labels, config, world_size, vocab_size=40)
    assert_matches(got, logits, labels, config, 40)
    assert all(value.isfinite().all() for out in got.outs for value in out)
    assert (got.gradient[logits.isneginf()] == 0).all()
    assert got.out.entropy[3] == 0
    assert got.out.cross_entropy[3] == 0


def test_gathered_logits_are_refused() -> None:
    def rank_loss(rank: int) -> None:
        group = dist.group.WORLD
        for width in (40, 48):  # the true vocabulary, and the padded one
            with pytest.raises(ValueError, match=rf"local size {width} .* vocab_size 40, with a world size of 2"):
                eaft_loss(torch.randn(3, width), torch.zeros(3).long(), EAFTConfig(), vocab_size=40, group=group)

    run_threads(rank_loss, 2)


@sizes
@configs
@pytest.mark.parametrize("filler", [0.0, 80.0, math.inf, math.nan, -math.inf])
def test_padding_columns_are_excluded_whatever_they_hold(config: EAFTConfig, world_size: int, filler: float) -> None:
    torch.manual_seed(0)
    real = torch.randn(6, 37)
    labels = torch.tensor([0, 36, 5, 18, 19, 20])
    alone = run_sharded(real, labels, config, 1, vocab_size=37)
    for multiple in (8, 64):
        logits = pad(real, multiple, value=filler)
        if logits.shape[-1] // world_size >= 37 and world_size > 1:
            continue
        got = run_sharded(logits, labels, config, world_size, vocab_size=37)
        assert_matches(got, logits, labels, config, 37)
        assert (got.gradient[:, 37:] == 0).all()
        torch.testing.assert_close(got.out.loss, alone.out.loss, **LOSS)
        torch.testing.assert_close(got.out.weight, alone.out.weight, **STATISTIC)


@sizes
@configs
@pytest.mark.parametrize("vocab", [9, 19, 20, 21, 53, 131])
def test_vocabularies_that_fit_nothing(config: EAFTConfig, world_size: int, vocab: int) -> None:
    """Not divisible, smaller than K, shards smaller than K; a label at each end of each shard."""
    torch.manual_seed(0)
    width = -(-vocab // world_size)
    ends = {first + offset for first in range(0, width * world_size, width) for offset in (0, width - 1)}
    labels = torch.tensor(sorted(end for end in ends if end < vocab))
    logits = pad(torch.randn(len(labels), vocab) * 3, width * world_size)
    got = run_sharded(logits, labels, config, world_size, vocab_size=vocab)
    assert_matches(got, logits, labels, config, vocab)


@pytest.mark.parametrize("label", [40, 45, -1, -2, 10**12, -(2**63)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_label_out_of_range_is_an_error_on_every_rank(label: int, world_size: int) -> None:
    labels = torch.tensor([3, label, -100])

    def rank_loss(rank: int) -> None:
        part = shard(torch.randn(3, 48), rank, world_size)
        group = dist.group.WORLD if world_size > 1 else None
        with pytest.raises(
            ValueError,
            match=rf"labels must be in \[0, vocab_size=40\) or ignore_index=-100.* got {label} at 1",
        ):
            eaft_loss(part, labels, EAFTConfig(), vocab_size=40, group=group)
        eaft_loss(part, labels, EAFTConfig(), vocab_size=40, group=group, loss_mask=torch.tensor([1, 0, 1]))

    if world_size == 1:
        rank_loss(0)
    else:
        run_threads(rank_loss, world_size)


@sizes
@pytest.mark.parametrize("ignore_index", [-100, -1, 7])
def test_ignored_labels_and_mask_agree(world_size: int, ignore_index: int) -> None:
    """Ignored by label, by mask, or by both: the same bits, and the others do not notice."""
    torch.manual_seed(0)
    config = EAFTConfig(ignore_index=ignore_index)
    logits = torch.randn(6, 40)
    labels = torch.tensor([1, 2, 3, 4, 5, 6])
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    by_label = labels.where(mask.bool(), ignore_index)
    runs = [
        run_sharded(logits, these, config, world_size, vocab_size=40, loss_mask=this)
        for these, this in ((by_label, None), (labels, mask), (by_label, mask), (by_label, torch.ones(6)))
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0].out, other.out, strict=True))
        assert torch.equal(runs[0].gradient, other.gradient)
    assert (runs[0].gradient[mask == 0] == 0).all()
    assert_matches(runs[0], logits, labels, config, 40, mask)


def extreme_rows() -> dict[str, Tensor]:
    torch.manual_seed(0)
    wide = torch.randn(3, 1000)
    peak = torch.zeros(3, 1000)
    peak[:, 5] = 60.0
    top = torch.zeros(3, 1000)
    top[:, 5] = torch.finfo(torch.bfloat16).max
    ends = torch.full((3, 1000), -1e4)
    ends[:, :500] = 1e4
    return {
        "scale 1e4": wide * 1e4,
        "halves at +-1e4": ends,
        "offset 1e4": wide + 1e4,
        "offset 1e6": wide + 1e6,
        "offset -1e6": wide - 1e6,
        "one at +60": peak,
        "uniform": torch.full((3, 1000), 2.5),
        "uniform at -1e30": torch.full((3, 1000), -1e30),
        "bfloat16 maximum": top,
        "denormal": wide * 1e-40,
    }


@sizes
@configs
@pytest.mark.parametrize("name", extreme_rows())
def test_extreme_logits(config: EAFTConfig, world_size: int, name: str) -> None:
    logits = extreme_rows()[name]
    labels = torch.tensor([5, 0, 999])
    got = run_sharded(logits, labels, config, world_size, vocab_size=1000)
    want = expected(logits, labels, config)
    got.assert_ranks_identical()
    out = got.out
    assert all(value.isfinite().all() and (value >= 0).all() for value in out)
    bound = math.log(20 if config.top_k else 1000)
    assert (out.entropy <= bound + 3e-7).all()  # ln V itself is not a float32
    assert (out.weight <= 1).all()
    # At losses of 1e4 and 3e38 one rounding of float32 is above 1e-5: the relative bound is the one that
    # holds.
    torch.testing.assert_close(out.cross_entropy.double(), want.cross_entropy, **LOSS)
    torch.testing.assert_close(out.entropy.double(), want.entropy, **STATISTIC)
    # d(H**0.5) is unbounded at H = 0; elsewhere the weight is as good as the entropy.
    known = want.entropy > 1e-3
    torch.testing.assert_close(out.weight.double()[known], want.weight[known], **STATISTIC)
    torch.testing.assert_close(got.gradient.double()[known], want.gradient[known], **GRADIENT)


def test_the_usual_entropy_formula_fails_where_ours_holds() -> None:
    """Why the shifted form: lse - sum(p z) in float32 is wrong by far at an offset of 1e6."""
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) + 1e6
    want = expected(logits, torch.zeros(4).long(), EAFTConfig(top_k=None)).entropy
    p = torch.softmax(logits, -1)
    usual = torch.logsumexp(logits, -1) - (p * logits).sum(-1)
    ours = eaft_loss(logits, torch.zeros(4).long(), EAFTConfig(top_k=None)).entropy
    assert (usual.double() - want).abs().max() > 0.02
    assert (ours.double() - want).abs().max() < 5e-6


@sizes
def test_alpha_zero_is_plain_cross_entropy_bit_for_bit(world_size: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 40) * 5
    logits[0, 1] = 1e4  # entropy exactly 0: 0 ** 0
    labels = torch.randint(0, 40, (7,))
    zero = run_sharded(logits, labels, EAFTConfig(alpha=0.0), world_size, vocab_size=40)
    none = run_sharded(logits, labels, EAFTConfig(gate="none"), world_size, vocab_size=40)
    assert zero.out.entropy[0] == 0
    assert all(torch.equal(a, b) for a, b in zip(zero.out, none.out, strict=True))
    assert torch.equal(zero.out.loss, zero.out.cross_entropy)
    assert torch.equal(zero.gradient, none.gradient)
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(none.out.loss, want, rtol=1e-6, atol=1e-6)


@sizes
def test_no_entropy_and_alpha_below_one(world_size: int) -> None:
    """H = 0 gives weight 0 for every alpha above 0: loss and gradient 0, nothing NaN."""
    logits = torch.zeros(2, 40)
    logits[:, 3] = 1e4
    for alpha in (1e-3, 0.5, 1.0, 7.0):
        got = run_sharded(logits, torch.tensor([3, 4]), EAFTConfig(alpha=alpha), world_size, vocab_size=40)
        assert torch.equal(got.out.weight, torch.zeros(2))
        assert torch.equal(got.out.loss, torch.zeros(2))
        assert torch.equal(got.gradient, torch.zeros(2, 40))


@sizes
@configs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_float32_of_the_same_values(config: EAFTConfig, world_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(8, 40) * 4).to(dtype)
    labels = torch.randint(0, 40, (8,))
    upstream = torch.randn(8)
    low = run_sharded(logits, labels, config, world_size, vocab_size=40, upstream=upstream)
    full = run_sharded(logits.float(), labels, config, world_size, vocab_size=40, upstream=upstream)
    assert all(value.dtype == torch.float32 for value in low.out)
    assert all(torch.equal(a, b) for a, b in zip(low.out, full.out, strict=True))
    # One rounding, after the scaling: bit for bit the float32 gradient, rounded.
    assert low.gradient.dtype == dtype
    assert torch.equal(low.gradient, full.gradient.to(dtype))


def test_the_checks_of_this_file_can_fail() -> None:
    """The comparison notices a relative error of 1e-5 in one number."""
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 40), torch.randint(0, 40, (6,))
    got = run_sharded(logits, labels, EAFTConfig(), 2, vocab_size=40)
    got.outs[0].loss[3] *= 1 + 1e-5
    with pytest.raises(AssertionError):
        assert_matches(got._replace(outs=got.outs[:1]), logits, labels, EAFTConfig(), 40)
    assert not bits_equal(got.outs[0].loss, got.outs[1].loss)
