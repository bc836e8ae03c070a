"""torch's AdamW inside Megatron's distributed optimizer.

Transformer Engine and Apex count the steps in the parameter group; torch keeps a tensor `step` beside the moments
of each parameter. Megatron-Core 0.15.3 `optimizer/distrib_optimizer.py` writes it into `param_groups` by itself,
but it looks for it before the first step, when there is none; takes it for a third moment when it cuts the state
into shards; and lets all parameters share one tensor after loading, which AdamW advances once for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_STEP = "step"


def with_states(state_dict: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`state_dict` that also works before the first step: with the states that AdamW would start from."""

    def wrapped(self: Any) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = {
                        _STEP: torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }
        return state_dict(self)

    return wrapped


def without_step(get_states: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """`_get_main_param_and_optimizer_states` with parameter-shaped states only."""

    def wrapped(self: Any, model_param: Tensor) -> dict[str, Tensor]:
        return {key: state for key, state in get_states(self, model_param).items() if key != _STEP}

    return wrapped


def keeping_step(set_states: Callable[..., None]) -> Callable[..., None]:
    """`_set_main_param_and_optimizer_states` for states without `step`, which `load_state_dict` has set."""

    def wrapped(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        own = {_STEP: state[_STEP]} if _STEP in state else {}
        # In float32 the main parameter is a view of the model's, which autograd does not let be written to.
        with torch.no_grad():
            set_states(self, model_param, {**tensors, **own})

    return wrapped


def with_own_steps(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    """`load_state_dict` that leaves each parameter with a `step` of its own."""

    def wrapped(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if _STEP in state:
                state[_STEP] = state[_STEP].clone()

    return wrapped
