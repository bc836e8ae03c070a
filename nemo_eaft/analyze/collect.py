"""The callback that looks at every token while NeMo validates.

The last pipeline stage sees labels and loss, every tensor-parallel rank of it the same; so of each copy of the model
one rank collects. Every `EVERY` global batches the ranks bring together what they have, and rank 0 writes it down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches

from nemo_eaft.analyze.logit_gradient import logit_gradient
from nemo_eaft.analyze.rows import PADDING
from nemo_eaft.analyze.tally import Tally
from nemo_eaft.analyze.tokens import RowTokens, Tokens
from nemo_eaft.batches import StepBatches, micro_batches
from nemo_eaft.config import EAFTConfig
from nemo_eaft.landscape.counts import Bins
from nemo_eaft.loss.collectives import gather_objects
from nemo_eaft.megatron import AttachedLoss, Observed, attach, detach

EVERY = 8
"""Global batches between two states."""


class CollectTokens(Callback):
    """Attaches the loss with the weights of training, and adds up what it sees.

    Args:
        config: of the loss.
        vocab_size: the true vocabulary size.
        batches: global batches that will come.
        begin: called when the first one is about to.
        save: called on every rank with what the batches since the last call gave, one tally for each rank that
            collected, in the order of ranks; and with the number of global batches done.
    """

    def __init__(
        self,
        config: EAFTConfig,
        vocab_size: int,
        batches: int,
        begin: Callable[[], None],
        save: Callable[[list[Tally], int], None],
    ) -> None:
        self._config, self._vocab_size, self._batches = config, vocab_size, batches
        self._begin, self._save = begin, save
        self._bins = Bins.of(config, vocab_size)
        self._loss: AttachedLoss | None = None
        self._tally = Tally()
        self._seen: StepBatches | None = None
        self._calls: list[Tokens | None] = []
        self._places: list[tuple[Any, Any]] = []
        self._done = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the chunk that owns the loss."""
        # NeMo's val_loss would be the weighted one.
        trainer.validate_loop.verbose = False
        for chunk in _chunks(trainer):
            loss = attach(chunk, self._config, vocab_size=self._vocab_size)
            if loss is not None:
                loss.requires_loss_mask = loss.weigh_validation = True
                loss.observer = self._see
                self._loss = loss
        self._begin()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the model its own loss back."""
        if getattr(trainer.strategy, "megatron_parallel", None) is not None:
            for chunk in _chunks(trainer):
                detach(chunk)

    def on_megatron_step_start(self, step: Any) -> Any:
        """Remember which rows come."""
        self._calls, self._places = [], []
        assert isinstance(step.data, Iterator), type(step.data)
        self._seen = StepBatches(step.data)
        return replace(step, data=self._seen)

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], forward_callback: Any) -> None:
        """Hand over the loss mask, as EAFTCallback does."""
        if self._loss is not None:
            self._loss.set_loss_mask(batch.get("loss_mask"))

    def _see(self, seen: Observed) -> None:
        """One micro-batch: every tensor-parallel rank of the last stage."""
        # Rows first: [b, s].
        valid, labels = seen.valid.transpose(0, 1), seen.labels.transpose(0, 1)
        group = parallel_state.get_tensor_model_parallel_group()
        logits = seen.logits.transpose(0, 1)[valid]
        found = logit_gradient(logits, labels[valid], self._vocab_size, group)
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            self._calls.append(None)
            return
        ratio = seen.out.entropy / self._config.entropy_normalizer(self._vocab_size)
        of_loss = (seen.out.cross_entropy, seen.out.entropy, ratio, seen.out.weight)
        taken = [value.transpose(0, 1)[valid] for value in of_loss]
        floats = torch.stack([value.double() for value in (*taken, found.norm, found.top_probability)]).cpu().numpy()
        cross_entropy, entropy, entropy_ratio, weight, gradient, top_probability = floats
        rows, places = valid.nonzero(as_tuple=True)
        self._places.append((rows.cpu().numpy(), labels.cpu().numpy()))
        # The logits at a place predict the token after it.
        position = places.cpu().numpy() + 1
        top = found.top.cpu().numpy()
        self._calls.append(
            Tokens(position, cross_entropy, entropy, entropy_ratio, weight, gradient, top, top_probability)
        )

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any) -> None:
        """End of a global batch, on every rank."""
        assert self._seen is not None
        if self._loss is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            batches = micro_batches(self._seen.seen, get_num_microbatches())
            assert len(batches) == len(self._calls), (len(batches), len(self._calls))
            for batch, values, (rows, labels) in zip(batches, self._calls, self._places, strict=True):
                assert values is not None
                self._add(batch, values, rows, labels)
        self._done += 1
        if self._done % EVERY == 0 or self._done == self._batches:
            # Every rank knows alike how many batches are done.
            tallies = gather_objects(self._tally.to_json() if self._tally.rows else None)
            self._tally = Tally()
            self._save([Tally.from_json(tally) for tally in tallies if tally is not None], self._done)

    def _add(self, batch: dict[str, Any], values: Tokens, rows: Any, labels: Any) -> None:
        tokens = batch["tokens"].numpy()
        for place, known in enumerate(batch["metadata"]):
            number = known["row"]
            if number == PADDING:
                continue
            own = values.of(np.flatnonzero(rows == place))
            end = int(own.position[-1]) if len(own.position) else 0
            ids = [*tokens[place, :end].tolist(), *([int(labels[place, end - 1])] if end else [])]
            self._tally.add(RowTokens(number, 0, ids, own), self._config, self._bins)


def _chunks(trainer: Trainer) -> list[Any]:
    strategy: Any = trainer.strategy
    return list(strategy.megatron_parallel)
