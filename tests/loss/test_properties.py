"""Properties that hold for any shape, sharding, dtype, mask and scale, searched by hypothesis.

At least 2,000 examples; the last test counts them.
"""

import functools
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_eaft import EAFTConfig, eaft_linear_loss
from nemo_eaft.config import Gate
from tests.harness import run_threads
from tests.loss.formulas import expected
from tests.loss.parallel import Ranked, bits_equal, run_sharded

LEAST_EXAMPLES = 2000
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])

ASKED: dict[str, int] = {}
"""Examples of each property, as declared."""

RAN: Counter[str] = Counter()
"""Examples of each property that ran to their end."""


def searched(examples: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """A property as a test over so many examples, counted."""

    def decorate(check: Callable[..., None]) -> Any:
        @functools.wraps(check)
        def counted(*args: Any, **kwargs: Any) -> None:
            check(*args, **kwargs)
            RAN[check.__name__] += 1

        ASKED[check.__name__] = examples
        return settings(max_examples=examples)(given(*strategies)(counted))

    return decorate


class Case(NamedTuple):
    logits: Tensor
    labels: Tensor
    mask: Tensor
    upstream: Tensor
    vocab: int
    world_size: int

    def run(self, config: EAFTConfig, **changes: Any) -> Ranked:
        """Forward and backward on all ranks, which must agree bit for bit."""
        new = self._replace(**changes)
        got = run_sharded(
            new.logits,
            new.labels,
            config,
            new.world_size,
            vocab_size=new.vocab,
            loss_mask=new.mask,
            upstream=new.upstream,
        )
        got.assert_ranks_identical()
        return got

    def rows(self, chosen: Tensor) -> "Case":
        return self._replace(
            logits=self.logits[chosen],
            labels=self.labels[chosen],
            mask=self.mask[chosen],
            upstream=self.upstream[chosen],
        )


@st.composite
def cases(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES) -> Case:
    world_size = draw(st.integers(1, 8))
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


TOP_K = st.sampled_from([None, 2, 5, 20, 1000])
ENTROPY_GATES = st.builds(
    EAFTConfig,
    alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=TOP_K,
    normalizer=st.sampled_from([None, None, 3.0]),
)
OTHER_GATES: list[Gate] = ["none", "dft", "mask", "sigmoid"]
CONFIGS = st.one_of(ENTROPY_GATES, st.builds(EAFTConfig, gate=st.sampled_from(OTHER_GATES), top_k=TOP_K))
EXACT, SINGLE = cases(st.just(torch.float64)), cases(st.just(torch.float32))


@searched(800, cases(), CONFIGS)
def test_the_formula(case: Case, config: EAFTConfig) -> None:
    got = case.run(config)
    want = expected(case.logits, case.labels, config, case.vocab, case.mask, case.upstream)
    double = case.logits.dtype == torch.float64
    calm = known_weights(want.cross_entropy, want.entropy, want.weight, config, case.vocab)
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


def known_weights(ce: Tensor, entropy: Tensor, weight: Tensor, config: EAFTConfig, vocab: int) -> Tensor:
    """Where float32 can know the weight: not where the gate is infinitely steep."""
    if config.gate == "eaft":
        # d(H ** 0.5) / dH is unbounded at 0: the weight, and what it multiplies, is only as good as sqrt(H).
        return ~((entropy < 1e-3) & (weight < 1) & (0 < config.alpha < 1))
    if config.gate == "mask":
        ratio = entropy / config.entropy_normalizer(vocab)
        probability = torch.exp(-ce)
        return ((probability - config.conflict_probability).abs() > 1e-5) & (
            (ratio - config.conflict_entropy).abs() > 1e-5
        )
    return torch.ones_like(weight, dtype=torch.bool)


@searched(300, cases(), TOP_K, st.sampled_from([0.5, 1.0, 3.0]))
def test_bounds(case: Case, top_k: int | None, alpha: float) -> None:
    config = EAFTConfig(top_k=top_k, alpha=alpha)
    out = case.run(config).out
    assert ((out.weight >= 0) & (out.weight <= 1)).all()
    assert (out.cross_entropy >= 0).all()
    bound = torch.tensor(config.entropy_bound(case.vocab), dtype=out.entropy.dtype)
    assert ((out.entropy >= 0) & (out.entropy <= bound)).all()
    assert torch.equal(out.loss, out.weight * out.cross_entropy)


@searched(200, EXACT, CONFIGS, st.sampled_from([-1e4, -3.0, 1e4]))
def test_adding_a_constant_to_the_logits_changes_nothing(case: Case, config: EAFTConfig, offset: float) -> None:
    here, moved = case.run(config), case.run(config, logits=case.logits + offset)
    # 1e4 + z keeps twelve digits of z.
    torch.testing.assert_close(moved.out.loss, here.out.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved.gradient, here.gradient, rtol=1e-10, atol=1e-10)


@searched(200, EXACT, CONFIGS, st.randoms(use_true_random=False))
def test_the_order_of_the_vocabulary_changes_nothing(case: Case, config: EAFTConfig, source: random.Random) -> None:
    order = list(range(case.vocab))
    source.shuffle(order)
    place = torch.tensor(order).argsort()
    columns = torch.cat((torch.tensor(order), torch.arange(case.vocab, case.logits.shape[-1])))
    one = case.run(config)
    two = case.run(config, logits=case.logits[:, columns], labels=place[case.labels])
    torch.testing.assert_close(two.out.loss, one.out.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(two.gradient, one.gradient[:, columns], rtol=1e-12, atol=1e-12)


@searched(150, SINGLE, CONFIGS, st.sampled_from([-2.0, 0.0, 0.25, 1024.0]))
def test_the_gradient_is_linear_in_what_comes_upstream(case: Case, config: EAFTConfig, factor: float) -> None:
    """By powers of two, so that the scaling itself rounds nothing."""
    scaled, plain = case.run(config, upstream=factor * case.upstream).gradient, case.run(config).gradient
    torch.testing.assert_close(scaled, factor * plain, rtol=3e-7, atol=1e-37)


@searched(150, SINGLE, CONFIGS, st.lists(st.integers(0, 7), max_size=3))
def test_masked_tokens_change_nothing_and_parts_make_the_whole(
    case: Case, config: EAFTConfig, splits: list[int]
) -> None:
    case = case._replace(upstream=torch.ones_like(case.upstream))
    everything = torch.arange(len(case.labels))
    whole = case.run(config)
    kept = everything[case.mask == 1]
    alone = case.rows(kept).run(config)
    torch.testing.assert_close(alone.out.loss, whole.out.loss[kept], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone.gradient, whole.gradient[kept], rtol=0, atol=1e-6)
    parts = [case.rows(part).run(config) for part in everything.tensor_split(sorted(splits))]
    torch.testing.assert_close(torch.cat([part.out.loss for part in parts]), whole.out.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([part.gradient for part in parts]), whole.gradient, rtol=0, atol=1e-6)
    total = sum(part.out.loss.double().sum() for part in parts)
    torch.testing.assert_close(torch.as_tensor(total), whole.out.loss.double().sum(), rtol=1e-6, atol=1e-6)


@searched(150, cases(), TOP_K)
def test_alpha_zero_is_cross_entropy_bit_for_bit(case: Case, top_k: int | None) -> None:
    zero, none = case.run(EAFTConfig(alpha=0.0, top_k=top_k)), case.run(EAFTConfig(gate="none", top_k=top_k))
    assert all(bits_equal(a, b) for a, b in zip(zero.out, none.out, strict=True))
    assert bits_equal(zero.out.loss, zero.out.cross_entropy)
    assert bits_equal(zero.gradient, none.gradient)


@searched(150, st.integers(1, 8), st.integers(0, 5), st.integers(1, 9), CONFIGS, st.booleans(), st.integers(0, 2**31))
def test_the_fused_output_layer_is_the_loss_of_its_logits(
    world_size: int, tokens: int, width: int, config: EAFTConfig, sequence: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    vocab, padded = 61, 64 if 64 % world_size == 0 else 61 + -61 % world_size
    hidden = torch.randn(tokens * world_size, width, dtype=torch.float64)
    weight = torch.randn(padded, width, dtype=torch.float64)
    labels = torch.randint(0, vocab, (tokens * world_size,))
    labels[torch.rand(len(labels)) < 0.3] = -100

    def rank_loss(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        h = (hidden.chunk(world_size)[rank] if sequence and tokens else hidden).clone().requires_grad_()
        w = weight.chunk(world_size)[rank].clone().requires_grad_()
        group = dist.group.WORLD if world_size > 1 else None
        out = eaft_linear_loss(h, w, labels, config, vocab_size=vocab, group=group, sequence_parallel=sequence)
        out.loss.sum().backward()
        assert h.grad is not None
        assert w.grad is not None
        return out.loss.detach(), h.grad, w.grad

    ranks = [rank_loss(0)] if world_size == 1 else run_threads(rank_loss, world_size)
    want = expected(hidden @ weight.t(), labels, config, vocab)
    for loss, grad_hidden, _ in ranks:
        assert torch.equal(loss, ranks[0][0])
        assert sequence or torch.equal(grad_hidden, ranks[0][1])
    torch.testing.assert_close(ranks[0][0], want.loss, rtol=1e-12, atol=1e-12)
    got = torch.cat([h for _, h, _ in ranks]) if sequence else ranks[0][1]
    torch.testing.assert_close(got, want.gradient @ weight, rtol=1e-12, atol=1e-11)
    rows = torch.cat([w for _, _, w in ranks])
    torch.testing.assert_close(rows, want.gradient.t() @ hidden, rtol=1e-12, atol=1e-11)


def test_two_thousand_examples_ran(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """Of every property of this file that this run selects; all of them together make the promised number."""
    assert sum(ASKED.values()) >= LEAST_EXAMPLES
    here = {getattr(item, "originalname", item.name) for item in request.session.items if item.path == request.path}
    selected = here & ASKED.keys()
    few = {name: RAN[name] for name in selected if RAN[name] < ASKED[name]}
    assert not few, few
    assert selected < ASKED.keys() or RAN.total() >= LEAST_EXAMPLES
    record_property("examples", RAN.total())
