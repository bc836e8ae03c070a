"""conflicts.html: parsed, and opened in headless Chromium where there is one."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nemo_eaft.analyze.page import pieces, write_page
from nemo_eaft.analyze.summary import summarise
from nemo_eaft.analyze.tally import Tally
from nemo_eaft.config import EAFTConfig
from nemo_eaft.landscape.counts import Bins
from tests.analyze.samples import CONFLICT, OPEN, SURE, row
from tests.nemo import models

CONFIG = EAFTConfig()
EVIL = '<script>document.title="taken"</script>"><img src=x onerror=alert(1)>&amp;'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def decode(ids: list[int]) -> str:
    return "".join({0: "Frage\n", 1: EVIL, 2: "'", 7: "<b>"}.get(number, f" w{number}") for number in ids)


@pytest.fixture
def page(tmp_path: Path) -> str:
    tally = Tally()
    bins = Bins.of(CONFIG, 1000)
    tally.add(row(0, [OPEN, CONFLICT, SURE], prompt=1), CONFIG, bins)
    tally.add(row(1, [SURE]), CONFIG, bins)
    settings = models.run_settings(tmp_path / "hf", tmp_path, tmp_path / "run")
    lines = [f"line <{found.row + 1}>" for found in (*tally.top_rows, *tally.top_tokens)]
    return write_page(tally, summarise(tally, settings, "a<b", 1000), CONFIG, lines, decode)


class Reader(html.parser.HTMLParser):
    """Tags, attributes and balance of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def test_is_whole_escaped_and_self_contained(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    tags = [tag for tag, _ in reader.seen]
    # Its own script and no other, though the data hold one.
    assert tags.count("script") == 1
    assert "img" not in tags
    assert EVIL in reader.text
    assert "line <1>" in reader.text
    for tag, attributes in reader.seen:
        assert not {"src", "href", "onerror", "onload"} & set(attributes), tag
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"https?://", page)
    policy = next(values["content"] for _, values in reader.seen if "http-equiv" in values)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_tokens_carry_their_values(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    tokens = [values for tag, values in reader.seen if tag == "span" and values.get("class", "") in ("t", "t c")]
    conflicts = [values for values in tokens if values["class"] == "t c" and "title" in values]
    # In its row and among the single tokens.
    assert len(conflicts) == 2
    for values in conflicts:
        assert values["style"] == "--w:0.050"
        title = values["title"]
        assert title is not None
        for part in ("p 0.01,", "model: '<b>' 0.9", "(ratio 0.05)", "weight 0.05", "gradient 1.3", "position 2"):
            assert part in title
    assert "prefers-color-scheme: dark" in page


def test_pieces_of_a_character() -> None:
    """Byte tokens: three make a euro sign, one makes nothing."""
    data = {1: b"a", 2: b"\xe2", 3: b"\x82", 4: b"\xac", 5: b" b", 6: b"\xff"}

    def text(ids: list[int]) -> str:
        return b"".join(data[number] for number in ids).decode(errors="replace")

    assert pieces([1, 2, 3, 4, 5], text) == ["a", "\u20ac", "", "", " b"]
    assert pieces([6, 1], text) == ["\ufffd", "a"]
    assert pieces([], text) == []


def test_pieces_keep_the_space_that_some_tokenizers_drop() -> None:
    def text(ids: list[int]) -> str:
        return "".join(f" w{number}" for number in ids).lstrip(" ")

    assert pieces([1, 2, 3], text) == ["w1", " w2", " w3"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser(page: str, tmp_path: Path) -> None:
    """It loads without an error, runs no text of the data, and shows its tokens."""
    assert CHROMIUM is not None
    path = tmp_path / "conflicts.html"
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert title[1].startswith("Confident conflicts of a&lt;b")
    assert done.stdout.count('class="t c"') == 3
