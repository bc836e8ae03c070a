"""Tables in Markdown, and the same as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nemo_eaft.compare.matching import Interval, Match, Matching, forgetting
from nemo_eaft.compare.record import MEASURES, Path

_LESS, _MORE = "forgets less", "forgets more"


def findings(matching: Matching) -> list[str]:
    """One sentence for each method and measure of forgetting, from the intervals alone."""
    sentences = []
    one_seed = all(count == 1 for count in matching.seeds.values())
    over = "rows alone: one seed" if one_seed else "seeds and rows"
    for each in matching.matches:
        if MEASURES[each.measure].forgetting is None:
            continue
        title = MEASURES[each.measure].title
        if each.mean_difference is None:
            sentences.append(
                f"{each.method} against {matching.reference}, {title}: the curves do not overlap, for one of them "
                f"never got below the base model's target cross-entropy with every seed; nothing is said."
            )
            continue
        sign = each.mean_difference.sign
        verdict = "is not shown to differ" if sign == 0 else _LESS if sign < 0 else _MORE
        figure = f"{_interval(each.mean_difference)} {MEASURES[each.measure].unit}"
        sentences.append(
            f"{each.method} {verdict} {'from' if sign == 0 else 'than'} {matching.reference} by {title}: mean "
            f"difference at equal target quality {figure} (over {over})."
        )
    return sentences or ["There is one method, so nothing is compared; measured checkpoints are below."]


def markdown(paths: Sequence[Path], matching: Matching, figures: Sequence[str] = ()) -> list[str]:
    """The tables: what was found, levels, areas, and every checkpoint."""
    lines = ["### What was found", "", *(f"* {sentence}" for sentence in findings(matching)), ""]
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
    head = ("method", "measure", "part of the way", "target cross-entropy", matching.reference, "method", "difference")
    lines = [
        f"Against {matching.reference}; differences are method minus {matching.reference}, in brackets 95 % of "
        f"{matching.draws} bootstrap draws. Learning rates that take part, and seeds for each: {rates}.",
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
        return [_row(match.method, name, "no overlap", "", "", "", "")]
    lines = [
        _row(
            match.method,
            name,
            f"{level.part:.0%}",
            f"{level.target:.3f}",
            f"{level.reference:.4f}",
            f"{level.value:.4f}",
            _interval(level.difference),
        )
        for level in match.levels
    ]
    span = f"{match.span[0]:.3f} to {match.span[1]:.3f}"
    lines.append(_row(match.method, name, "mean", span, "", "", _interval(match.mean_difference)))
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


def _interval(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:+.4f} [no interval]"
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def as_mapping(paths: Sequence[Path], matching: Matching) -> dict[str, Any]:
    """Everything in the tables as plain values."""
    return {
        "matching": asdict(matching),
        "findings": findings(matching),
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
