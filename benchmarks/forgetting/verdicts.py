"""Which runs are compared, and what comes out: the one comparison that the study was made for, and all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.forgetting import design, plan, results
from benchmarks.forgetting.results import BASE, Line
from nemo_eaft.compare.matching import Match, Matching, match
from nemo_eaft.compare.record import MEASURES
from nemo_eaft.compare.report import as_text, by_chance, finding, judged, of_one_seed

FORGETTING = tuple(name for name, each in MEASURES.items() if each.forgetting is not None)


@dataclass(frozen=True)
class Compared:
    """Comparisons of one setting; None where there is nothing to compare."""

    chosen: Matching | None
    """Each method at its chosen learning rate, with all its seeds."""
    all_rates: Matching | None
    """Each method at the best of all learning rates at a level, with the seed of the tuning."""
    one_rate: Matching | None
    """Each method at the learning rate that is chosen for the reference, with the seed of the tuning."""

    def all(self) -> list[Matching]:
        return [each for each in (self.chosen, self.all_rates, self.one_rate) if each is not None]


def compare(setting: str, lines: Sequence[Line], rates: Mapping[str, float]) -> Compared:
    """lines: of the setting; rates: the chosen ones of the methods whose tuning is complete."""
    return Compared(
        _match(at_chosen(lines, rates)),
        _match(_tuned(lines)) if setting in design.TUNED_ON else None,
        _match(_at_one_rate(lines, rates)) if setting in design.TUNED_ON else None,
    )


def at_chosen(lines: Iterable[Line], rates: Mapping[str, float]) -> list[Line]:
    """The base model and each method at its chosen learning rate; all lines of a method for which none is chosen."""
    return [
        line
        for line in lines
        if line.method == BASE or line.learning_rate == rates.get(line.method, line.learning_rate)
    ]


def _tuned(lines: Sequence[Line]) -> list[Line]:
    """Those of the tuning, of the methods that have been tried with every learning rate."""
    first = [line for line in lines if line.method == BASE or line.seed == 0]
    tried = {
        method: {line.learning_rate for line in first if line.method == method} for method in (*design.METHODS, BASE)
    }
    return [line for line in first if line.method == BASE or tried[line.method] >= set(design.RATES)]


def _at_one_rate(lines: Sequence[Line], rates: Mapping[str, float]) -> list[Line]:
    """Empty where every method has chosen that of the reference, so that nothing new is compared."""
    rate = rates.get(design.REFERENCE)
    if rate is None or set(rates.values()) == {rate}:
        return []
    return [line for line in lines if line.method == BASE or (line.seed == 0 and line.learning_rate == rate)]


def _match(lines: Sequence[Line]) -> Matching | None:
    # In the order of the design, whichever was run first: a method has the same colour in every picture.
    order = (BASE, *design.METHODS)
    courses = results.courses(sorted(lines, key=lambda line: order.index(line.method)))
    methods = {course.method for course in courses}
    if design.REFERENCE not in methods or len(methods) == 1:
        return None
    return match(courses, design.REFERENCE, design.DRAWS)


def primary(compared: Mapping[str, Compared], rates: Mapping[str, float]) -> str:
    """The sentence of the comparison that was named before the runs."""
    setting, method, measure = design.PRIMARY
    matching = compared[setting].chosen
    if matching is None or method not in matching.seeds:
        return "Not measured yet."
    each = matching.of(method, measure)
    both = (method, design.REFERENCE)
    whole = all(name in rates and matching.seeds[name] == len(design.SEEDS[setting]) for name in both)
    return finding(each, matching) + ("" if whole else " (Not final: some of its runs are still to be made.)")


def secondary(compared: Mapping[str, Compared]) -> list[str]:
    """How many other comparisons there are, how they came out, and what chance would do."""
    others = [
        (each, of_one_seed(each, matching))
        for setting, of_setting in compared.items()
        for matching in of_setting.all()
        for each in judged(matching)
        if (setting, each.method, each.measure) != design.PRIMARY or matching is not of_setting.chosen
    ]
    if not others:
        return []
    signs = [each.mean_difference.sign for each, _ in others if each.mean_difference is not None]
    return [
        f"All others are secondary. {by_chance(len(others), sum(alone for _, alone in others))} Here "
        f"{signs.count(-1)} say *forgets less*, "
        f"{signs.count(1)} *forgets more* and {signs.count(0)} *not shown to differ*.",
        "",
        f"They do not count one by one. All methods of a setting are compared with the same runs of "
        f"{design.REFERENCE}, so that one unlucky run of it moves every one of them the same way; the "
        f"{len(FORGETTING)} measures of a method are of the same runs, and two of them of the same questions; with the "
        f"same seed the settings share rows; and the comparisons over all learning rates and at one learning rate use "
        f"runs of the others again. A pattern over settings says more than their number.",
    ]


def learning_rates(lines: Sequence[Line]) -> list[str]:
    """How each method's learning rate was chosen, and where the grid ends."""
    chosen = plan.chosen_rates(lines)
    if not chosen:
        return ["No learning rate is chosen yet."]
    targets = plan.tuned_targets(lines)
    text = [
        f"Lowest target cross-entropy of a run with seed 0, mean over {' and '.join(design.TUNED_ON)}, nats per token:",
        "",
        "| method | " + " | ".join(f"{rate:g}" for rate in design.RATES) + " | chosen |",
        "| --- " * (len(design.RATES) + 2) + "|",
    ]
    edge = {min(design.RATES): "the lowest", max(design.RATES): "the highest"}
    for method, rate in chosen.items():
        means = [targets[method][each] for each in design.RATES]
        said = f"{rate:g}" + (f", {edge[rate]} that was tried" if rate in edge else "")
        text.append(f"| {method} | " + " | ".join(f"{mean:.4f}" for mean in means) + f" | {said} |")
    at_edge = [method for method, rate in chosen.items() if rate in edge]
    if at_edge:
        text += [
            "",
            f"At the edge of the grid: {', '.join(at_edge)}. A rate beyond it might have reached a lower target.",
        ]
    who = "every method" if len(chosen) == len(design.METHODS) else "these methods"
    text += [
        "",
        f"The chosen rates are the same for {who}, so they play no part in the differences between them."
        if len(set(chosen.values())) == 1
        else "Where two methods have chosen different rates, method and learning rate are compared together. The tuned "
        "settings are therefore compared twice more below: over all rates, and at one.",
    ]
    return text


def table(matching: Matching) -> list[str]:
    """Verdicts of one matching, a method in each line."""
    methods = dict.fromkeys(each.method for each in matching.matches)
    heads = [MEASURES[name].title.replace("|", "\\|") for name in FORGETTING]
    text = [f"| method | range of target | {' | '.join(heads)} |", "| --- " * (len(FORGETTING) + 2) + "|"]
    for method in methods:
        matches = [matching.of(method, measure) for measure in FORGETTING]
        span = matches[0].span
        where = "none" if span is None else f"{span[1]:.3f} to {span[0]:.3f}"
        text.append(f"| {method} | {where} | {' | '.join(_cell(each) for each in matches)} |")
    return text


def _cell(each: Match) -> str:
    if each.mean_difference is None:
        return ""
    said = {-1: "**less** ", 0: "", 1: "**more** "}[each.mean_difference.sign]
    return f"{said}{as_text(each.mean_difference)}" + (" (sign changes)" if each.turning else "")


def overview(compared: Mapping[str, Compared], rates: Mapping[str, float], measure: str) -> list[str]:
    """One measure, every method at its chosen learning rate in every setting; those without one are left out. Where
    seeds are missing it is said."""
    settings = [name for name, each in compared.items() if each.chosen is not None]
    heads = [f"{name}, {_seeds(len(design.SEEDS[name]))}" for name in settings]
    text = [f"| method | {' | '.join(heads)} |", "| --- " * (len(settings) + 1) + "|"]
    for method in (name for name in design.METHODS if name in rates and name != design.REFERENCE):
        text.append(
            f"| {method} | {' | '.join(_found(compared[name].chosen, name, method, measure) for name in settings)} |"
        )
    return text


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _found(matching: Matching | None, setting: str, method: str, measure: str) -> str:
    if matching is None or method not in matching.seeds:
        return ""
    each = matching.of(method, measure)
    seeds = min(matching.seeds[method], matching.seeds[design.REFERENCE])
    planned = seeds == len(design.SEEDS[setting])
    return (_cell(each) or "no common range") + ("" if planned else f" ({_seeds(seeds)} so far)")
