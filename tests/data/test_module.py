"""NeMo's data module on prepared rows: the batches that reach the model, decoded."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_eaft.data import build_module, prepare, tokenize_pair
from nemo_eaft.settings import Settings
from tests.data.support import CHATML, chat, make_settings, make_tokenizer, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.unpoisoned]

CHATS = [
    chat("Two plus two?", "Four."),
    chat("The capital of France?", "The capital of France is Paris.", "Thanks", "Bye", system="Be brief."),
    chat("Call a function.", '{"name": "area", "arguments": {"base": 10}}'),
    chat("Think first.", "ok"),
]


@pytest.fixture
def nemo_tokenizer(tmp_path: Path) -> Any:
    """Saves a Hugging Face tokenizer and opens it as NeMo does."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    def build(template: str | None = None) -> Any:
        folder = tmp_path / "tokenizer"
        make_tokenizer(template or CHATML["smollm2"]).save_pretrained(folder)
        return AutoTokenizer(str(folder))

    return build


def batch(settings: Settings, tokenizer: Any, part: str = "train") -> dict[str, Any]:
    """All rows of a part in one batch, made by the data set that NeMo's module would use for it."""
    root = Path(settings.run.dir) / "data"
    module = build_module(settings, root, tokenizer)
    module.prepare_data()
    packed = settings.data.packed
    paths = {
        "train": module.train_path_packed if packed else module.train_path,
        "validation": module.validation_path_packed if packed else module.validation_path,
    }
    metadata = module.pack_metadata if packed else None
    dataset = module._create_dataset(paths[part], metadata, is_test=True, **module.dataset_kwargs)
    return dataset.collate_fn([dataset[index] for index in range(len(dataset))])


def trained(tokenizer: Any, values: dict[str, Any], row: int) -> list[str]:
    """The text of each run of labels in the loss."""
    mask, labels = values["loss_mask"][row].tolist(), values["labels"][row].tolist()
    runs: list[list[int]] = []
    for position, (inside, label) in enumerate(zip(mask, labels, strict=True)):
        if inside:
            if not position or not mask[position - 1]:
                runs.append([])
            runs[-1].append(label)
    return [tokenizer.tokenizer.decode(run) for run in runs]


def assistant_texts(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]


@pytest.mark.parametrize("name", CHATML)
def test_chat_batches_hold_the_answers_in_the_loss(tmp_path: Path, nemo_tokenizer: Any, name: str) -> None:
    tokenizer = nemo_tokenizer(CHATML[name])
    path = write_jsonl(tmp_path / "t.jsonl", [{"messages": messages} for messages in CHATS])
    settings = make_settings(tmp_path, path, path)
    prepare(settings, tokenizer.tokenizer)
    for part in ("train", "validation"):
        values = batch(settings, tokenizer, part)
        for row, messages in enumerate(CHATS):
            ids = tokenizer.tokenizer.apply_chat_template(messages)
            assert values["tokens"][row, : len(ids) - 1].tolist() == ids[:-1]
            assert values["labels"][row, : len(ids) - 1].tolist() == ids[1:]
            assert trained(tokenizer, values, row) == assistant_texts(messages)
            assert not values["loss_mask"][row, len(ids) - 1 :].any()
        assert values["tokens"].shape[1] % 16 == 0


def test_nemo_alone_would_train_on_the_prompts(nemo_tokenizer: Any) -> None:
    """Why rows are tokenized here. If this fails, NeMo has learned it and our part can go."""
    from nemo.collections.llm.gpt.data.utils import _chat_preprocess

    tokenizer = nemo_tokenizer()
    row = _chat_preprocess({"messages": CHATS[0]}, tokenizer)
    assert row["loss_mask"].all()
    assert row["input_ids"].tolist() == [
        *tokenizer.tokenizer.apply_chat_template(CHATS[0]),
        tokenizer.eos_id,  # a second end token, after the newline
    ]


@pytest.mark.parametrize(
    "template", ["{input} {output}", "Frage: {input}\nAntwort (größer):{output}", "{input}\n\n{output}"]
)
def test_pair_batches_are_nemos_and_their_lengths_were_known(
    tmp_path: Path, nemo_tokenizer: Any, template: str
) -> None:
    tokenizer = nemo_tokenizer()
    pairs = [
        {"input": "What is two plus two? ", "output": " The answer is four."},
        {"input": "Ünïcode 😀", "output": "ok \\n {x}"},
    ]
    settings = make_settings(tmp_path, write_jsonl(tmp_path / "t.jsonl", pairs), data={"prompt_template": template})
    prepare(settings, tokenizer.tokenizer)
    values = batch(settings, tokenizer)
    for row, pair in enumerate(pairs):
        ours = tokenize_pair(tokenizer.tokenizer, template, pair)
        length = len(ours.input_ids) - 1
        assert values["tokens"][row, :length].tolist() == ours.input_ids[:-1]
        assert values["labels"][row, :length].tolist() == ours.input_ids[1:]
        assert values["loss_mask"][row, :length].tolist() == ours.loss_mask[1:]
        assert not values["loss_mask"][row, length:].any()
        [text] = trained(tokenizer, values, row)
        assert text.strip() == pair["output"].strip() + "<|im_end|>"


def test_packed_rows_keep_their_answers_and_their_borders(tmp_path: Path, nemo_tokenizer: Any) -> None:
    tokenizer = nemo_tokenizer()
    path = write_jsonl(tmp_path / "t.jsonl", [{"messages": messages} for messages in CHATS * 3])
    settings = make_settings(tmp_path, path, path, data={"packed": True, "packed_size": 160})
    prepared = prepare(settings, tokenizer.tokenizer)
    assert prepared.packed
    assert prepared.train_rows == 12
    assert 1 < prepared.train_samples < 12
    values = batch(settings, tokenizer)
    assert len(values["tokens"]) == prepared.train_samples
    said = [text for row in range(len(values["tokens"])) for text in trained(tokenizer, values, row)]
    assert sorted(said) == sorted(text for messages in CHATS * 3 for text in assistant_texts(messages))
    expected = sorted(len(tokenizer.tokenizer.apply_chat_template(messages)) - 1 for messages in CHATS * 3)
    lengths = []
    for row in range(len(values["tokens"])):
        borders = [border for border in values["cu_seqlens"][row].tolist() if border >= 0]
        for start, end in pairwise(borders):
            if end > start and values["loss_mask"][row, start:end].any():
                lengths.append(end - start)
                # Positions start anew in each row, so no row sees where another one stands.
                assert values["position_ids"][row, start:end].tolist() == list(range(end - start))
    assert sorted(lengths) == expected


def test_packing_is_the_same_each_time_and_leaves_numpys_generator_alone(tmp_path: Path, nemo_tokenizer: Any) -> None:
    import numpy as np

    tokenizer = nemo_tokenizer()
    path = write_jsonl(tmp_path / "t.jsonl", [{"messages": messages} for messages in CHATS * 3])
    made: list[torch.Tensor] = []
    for name in ("a", "b"):
        settings = make_settings(tmp_path / name, path, data={"packed": True, "packed_size": 160})
        np.random.seed(len(made))  # noqa: NPY002
        before = np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
        prepare(settings, tokenizer.tokenizer)
        assert np.random.get_state()[1].tolist() == before  # type: ignore[index] # noqa: NPY002
        made.append(batch(settings, tokenizer)["tokens"])
    assert torch.equal(*made)


def test_packed_pairs(tmp_path: Path, nemo_tokenizer: Any) -> None:
    tokenizer = nemo_tokenizer()
    pairs = [{"input": f"Question {n}?", "output": f"Answer {n}."} for n in range(6)]
    settings = make_settings(tmp_path, write_jsonl(tmp_path / "t.jsonl", pairs), data={"packed": True})
    prepare(settings, tokenizer.tokenizer)
    values = batch(settings, tokenizer)
    said = [text.strip() for row in range(len(values["tokens"])) for text in trained(tokenizer, values, row)]
    assert sorted(said) == [f"Answer {n}.<|im_end|>" for n in range(6)]


def test_ranks_that_need_another_multiple_get_full_length(tmp_path: Path, nemo_tokenizer: Any) -> None:
    tokenizer = nemo_tokenizer()
    path = write_jsonl(tmp_path / "t.jsonl", [{"messages": CHATS[0]}])
    settings = make_settings(
        tmp_path,
        path,
        parallel={"tensor": 3, "sequence": True},
        trainer={"gpus_per_node": 3, "seq_length": 120},
    )
    prepare(settings, tokenizer.tokenizer)
    assert batch(settings, tokenizer)["tokens"].shape == (1, 120)


@pytest.mark.parametrize("tensor, context, full", [(4, 2, False), (8, 4, True), (1, 8, False), (2, 16, True)])
def test_full_length_only_where_sixteen_does_not_fit(
    tmp_path: Path, nemo_tokenizer: Any, tensor: int, context: int, full: bool
) -> None:
    tokenizer = nemo_tokenizer()
    path = write_jsonl(tmp_path / "t.jsonl", [{"messages": CHATS[0]}] * 8)
    settings = make_settings(
        tmp_path,
        path,
        parallel={"tensor": tensor, "context": context, "sequence": tensor > 1},
        trainer={"gpus_per_node": tensor * context, "seq_length": 128},
        run={"dir": str(tmp_path / "run"), "backend": "cuda"},
    )
    prepare(settings, tokenizer.tokenizer)
    module = build_module(settings, Path(settings.run.dir) / "data", tokenizer)
    assert module.dataset_kwargs["pad_to_max_length"] == full
