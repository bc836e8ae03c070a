"""A NeMo script that is not ours, with our one line in it: what it gets, and how it is told of a mistake."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_eaft import recorder
from tests.nemo import jobs, reference, scripts
from tests.nemo.conftest import Workshop
from tests.nemo.ranks import run_ranks


def run_script(workshop: Workshop, run_dir: Path, **changes: Any) -> list[jobs.Recorded]:
    checkpoint = changes.pop("checkpoint", None) or workshop.nemo("llama")
    spec = scripts.Script(checkpoint=checkpoint, rows=workshop.rows, run_dir=run_dir, **changes)
    return run_ranks(scripts.script, spec.world, spec)


def test_a_padded_vocabulary_takes_no_part(workshop: Workshop, tmp_path: Path) -> None:
    """NeMo pads 250 tokens to 512 at TP=4, so two ranks hold nothing but padding."""
    model = {"vocab_size": 250}
    checkpoint = workshop.nemo("llama", **model)
    common = {"checkpoint": checkpoint, "keep_vocab_size": False, "tensor": 4, "world": 4}
    ranks = run_script(workshop, tmp_path / "eaft", **common)
    assert [rank.error for rank in ranks] == [None] * 4
    assert [rank.final["module.output_layer.weight"][0].shape[0] for rank in ranks] == [512] * 4
    assert [rank.final["module.output_layer.weight"][0].offset[0] for rank in ranks] == [0, 128, 256, 384]

    sums = workshop.sums("llama", **model)
    answers = [row for rows in ranks[0].answers[0] for row in rows]
    expected = reference.means(sums[answer] for answer in answers)
    assert ranks[0].losses[0] == pytest.approx(expected["loss"], abs=1e-5)
    norm = reference.gradient_norm(
        workshop.model("llama", **model), {answer: workshop.train_rows[answer] for answer in answers}
    )
    assert ranks[0].gradient_norms[0] == pytest.approx(norm, rel=1e-5)
    rows = recorder.read(tmp_path / "eaft" / "metrics.jsonl")
    for name in ("loss", "cross_entropy", "entropy", "weight"):
        assert rows[0][name] == pytest.approx(expected[name], abs=1e-5), name
    validated = dict(list(workshop.validation_rows.items())[:8])
    held_out = reference.means(reference.row_sums(workshop.model("llama", **model), validated).values())
    assert rows[1] == {"step": 1, "val_loss": pytest.approx(held_out["cross_entropy"], abs=1e-5)}
    assert ranks[0].val_losses == pytest.approx([held_out["cross_entropy"]], abs=1e-5)

    # Megatron's own loss counts the padding in the denominator.
    stock = run_script(workshop, tmp_path / "stock", callback=False, **common)
    assert stock[0].val_losses[0] - held_out["cross_entropy"] > 1e-3


@pytest.mark.parametrize(
    "mistake, world, layout, message",
    [
        ("per-token off", 2, {}, "calculate_per_token_loss is False"),
        ("too late", 2, {"average_in_collective": False}, "gradient_scaling_factor is 0.5"),
        ("too late", 2, {"average_in_collective": True}, "average_in_collective is True"),
        ("replaced", 2, {"pipeline": 2}, "its loss was never called"),
        ("not a number", 4, {"tensor": 2, "pipeline": 2}, "the loss is nan"),
    ],
)
def test_a_mistake_stops_every_rank_before_the_first_update(
    workshop: Workshop, tmp_path: Path, mistake: str, world: int, layout: dict[str, Any], message: str
) -> None:
    ranks = run_script(workshop, tmp_path, mistake=mistake, world=world, learning_rate=1e-2, **layout)
    for rank in ranks:
        assert rank.error is not None
        assert rank.error.startswith("RuntimeError")
        assert message in rank.error
        if mistake == "not a number":
            # NeMo's own data say no line, so it is the text that names the row.
            assert "micro-batch 1 of 4, row 1 of it, position " in rank.error
            assert "text 't" in rank.error
        assert rank.losses == []
        assert rank.initial
        for name, before in rank.initial.items():
            for left, right in zip(before, rank.final[name], strict=True):
                assert torch.equal(left.data.nan_to_num(), right.data.nan_to_num()), name


def test_the_line_is_enough(workshop: Workshop, tmp_path: Path) -> None:
    """The script left per-token loss off and averages in the collective: the callback sets both, at DP=2."""
    ranks = run_script(workshop, tmp_path, world=2)
    answers = [row for rank in ranks for rows in rank.answers[0] for row in rows]
    expected = reference.means(workshop.sums("llama")[answer] for answer in answers)
    assert len(answers) == 8
    assert ranks[0].losses[0] == pytest.approx(expected["loss"], abs=1e-5)
    norm = reference.gradient_norm(workshop.model("llama"), {answer: workshop.train_rows[answer] for answer in answers})
    assert ranks[0].gradient_norms[0] == pytest.approx(norm, rel=1e-5)
