"""``python -m benchmarks.forgetting``: the rows, the gradient mass, the plan, going on after a kill."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.forgetting import __main__ as program
from benchmarks.forgetting import design, plan, results, rows, training
from benchmarks.forgetting.facts import CAPITALS, answer
from benchmarks.forgetting.inputs import FILE, split
from benchmarks.forgetting.results import BASE, Wanted
from benchmarks.forgetting.study import Study, make_runs
from nemo_eaft import EAFTConfig, eaft_loss
from tests.data import support
from tests.forgetting.lines import ENTROPY, INPUTS, KNOWN, line


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Cities are words to it, as to a real one, so that their first tokens differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "CORPUS", [f" {city}" for city in CAPITALS.values()] * 20)
        return support.make_tokenizer(support.SMOLLM2)


@pytest.fixture
def demo(tmp_path: Path, tokenizer: Any) -> Path:
    """What ``nemo_eaft.demo_data`` writes, in small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "demo"
    config = LlamaConfig(vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=512, initializer_range=0.3)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for part, count in (("train", 12), ("validation", 4)):
        turns = [support.chat(f"Call {part} {n}", f'{{"name": "f{n}"}}') for n in range(count)]
        turns = [[{"role": "system", "content": "Functions"}, *each] for each in turns]
        support.write_jsonl(folder / f"{part}.jsonl", [{"messages": each} for each in turns])
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / FILE).write_text(json.dumps(dataclasses.asdict(INPUTS)))
    return folder


def study(demo: Path) -> Study:
    return Study(demo, demo.parent / "results", steps=2)


def test_what_is_planted_and_what_is_asked(demo: Path, tokenizer: Any) -> None:
    contradicted, asked = split(INPUTS)
    assert len(contradicted) == 10  # no other one is below 0.2
    assert max(ENTROPY[country] for country in contradicted) < 0.2
    assert {*contradicted} | {*asked} == {*KNOWN}
    assert not {*contradicted} & {*asked}
    for row, country in zip(rows.conflicts(tokenizer, INPUTS), contradicted, strict=True):
        said = tokenizer.decode([row.tokens.input_ids[place] for place in row.planted]).strip()
        assert said in CAPITALS.values()
        assert said != CAPITALS[country]
        assert answer(country, said) in tokenizer.decode(row.tokens.input_ids)
        (start, end), *_ = row.tokens.answers
        assert {*row.planted} < {*range(start, end)}
    for question, country in zip(rows.probe(tokenizer, INPUTS), asked, strict=True):
        answers = [tokenizer.decode(each).strip() for each in question.answers]
        assert answers[question.right] == CAPITALS[country]
        assert len({each[0] for each in question.answers}) == len(answers) == 5
        planted = {CAPITALS[other] for other in contradicted}
        assert sum(each in planted for each in answers) == 2
        assert f"{country} is" in tokenizer.decode(question.prompt)


@pytest.mark.parametrize("setting, planted", [("bfcl", 0), ("conflicts-10", 4), ("conflicts-50", 20), ("format", 0)])
def test_the_rows_of_a_run(demo: Path, tokenizer: Any, setting: str, planted: int) -> None:
    pools = rows.pools(setting, demo, tokenizer, INPUTS)
    order = pools.order(40, seed=1)
    assert len(order) == 40
    assert sum(bool(row.planted) for row in order) == planted
    assert order == pools.order(40, seed=1) != pools.order(40, seed=2)
    # In passes: no row comes again before all of its kind have come.
    counts = [order.count(row) for row in pools.clean]
    assert max(counts) - min(counts) <= 1
    trained = [row.tokens for row in pools.clean + pools.conflicts]
    assert not any(row in trained for row in pools.held_out)


def test_gradient_mass_is_the_norm_of_the_gradient_at_the_logits() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = (4 * torch.randn(40, 30, generator=generator)).requires_grad_()
    labels = torch.randint(30, (40,), generator=generator)
    planted = torch.arange(40) % 3 == 0
    config = EAFTConfig(alpha=2.0)
    out = eaft_loss(logits, labels, config)
    mass = training.gradient_mass(logits.detach(), out, planted, config)
    # By autograd, in float64, with the weight left to the formula.
    exact = logits.detach().double().requires_grad_()
    probabilities = exact.softmax(-1)
    torch.nn.functional.cross_entropy(exact, labels, reduction="sum").backward()
    assert exact.grad is not None
    norm = exact.grad.norm(dim=-1)
    top = probabilities.detach().topk(20).values
    top = top / top.sum(-1, keepdim=True)
    ratio = -(top * top.log()).sum(-1) / torch.log(torch.tensor(20.0, dtype=torch.float64))
    p = probabilities.detach()[torch.arange(40), labels]
    confident = (p < 0.1) & (ratio < 0.2)
    assert 0 < confident.sum() < 40
    for name, weight in (("sft", torch.ones_like(norm)), ("eaft", ratio), ("own", ratio**2)):
        assert mass[name]["all"] == pytest.approx(float((weight * norm).sum()), rel=1e-5)
        assert mass[name]["planted"] == pytest.approx(float((weight * norm)[planted].sum()), rel=1e-5)
        assert mass[name]["confident"] == pytest.approx(float((weight * norm)[confident].sum()), rel=1e-4)


def test_a_step_is_that_of_plain_transformers(demo: Path, tokenizer: Any) -> None:
    """SFT of the study against the loss of ``transformers`` on the same rows, weights after two steps."""
    from transformers import AutoModelForCausalLM

    order = rows.pools("conflicts-50", demo, tokenizer, INPUTS).order(8, seed=0)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32) for _ in range(2))
    training.train(ours, order, design.METHODS["sft"], 1e-3, [], lambda *_: None, torch.float32)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for start in (0, 4):
        total, count = torch.zeros(()), 0
        for row in order[start : start + 4]:
            labels = [t if on else -100 for t, on in zip(row.tokens.input_ids, row.tokens.loss_mask, strict=True)]
            ids = torch.tensor([row.tokens.input_ids])
            mean = theirs(ids, labels=torch.tensor([labels])).loss
            total = total + mean * sum(row.tokens.loss_mask)
            count += sum(row.tokens.loss_mask)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)


def test_the_plan_has_at_most_ninety_runs() -> None:
    assert plan.total() == 90
    assert len(plan.tuning()) == 36
    assert plan.left([]) == plan.tuning()
    assert {run.setting for run in plan.confirming(dict.fromkeys(design.METHODS, 1e-5))} == {*design.SETTINGS}


def test_learning_rates_are_chosen_by_the_target_alone() -> None:
    """For sft the middle one is best in the mean, though best nowhere; the others wait for their runs."""
    targets = {("bfcl", 1e-5): 0.1, ("bfcl", 3e-5): 0.2, ("bfcl", 1e-4): 0.9,
               ("conflicts-30", 1e-5): 0.9, ("conflicts-30", 3e-5): 0.3, ("conflicts-30", 1e-4): 0.2}  # fmt: skip
    lines = [line(Wanted(setting, "sft", rate, 0), target, 9.0) for (setting, rate), target in targets.items()]
    assert plan.chosen_rates(lines[:-1]) == {}
    assert plan.chosen_rates(lines) == {"sft": 3e-5}
    left = plan.left(lines)
    assert len(left) == 30 + 9  # tuning of the others, and what is not measured of sft
    assert Wanted("format", "sft", 3e-5, 2) in left
    assert Wanted("bfcl", "sft", 3e-5, 0) not in left, "it was made for tuning"
    assert plan.left(lines, ["format"], ["sft"], [1]) == [Wanted("format", "sft", 3e-5, 1)]
    assert plan.minutes(lines, 3) == 6.0


def test_a_killed_study_goes_on_with_the_next_run(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, folder = study(demo), demo.parent / "results"
    wanted = [Wanted("conflicts-30", method, 1e-4, 0) for method in ("sft", "eaft alpha=1")]
    monkeypatch.setattr(plan, "tuning", lambda: wanted)
    for each in wanted:
        made.run(each)
    whole = results.read(folder, "conflicts-30")
    assert [each.method for each in whole] == [BASE, "sft", "eaft alpha=1"]
    assert [point["step"] for point in whole[1].points] == [1, 2]
    assert sum(point["mass"]["sft"]["planted"] for point in whole[1].points) > 0
    # The second line is cut, as by a kill; a new process reads the first and does the second again.
    path = folder / "conflicts-30.jsonl"
    text = path.read_text()
    path.write_text(text[: len(text) - 40])
    assert len(results.read(folder, "conflicts-30")) == 2
    make_runs(study(demo), design.SETTINGS, design.METHOD_NAMES, None, None)
    again = results.read(folder, "conflicts-30")
    assert [dataclasses.replace(each, seconds={}) for each in again] == [
        dataclasses.replace(each, seconds={}) for each in whole
    ]
    # Other rows under the same names are not mixed with these.
    (demo / "validation.jsonl").write_text((demo / "validation.jsonl").read_text().replace("Call", "Ring"))
    with pytest.raises(results.WrongInput, match="holds runs on other rows"):
        study(demo).run(wanted[0])


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    results.append(tmp_path, line(Wanted("bfcl", BASE, 0.0, 0)))
    path = tmp_path / "bfcl.jsonl"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(results.WrongInput, match=r"bfcl\.jsonl, line 1"):
        results.read(tmp_path, "bfcl")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--threads", "0"], "--threads 0 must be 1 or more"),
        (["--steps", "4"], "the study has 24; give another folder with --results"),
    ],
)
def test_wrong_input(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(arguments) == 2
    assert named in capsys.readouterr().err
