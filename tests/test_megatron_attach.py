"""`attach` and `detach`: what they leave on a model, and on which models they refuse to stand."""

from __future__ import annotations

import copy

import pytest
import torch

from nemo_eaft import EAFTConfig
from nemo_eaft.megatron import attach, attached, detach, unwrap
from tests.cpu import models
from tests.cpu.models import model_and_data
from tests.nemo.ranks import run_ranks

V = models.VOCAB_SIZE


def coming_and_going(fused: bool) -> None:
    model, data = model_and_data()
    names, attributes = list(model.state_dict()), dict(model.__dict__)
    of_the_layer = dict(model.output_layer.__dict__)
    sharded = set(model.sharded_state_dict())
    before = data.forward(model).detach()
    assert attached(model) is None
    detach(model)

    loss = attach(model, EAFTConfig(), vocab_size=V, fused_linear=fused)
    assert loss is not None
    assert attached(model) is loss
    assert loss.in_place()
    assert list(model.state_dict()) == names
    assert set(model.sharded_state_dict()) == sharded
    assert "compute_language_model_loss" in model.__dict__
    assert loss.fused_linear is fused
    assert ("forward" in model.output_layer.__dict__) is fused
    with pytest.raises(ValueError, match=r"GPTModel\.compute_language_model_loss is replaced already"):
        attach(model, EAFTConfig(), vocab_size=V, fused_linear=fused)
    assert attached(model) is loss

    detach(model)
    assert attached(model) is None
    assert not loss.in_place()
    assert model.__dict__.keys() == attributes.keys()
    assert model.output_layer.__dict__ == of_the_layer
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_pre_hooks_with_kwargs
    assert torch.equal(data.forward(model), before)
    again = attach(model, EAFTConfig(), vocab_size=V, fused_linear=fused)
    assert again is not loss
    assert again is not None
    data.forward(model)
    assert (again.calls, loss.calls) == (1, 0)

    # Somebody else's replacement is seen.
    model.compute_language_model_loss = lambda labels, logits: None
    assert not again.in_place()
    assert attached(model) is None
    with pytest.raises(ValueError, match="replaced already"):
        attach(model, EAFTConfig(), vocab_size=V, fused_linear=fused)


@pytest.mark.parametrize("fused", [False, True])
def test_attach_and_detach_leave_no_trace(fused: bool) -> None:
    run_ranks(coming_and_going, 1, fused)


def stages() -> None:
    models.start()
    model = models.gpt(models.config(), post_process=False)
    attributes = dict(model.__dict__)
    assert attach(model, EAFTConfig(), vocab_size=V) is None
    assert attached(model) is None
    assert model.__dict__ == attributes
    detach(model)


def test_a_stage_without_a_loss_is_left_alone() -> None:
    run_ranks(stages, 1)


def wrong_arguments() -> None:
    model, _ = model_and_data()
    for size in (models.PADDED_VOCAB_SIZE + 1, 1, 0):
        with pytest.raises(ValueError, match=rf"^vocab_size: {size}; allowed: 2 to 32"):
            attach(model, EAFTConfig(), vocab_size=size)
    with pytest.raises(ValueError, match=r"^fused_linear: True; allowed: False with measure_only=True"):
        attach(model, EAFTConfig(), vocab_size=V, fused_linear=True, measure_only=True)
    assert attached(model) is None
    assert not model._forward_pre_hooks
    assert attach(model, EAFTConfig(), vocab_size=models.PADDED_VOCAB_SIZE) is not None


def test_wrong_arguments_leave_the_model_alone() -> None:
    run_ranks(wrong_arguments, 1)


def test_foreign_models_are_refused() -> None:
    for model in (torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))):
        for function in (lambda m: attach(m, EAFTConfig(), vocab_size=2), attached, detach, unwrap):
            with pytest.raises(ValueError, match="holds no model with a method compute_language_model_loss"):
                function(model)


def copies() -> list[bool]:
    """Whether a model can be copied: bare, and with the loss attached."""
    model, _ = model_and_data()
    found = []
    for _ in range(2):
        try:
            copy.deepcopy(model)
            found.append(True)
        except (TypeError, RuntimeError):
            found.append(False)
        attach(model, EAFTConfig(), vocab_size=V) if attached(model) is None else None
    return found


def test_attaching_takes_no_copying_away() -> None:
    # Megatron's own model cannot be copied, as it holds process groups; if that changes, ours has to follow.
    ((bare, with_loss),) = run_ranks(copies, 1)
    assert with_loss == bare
