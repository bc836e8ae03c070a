"""The sharded loss: arguments, shards of any width, memory, padding, and the backend switch."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_eaft import EAFTConfig, eaft_loss
from nemo_eaft.config import GATES
from nemo_eaft.loss import gradient, rows
from tests.harness import run_threads
from tests.loss.formulas import expected, pad, shard
from tests.loss.parallel import run_sharded
from tests.loss.recording import Allocations

CONFIG = EAFTConfig()


def batch(vocab: int = 40, shape: tuple[int, ...] = (3, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape, vocab), torch.randint(0, vocab, shape)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "config",
    [
        *[EAFTConfig(gate=gate) for gate in GATES],  # type: ignore[arg-type]
        EAFTConfig(alpha=0.5),
        EAFTConfig(top_k=None),
        EAFTConfig(top_k=999),
        EAFTConfig(top_k=3, normalizer=3.0),
        EAFTConfig(top_k=None, normalizer=1.0),
    ],
    ids=str,
)
def test_every_gate_at_every_size_is_the_formula(config: EAFTConfig, world_size: int) -> None:
    torch.manual_seed(1)
    logits = pad(torch.randn(3, 4, 53, dtype=torch.float64) * 4, 8, value=40.0)
    labels = torch.randint(0, 53, (3, 4))
    labels[0, 0] = -100
    upstream = torch.randn(3, 4, dtype=torch.float64)
    got = run_sharded(logits, labels, config, world_size, vocab_size=53, upstream=upstream)
    want = expected(logits, labels, config, 53, upstream=upstream)
    got.assert_ranks_identical()
    for value, name in zip(got.out, got.out._fields, strict=True):
        torch.testing.assert_close(value, getattr(want, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.gradient, want.gradient, rtol=1e-12, atol=1e-12)


def test_the_reference_path_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = batch(300, (20, 4))
    labels.clamp_(max=289)
    ours = run_sharded(logits, labels, CONFIG, 1, vocab_size=290)
    monkeypatch.setenv("NEMO_EAFT_BACKEND", "reference")
    theirs = run_sharded(logits, labels, CONFIG, 1, vocab_size=290)
    for a, b in zip(ours.out, theirs.out, strict=True):
        torch.testing.assert_close(a, b, rtol=1.3e-6, atol=1e-5)
    torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=1.3e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["cuda", ""])
def test_an_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("NEMO_EAFT_BACKEND", name)
    with pytest.raises(ValueError, match=rf"NEMO_EAFT_BACKEND must be one of reference, torch, triton, got '{name}'"):
        eaft_loss(*batch(), CONFIG)


def test_the_reference_says_that_it_saves_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_EAFT_BACKEND", "reference")
    logits = torch.randn(3, 8, requires_grad=True) * 1.0
    labels = torch.tensor([1, 2, 3])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            eaft_loss(logits, labels, EAFTConfig(top_k=2), inplace_backward=True)
    assert [str(warning.message) for warning in said] == [
        "inplace_backward=True has no effect with NEMO_EAFT_BACKEND=reference"
    ]


def test_the_reference_refuses_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_EAFT_BACKEND", "reference")
    logits, labels = batch()

    def rank_loss(rank: int) -> None:
        with pytest.raises(ValueError, match="'reference' with 2 ranks"):
            eaft_loss(shard(logits, rank, 2), labels, CONFIG, vocab_size=40, group=dist.group.WORLD)

    run_threads(rank_loss, 2)


LOGITS, LABELS = batch()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": {"alpha": 1.0}}, "config must be an EAFTConfig, got dict"),
        ({"logits": LOGITS.long()}, r"logits.dtype must be float32, .* got torch.int64"),
        ({"logits": LOGITS.tolist()}, "logits must be a tensor, got list"),
        ({"logits": torch.tensor(1.0)}, r"logits must have at least 1 dimensions, got shape \(\)"),
        ({"labels": LABELS.int()}, "labels.dtype must be int64, got torch.int32"),
        ({"labels": LABELS.t()}, r"labels must have the shape of the tokens, \(3, 4\), got \(4, 3\)"),
        ({"labels": LABELS.tolist()}, "labels must be a tensor"),
        (
            {"loss_mask": torch.ones(12)},
            r"loss_mask must have the shape of the tokens, \(3, 4\), got \(12,\)",
        ),
        ({"loss_mask": LABELS.to("meta")}, "loss_mask must be on cpu like the logits, got meta"),
        ({"vocab_size": 41}, "vocab_size must be at most local size x world size = 40 x 1 = 40, got 41"),
        ({"vocab_size": 1}, "vocab_size must be an integer of at least 2, got 1"),
        ({"vocab_size": 40.0}, "vocab_size must be an integer of at least 2, got 40.0"),
        ({"vocab_size": True}, "vocab_size must be an integer of at least 2, got True"),
        ({"group": "tp"}, "group must be a torch.distributed ProcessGroup or None, got str"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": LOGITS, "labels": LABELS, "config": CONFIG, **change}
    with pytest.raises(ValueError, match=message):
        eaft_loss(**arguments)


def test_several_ranks_need_the_vocabulary_size() -> None:
    def rank_loss(rank: int) -> None:
        part = shard(LOGITS, rank, 2)
        with pytest.raises(ValueError, match=r"vocab_size is required .* got None with 2 ranks: the local size 20"):
            eaft_loss(part, LABELS, CONFIG, group=dist.group.WORLD)
        with pytest.raises(ValueError, match=r"local size x world size = 20 x 2 = 40, got 41"):
            eaft_loss(part, LABELS, CONFIG, group=dist.group.WORLD, vocab_size=41)

    run_threads(rank_loss, 2)


def test_a_group_of_one_rank_needs_no_vocabulary_size_and_sends_nothing() -> None:
    def rank_loss(rank: int) -> None:
        alone = eaft_loss(LOGITS, LABELS, CONFIG)
        grouped = eaft_loss(LOGITS, LABELS, CONFIG, group=dist.group.WORLD)
        assert all(torch.equal(a, b) for a, b in zip(alone, grouped, strict=True))

    run_threads(rank_loss, 1)


def test_ranks_may_hold_nothing_but_padding() -> None:
    """V = 9 in shards of 3 on 8 ranks: ranks 3 to 7 hold no real column."""
    torch.manual_seed(2)
    logits = pad(torch.randn(6, 9, dtype=torch.float64), 24, value=torch.nan)
    labels = torch.tensor([0, 2, 3, 5, 6, 8])
    for config in (EAFTConfig(), EAFTConfig(top_k=None), EAFTConfig(top_k=5)):
        got = run_sharded(logits, labels, config, 8, vocab_size=9)
        want = expected(logits, labels, config, 9)
        torch.testing.assert_close(got.out.loss, want.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.out.weight, want.weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.gradient, want.gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_never_a_large_tensor_but_the_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab = 64, 4096
    monkeypatch.setitem(rows._BLOCK_BYTES, "cpu", 4 * vocab * 4)
    block = 4 * vocab * 4
    logits = torch.randn(tokens, vocab).to(dtype).requires_grad_()
    whole = logits.numel() * logits.element_size()
    labels = torch.randint(0, vocab, (tokens,))
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with Allocations() as forward:
            loss = eaft_loss(logits, labels, CONFIG).loss
    assert forward.made, "the recorder saw nothing"
    assert forward.at_least(block + 1) == []
    others = [t for t in saved if t.data_ptr() != logits.data_ptr()]
    assert sum(t.numel() * t.element_size() for t in others if t.dim() == 1) == 16 * tokens
    assert all(t.dim() == 1 for t in others)
    total = loss.sum()
    with Allocations() as backward:
        total.backward()
    assert backward.at_least(block + 1) == [(dtype, whole)]


def test_memory_in_place_allocates_nothing_large(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab = 64, 4096
    block = 4 * vocab * 4
    monkeypatch.setitem(rows._BLOCK_BYTES, "cpu", block)
    leaf = torch.randn(tokens, vocab, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    logits = leaf.view(tokens, vocab)
    loss = eaft_loss(logits.clone(), labels, CONFIG, inplace_backward=True).loss.sum()
    with Allocations() as backward:
        loss.backward()
    # The clone's backward hands the same storage on; the leaf keeps it.
    assert backward.at_least(block + 1) == []


@pytest.mark.parametrize("block_rows", [1, 2, 5, 1000])
def test_the_size_of_row_blocks_changes_nothing(block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = batch(300, (7, 3))
    labels[2] = -100
    whole = run_sharded(logits, labels, CONFIG, 1, vocab_size=300)
    monkeypatch.setitem(rows._BLOCK_BYTES, "cpu", block_rows * 300 * 4)
    blocks = run_sharded(logits, labels, CONFIG, 1, vocab_size=300)
    torch.testing.assert_close(blocks.out.loss, whole.out.loss, rtol=0, atol=5e-7)
    torch.testing.assert_close(blocks.gradient, whole.gradient, rtol=0, atol=1e-7)


def test_rows_of_ignored_tokens_are_not_even_read_where_looking_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, labels = batch(300, (4,))
    monkeypatch.setitem(rows._BLOCK_BYTES, "cpu", 1)
    read: list[int] = []
    real = rows.TokenRows.read

    def reading(self: rows.TokenRows, start: int, stop: int) -> torch.Tensor:
        read.append(start)
        return real(self, start, stop)

    monkeypatch.setattr(rows.TokenRows, "read", reading)
    labels[1] = labels[3] = -100
    logits.requires_grad_()
    eaft_loss(logits, labels, CONFIG).loss.sum().backward()
    assert read == [0, 2, 0, 2]


def test_skipping_blocks_and_selecting_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device no block is skipped: masked rows are then set aside by selection alone."""
    logits, labels = batch(50, (6, 2))
    logits[1:3] = torch.nan
    labels[1:3] = -100
    skipped = run_sharded(logits, labels, CONFIG, 2, vocab_size=50)
    from nemo_eaft.loss import records

    for module in (records, gradient):
        monkeypatch.setattr(module, "skippable", lambda target: False)
    selected = run_sharded(logits, labels, CONFIG, 2, vocab_size=50)
    assert all(torch.equal(a, b) for a, b in zip(skipped.out, selected.out, strict=True))
    assert torch.equal(skipped.gradient, selected.gradient)
    assert not torch.signbit(selected.gradient[1:3]).any()


def test_a_uniform_row_has_weight_one_and_never_more() -> None:
    for vocab in (2, 3, 20, 151, 1000):
        for config in (EAFTConfig(), EAFTConfig(top_k=None)):
            out = eaft_loss(torch.full((1, vocab), 0.3), torch.zeros(1, dtype=torch.int64), config)
            assert 1 - 1e-6 < out.weight.item() <= 1
            assert out.entropy.item() == pytest.approx(math.log(config.effective_top_k(vocab) or vocab), abs=1e-6)
