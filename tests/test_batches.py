"""Naming a row, and where a token of a context-parallel rank stands."""

from typing import Any

import pytest
import torch

from nemo_eaft.batches import StepBatches, describe, micro_batches
from nemo_eaft.nonfinite import find, whole_position
from nemo_eaft.place import Place

PLACE = Place(rank=5, tensor=1, pipeline=0, data=2, context=0)


class Tokenizer:
    """Letters."""

    def ids_to_text(self, ids: list[int]) -> str:
        return "".join(chr(97 + number % 26) for number in ids)


def batch(rows: int = 4, length: int = 6) -> dict[str, Any]:
    tokens = torch.arange(rows * length).view(rows, length)
    return {"tokens": tokens, "metadata": [{"line": 10 + row} for row in range(rows)]}


def test_a_row_is_named_by_line_and_text() -> None:
    assert describe(batch(), 1, 2, Tokenizer()) == "line 11 of the training data, text 'ghijkl'"
    assert describe({"tokens": batch()["tokens"]}, 0, None, None) == "text 'tokens [0, 1, 2, 3, 4, 5]'"
    assert describe({}, 0, None, None) == "a row that is not known"
    other = dict(batch(), metadata=[{"id": "x" * 100}] * 4)
    assert describe(other, 0, None, Tokenizer()) == "{'id': '" + "x" * 52 + "..., text 'abcdef'"
    long = {"tokens": torch.zeros(1, 90, dtype=torch.int64)}
    assert describe(long, 0, 80, Tokenizer()) == f"text '{'a' * 60}'"


def test_a_row_of_a_pack_is_named_by_its_start() -> None:
    pack = {
        "tokens": torch.arange(10).view(1, 10),
        "metadata": [{"pack": 3}],
        "cu_seqlens": torch.tensor([[0, 4, 10, -1, -1]]),
    }
    said = describe(pack, 0, 4, Tokenizer())
    assert said == "pack 3 (from 0), the row in it that starts at position 4, text 'efghij'"
    assert describe(pack, 0, 3, Tokenizer()).endswith("starts at position 0, text 'abcd'")


@pytest.mark.parametrize("whole", [True, False])
def test_batches_pass_through_and_are_remembered(whole: bool) -> None:
    """NeMo's fine-tuning loader gives the whole step at once, others one micro-batch at a time."""
    all_rows = batch()
    parts = micro_batches([all_rows], 2)
    assert [part["tokens"].tolist() for part in parts] == [half.tolist() for half in all_rows["tokens"].split(2)]
    assert [part["metadata"][0]["line"] for part in parts] == [10, 12]
    given = [(all_rows, 0, 0)] if whole else [(part, index, 0) for index, part in enumerate(parts)]
    batches = StepBatches(iter(given))
    ahead = batches.look_ahead(len(given))
    assert len(ahead) == len(given)
    assert batches.seen == []
    taken = list(batches)
    assert all(left is right for left, right in zip(taken, given, strict=True))
    seen = micro_batches(batches.seen, 2)
    assert [describe(part, 0, 0, Tokenizer())[:7] for part in seen] == ["line 10", "line 12"]


def test_data_that_end_early() -> None:
    assert len(StepBatches(iter([batch(1)])).look_ahead(3)) == 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_positions_of_context_parallel_ranks(size: int) -> None:
    """Rank r holds the pieces r and 2 x size - 1 - r of 2 x size."""
    pieces = torch.arange(16).chunk(2 * size)
    for rank in range(size):
        held = torch.arange(16) if size == 1 else torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])
        assert [whole_position(i, len(held), rank, size) for i in range(len(held))] == held.tolist()


def test_the_first_token_is_found() -> None:
    bad = [torch.zeros(2, 3, dtype=torch.bool) for _ in range(3)]
    assert find(bad, [], PLACE, 1, None) is None
    bad[1][1, 2] = bad[2][0, 0] = bad[2][0, 1] = True
    parts = micro_batches([batch(6, 3)], 3)
    found = find(bad, parts, PLACE, 1, Tokenizer())
    assert found is not None
    assert (found.micro_batch, found.row, found.position) == (1, 1, 2)
    assert (found.tokens, found.micro_batches) == (3, 2)
    assert found.sample.startswith("line 13 ")
    assert str(found.place) == "global rank 5 (tensor 1, pipeline 0, data 2, context 0)"
