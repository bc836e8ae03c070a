"""Plain ``transformers`` training on the CPU with the package's own loss: AdamW, no decay, a constant learning rate.

In bfloat16 mixed precision, as such models are trained on GPUs: weights, their gradients and AdamW's moments are
float32, matrix products bfloat16. It takes 2.6 times less than float32 does where the CPU has AVX512-BF16.

Not NeMo: a NeMo process takes longer to start than such a run takes. The loss is :func:`nemo_eaft.eaft_loss`, the same
function that the adapters for Megatron and NeMo call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.forgetting import design
from benchmarks.forgetting.rows import Row
from nemo_eaft import EAFTConfig, TokenLoss, eaft_loss
from nemo_eaft.gates import is_conflict

_IGNORED = -100
KINDS = ("all", "planted", "confident")
"""Tokens of which the gradient is summed: all, planted conflicts, and the paper's confident conflicts."""

Mass = dict[str, dict[str, float]]
"""Weighting (``sft``: 1, ``eaft``: alpha 1, ``own``: the method's) -> kind of tokens -> sum of gradient norms; and
``tokens`` -> kind -> their number."""


def train(
    model: Any,
    rows: Sequence[Row],
    config: EAFTConfig,
    learning_rate: float,
    checkpoints: Sequence[int],
    at_checkpoint: Callable[[int, Mass], None],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Train in place.

    Args:
        model: a float32 causal model of ``transformers`` on the CPU.
        rows: of the whole run, in their order; ``design.BATCH`` for each step.
        config: the method.
        learning_rate: of AdamW.
        checkpoints: steps after which ``at_checkpoint`` is called, with the gradient mass since the one before.
        dtype: of matrix products.
        at_checkpoint: gets the number of steps done; may use the model, which stays as it is.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    mass = _nothing()
    model.train()
    for step in range(1, len(rows) // design.BATCH + 1):
        ids, mask, labels, planted = collate(rows[(step - 1) * design.BATCH : step * design.BATCH])
        # The output layer only where there is a label: most tokens of a row are its prompt.
        there = labels != _IGNORED
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[there]
            logits = model.get_output_embeddings()(hidden).float()
        out = eaft_loss(logits, labels[there], config)
        _add(mass, gradient_mass(logits.detach(), out, planted[there], config))
        (out.loss.sum() / there.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), design.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in checkpoints:
            at_checkpoint(step, mass)
            mass = _nothing()


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows padded on the right: [rows, longest] token ids, attention mask, labels (shifted, -100 where there is none)
    and whether a label is a planted conflict."""
    longest = max(len(row.tokens.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, _IGNORED)
    planted = torch.zeros_like(ids, dtype=torch.bool)
    for line, row in enumerate(rows):
        tokens = torch.tensor(row.tokens.input_ids)
        ids[line, : len(tokens)] = tokens
        mask[line, : len(tokens)] = 1
        for start, end in row.tokens.answers:
            labels[line, start - 1 : end - 1] = tokens[start:end]
        planted[line, [place - 1 for place in row.planted]] = True
    return ids, mask, labels, planted


def gradient_mass(logits: Tensor, out: TokenLoss, planted: Tensor, config: EAFTConfig) -> Mass:
    """Sums over tokens of ``weight * ||softmax - onehot||``, the norm of the gradient at the logits.

    Args:
        logits: [tokens, V] float32.
        out: the loss at them.
        planted: [tokens] bool.
        config: the method, for its thresholds of a confident conflict.
    """
    # sum p^2 - 2 p_y + 1, with sum p^2 = e^(logsumexp 2z - 2 logsumexp z)
    squares = (torch.logsumexp(2 * logits, -1) - 2 * torch.logsumexp(logits, -1)).exp()
    norm = (squares - 2 * torch.exp(-out.cross_entropy) + 1).clamp_min(0).sqrt().double()
    ratio = out.entropy / config.entropy_normalizer(logits.shape[-1])
    masks = {
        "all": torch.ones_like(planted),
        "planted": planted,
        "confident": is_conflict(out.cross_entropy, ratio, config),
    }
    weights = {"sft": torch.ones_like(ratio), "eaft": ratio, "own": out.weight}
    sums = {
        name: {kind: float((weight * norm)[masks[kind]].sum()) for kind in KINDS} for name, weight in weights.items()
    }
    return sums | {"tokens": {kind: float(masks[kind].sum()) for kind in KINDS}}


def _nothing() -> Mass:
    return {name: dict.fromkeys(KINDS, 0.0) for name in ("sft", "eaft", "own", "tokens")}


def _add(total: Mass, more: Mass) -> None:
    for name, kinds in more.items():
        for kind, value in kinds.items():
            total[name][kind] += value
