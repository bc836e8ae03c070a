"""A run as JSON, as Markdown and as a figure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.contenders import BY_NAME
from benchmarks.memory import Memory
from benchmarks.plot import draw
from benchmarks.results import Row, memory_ratio, time_ratio
from benchmarks.targets import Outcome

DEFINITIONS = (
    "Times are milliseconds, median [quartiles] of rounds in which every contender runs once, in one process, in "
    "rotating order, after a warm-up, given logits restored before each call outside the timed region.",
    "A ratio is the median of the rounds' ratios. Below 1, ours takes less.",
    "Peak memory is the logits (or hidden states and weight) and everything the loss allocates, gradient included; "
    "`extra` is the part beyond those inputs. On a CPU each contender is measured in a process of its own. MB is "
    "10^6 bytes.",
    "The limit is what any loss on given logits must move: each logit read in forward, read and written in backward. "
    "Its time is those bytes at the copy bandwidth measured in the same run. `as bytes` is what a copy would move per "
    "logit in the contender's time.",
    "A shard has V / TP columns and is measured alone: one rank, no real collective.",
)


@dataclasses.dataclass(kw_only=True)
class Run:
    """Everything about one run."""

    device: str
    date: str
    commit: str
    versions: dict[str, str]
    bandwidth: float
    """Bytes a second of a copy, read plus written."""

    load: float | None
    tests: str
    rows: list[Row]
    outcomes: list[Outcome]


def write(run: Run, folder: Path, stem: str) -> list[Path]:
    """``stem`` with .json, .md and .png in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}{end}" for end in (".json", ".md", ".png")]
    paths[0].write_text(json.dumps(as_json(run), indent=1) + "\n")
    paths[1].write_text(markdown(run))
    draw(run.rows, run.bandwidth, run.device, paths[2])
    return paths


def as_json(run: Run) -> dict[str, Any]:
    return {
        "device": run.device,
        "date": run.date,
        "commit": run.commit,
        "versions": run.versions,
        "copy_bytes_per_second": run.bandwidth,
        "load_average_at_start": run.load,
        "kernel_tests": run.tests,
        "definitions": list(DEFINITIONS),
        "targets": [
            {
                "where": outcome.target.where,
                "what": outcome.target.title(),
                "bound": outcome.target.bound,
                "value": outcome.value,
                "status": outcome.status,
                "reason": outcome.reason,
            }
            for outcome in run.outcomes
        ],
        "rows": [row.as_json(run.bandwidth) for row in run.rows],
    }


def markdown(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    lines = [
        f"# {run.device}, {run.date}",
        "",
        f"Commit {run.commit}. {versions}. Copy bandwidth measured here: {run.bandwidth / 1e9:.1f} GB/s. "
        f"Load average at the start: {run.load}. Kernel tests: {run.tests}.",
        "",
        *(f"* {sentence}" for sentence in DEFINITIONS),
        "",
        "## Figures to reach",
        "",
        "| where | what | bound | here | |",
        "|---|---|---|---|---|",
        *(_target_line(outcome) for outcome in run.outcomes),
        "",
    ]
    away = sorted({each.target.where for each in run.outcomes if each.reason == f"no {each.target.where} here"})
    if away:
        lines += [f"The rows of {' and '.join(away)} are not measured: there was none.", ""]
    cases = list(dict.fromkeys(row.case for row in run.rows))
    for case in cases:
        lines += [f"## {case.title()}", "", *_case_table([row for row in run.rows if row.case == case], run), ""]
    return "\n".join(lines).rstrip() + "\n"


def _target_line(outcome: Outcome) -> str:
    target = outcome.target
    value = "" if outcome.value is None else f"{outcome.value:.3g}"
    status = outcome.status + (f": {outcome.reason}" if outcome.reason else "")
    return f"| {target.where} | {target.title()} | <= {target.bound:g} | {value} | {status} |"


def _case_table(rows: list[Row], run: Run) -> list[str]:
    """Ratios are of the first of our contenders that was timed, to each other one."""
    ours = next((row for row in rows if BY_NAME[row.contender].ours and row.rounds), None)
    linear = rows[0].case.hidden is not None
    lines = [
        "| contender | forward | backward | sum | as bytes | peak MB | extra MB | ours, time | ours, memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        label = BY_NAME[row.contender].label
        if row.reason is not None:
            lines.append(f"| {label} | {row.reason} | | | | | | | |")
            continue
        cells = [_time(row, part) for part in ("forward", "backward", "sum")]
        per_logit = row.as_json(run.bandwidth).get("bytes_per_logit", {})
        cells.append(f"{per_logit['time_as_bytes']:.1f}" if "time_as_bytes" in per_logit else "")
        if isinstance(row.memory, Memory):
            cells += [f"{row.memory.total / 1e6:.0f}", f"{row.memory.extra / 1e6:.0f}"]
        else:
            cells += [row.memory or "", ""]
        cells += ["", ""] if ours is None else _ratios(rows, ours, row)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    if not linear:
        limit = rows[0].limit_ms(run.bandwidth)
        lines.append(f"| limit at the measured copy bandwidth | | | {limit:.2f} | {rows[0].case.limit_bytes} | | | | |")
    return lines


def _time(row: Row, part: str) -> str:
    taken = row.time(part)
    return "" if taken is None else f"{taken.median:.2f} [{taken.low:.2f}, {taken.high:.2f}]"


def _ratios(rows: list[Row], ours: Row, row: Row) -> list[str]:
    if row is ours:
        return ["1", "1"]
    time = time_ratio(rows, row.case, ours.contender, row.contender)
    memory = memory_ratio(rows, row.case, ours.contender, row.contender)
    return [
        "" if time is None else f"{time.median:.2f} [{time.low:.2f}, {time.high:.2f}]",
        "" if memory is None else f"{memory:.2f}",
    ]
