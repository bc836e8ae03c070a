"""How hard planted conflicts, confident ones and the other tokens push: tables and a picture, from the JSON lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.forgetting import design
from benchmarks.forgetting.results import BASE, Line
from benchmarks.forgetting.training import KINDS, Mass
from benchmarks.forgetting.verdicts import at_chosen
from nemo_eaft.compare.plot import MARK, STYLES, blank, legend, save

PUSH = (
    "push of a token: the norm of its gradient at the logits, weight x ||softmax - onehot||; of several tokens their "
    "sum. It is a sum of norms, not the norm of a sum: what cancels between tokens, what the layers below make of it, "
    "the clipping of gradients and AdamW, which divides by the gradient's own size, are left out. *As SFT*: the same "
    "tokens at the same moment with every weight 1, along the path of the method's own run. That says what the weights "
    "take away there, not what SFT would have done: its own runs are on another path, where the model has learned "
    "other things by then. *Confident*: probability below 0.1 and entropy below 0.2 of its highest, under the model as "
    "it is at that step, so these are other tokens in each run, and fewer once they are learned"
)
"""What the figures of this module are, for the page."""


def mass(lines: Sequence[Line], rates: Mapping[str, float]) -> list[str]:
    """The tables of one setting; lines: its own; rates: the chosen ones."""
    runs = _runs(lines, rates)
    if not runs.get(design.REFERENCE):
        return ["Not measured yet."]
    name = _kind(runs)
    rest = "clean" if name == "planted" else "other"
    reference = design.REFERENCE
    text = []
    _, method, _ = design.PRIMARY
    if method in runs:
        mine, theirs = (_total(lines) for lines in _paired(runs[method], runs[reference]))
        text += [
            f"In the runs of {method} all {name} tokens together push "
            f"{_ratio(mine['own'][name], theirs['own'][name]) or '(none)'} times as hard as in those of {reference}, "
            f"all {rest} ones {_ratio(_rest(mine, 'own', name), _rest(theirs, 'own', name))} times.",
            "",
        ]
    text += [
        f"Each method's own runs at its chosen learning rate against {reference}'s own runs, with the same rows in the "
        f"same steps:",
        "",
        f"| method | {name} push, {reference} = 1 | {rest} push, {reference} = 1 | mean push of a {name} token | "
        f"of the {rest} ones | {name} share of all push | learning rates | runs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, own in runs.items():
        mine, theirs = (_total(lines) for lines in _paired(own, runs[design.REFERENCE]))
        count = mine["tokens"][name]
        cells = [
            _ratio(mine["own"][name], theirs["own"][name]),
            _ratio(_rest(mine, "own", name), _rest(theirs, "own", name)),
            _ratio(mine["own"][name], count),
            _ratio(_rest(mine, "own", name), _rest(mine, "tokens", name)),
            _ratio(mine["own"][name], mine["own"]["all"]),
            _rates(own, rates.get(method)),
            str(len(_paired(own, runs[design.REFERENCE])[0])),
        ]
        text.append(f"| {method} | {' | '.join(cells)} |")
    return [*text, "", *_by_steps(runs, name)]


def _paired(own: Sequence[Line], others: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """The runs of both with the same seeds, for these have the same rows in the same steps; where one of them has
    several learning rates, those with the same rate."""
    several = any(len({line.learning_rate for line in each}) > 1 for each in (own, others))
    keys = [[(line.seed, line.learning_rate if several else None) for line in each] for each in (own, others)]
    common = {*keys[0]} & {*keys[1]}
    mine, theirs = (
        [line for line, key in zip(each, of_each, strict=True) if key in common]
        for each, of_each in zip((own, others), keys, strict=True)
    )
    return mine, theirs


def _by_steps(runs: Mapping[str, Sequence[Line]], kind: str) -> list[str]:
    kinds = dict.fromkeys((kind, "confident"))
    heads = [f"{each}, {how}" for each in kinds for how in ("as SFT", "own")]
    text = [
        "<details><summary>Step by step</summary>",
        "",
        f"Mean push of a {kind} token, and shares in the push of all.",
        "",
        f"| method | steps | {kind} tokens | mean push, as SFT | own | share of " + " | share of ".join(heads) + " |",
        "| --- " * (5 + len(heads)) + "|",
    ]
    for method, own in runs.items():
        for number, (first, last) in enumerate(_spans(own)):
            total = _total(own, number)
            count = total["tokens"][kind]
            shares = [_ratio(total[how][each], total[how]["all"]) for each in kinds for how in ("sft", "own")]
            pushes = [_ratio(total[how][kind], count) for how in ("sft", "own")]
            steps = f"{first} to {last}" if first < last else f"{last}"
            text.append(f"| {method} | {steps} | {count:.0f} | {' | '.join(pushes + shares)} |")
    return [*text, "", "</details>"]


def draw(lines: Sequence[Line], rates: Mapping[str, float], setting: str, png: Path) -> bool:
    """The mean push of a planted token over the steps, each method's own runs; 8 x 5 inch at 120 dots per inch. False,
    and nothing is written, where nothing is planted or measured."""
    runs = _runs(lines, rates)
    if not runs.get(design.REFERENCE) or _kind(runs) != "planted":
        return False
    figure, axes = blank(
        f"{setting}: how hard a planted conflict pushes, in each method's own runs",
        "step (middle of the steps between two checkpoints)",
        "mean push of a planted token: weight x gradient norm at the logits",
    )
    for number, method in enumerate(design.METHODS):
        if not runs.get(method):
            continue
        colour, mark, dash = STYLES[number % len(STYLES)]
        where, pushes = [], []
        for place, (first, last) in enumerate(_spans(runs[method])):
            total = _total(runs[method], place)
            if total["tokens"]["planted"]:
                where.append((first + last) / 2)
                pushes.append(total["own"]["planted"] / total["tokens"]["planted"])
        axes.plot(where, pushes, color=colour, marker=mark, **MARK, linewidth=2, linestyle=dash, label=method)
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(0, design.STEPS + 1, 4))
    legend(axes)
    save(figure, png)
    return True


def _runs(lines: Sequence[Line], rates: Mapping[str, float]) -> dict[str, list[Line]]:
    """Method -> its runs at the chosen learning rate; all of them where none is chosen yet."""
    chosen = [line for line in at_chosen(lines, rates) if line.method != BASE]
    found = {method: [line for line in chosen if line.method == method] for method in design.METHODS}
    return {method: own for method, own in found.items() if own}


def _kind(runs: Mapping[str, Sequence[Line]]) -> str:
    """Of which tokens is spoken: planted ones; confident conflicts where nothing is planted."""
    return "planted" if any(_total(own)["tokens"]["planted"] for own in runs.values()) else "confident"


def _total(lines: Sequence[Line], number: int | None = None) -> Mass:
    """Sums over runs, of the steps before one checkpoint or of all."""
    masses = [
        point["mass"] for line in lines for place, point in enumerate(line.points) if number is None or place == number
    ]
    return {
        name: {kind: sum(each[name][kind] for each in masses) for kind in KINDS}
        for name in ("sft", "eaft", "own", "tokens")
    }


def _spans(lines: Sequence[Line]) -> list[tuple[int, int]]:
    """First and last of the steps before each checkpoint."""
    steps = [0, *(point["step"] for point in lines[0].points)]
    return [(before + 1, step) for before, step in pairwise(steps)]


def _rest(total: Mass, name: str, kind: str) -> float:
    return total[name]["all"] - total[name][kind]


def _ratio(value: float, by: float) -> str:
    return f"{value / by:.3f}" if by else ""


def _rates(lines: Sequence[Line], chosen: float | None) -> str:
    if chosen is not None:
        return f"{chosen:g}"
    return ", ".join(f"{rate:g}" for rate in sorted({line.learning_rate for line in lines})) + " (none chosen yet)"
