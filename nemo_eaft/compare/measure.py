"""All measures of one model, on one set of rows, samples, text and questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_eaft.compare.drift import Reference, measure_drift
from nemo_eaft.compare.probe import Question, Scoring, measure_probe
from nemo_eaft.compare.record import Measures
from nemo_eaft.compare.target import measure_target
from nemo_eaft.compare.text import measure_text
from nemo_eaft.data import Tokens


@dataclass(frozen=True)
class Task:
    """What is measured on; an empty list leaves a measure out."""

    rows: Sequence[Tokens]
    samples: Sequence[Sequence[int]] = ()
    """Texts that the base model wrote (:func:`nemo_eaft.compare.drift.sample`)."""
    pieces: Sequence[Sequence[int]] = ()
    """Windows of general text (:func:`nemo_eaft.compare.text.windows`)."""
    questions: Sequence[Question] = ()
    scoring: Scoring = "full"
    names: dict[str, Any] = field(default_factory=dict)
    """Plain values that say where all of it came from."""


def measure(model: Any, task: Task, base: Reference) -> Measures:
    """Measure a causal model of ``transformers``.

    Args:
        model: on its device, in the dtype to measure in.
        task: what on.
        base: the base model's log-probabilities of ``task.samples``.
    """
    found = measure_target(model, task.rows)
    if task.samples:
        found["drift"] = measure_drift(model, task.samples, base)
    if task.pieces:
        found["text"] = measure_text(model, task.pieces)
    if task.questions:
        found |= measure_probe(model, task.questions, task.scoring)
    return found


def load_model(folder: Path, dtype: str, device: str, trust_remote_code: bool = False) -> Any:
    """A model of ``transformers`` in evaluation mode.

    dtype: ``float32`` or ``bfloat16``; device: ``cpu`` or ``cuda``.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
    )
    return model.to(device).eval()
