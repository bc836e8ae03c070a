"""What only a finished forward and backward can show: the loss was ours, and it is divided by its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_eaft.loss.collectives import any_rank, gather_objects, sum_over_data_and_broadcast_over_pipeline
from nemo_eaft.megatron import AttachedLoss


class FirstStep:
    """Listens to Megatron's last act on the gradients, for one step.

    That is `config.finalize_model_grads_func(model, num_tokens, ...)` (megatron-core 0.15.3, pipeline_parallel/
    schedules.py), which divides the gradient by `num_tokens`, summed over the ranks.

    Args:
        config: of the rank's first model chunk, the one that the schedule reads.

    Raises:
        RuntimeError: there is no such function.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._real = config.finalize_model_grads_func
        self._tokens: Tensor | None = None
        if self._real is None:
            raise RuntimeError(
                "model.config.finalize_model_grads_func is not set: gradients would be neither summed over the ranks "
                "nor divided by the tokens. The optimizer must be nemo.lightning's MegatronOptimizerModule "
                "(llm.finetune(optim=...), or model.optim)"
            )
        config.finalize_model_grads_func = self._finalize

    def remove(self) -> None:
        """Give Megatron its function back."""
        if self._config.finalize_model_grads_func == self._finalize:
            self._config.finalize_model_grads_func = self._real

    def check(
        self,
        loss: AttachedLoss | None,
        device: torch.device,
        groups: tuple[ProcessGroup | None, ProcessGroup | None, int | None],
    ) -> None:
        """After the step, on every rank, before the optimizer.

        The sums are those of this rank's tensor-parallel index, so ranks may find different things; one all-reduce over
        the world makes them agree whether to raise.

        Raises:
            RuntimeError: on every rank; no call of the loss, or another number of tokens than under the loss mask.
        """
        counts = torch.zeros(3, dtype=torch.float64, device=device)
        if loss is not None and loss.in_place() and loss.sums is not None:
            counts[0] += loss.calls
            counts[1] += loss.sums[-1]
        if self._tokens is not None:
            counts[2:] += self._tokens.to(counts)
        calls, ours, theirs = sum_over_data_and_broadcast_over_pipeline(counts, *groups).tolist()
        if not any_rank(not calls or ours != theirs, device):
            return
        found = gather_objects((calls, ours, theirs, loss and loss.replaced_by()))
        calls, ours, theirs, _ = next(one for one in found if not one[0] or one[1] != one[2])
        if not calls:
            replaced = [one[3] for one in found if one[3]]
            why = (
                f"{replaced[0]} replaced it after the callback" if replaced else "the model computes its loss elsewhere"
            )
            raise RuntimeError(
                f"EAFT is configured but its loss was never called in the first step: {why}. Nothing was trained."
            )
        raise RuntimeError(
            f"the gradient would be divided by {theirs:.0f}, but {ours:.0f} tokens of the first step are under the "
            "loss mask: the model's training_loss_reduction must return (sum of the losses, number of tokens, what "
            "to log) as nemo.lightning's MaskedTokenLossReduction does, with a loss mask of 0 and 1. Nothing was "
            "trained."
        )

    def _finalize(self, model: Any, num_tokens: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        # Summed in place over the ranks in there.
        self._tokens = None if num_tokens is None else num_tokens.detach().clone()
        return self._real(model, num_tokens, *args, **kwargs)
