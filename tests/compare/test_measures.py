"""Every measure against its formula in float64, row by row and without padding, on a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_eaft.compare.drift import measure_drift, reference, sample
from nemo_eaft.compare.forward import batches, log_probabilities
from nemo_eaft.compare.measure import Task, measure
from nemo_eaft.compare.probe import Scoring, answer_scores, measure_probe, read_questions, to_question
from nemo_eaft.compare.target import measure_target, read_rows
from nemo_eaft.compare.text import measure_text, windows
from nemo_eaft.data import Tokens
from tests.compare.models import pair
from tests.data import support
from tests.nemo.models import VOCAB_SIZE, save_tokenizer


def close(expected: list[float]) -> Any:
    """Float32 logits against float64 ones of the same weights."""
    return pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return pair()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def exact(model: Any, ids: list[int]) -> torch.Tensor:
    """[tokens, V] float64 log-probabilities of what follows each token, by a float64 copy of the model."""
    import copy

    double = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = double(torch.tensor([ids])).logits[0]
    shifted = logits - logits.max(-1, keepdim=True).values
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def rows_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def test_target_cross_entropy_and_exact_match(models: tuple[Any, Any]) -> None:
    model = models[0]
    rows = [Tokens(ids, [(3, 5), (7, len(ids))]) for ids in rows_of(12, 9, 17)]
    # One answer is what the model itself writes, so that not all are wrong; another only begins so.
    for count, place in ((len(rows[1].input_ids), 1), (16, 2)):
        ids = rows[place].input_ids
        written = model.generate(torch.tensor([ids[:7]]), max_new_tokens=count - 7, do_sample=False, eos_token_id=None)
        rows[place] = Tokens(written[0].tolist() + ids[count:], [(7, len(ids))])
    measured = measure_target(model, rows)
    nats, right = [], []
    for row in rows:
        predicted = exact(model, row.input_ids)
        places = [place for start, end in row.answers for place in range(start, end)]
        nats.append(-sum(predicted[place - 1, row.input_ids[place]].item() for place in places))
        prompt = row.answers[-1][0]
        written = model.generate(
            torch.tensor([row.input_ids[:prompt]]),
            max_new_tokens=len(row.input_ids) - prompt,
            do_sample=False,
            eos_token_id=None,
        )
        right.append(written[0].tolist() == row.input_ids)
    assert list(measured["target"].values) == close(nats)
    assert measured["target"].counts == (7, 2, 10)
    assert measured["target"].mean == pytest.approx(sum(nats) / 19, rel=1e-5)
    assert right == [False, True, False]
    assert [bool(each) for each in measured["exact"].values] == right


def test_rows_are_those_of_the_training(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "validation.jsonl"
    chat = {"input_ids": [5, 6, 7], "answers": [[1, 3]], "line": 1}
    path.write_text("\n".join(map(json.dumps, [chat, {"input": "t1 t2", "output": "t3", "line": 2}, chat])))
    first, second = read_rows(path, tokenizer, "{input} {output}", 2)
    assert first == Tokens([5, 6, 7], [(1, 3)])
    assert (second.input_ids[-1], second.answers) == (tokenizer.eos_token_id, [(2, 4)])


def test_drift_is_the_divergence_of_the_tuned_model_from_the_base(models: tuple[Any, Any]) -> None:
    base, tuned = models
    texts = rows_of(6, 11)
    kept = reference(base, texts)
    measured = measure_drift(tuned, texts, lambda number: kept[number])
    forward, backward = [], []
    for ids in texts:
        p, q = exact(base, ids)[:-1], exact(tuned, ids)[:-1]
        forward.append((p.exp() * (p - q)).sum().item())
        backward.append((q.exp() * (q - p)).sum().item())
    assert list(measured.values) == pytest.approx(forward, rel=1e-4)
    assert measured.counts == (5, 10)
    # The other way round is another number, and the test would see it.
    assert list(measured.values) != pytest.approx(backward, rel=0.02)
    nothing = measure_drift(base, texts, lambda number: kept[number])
    assert nothing.mean == pytest.approx(0.0, abs=1e-7)


def test_samples_come_from_the_whole_distribution_of_the_base_model(models: tuple[Any, Any]) -> None:
    base = models[0]
    texts = sample(base, 3, count=400, length=3, seed=0, end=None)
    assert texts == sample(base, 3, count=400, length=3, seed=0, end=None)
    assert texts != sample(base, 3, count=400, length=3, seed=1, end=None)
    assert all(len(text) == 3 and text[0] == 3 for text in texts)
    # Second tokens against their probabilities, five standard deviations; and third ones after the most frequent.
    for place, given in ((1, [3]), (2, [3, max(set(seconds := [text[1] for text in texts]), key=seconds.count)])):
        drawn = [text[place] for text in texts if text[:place] == given]
        expected = exact(base, given)[-1].exp()
        for token in expected.topk(4).indices.tolist():
            p = expected[token].item()
            assert abs(drawn.count(token) - p * len(drawn)) < 5 * math.sqrt(p * (1 - p) * len(drawn)) + 1


def test_a_sample_ends_with_its_end_token(models: tuple[Any, Any]) -> None:
    base = models[0]
    free = sample(base, 3, count=20, length=12, seed=0, end=None)
    end = free[0][4]
    ended = sample(base, 3, count=20, length=12, seed=0, end=end)
    cut = [text[: text.index(end, 1) + 1] if end in text[1:] else text for text in free]
    assert ended == cut
    assert min(map(len, ended)) >= 2


def test_general_text(models: tuple[Any, Any], tokenizer: Any) -> None:
    text = " ".join(f"t{number * 7 % 200}" for number in range(50))
    pieces = windows(tokenizer, text, 3, 12)
    assert [token for piece in pieces for token in piece] == tokenizer(text, add_special_tokens=False).input_ids[:36]
    assert len(windows(tokenizer, text, 9, 12)) == 4  # two tokens are left over
    measured = measure_text(models[0], pieces)
    nats = []
    for piece in pieces:
        predicted = exact(models[0], piece)
        nats.append(-sum(predicted[place, piece[place + 1]].item() for place in range(11)))
    assert list(measured.values) == close(nats)
    assert measured.counts == (11, 11, 11)
    with pytest.raises(ValueError, match="at least one window of 60"):
        windows(tokenizer, text, 1, 60)


def test_probe(models: tuple[Any, Any], tokenizer: Any, tmp_path: Path) -> None:
    model = models[0]
    rows: list[Any] = [
        {"question": f"t{n} t{n + 1}", "answers": [f"t{n + 20} t1", f"t{n + 40}", f"t{n + 60} t2 t3"], "right": n % 3}
        for n in range(12)
    ]
    path = tmp_path / "probe.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    whole, first = [], []
    for row in rows:
        asked = tokenizer(row["question"]).input_ids
        scores = []
        for answer in row["answers"]:
            ids = tokenizer(answer, add_special_tokens=False).input_ids
            predicted = exact(model, asked + ids)
            scores.append([predicted[len(asked) - 1 + n, token].item() for n, token in enumerate(ids)])
        whole.append([sum(each) for each in scores])
        first.append([each[0] for each in scores])
    scorings: tuple[tuple[Scoring, list[list[float]]], ...] = (("full", whole), ("first", first))
    for scoring, expected in scorings:
        questions = read_questions(path, tokenizer, scoring)
        for got, wanted in zip(answer_scores(model, questions, scoring), expected, strict=True):
            assert got == close(wanted)
        right = [float(max(each) == each[row["right"]]) for each, row in zip(expected, rows, strict=True)]
        assert 0 < sum(right) < len(right)
        measured = measure_probe(model, questions, scoring)
        assert list(measured["probe"].values) == right
        assert list(measured["answer"].values) == close(
            [-each[row["right"]] for each, row in zip(expected, rows, strict=True)]
        )


def test_messages_that_the_template_cannot_write(tmp_path: Path) -> None:
    tokenizer = support.make_tokenizer()
    answers = {"answers": [" a", " b"], "right": 0}
    for messages in ("hi", [{"role": "user"}]):
        path = tmp_path / "probe.jsonl"
        path.write_text(json.dumps({"messages": messages} | answers))
        with pytest.raises(ValueError, match=r"probe\.jsonl, line 1: .*'messages'"):
            read_questions(path, tokenizer, "full")
    # A character that ends a line for Python, but not in JSON; and the mark that some editors write first.
    row = {"messages": [{"role": "user", "content": "one\u2028two"}]} | answers
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert len(read_questions(path, tokenizer, "full")) == 1


@pytest.mark.parametrize(
    "row, named",
    [
        ([], "a question is an object"),
        ({"question": "t1", "answers": ["t2"], "right": 0}, "'answers' must be two texts or more"),
        ({"question": "t1", "answers": ["t2", "t3"], "right": 2}, "'right' must be a number from 0 to 1, got 2"),
        ({"question": "t1", "answers": ["t2", "t3"], "right": True}, "'right' must be a number from 0 to 1, got True"),
        ({"answers": ["t2", "t3"], "right": 0}, "'question' must be a text"),
        ({"messages": [], "answers": ["t2", "t3"], "right": 0}, "needs a tokenizer with a chat template"),
        ({"question": "t1", "answers": ["t2 t3", "t2 t4"], "right": 0}, "begin with the same token"),
        ({"question": "t1", "answers": ["t2", "t2"], "right": 0}, "two answers are equal"),
        ({"question": "t1", "messages": [], "answers": ["t2", "t3"], "right": 0}, "both there"),
    ],
)
def test_a_question_that_cannot_be_asked(tokenizer: Any, row: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        to_question(row, tokenizer, "first")


def test_what_is_not_asked_for_is_left_out(models: tuple[Any, Any]) -> None:
    rows = [Tokens(ids, [(2, 5)]) for ids in rows_of(6)]
    assert set(measure(models[0], Task(rows), lambda number: pytest.fail("no sample"))) == {"target", "exact"}
    models[0].train()
    measure(models[0], Task(rows), lambda number: pytest.fail("no sample"))
    assert models[0].training, "a model that is being trained goes on as it was"
    models[0].eval()


def test_batches_hold_no_more_than_allowed_and_little_padding() -> None:
    lengths = [3, 9, 2, 2, 30, 1, 4]
    found = list(batches(lengths, tokens=20))
    assert sorted(index for batch in found for index in batch) == list(range(7))
    assert all(len(batch) * max(lengths[index] for index in batch) <= 20 or len(batch) == 1 for batch in found)
    assert found == [[5, 2, 3, 0, 6], [1], [4]]


def test_a_model_that_computes_all_logits_gives_the_same(models: tuple[Any, Any]) -> None:
    class Whole(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            return models[0](input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    rows, places = rows_of(7, 12, 5), [[6], [0, 4, 10], [2, 3]]
    for (number, some), (other, whole) in zip(
        log_probabilities(models[0], rows, places), log_probabilities(Whole(), rows, places), strict=True
    ):
        assert number == other
        torch.testing.assert_close(some, whole, rtol=0, atol=1e-5)
