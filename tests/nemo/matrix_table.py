"""The table of README.md that says which features were trained together, made from the rows of matrix.py.

python -m tests.nemo.matrix_table      # writes it
"""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

from tests.nemo.matrix import FEATURES, LARGE_ROWS, ROWS, Row, legal_rows, sensible_rows

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- made by tests/nemo/matrix_table.py -->\n", "<!-- end -->\n"

NAMES = {
    "tensor": "TP",
    "pipeline": "PP",
    "virtual": "VPP",
    "data": "DP",
    "context": "CP",
    "expert": "EP",
    "sequence": "SP",
    "micro_batch": "micro-batch",
    "distributed_optimizer": "distributed optimizer",
    "recompute": "recompute",
    "packed": "packed",
    "tied": "tied",
    "fused": "fused linear",
    "moe": "MoE",
    "mtp": "MTP",
    "lora": "LoRA",
}
HERE, LARGE, NEVER = "yes", "8 ranks", "no"


def columns() -> dict[str, list[tuple[str, Any]]]:
    """What has a row and a column of its own: feature and the values that are not a plain training's."""
    plain = {entry.name: entry.default for entry in fields(Row)}
    found: dict[str, list[tuple[str, Any]]] = {}
    for feature, values in FEATURES.items():
        for value in values:
            if value != plain[feature]:
                found.setdefault(NAMES[value if feature == "kind" else feature], []).append((feature, value))
    return found


def cell(one: list[tuple[str, Any]], other: list[tuple[str, Any]], legal: list[Row]) -> str:
    """Where the two were trained together, in all their values that go together."""

    def together(rows: Any) -> set[Any]:
        pairs = itertools.product(one, other)
        return {pair for pair in pairs if any(all(getattr(row, f) == v for f, v in pair) for row in rows)}

    wanted = together(legal)
    if not wanted:
        return NEVER
    assert wanted <= together(ROWS + LARGE_ROWS)
    return HERE if wanted <= together(ROWS) else LARGE


def table() -> str:
    """Markdown, between the marks."""
    legal, parts = list(legal_rows()), columns()
    names = list(parts)
    lines = ["| | " + " | ".join(names[1:]) + " |", "| --- |" + " --- |" * (len(names) - 1)]
    for i, name in enumerate(names[:-1]):
        cells = ["" if j <= i else cell(parts[name], parts[names[j]], legal) for j in range(1, len(names))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    reasons = dict.fromkeys(row.refusal() for row in sensible_rows())
    values = ", ".join(
        f"{NAMES[feature]} {{{', '.join(map(str, values))}}}"
        for feature, values in FEATURES.items()
        if not isinstance(values[0], (bool, str))
    )
    text = f"Values: {values}; the others on and off. Not tested, and why:\n\n"
    return "\n".join(lines) + "\n\n" + text + "".join(f"* {reason}\n" for reason in reasons if reason is not None)


def expected(readme: str) -> str:
    """README.md with the table as it should be."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + rest[rest.index(END) :]


if __name__ == "__main__":
    README.write_text(expected(README.read_text(encoding="utf-8")), encoding="utf-8")
