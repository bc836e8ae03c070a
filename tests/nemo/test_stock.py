"""With EAFT switched off, NeMo trains as if we were not there."""

from typing import Any

import pytest
import torch

from tests.nemo.conftest import Run, Workshop

STEPS = 5
SIZES = {"tp1": (1, {}), "tp2": (2, {"tensor": 2}), "tp2-dp2": (4, {"tensor": 2})}


def train(workshop: Workshop, kind: str, size: str) -> Run:
    """`kind`: `stock` has no callback of ours, `measured` is loss.gate=stock, `alpha=0` and `eaft` are our loss."""
    world, parallel = SIZES[size]
    loss: dict[str, Any] = {"gate": "eaft" if kind in ("alpha=0", "eaft") else "stock"}
    if kind == "alpha=0":
        loss["alpha"] = 0.0
    # Weights that do not move, for a validation of both on the same ones.
    rate = (
        {"learning_rate": 0.0, "max_steps": 1, "val_every": 1, "val_batches": 1}
        if kind == "eaft"
        else {"max_steps": STEPS, "val_every": STEPS}
    )
    return workshop.train(
        f"{kind}-{size}", world=world, parallel=parallel, loss=loss, trainer=rate, plan={"callback": kind != "stock"}
    )


@pytest.mark.parametrize("size", SIZES)
def test_gate_stock_is_nemo_bit_for_bit(workshop: Workshop, size: str) -> None:
    stock, measured = train(workshop, "stock", size), train(workshop, "measured", size)
    assert len(stock.losses) == STEPS
    assert measured.losses == stock.losses
    assert measured.ranks[0].gradient_norms == stock.ranks[0].gradient_norms
    for left, right in zip(measured.ranks, stock.ranks, strict=True):
        assert left.final.keys() == right.final.keys()
        for name, pieces in left.final.items():
            for a, b in zip(pieces, right.final[name], strict=True):
                assert torch.equal(a.data, b.data), name
        assert len(left.optimizer) == len(right.optimizer) > 0
        assert all(torch.equal(a, b) for a, b in zip(left.optimizer, right.optimizer, strict=True))
    # What it measures is what it trains on; weight 1 for every token.
    assert not (stock.dir / "metrics.jsonl").exists()
    for row, loss in zip(measured.steps, stock.losses, strict=True):
        assert row["loss"] == row["cross_entropy"] == pytest.approx(loss, rel=1e-6)
        assert row["weight"] == 1.0
        assert row["entropy"] > 0.1
    # Validation is our plain cross-entropy.
    assert measured.ranks[0].val_losses == pytest.approx(stock.ranks[0].val_losses, rel=1e-6)
    assert len(stock.ranks[0].val_losses) == 1


@pytest.mark.parametrize("size", SIZES)
def test_alpha_zero_is_stock_to_rounding(workshop: Workshop, size: str) -> None:
    """Another order of additions, nothing else: V=252 divides, so there is no padding."""
    stock, ours = train(workshop, "stock", size), train(workshop, "alpha=0", size)
    assert ours.losses[0] == pytest.approx(stock.losses[0], rel=1e-6)
    assert ours.losses == pytest.approx(stock.losses, rel=1e-5)
    assert ours.ranks[0].gradient_norms == pytest.approx(stock.ranks[0].gradient_norms, rel=1e-5)
    assert ours.ranks[0].val_losses == pytest.approx(stock.ranks[0].val_losses, rel=1e-5)
    assert all(row["weight"] == 1.0 for row in ours.steps)


def test_validation_of_an_eaft_run_is_plain_cross_entropy(workshop: Workshop) -> None:
    eaft = train(workshop, "eaft", "tp2")
    assert eaft.steps[0]["loss"] < 0.9 * eaft.steps[0]["cross_entropy"]
    stock = workshop.train(
        "stock-still",
        loss={"gate": "stock"},
        trainer={"learning_rate": 0.0, "max_steps": 1, "val_every": 1, "val_batches": 1},
        plan={"callback": False},
    )
    assert len(stock.ranks[0].val_losses) == 1
    assert eaft.ranks[0].val_losses == pytest.approx(stock.ranks[0].val_losses, rel=1e-6)
    # With one batch; NeMo takes the mean over batches, metrics.jsonl the mean over tokens.
    assert [row["val_loss"] for row in eaft.validations] == pytest.approx(stock.ranks[0].val_losses, rel=1e-6)
