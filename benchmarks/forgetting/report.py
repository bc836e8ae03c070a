"""README.md and its pictures, from the JSON lines alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.forgetting import design, plan, results, verdicts
from benchmarks.forgetting.how import how, what
from benchmarks.forgetting.mass import draw, mass
from benchmarks.forgetting.results import BASE, Line
from benchmarks.forgetting.verdicts import FORGETTING, Compared
from nemo_eaft.atomic import replacing
from nemo_eaft.compare.matching import Matching
from nemo_eaft.compare.plot import write_figures
from nemo_eaft.compare.record import MEASURES
from nemo_eaft.compare.report import findings, levels_table

README = "README.md"
_PUSH = "push.png"
_DIFFERENCE = f"Mean difference from {design.REFERENCE} at equal target quality, with its interval of 95 %"
_SIGNS = "Below 0: it forgets less; **less** and **more** where the interval says so."
Lines = Mapping[str, Sequence[Line]]
"""Setting -> its lines."""


def write(folder: Path) -> list[Path]:
    """Write the page and its pictures beside the folder of the results; the same lines give the same page."""
    home = folder.parent
    lines, rates, compared = _compared(folder)
    written = []
    for setting, own in lines.items():
        matching = compared[setting].chosen
        if matching is None:
            continue
        pictures = home / "figures" / setting
        pictures.mkdir(parents=True, exist_ok=True)
        written += write_figures(results.courses(own), matching, pictures, setting)
        if draw(own, rates, setting, pictures / _PUSH):
            written.append(pictures / _PUSH)
    with replacing(home / README) as temporary:
        temporary.write_text(_page(folder, lines, rates, compared), encoding="utf-8")
    return [home / README, *written]


def page(folder: Path) -> str:
    """The page in Markdown."""
    return _page(folder, *_compared(folder))


def _compared(folder: Path) -> tuple[Lines, dict[str, float], dict[str, Compared]]:
    lines = {setting: results.read(folder, setting) for setting in design.SETTINGS}
    rates = plan.chosen_rates([line for each in lines.values() for line in each])
    return lines, rates, {setting: verdicts.compare(setting, own, rates) for setting, own in lines.items()}


def _page(folder: Path, by_setting: Lines, rates: Mapping[str, float], compared: Mapping[str, Compared]) -> str:
    lines = [line for each in by_setting.values() for line in each]
    done = sum(line.method != BASE for line in lines)
    setting, method, measure = design.PRIMARY
    text = [
        "# When does EAFT forget less?",
        "",
        "Written by `python -m benchmarks.forgetting --report` from the lines in `results/`; the sentences under *What "
        "was found* too: each comes from an interval, whichever way it points.",
        "",
        "## The question",
        "",
        f"Named before the first run: does `{method}` forget less than `{design.REFERENCE}` in `{setting}`, by "
        f"{MEASURES[measure].title}, at equal target quality?",
        "",
        f"**{verdicts.primary(compared, rates)}**",
        "",
        "## All settings at once",
        "",
        *_overviews(compared, rates),
        "",
        "## How many comparisons",
        "",
        *verdicts.secondary(compared),
        "",
        *how(folder),
        "",
        f"{done} of {plan.total()} runs are made.",
        "",
        "## Learning rates",
        "",
        *verdicts.learning_rates(lines),
    ]
    for name, own in by_setting.items():
        text += ["", f"## {name}", "", what(name, folder), "", *_setting(name, own, rates, compared[name])]
    text += ["", "## Every run", "", *_runs(lines)]
    return "\n".join(text).rstrip() + "\n"


def _setting(setting: str, lines: Sequence[Line], rates: Mapping[str, float], compared: Compared) -> list[str]:
    matching = compared.chosen
    if matching is None:
        return ["Not measured yet."]
    text = ["### What was found", "", _mean(matching), "", *verdicts.table(matching), ""]
    sentences = (f"* {each}" for each in findings(matching))
    text += ["<details><summary>In words</summary>", "", *sentences, "", "</details>"]
    for measure in FORGETTING:
        text += ["", f"![{MEASURES[measure].title} of {setting}](figures/{setting}/{measure}.png)"]
    if compared.all_rates is not None:
        text += [
            "",
            "### Over all learning rates",
            "",
            f"Seed 0: at each level the learning rate that forgets least, of {', '.join(map(_number, design.RATES))}; "
            f"mean difference from {design.REFERENCE} over rows alone.",
            "",
            *verdicts.table(compared.all_rates),
        ]
    if compared.one_rate is not None:
        text += [
            "",
            "### At one learning rate",
            "",
            f"Seed 0, every method at {_number(rates[design.REFERENCE])}, which is {design.REFERENCE}'s; mean "
            f"difference from {design.REFERENCE}, over rows alone.",
            "",
            *verdicts.table(compared.one_rate),
        ]
    text += ["", "### How hard conflicts push", "", *mass(lines, rates)]
    if any(point["mass"]["tokens"]["planted"] for line in lines if line.method != BASE for point in line.points):
        text += ["", f"![Push of a planted token in {setting}](figures/{setting}/{_PUSH})"]
    details = ["<details><summary>Every level</summary>", "", *levels_table(matching), "", "</details>"]
    return [*text, "", "### At equal target quality", "", *details]


def _mean(matching: Matching) -> str:
    counted = ", ".join(f"{method} {count}" for method, count in matching.seeds.items())
    return f"{_DIFFERENCE}. {_SIGNS} Seeds: {counted}."


def _overviews(compared: Mapping[str, Compared], rates: Mapping[str, float]) -> list[str]:
    """For each measure of forgetting a table; the one that the study was made for stands first."""
    text = []
    _, _, first = design.PRIMARY
    for measure in sorted(FORGETTING, key=lambda name: name != first):
        table = verdicts.overview(compared, rates, measure)
        if len(table) > 2:
            shown = MEASURES[measure]
            text += [f"{shown.title[0].upper()}{shown.title[1:]}, {shown.unit}:", "", *table, ""]
    if not text:
        return ["Not measured yet."]
    return [
        f"{_DIFFERENCE}, each method at its chosen learning rate. {_SIGNS} *Sign changes*: at some level of quality it "
        f"is the other way round. With one seed the interval is over rows alone, "
        f"and another seed may say something else. The ranges of quality are not the same for all methods: where "
        f"{design.REFERENCE} and the method both have been, as listed for each setting below.",
        "",
        *text[:-1],
    ]


def _number(rate: float) -> str:
    return f"{rate:g}"


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
