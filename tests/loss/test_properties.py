"""Properties that hold for any shape, sharding, dtype, mask and scale, searched by hypothesis."""

import math
import random
from typing import Any, NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_eaft import EAFTConfig
from tests.loss.formulas import expected
from tests.loss.parallel import run_sharded

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


class Case(NamedTuple):
    logits: Tensor
    labels: Tensor
    mask: Tensor
    upstream: Tensor
    vocab: int
    world_size: int


@st.composite
def cases(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES) -> Case:
    world_size = draw(st.sampled_from([1, 2, 4, 8]))
    vocab = draw(st.integers(max(2, world_size + 1), 90))
    least = -(-vocab // world_size)
    # A shard may hold padding, but not the whole vocabulary.
    width = draw(st.integers(least, max(least, min(least + 9, vocab - 1 if world_size > 1 else vocab + 9))))
    tokens = draw(st.integers(0, 7))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 5.0, 50.0]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(tokens, width * world_size) * scale
    logits[:, vocab:] = draw(st.sampled_from([0.0, 100.0, -math.inf, math.nan]))
    if draw(st.booleans()):
        hole = draw(st.integers(0, vocab - 1))
        logits[:, hole] = torch.where(torch.arange(tokens) % 2 == 0, -math.inf, logits[:, hole])
    # Labels at the ends of shards as often as anywhere else; never at a -Inf.
    ends = [end for r in range(world_size) for end in (r * width, r * width + width - 1) if end < vocab]
    chosen = [
        draw(st.sampled_from([end for end in ends if not logits[t, end].isinf()] or [int(logits[t, :vocab].argmax())]))
        if draw(st.booleans())
        else int(logits[t, :vocab].nan_to_num(neginf=-1e9).argsort()[-1 - draw(st.integers(0, vocab - 2))])
        for t in range(tokens)
    ]
    mask = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens)), dtype=torch.int64)
    logits[mask == 0] = draw(st.sampled_from([0.0, math.nan, math.inf]))
    upstream = torch.randn(tokens)
    labels = torch.tensor(chosen, dtype=torch.int64)
    return Case(logits.to(draw(dtypes)), labels, mask, upstream, vocab, world_size)


CONFIGS = st.builds(
    EAFTConfig,
    alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 2, 5, 20, 1000]),
)


@settings(max_examples=120)
@given(cases(), CONFIGS)
def test_the_formula(case: Case, config: EAFTConfig) -> None:
    got = run_sharded(
        case.logits,
        case.labels,
        config,
        case.world_size,
        vocab_size=case.vocab,
        loss_mask=case.mask,
        upstream=case.upstream,
    )
    want = expected(case.logits, case.labels, config, case.vocab, case.mask, case.upstream)
    got.assert_ranks_identical()
    double = case.logits.dtype == torch.float64
    # d(H ** 0.5) / dH is unbounded at 0: there the weight, and what it multiplies, is only as good as
    # sqrt(H).
    steep = (want.entropy < 1e-3) & (want.weight < 1) & (config.alpha < 1) & (config.alpha > 0)
    calm = ~steep
    for name, atol in (("cross_entropy", 1e-5), ("entropy", 5e-6), ("weight", 5e-6), ("loss", 1e-5)):
        value, reference = getattr(got.out, name).double(), getattr(want, name)
        tolerance: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12} if double else {"rtol": 1.3e-6, "atol": atol}
        keep = calm if name in ("weight", "loss") else torch.ones_like(calm)
        torch.testing.assert_close(value[keep], reference[keep], **tolerance)
    assert got.gradient.dtype == case.logits.dtype
    reference = want.gradient[calm]
    # One rounding to the dtype, after an error of at most 1e-6 times the upstream gradient.
    eps = {torch.float64: 1e-12, torch.float32: 1.2e-7, torch.bfloat16: 7.8e-3 / 2, torch.float16: 9.8e-4 / 2}
    bound = eps[case.logits.dtype] * reference.abs() + (1e-12 if double else 2e-6)
    assert ((got.gradient[calm].double() - reference).abs() <= bound).all()
    assert (got.gradient[:, case.vocab :] == 0).all()


@settings(max_examples=60)
@given(cases(), st.sampled_from([None, 2, 20]), st.sampled_from([0.5, 1.0, 3.0]))
def test_bounds(case: Case, top_k: int | None, alpha: float) -> None:
    config = EAFTConfig(top_k=top_k, alpha=alpha)
    out = run_sharded(case.logits, case.labels, config, case.world_size, vocab_size=case.vocab, loss_mask=case.mask).out
    assert ((out.weight >= 0) & (out.weight <= 1)).all()
    assert (out.cross_entropy >= 0).all()
    bound = torch.tensor(config.entropy_bound(case.vocab), dtype=out.entropy.dtype)
    assert ((out.entropy >= 0) & (out.entropy <= bound)).all()
    assert torch.equal(out.loss, out.weight * out.cross_entropy)


@settings(max_examples=40)
@given(cases(st.just(torch.float64)), CONFIGS, st.sampled_from([-1e4, -3.0, 1e4]))
def test_adding_a_constant_to_the_logits_changes_nothing(case: Case, config: EAFTConfig, offset: float) -> None:
    def run(logits: Tensor) -> tuple[Tensor, Tensor]:
        got = run_sharded(logits, case.labels, config, case.world_size, vocab_size=case.vocab, loss_mask=case.mask)
        return got.out.loss, got.gradient

    loss, gradient = run(case.logits)
    moved_loss, moved_gradient = run(case.logits + offset)
    # 1e4 + z keeps twelve digits of z.
    torch.testing.assert_close(moved_loss, loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved_gradient, gradient, rtol=1e-10, atol=1e-10)


@settings(max_examples=40)
@given(cases(st.just(torch.float64)), CONFIGS, st.randoms(use_true_random=False))
def test_the_order_of_the_vocabulary_changes_nothing(case: Case, config: EAFTConfig, source: random.Random) -> None:
    order = list(range(case.vocab))
    source.shuffle(order)
    place = torch.tensor(order).argsort()
    columns = torch.cat((torch.tensor(order), torch.arange(case.vocab, case.logits.shape[-1])))
    one = run_sharded(case.logits, case.labels, config, case.world_size, vocab_size=case.vocab, loss_mask=case.mask)
    two = run_sharded(
        case.logits[:, columns],
        place[case.labels],
        config,
        case.world_size,
        vocab_size=case.vocab,
        loss_mask=case.mask,
    )
    torch.testing.assert_close(two.out.loss, one.out.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(two.gradient, one.gradient[:, columns], rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(cases(st.just(torch.float32)), CONFIGS, st.sampled_from([-2.0, 0.0, 0.25, 1024.0]))
def test_the_gradient_is_linear_in_what_comes_upstream(case: Case, config: EAFTConfig, factor: float) -> None:
    """By powers of two, so that the scaling itself rounds nothing."""

    def run(upstream: Tensor) -> Tensor:
        return run_sharded(
            case.logits,
            case.labels,
            config,
            case.world_size,
            vocab_size=case.vocab,
            loss_mask=case.mask,
            upstream=upstream,
        ).gradient

    torch.testing.assert_close(run(factor * case.upstream), factor * run(case.upstream), rtol=3e-7, atol=1e-37)


@settings(max_examples=30)
@given(cases(st.just(torch.float32)), CONFIGS)
def test_masked_tokens_change_nothing_and_parts_make_the_whole(case: Case, config: EAFTConfig) -> None:
    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        got = run_sharded(
            case.logits[rows],
            case.labels[rows],
            config,
            case.world_size,
            vocab_size=case.vocab,
            loss_mask=case.mask[rows],
        )
        return got.out.loss, got.gradient

    everything = torch.arange(len(case.labels))
    loss, gradient = run(everything)
    kept = everything[case.mask == 1]
    alone_loss, alone_gradient = run(kept)
    torch.testing.assert_close(alone_loss, loss[kept], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone_gradient, gradient[kept], rtol=0, atol=1e-6)
    halves = [run(part) for part in everything.tensor_split(2)]
    torch.testing.assert_close(torch.cat([half[0] for half in halves]), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([half[1] for half in halves]), gradient, rtol=0, atol=1e-6)
