"""tests/README.md names tests that exist, and all thirty cases and nine promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
TEXT = (HERE / "README.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def missing(text: str) -> list[str]:
    """Tests that are named and do not exist."""
    functions: dict[str, set[str]] = {}
    for file, _ in NAMED.findall(text):
        path = HERE / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return [f"{file}::{name}" for file, name in NAMED.findall(text) if name not in functions[file]]


def section(title: str) -> str:
    return TEXT.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_every_named_test_exists() -> None:
    assert len(NAMED.findall(TEXT)) > 80
    assert missing(TEXT) == []
    assert missing("`test_case_map.py::test_nothing`, `no_file.py::test_x`") == [
        "test_case_map.py::test_nothing",
        "no_file.py::test_x",
    ]


def test_every_case_and_promise_has_a_test() -> None:
    cases = re.findall(r"^\| (\d+) \| .*$", section("Thirty cases"), re.MULTILINE)
    assert cases == [str(number) for number in range(1, 31)]
    promises = re.findall(r"^\| (\d)\. ", section("Promises"), re.MULTILINE)
    assert promises == [str(number) for number in range(1, 10)]
    rows = [line for title in ("Thirty cases", "What breaks", "Promises") for line in section(title).splitlines()]
    for row in rows:
        if row.startswith("| ") and not row.startswith(("| ---", "| what", "| promise", "| | case")):
            assert NAMED.search(row), row
