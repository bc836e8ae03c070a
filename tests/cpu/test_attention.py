"""Packed sequences on the CPU backend: the same numbers as one sequence at a time, and no sight of each other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cpu import models
from tests.nemo.ranks import run_ranks

LENGTHS = (5, 1, 9, 2)


def packed(lengths: tuple[int, ...], padded: tuple[int, ...] | None = None) -> Any:
    """PackedSeqParams of sequences of `lengths`, each followed by padding up to its length in `padded`."""
    from megatron.core.packed_seq_params import PackedSeqParams

    def bounds(of: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *of], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    spaces = None if padded is None else bounds(padded)
    longest = max(lengths if padded is None else padded)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds(lengths),
        cu_seqlens_kv=bounds(lengths),
        cu_seqlens_q_padded=spaces,
        cu_seqlens_kv_padded=spaces,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def starts_of(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[:index]) for index in range(len(lengths))]


def pack(lengths: tuple[int, ...], spaces: tuple[int, ...], length: int) -> tuple[models.Batch, Tensor]:
    """One row of `length` tokens with the sequences at their places, and the logits' gradient, 0 on padding."""
    data = models.batch(1, length)
    upstream = torch.zeros(1, length, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    data.positions = torch.zeros(1, length, dtype=torch.int64)
    for start, count in zip(starts_of(spaces), lengths, strict=True):
        upstream[0, start : start + count, 0].normal_(generator=generator)
        data.positions[0, start : start + count] = torch.arange(count)
    return data, upstream


def compare(embedding: str, tensor: int, recompute: bool, case: str) -> dict[str, float]:
    """Largest differences between the sequences packed and each by itself, in float64; also of the wrong variant."""
    models.start(tensor)
    recomputed = {"recompute_granularity": "selective"} if recompute else {}
    window = {"window_size": [2, 0]} if case == "window" else {}
    config = models.config(tensor, sequence_parallel=tensor > 1, **recomputed, **window)
    model = models.gpt(config, position_embedding_type=embedding).double()
    # Sequence parallelism cuts each sequence of the reference over the ranks.
    lengths = LENGTHS if tensor == 1 else (4, 2, 8, 2)
    spaces = (6, 4, 9, 3) if case == "padding behind each" else lengths
    # Megatron's rotary embedding wants the last bound at the end; learned positions leave a tail to attention.
    length = sum(spaces) + {"uncovered tail": 3, "one token of tail": 1, "tail as a sequence": 6}.get(case, 0)
    extra = {"tail as a sequence": (6,), "empty sequences": (0, 0)}.get(case, ())
    params = packed((*lengths, *extra), spaces if case == "padding behind each" else None)
    data, upstream = pack(lengths, spaces, length)
    places = [slice(start, start + count) for start, count in zip(starts_of(spaces), lengths, strict=True)]

    model.zero_grad()
    expected = []
    for place in places:
        tokens = data.tokens[:, place]
        alone = models.Batch(tokens, tokens, torch.arange(tokens.size(1))[None], torch.ones(tokens.shape))
        logits = alone.logits(model)
        (logits * upstream[:, place]).sum().backward()
        expected.append(logits.detach())
    expected_gradients = models.gradients(model)

    found = {}
    for name, given in (("packed", params), ("one", packed((length,)))):
        model.zero_grad()
        logits = data.logits(model, packed_seq_params=given)
        (logits * upstream).sum().backward()
        parts = [logits[:, place].detach() for place in places]
        found[f"{name} logits"] = max(float((a - b).abs().max()) for a, b in zip(parts, expected, strict=True))
        found[f"{name} gradients"] = models.largest_difference(models.gradients(model), expected_gradients)
    return found


@pytest.mark.parametrize(
    "embedding, tensor, recompute, case",
    [
        ("rope", 1, False, "plain"),
        ("rope", 1, True, "plain"),
        ("rope", 1, False, "padding behind each"),
        ("rope", 1, False, "window"),
        ("rope", 1, False, "tail as a sequence"),
        ("rope", 1, False, "empty sequences"),
        ("learned_absolute", 1, False, "plain"),
        ("learned_absolute", 1, False, "uncovered tail"),
        ("learned_absolute", 1, False, "one token of tail"),
        ("rope", 2, False, "tail as a sequence"),
    ],
)
def test_packed_equals_one_at_a_time(embedding: str, tensor: int, recompute: bool, case: str) -> None:
    for found in run_ranks(compare, tensor, embedding, tensor, recompute, case):
        # 1e-6 is promised; float64 leaves rounding far below it.
        assert found["packed logits"] < 1e-12, found
        assert found["packed gradients"] < 1e-11, found
        assert found["one logits"] > 1e-1, found
        assert found["one gradients"] > 1e-1, found


def sight(changed: int) -> dict[str, list[bool]]:
    """Whether each sequence's logits stay the same, bit for bit, when the tokens of sequence `changed` do not."""
    models.start()
    model = models.gpt(models.config())
    data, _ = pack(LENGTHS, LENGTHS, sum(LENGTHS))
    start = starts_of(LENGTHS)[changed]
    cut = slice(start, start + LENGTHS[changed])
    found = {}
    for name, params in (("packed", packed(LENGTHS)), ("one", packed((sum(LENGTHS),)))):
        before = data.logits(model, packed_seq_params=params)
        tokens = data.tokens.clone()
        data.tokens[:, cut] = (tokens[:, cut] + 1) % models.VOCAB_SIZE
        after = data.logits(model, packed_seq_params=params)
        data.tokens = tokens
        found[name] = [
            torch.equal(before[:, s : s + n], after[:, s : s + n])
            for s, n in zip(starts_of(LENGTHS), LENGTHS, strict=True)
        ]
    return found


def test_packed_sequences_do_not_see_each_other() -> None:
    (found,) = run_ranks(sight, 1, 0)
    assert found["packed"] == [False, True, True, True]
    assert found["one"] == [False, False, False, False], "the test would not see a leak"


def too_long() -> str:
    models.start()
    model = models.gpt(models.config(), position_embedding_type="learned_absolute")
    data, _ = pack((4,), (4,), 4)
    with pytest.raises(ValueError) as error:
        data.logits(model, packed_seq_params=packed((3, 2)))
    return str(error.value)


def test_bounds_behind_the_tokens_are_an_error() -> None:
    (message,) = run_ranks(too_long, 1)
    assert message == "cu_seqlens: sequences of 5 tokens in a batch of 4"


def window_over_context_ranks() -> str:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    models.start()
    config = models.config(context_parallel_size=2, window_size=[2, 0])
    with pytest.raises(ValueError) as error:
        DotProductAttention(config, 1, AttnMaskType.causal, "self")
    return str(error.value)


def test_a_window_over_context_parallel_ranks_is_refused_when_the_model_is_built() -> None:
    """Megatron's softmax makes the window's mask itself, for a whole sequence, and ignores the one it is given."""
    (message,) = run_ranks(window_over_context_ranks, 1)
    assert message.startswith("window_size: [2, 0] with context_parallel_size=2; the CPU backend has sliding-window")
