"""Which cases run, and how often."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.cases import DTYPES, Case
from benchmarks.contenders import CONTENDERS

VOCABULARIES = (32000, 49152, 151936, 262144)
SHARDS = (1, 2, 4, 8)
ENTROPIES = (20, None)

COMPILED = tuple(each.name for each in CONTENDERS if each.compiled)


class Step(NamedTuple):
    case: Case
    rounds: int
    left_out: tuple[str, ...] = ()
    """Names of contenders that take too long here for what they tell."""


def plan(device: torch.device, quick: bool) -> list[Step]:
    """The cases with a target, then, unless ``quick``, every vocabulary, shard, type and entropy."""
    if device.type == "cuda":
        return _gpu_plan(quick)
    left_out = (*COMPILED, "four-products") if quick else ()
    # A round of the output layer takes several times as long as one of the loss.
    steps = [
        Step(case, (5 if quick else 9) if case.hidden is None else (3 if quick else 5), left_out) for case in CPU_CASES
    ]
    if quick:
        return steps
    # A CPU streams a few tokens as it streams many: one row alone is larger than the caches near a core.
    return steps + [Step(case, 3, COMPILED) for case in sweep_cases(64)]


def _gpu_plan(quick: bool) -> list[Step]:
    steps = [Step(case, 20 if quick else 50) for case in GPU_CASES]
    if quick:
        return steps
    # No compiled contender has an entropy: once for each size is enough.
    sweep = [Step(case, 20, COMPILED if case.top_k is None else ()) for case in sweep_cases(8192)]
    return steps + [step for step in sweep if step.case not in GPU_CASES]


def sweep_cases(tokens: int) -> list[Case]:
    return [
        Case(tokens=tokens, vocab=vocab, shards=shards, dtype=dtype, top_k=top_k)
        for vocab in VOCABULARIES
        for shards in SHARDS
        for dtype in DTYPES
        for top_k in ENTROPIES
    ]


CPU_CASES = (
    *(Case(tokens=512, vocab=151936, dtype=dtype) for dtype in DTYPES),
    *(Case(tokens=1024, vocab=49152, hidden=576, dtype=dtype) for dtype in DTYPES),
)

GPU_CASES = (
    Case(tokens=8192, vocab=151936, dtype="bfloat16"),
    Case(tokens=8192, vocab=151936, shards=8, dtype="bfloat16"),
    Case(tokens=8192, vocab=151936, hidden=5120, dtype="bfloat16"),
)
