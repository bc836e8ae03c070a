"""The same measures on a GPU. What they are is tested on the CPU (test_measures.py)."""

from __future__ import annotations

import pytest

from nemo_eaft.compare.drift import reference, sample
from nemo_eaft.compare.measure import Task, measure
from nemo_eaft.compare.probe import Question
from nemo_eaft.data import Tokens
from tests.compare.models import pair


@pytest.mark.gpu
def test_a_gpu_measures_what_the_cpu_measures() -> None:
    base, tuned = pair()
    texts = sample(base, 3, count=4, length=10, seed=0, end=None)
    rows = [Tokens(text, [(4, 10)]) for text in texts]
    task = Task(rows, texts, texts, [Question(text[:4], [[5], [6, 7]], 0) for text in texts])
    found = []
    for device in ("cpu", "cuda"):
        kept = reference(base.to(device), texts)
        found.append(measure(tuned.to(device), task, kept.__getitem__))
    for name, sums in found[0].items():
        assert found[1][name].mean == pytest.approx(sums.mean, rel=1e-3, abs=1e-4), name
    half = measure(tuned.bfloat16(), task, kept.__getitem__)
    assert half["target"].mean == pytest.approx(found[0]["target"].mean, rel=0.05)
    base.to("cpu")
