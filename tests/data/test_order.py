"""The rows that a run draws: each once an epoch, in an order of the seed, which a longer run continues."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft.data import build_module, order, prepare
from tests.data.support import chat, make_settings, make_tokenizer, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.unpoisoned]

ROWS = 23
BATCH = 4
ALONE = {"sanity_check_dist_workers": False}
"""There are no other ranks, which NeMo would ask whether they build the data set as well."""
SHORT, LONG = 5, 16  # steps; 23 rows end in the middle of the sixth batch


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return AutoTokenizer(str(folder))


KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "chat": ([{"messages": chat(f"Question {n}?", f"Answer {n}.")} for n in range(ROWS)], {}),
    "pair": ([{"input": f"Question {n}?", "output": f"Answer {n}."} for n in range(ROWS)], {}),
    "packed": (
        [{"input": f"Question {n}?", "output": f"Answer {n}."} for n in range(ROWS)],
        {"packed": True, "packed_size": 48},
    ),
}


def drawn(folder: Path, tokenizer: Any, kind: str, steps: int, seed: int) -> tuple[list[Any], int]:
    """What a run of so many steps draws, by line of the file or number of the pack; and how many there are of them."""
    rows, data = KINDS[kind]
    settings = make_settings(
        folder,
        write_jsonl(folder / "t.jsonl", rows),
        data=data,
        trainer={"max_steps": steps, "global_batch_size": BATCH, "seed": seed, "seq_length": 48},
    )
    prepared = prepare(settings, tokenizer.tokenizer)
    module = build_module(settings, Path(settings.run.dir) / "data", tokenizer)
    path = module.train_path_packed if prepared.packed else module.train_path
    # As FineTuningDataModule.setup and train_dataloader do it.
    samples = math.ceil(BATCH * steps * 1.005)
    dataset = module._create_dataset(path, max_num_samples=samples, **ALONE, **module.dataset_kwargs)
    assert len(dataset) == samples
    places = [dataset[place]["metadata"] for place in range(BATCH * steps)]
    return [place["pack" if prepared.packed else "line"] for place in places], prepared.train_samples


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_run_begins_with_the_rows_of_a_shorter_one(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    short, _ = drawn(tmp_path, tokenizer, kind, SHORT, seed=7)
    long, count = drawn(tmp_path, tokenizer, kind, LONG, seed=7)
    assert long[: len(short)] == short
    epochs = [long[start : start + count] for start in range(0, len(long), count)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
    whole = [epoch for epoch in epochs if len(epoch) == count]
    assert len(whole) > 1
    assert whole[0] != whole[1]
    assert sorted(whole[0]) == sorted(whole[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    orders = []
    for run, seed in enumerate((7, 7, 8)):
        folder = tmp_path / str(run)
        folder.mkdir()
        orders.append(drawn(folder, tokenizer, kind, LONG, seed)[0])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    # Nor is one the other, an epoch later.
    assert orders[2][:ROWS] not in [orders[0][start : start + ROWS] for start in range(len(orders[0]))]


def test_nemo_alone_draws_rows_again_in_a_longer_run_and_does_not_know_the_seed(tmp_path: Path, tokenizer: Any) -> None:
    """Why there is an order of our own. If this fails, NeMo has learned it and our part can go."""
    from nemo.collections.llm.gpt.data.core import create_sft_dataset

    rows = write_jsonl(tmp_path / "t.jsonl", KINDS["pair"][0])

    def nemos(samples: int, seed: int) -> list[int]:
        dataset = create_sft_dataset(rows, tokenizer, 48, seed=seed, max_num_samples=samples, **ALONE)
        return [int(dataset.samples_mapping[place][0]) for place in range(samples)]

    long = nemos(4 * ROWS - 3, 7)
    assert long == nemos(4 * ROWS - 3, 8)
    assert nemos(ROWS, 7) != long[:ROWS]


def test_an_order_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo shuffles blocks, and in them; here of ten rows instead of a million."""
    from nemo.collections.llm.gpt.data.utils import _OnlineSampleMapping

    monkeypatch.setattr(order, "_OnlineSampleMapping", functools.partial(_OnlineSampleMapping, block_size=10))
    rows = 43
    short, long = (order.RowOrder(rows, count * rows, seed=2**32 - 1) for count in (2, 9))
    drawn = [long[place][0] for place in range(9 * rows)]
    assert [short[place][0] for place in range(2 * rows)] == drawn[: 2 * rows]
    epochs = [drawn[start : start + rows] for start in range(0, len(drawn), rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    # Whatever is asked for first.
    assert [short[place][0] for place in reversed(range(2 * rows))] == drawn[: 2 * rows][::-1]
    for place in (-1, 2 * rows):
        with pytest.raises(IndexError, match=f"place {place} of an order of {2 * rows}"):
            short[place]
