"""Sums, lists and advice of made-up tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nemo_eaft.analyze.advice import suggest
from nemo_eaft.analyze.summary import quartile_means, summarise
from nemo_eaft.analyze.tally import ALPHAS, SUMS, TOP_ROWS, TOP_TOKENS, Tally
from nemo_eaft.config import EAFTConfig
from nemo_eaft.landscape.counts import FINE, Bins
from tests.analyze.samples import CONFLICT, OPEN, SURE, row
from tests.nemo import models

CONFIG = EAFTConfig()
BINS = Bins.of(CONFIG, 1000)


def tally_of(*rows: list[tuple[float, float, float]]) -> Tally:
    tally = Tally()
    for number, tokens in enumerate(rows):
        tally.add(row(number, tokens), CONFIG, BINS)
    return tally


def test_sums_by_hand() -> None:
    tally = tally_of([CONFLICT, SURE], [OPEN])
    named = dict(zip(SUMS, tally.sums, strict=True))
    assert (tally.rows, tally.tokens, tally.conflicts, tally.not_finite) == (2, 3, 1, 0)
    assert named["gradient"] == pytest.approx(1.3 + 0.01 + 0.8)
    assert named["conflict_gradient"] == pytest.approx(1.3)
    assert named["weighted_gradient"] == pytest.approx(0.05 * 1.3 + 0.02 * 0.01 + 0.8 * 0.8)
    assert named["conflict_weighted_gradient"] == pytest.approx(0.05 * 1.3)
    for (total, conflicts), alpha in zip(tally.by_alpha, ALPHAS, strict=True):
        assert conflicts == pytest.approx(0.05**alpha * 1.3)
        assert total == pytest.approx(0.05**alpha * 1.3 + 0.02**alpha * 0.01 + 0.8**alpha * 0.8)
    assert (tally.grid.sum(), tally.read) == (3, 7)
    assert [found.row for found in tally.top_rows] == [0]
    assert tally.top_tokens[0].values.position.tolist() == [2]


def test_merged_parts_are_the_whole_bit_for_bit_and_json_keeps_it() -> None:
    parts = [tally_of([CONFLICT, OPEN] * (number % 5 + 1), [SURE] * number) for number in range(8)]
    whole, stored = Tally(), Tally()
    for part in parts:
        whole.merge(part, CONFIG)
        stored = Tally.from_json(json.loads(json.dumps(stored.to_json())))
        stored.merge(Tally.from_json(json.loads(json.dumps(part.to_json()))), CONFIG)
    assert json.dumps(whole.to_json()) == json.dumps(stored.to_json())


def test_lists_do_not_grow() -> None:
    generator = np.random.default_rng(0)
    rows = [[(0.01, 0.1 * float(generator.random()), 0.5 + float(generator.random()))] * 3 for _ in range(100)]
    tally = tally_of(*rows)
    assert (len(tally.top_rows), len(tally.top_tokens)) == (TOP_ROWS, TOP_TOKENS)
    pushes = [3 * tokens[0][2] for tokens in rows]
    best = sorted(range(100), key=lambda number: -pushes[number])[:TOP_ROWS]
    assert [found.row for found in tally.top_rows] == best


def test_a_token_that_is_not_finite_is_counted_and_nowhere_else() -> None:
    tally = tally_of([CONFLICT, (float("nan"), 0.1, 1.0), OPEN])
    assert (tally.tokens, tally.not_finite) == (2, 1)
    assert np.isfinite(tally.sums).all()


@pytest.mark.parametrize(
    "rows, effect, alpha",
    [
        ([[OPEN] * 99 + [CONFLICT]], "little", 1.0),
        ([[OPEN] * 20 + [CONFLICT]], "some", 1.0),
        ([[OPEN] + [(0.01, 0.0005, 1.3)] * 5], "much", 1.0),
        ([[OPEN] + [CONFLICT] * 5], "much", 2.0),
        ([[OPEN] + [(0.01, 0.19, 1.3)] * 50], "much", 2.0),
        ([[]], "unknown", None),
    ],
)
def test_advice(rows: list[list[tuple[float, float, float]]], effect: str, alpha: float | None) -> None:
    tally = tally_of(*rows)
    advice = suggest(tally, dict(zip(SUMS, tally.sums.tolist(), strict=True)))
    assert (advice["effect"], advice["alpha"]) == (effect, alpha)
    text = str(advice["text"])
    assert "\n" not in text
    # What was not measured is not promised.
    assert "expect" not in text
    if alpha is not None:
        assert text.startswith(f"confident conflicts give {effect} of the push of SFT: ")
        assert "to be compared with loss=sft" in text


def test_quartiles() -> None:
    counts, sums = np.zeros(FINE, dtype=np.int64), np.zeros(FINE)
    counts[[0, 5, 900]] = 4, 2, 2
    sums[[0, 5, 900]] = 0.4, 1.0, 2.0
    assert quartile_means(counts, sums) == pytest.approx([0.1, 0.1, 0.5, 1.0])
    assert quartile_means(np.zeros(FINE, dtype=np.int64), sums) == [0.0] * 4


def test_summary_is_strict_json_and_consistent(tmp_path: Path) -> None:
    settings = models.run_settings(tmp_path / "hf", tmp_path, tmp_path / "run")
    tally = tally_of([CONFLICT, SURE], [OPEN])
    content = json.loads(json.dumps(summarise(tally, settings, "m", 1000), allow_nan=False))
    assert content["conflicts"]["share_of_sft_gradient"] == pytest.approx(1.3 / 2.11)
    assert np.sum(content["landscape"]["counts"]) == content["tokens"] == 3
    assert content["mean"]["weight"] == pytest.approx((0.05 + 0.02 + 0.8) / 3)
    empty = summarise(Tally(), settings, "m", 1000)
    assert json.dumps(empty, allow_nan=False)
