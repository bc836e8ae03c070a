"""Tables in Markdown, and the same as plain values for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nemo_eaft.compare.matching import CONFIDENCE, Interval, Match, Matching, forgetting
from nemo_eaft.compare.record import MEASURES, Path

_LESS, _MORE = "forgets less", "forgets more"


def findings(matching: Matching) -> list[str]:
    """One sentence for each method and measure of forgetting, from the intervals alone."""
    sentences = [finding(each, matching) for each in matching.matches if MEASURES[each.measure].forgetting]
    return sentences or ["There is one method, so nothing is compared; measured checkpoints are below."]


def finding(match: Match, matching: Matching) -> str:
    """What the interval of one comparison says."""
    method, reference = match.method, matching.reference
    shown = MEASURES[match.measure]
    if match.mean_difference is None or match.span is None:
        return (
            f"{method} against {reference}, {shown.title}: there is no common range of target cross-entropy between "
            f"trained checkpoints, for {match.why_not}; nothing is said."
        )
    sign = match.mean_difference.sign
    verdict = "is not shown to differ" if sign == 0 else _LESS if sign < 0 else _MORE
    low, high = match.span
    where = f"from {high:.3f} to {low:.3f}" if low < high else f"at {low:.3f}"
    text = (
        f"{method} {verdict} {'from' if sign == 0 else 'than'} {reference} by {shown.title}: mean difference at equal "
        f"target quality {as_text(match.mean_difference)} {shown.unit} ({where} nats of target cross-entropy; "
        f"{_over(method, reference, matching.seeds)})"
    )
    if match.turning:
        text += "; the sign changes along the way: " + ", ".join(
            f"{as_text(level.difference)} at {level.target:.3f}" for level in match.turning
        )
    return f"{text}."


def _over(method: str, reference: str, seeds: Mapping[str, int]) -> str:
    mine, theirs = seeds[method], seeds[reference]
    if mine == theirs:
        return "over rows alone: one seed" if mine == 1 else f"over rows and {mine} seeds"
    return f"over rows and seeds: {mine} of {method}, {theirs} of {reference}"


def judged(matching: Matching) -> list[Match]:
    """The comparisons with an interval from which something is said."""
    return [
        each
        for each in matching.matches
        if MEASURES[each.measure].forgetting
        and each.mean_difference is not None
        and each.mean_difference.low is not None
    ]


def of_one_seed(match: Match, matching: Matching) -> bool:
    """Whether one of the two has a single seed, so that the interval leaves out what another would do."""
    return min(matching.seeds[match.method], matching.seeds[matching.reference]) == 1


def by_chance(count: int, one_seed: int) -> str:
    """How much of what was found would be found where there is nothing.

    one_seed: how many of so many comparisons are of one seed.
    """
    text = (
        f"{count} comparisons have an interval of {100 * CONFIDENCE:.0f} %, none made wider for their number: if no "
        f"method differed at all, about {(1 - CONFIDENCE) * count:.1f} of them would be on one side of 0 by chance."
    )
    if one_seed:
        are = "is" if one_seed == 1 else "are"
        text += f" {one_seed} of them {are} of one seed, whose luck is in no interval: there it would be more."
    return text


def comparisons(matching: Matching) -> list[str]:
    """What must be known of several comparisons together; nothing where there is one."""
    found = judged(matching)
    return [by_chance(len(found), sum(of_one_seed(each, matching) for each in found))] if len(found) > 1 else []


def markdown(paths: Sequence[Path], matching: Matching, figures: Sequence[str] = ()) -> list[str]:
    """The tables: what was found, levels, areas, and every checkpoint."""
    lines = ["### What was found", "", *(f"* {sentence}" for sentence in findings(matching)), ""]
    for sentence in comparisons(matching):
        lines += [sentence, ""]
    for figure in figures:
        lines += [f"![{figure}]({figure})", ""]
    lines += ["### At equal target quality", "", *levels_table(matching)]
    return [*lines, "", "### Every checkpoint", "", *_points(paths), ""]


def levels_table(matching: Matching) -> list[str]:
    """Every method against the reference at the levels of target cross-entropy, and in the mean over them."""
    rates = "; ".join(
        f"{method}: {', '.join('unknown' if rate is None else f'{rate:g}' for rate in rates)} "
        f"({matching.seeds[method]})"
        for method, rates in matching.learning_rates.items()
    )
    head = (
        "method",
        "measure",
        "part of the range",
        "target cross-entropy",
        matching.reference,
        "method",
        "difference",
    )
    lines = [
        f"Against {matching.reference}; differences are method minus {matching.reference}, in brackets 95 % of "
        f"{matching.draws} bootstrap draws and what coarse checkpoints leave open. The common range of target "
        f"cross-entropy begins (0%) at the first trained checkpoint that is farther, of all runs of both, and ends "
        f"(100%) where both have been. Learning rates that take part, and seeds for each: {rates}.",
        "",
        _row(*head),
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in matching.matches:
        lines += _levels(each)
    return lines


def _levels(match: Match) -> list[str]:
    name = _name(match.measure)
    if match.span is None or match.mean_difference is None:
        return [_row(match.method, name, "no common range", "", "", "", "")]
    lines = [
        _row(
            match.method,
            name,
            f"{level.part:.0%}",
            f"{level.target:.3f}",
            f"{level.reference:.4f}",
            f"{level.value:.4f}",
            as_text(level.difference),
        )
        for level in match.levels
    ]
    span = f"{match.span[0]:.3f} to {match.span[1]:.3f}"
    lines.append(_row(match.method, name, "mean", span, "", "", as_text(match.mean_difference)))
    return lines


def _points(paths: Sequence[Path]) -> list[str]:
    measures = list(paths[0].points[0])
    lines = [
        _row("run", "method", "learning rate", "seed", "step", *(MEASURES[name].title for name in measures)),
        "| --- " * (5 + len(measures)) + "|",
    ]
    base = paths[0].points[0]
    lines.append(_row("base model", "", "", "", "0", *(f"{base[name].mean:.4f}" for name in measures)))
    for path in paths:
        rate = "" if path.learning_rate is None else f"{path.learning_rate:g}"
        seed = "" if path.seed is None else str(path.seed)
        for step, point in zip(path.steps[1:], path.points[1:], strict=True):
            cells = (f"{point[name].mean:.4f}" for name in measures)
            # A folder of weights does not say after how many steps it was exported.
            done = "" if path.seed is None else str(step)
            lines.append(_row(path.name, path.method, rate, seed, done, *cells))
    return lines


def _row(*cells: str) -> str:
    """A line of a table. A bar in a cell, as KL(base || tuned) has two, would begin another cell."""
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return "|" + "|".join(f" {cell} " if cell else " " for cell in escaped) + "|"


def _name(measure: str) -> str:
    shown = MEASURES[measure]
    how = {"value": "", "rise": "rise of ", "fall": "loss in ", None: ""}[shown.forgetting]
    return f"{how}{shown.title}"


def as_text(interval: Interval) -> str:
    """A value and in brackets its interval."""
    if interval.low is None or interval.high is None:
        return f"{interval.value:+.4f} [no interval]"
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def as_mapping(paths: Sequence[Path], matching: Matching) -> dict[str, Any]:
    """Everything in the tables as plain values."""
    return {
        "matching": asdict(matching),
        "findings": findings(matching),
        "comparisons": len(judged(matching)),
        "runs": [
            {
                "name": path.name,
                "method": path.method,
                "learning_rate": path.learning_rate,
                "seed": path.seed,
                "points": [
                    {"step": step}
                    | {name: sums.mean for name, sums in point.items()}
                    | {
                        f"{name}_forgetting": float(forgetting(path, name)[0, number])
                        for name in point
                        if MEASURES[name].forgetting in ("rise", "fall")
                    }
                    for number, (step, point) in enumerate(zip(path.steps, path.points, strict=True))
                ],
            }
            for path in paths
        ],
    }
