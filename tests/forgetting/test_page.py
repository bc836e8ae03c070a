"""The page that ``python -m benchmarks.forgetting --report`` writes, from made-up lines."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.forgetting import design, report, results
from benchmarks.forgetting.inputs import FILE
from benchmarks.forgetting.results import BASE, Line, Wanted
from tests.forgetting.lines import INPUTS, line


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is looked at as closely as all draws tell."""
    monkeypatch.setattr(design, "DRAWS", 50)


def made(folder: Path, lines: Sequence[Line]) -> Path:
    """A folder of results, with a base model's line for each setting."""
    folder.mkdir(parents=True)
    (folder / FILE).write_text(json.dumps(dataclasses.asdict(INPUTS)))
    for setting in dict.fromkeys(each.setting for each in lines):
        results.append(folder, line(Wanted(setting, BASE, 0.0, 0), 2.0, 0.0))
    for each in lines:
        results.append(folder, each)
    return folder


@pytest.mark.usefixtures("few_draws")
def test_the_page_says_what_the_numbers_say(tmp_path: Path) -> None:
    assert "Not measured yet." in report.page(made(tmp_path / "empty", []))
    lines = []
    for seed in range(3):
        lines.append(line(Wanted("bfcl", "sft", 1e-5, seed), 1.0, 0.8))
        lines.append(line(Wanted("bfcl", "eaft alpha=1", 1e-5, seed), 1.0, 0.2))
        lines.append(line(Wanted("bfcl", "dft", 1e-5, seed), 2.5, 0.2))
    folder = made(tmp_path / "results", lines)
    written = report.write(folder)
    page = (tmp_path / "README.md").read_text()
    assert page == report.page(folder)
    assert "eaft alpha=1 forgets less than sft by drift, KL(base || tuned)" in page
    assert "dft against sft, drift, KL(base || tuned): there is no common range" in page
    assert "| dft | none |  |  |  |  |" in page
    assert page.count("| bfcl | eaft alpha=1 | 1e-05 |") == 3
    assert [path.relative_to(tmp_path).as_posix() for path in written[1:]] == [
        f"figures/bfcl/{name}.png" for name in ("drift", "text", "probe", "answer", "push")
    ]
    assert all(f"({path.relative_to(tmp_path).as_posix()})" in page for path in written[1:])
    # The other way round it says the other thing.
    names = {"sft": "eaft alpha=1", "eaft alpha=1": "sft"}
    swapped = [dataclasses.replace(each, method=names.get(each.method, each.method)) for each in lines]
    assert "eaft alpha=1 forgets more than sft by drift" in report.page(made(tmp_path / "swapped", swapped))


def whole(setting: str, forgets: dict[str, float], best: dict[str, float] | None = None) -> list[Line]:
    """All learning rates at seed 0, and the best one at the others; three checkpoints each, which go farther at it."""
    lines = []
    for method, drift in forgets.items():
        chosen = (best or {}).get(method, 3e-5)
        for rate in design.RATES:
            targets = (1.75, 1.5, 1.0) if rate == chosen else (1.75, 1.5, 1.25)
            factor = 1.0 if rate == chosen else 1.5
            for seed in design.SEEDS[setting] if rate == chosen else (0,):
                lines.append(line(Wanted(setting, method, rate, seed), targets, drift * factor))
    return lines


@pytest.mark.usefixtures("few_draws")
def test_the_question_stands_first_and_the_others_are_counted(tmp_path: Path) -> None:
    forgets = {"mask": 0.8, "sft": 0.8, "eaft alpha=1": 0.2}
    lines = whole("bfcl", forgets) + whole("conflicts-30", forgets)
    page = report.page(made(tmp_path / "results", lines))
    question = page[: page.index("## How\n")]
    assert "does `eaft alpha=1` forget less than `sft` in `conflicts-30`, by cross-entropy of the probe's" in question
    assert "**eaft alpha=1 forgets less than sft by cross-entropy of the probe's right answers" in question
    assert "over rows and 3 seeds).**" in question
    # Two methods, four measures, two settings, at the chosen rates and over all; the primary one is not among them.
    assert "31 comparisons have an interval" in question
    assert "about 1.6 of them" in question
    assert "16 of them are of one seed" in question
    assert "say *forgets less*, 0 *forgets more*" in question
    # All settings at once, the measure of the question first.
    tables = page[page.index("## All settings at once") : page.index("## How many")]
    assert tables.index("Cross-entropy of the probe's right answers, nats per question:") < tables.index("Drift, KL")
    head, _, *rows = tables[tables.index("| method |") :].split("\n\n")[0].splitlines()
    assert head == "| method | bfcl, 3 seeds | conflicts-30, 3 seeds |"
    assert [row.split(" | ")[0] for row in rows] == ["| eaft alpha=1", "| mask"]
    assert rows[0].count("**less** -") == 2
    assert re.fullmatch(r"\| mask( \| \+0\.0000 \[-0\.\d{4}, \+0\.\d{4}\]){2} \|", rows[1])
    setting = page[page.index("## bfcl") : page.index("## conflicts-10")]
    found = setting[setting.index("### What was found") : setting.index("<details>")]
    assert "Mean difference from sft" in found
    assert "Seeds: sft 3, eaft alpha=1 3, mask 3." in found
    assert "| eaft alpha=1 | 1.750 to 1.000 | **less** -" in found
    # In the order of the design, not in that of the lines.
    assert page.index("* eaft alpha=1 forgets less than sft by drift") < page.index("* mask is not shown to differ")
    # A seed that is missing, and it is not final.
    missing = [each for each in lines if (each.setting, each.method, each.seed) != ("conflicts-30", "sft", 2)]
    assert "Not final" not in question
    partly = report.page(made(tmp_path / "partly", missing))
    assert "over rows and seeds: 3 of eaft alpha=1, 2 of sft). (Not final: some of its runs are still" in partly
    assert partly.count("] (2 seeds so far) |") == 8, "two methods, four measures"
    # Without a run of the tuning no learning rate is chosen, and nothing is said of the method.
    untuned = [each for each in missing if (each.method, each.learning_rate) != ("mask", 1e-5)]
    some = report.page(made(tmp_path / "untuned", untuned))
    some = some[some.index("## All settings at once") : some.index("## How many")]
    assert "| eaft alpha=1 |" in some
    assert "| mask |" not in some


@pytest.mark.usefixtures("few_draws")
def test_learning_rate_and_method_are_told_apart(tmp_path: Path) -> None:
    """`mask` forgets as much as `sft` at every rate, but is chosen to run at the highest: the edge is said, and it is
    compared over all rates and at that of `sft` as well."""
    best = {"mask": 1e-4}
    forgets = {"sft": 0.4, "mask": 0.4}
    page = report.page(made(tmp_path / "results", [x for s in design.TUNED_ON for x in whole(s, forgets, best)]))
    assert "| sft | 1.2500 | 1.0000 | 1.2500 | 3e-05 |" in page
    assert "| mask | 1.2500 | 1.2500 | 1.0000 | 0.0001, the highest that was tried |" in page
    assert "At the edge of the grid: mask." in page
    setting = page[page.index("## conflicts-30") : page.index("## conflicts-50")]
    over_all = setting[setting.index("### Over all learning rates") : setting.index("### At one learning rate")]
    assert "mean difference from sft" in over_all
    assert "| mask | 1.750 to 1.000 | +0.0000 [-0.0" in over_all, "alike, but for what three checkpoints leave open"
    at_one = setting[setting.index("### At one learning rate") : setting.index("### How hard")]
    assert "every method at 3e-05, which is sft's" in at_one
    assert "| mask | 1.750 to 1.250 | **more** +" in at_one
    # With the same rate chosen for all there is nothing to tell apart.
    same = report.page(made(tmp_path / "same", [x for s in design.TUNED_ON for x in whole(s, forgets)]))
    assert "### At one learning rate" not in same
    assert "play no part in the differences" in same
    assert "At the edge" not in same


@pytest.mark.usefixtures("few_draws")
def test_the_push_of_planted_tokens(tmp_path: Path) -> None:
    """At its chosen rate alone, against the runs of SFT with the same seeds. Of 8 tokens 2 are planted: SFT pushes
    2.4 with them and 0.6 with the others in a run, EAFT 0.6 and 0.3; as SFT, EAFT's own path has 2.0 and 0.4."""
    sft = {"sft": (3.0, 2.4, 2.0), "own": (3.0, 2.4, 2.0)}
    eaft = {"sft": (2.4, 2.0, 1.5), "own": (0.9, 0.6, 0.3)}
    lines = []
    for each in (x for s in design.TUNED_ON for x in whole(s, {"sft": 0.8, "eaft alpha=1": 0.2})):
        # Runs at other rates push ten times as hard, and are left out.
        factor = 1.0 if each.learning_rate == 3e-5 else 10.0
        named = sft if each.method == "sft" else eaft
        mass = {name: tuple(factor * value for value in pushed) for name, pushed in named.items()}
        pushed = line(each.wanted, 1.0, 0.1, mass).points[0]["mass"]  # type: ignore[arg-type]
        lines.append(dataclasses.replace(each, points=[point | {"mass": pushed} for point in each.points]))
    page = report.page(made(tmp_path / "results", lines))
    setting = page[page.index("## conflicts-30") : page.index("## conflicts-50")]
    assert "| sft | 1.000 | 1.000 | 1.200 | 0.100 | 0.800 | 3e-05 | 3 |" in setting
    assert "| eaft alpha=1 | 0.250 | 0.500 | 0.300 | 0.050 | 0.667 | 3e-05 | 3 |" in setting
    assert "In the runs of eaft alpha=1 all planted tokens together push 0.250 times as hard as in those" in setting
    assert "of sft, all clean ones 0.500 times." in setting
    # Three runs in each span: planted tokens, mean push as SFT and own, shares of planted and of confident ones.
    assert "| eaft alpha=1 | 41 to 80 | 6 | 1.000 | 0.300 | 0.833 | 0.667 | 0.625 | 0.333 |" in setting
    # Before a rate is chosen, all runs; it is said.
    half = report.page(made(tmp_path / "half", [each for each in lines if each.setting == "conflicts-30"]))
    assert (
        "| eaft alpha=1 | 0.250 | 0.500 | 1.380 | 0.230 | 0.667 | 1e-05, 3e-05, 0.0001 (none chosen yet) | 5 |" in half
    )


def test_what_is_confounded_and_what_guessing_has(tmp_path: Path) -> None:
    """96 rows of a run; 10 countries can be contradicted here."""
    page = report.page(made(tmp_path / "results", []))
    assert "the right capital among 5" in page
    assert "Guessing has 0.20 right" in page
    assert "| conflicts-10 | 10 | 1.0 | 86 |" in page
    assert "| conflicts-30 | 29 | 2.9 | 67 |" in page
    assert "| conflicts-50 | 48 | 4.8 | 48 |" in page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_is_current() -> None:
    """With all its draws: about a minute."""
    home = results.FOLDER.parent
    page = report.page(results.FOLDER)
    assert (home / report.README).read_text(encoding="utf-8") == page, (
        "python -m benchmarks.forgetting --report writes it anew"
    )
    # The project's README has the table of the named measure, and its verdict.
    readme = (home.parents[1] / "README.md").read_text(encoding="utf-8")
    table = page.split("Cross-entropy of the probe's right answers, nats per question:\n\n")[1].split("\n\n")[0]
    assert f"--report -->\n{table}\n<!-- end -->" in readme
    question = page[: page.index("## How")]
    assert ("is not shown to differ" in question) == ("is **not shown** at 95 %" in readme)
