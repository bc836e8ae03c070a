"""``conflicts.html``: the most conflicting rows and tokens in their context. One file, no network, nothing but text.

Every piece of text from data or model is escaped, and the page's own policy lets it load nothing.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_eaft.analyze.tally import Tally
from nemo_eaft.analyze.tokens import RowTokens
from nemo_eaft.config import EAFTConfig

FILE = "conflicts.html"
"""File in ``run.dir``."""

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_LONGEST = 4  # tokens that together may make one character
_HIDDEN = str.maketrans({"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n", "\t": "\N{RIGHTWARDS ARROW TO BAR}\t"})


def write_page(
    tally: Tally, summary: dict[str, Any], config: EAFTConfig, lines: Sequence[str], decode: Callable[[list[int]], str]
) -> str:
    """The page.

    Args:
        tally: of all rows.
        summary: the content of ``analysis.json``.
        config: of the loss.
        lines: for each of `tally.top_rows` and then of `tally.top_tokens`, where its row stands in the data.
        decode: token ids to text, special tokens included.
    """
    names = iter(lines)
    rows = [_article(row, config, f"{next(names)}: {_counted(row, config)}", decode) for row in tally.top_rows]
    tokens = [_article(row, config, f"{next(names)}: {_said(row, decode)}", decode) for row in tally.top_tokens]
    conflicts = summary["conflicts"]
    facts = (
        f"{summary['tokens']:,} answer tokens of {summary['rows']:,} rows. Confident conflicts (label below "
        f"{conflicts['probability_below']:g}, entropy / normaliser below {conflicts['entropy_below']:g}): "
        f"{conflicts['tokens']:,}, {conflicts['share_of_tokens']:.2%} of the tokens and "
        f"{conflicts['share_of_sft_gradient']:.1%} of the gradient norm of plain fine-tuning "
        f"({conflicts['share_of_gated_gradient']:.1%} with {_gate(config)})."
    )
    title = f"Confident conflicts of {summary['model']} on {Path(summary['data']).name}"
    advice = str(summary["advice"]["text"])
    none = "<p>No token is a confident conflict.</p>"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{(_HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(facts)}</p>
<p><strong>{html.escape(advice[:1].upper() + advice[1:])}.</strong></p>
<p class="legend"><span>weight 0 <i class="swatch"></i> 1</span>
<span class="t c" style="--w:0">confident conflict</span>
<span class="prompt">grey: prompt, not in the loss</span></p>
<div id="detail" role="status">Point at a token, or reach it with Tab: what the model thought of it stands here.</div>
<h2>Rows whose conflicts push hardest</h2>
{"".join(rows) or none}
<h2>Single tokens: sure of something else</h2>
<p class="faint">By gradient norm x (1 - entropy / normaliser): what the model's certainty speaks against. Grey:
what stands around it.</p>
{"".join(tokens)}
<script>
{(_HERE / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _gate(config: EAFTConfig) -> str:
    return f"EAFT, alpha {config.alpha:g}" if config.gate == "eaft" else f"gate {config.gate}"


def _counted(row: RowTokens, config: EAFTConfig) -> str:
    """What a row holds."""
    values, counted = row.values, int(row.values.conflicts(config).sum())
    tokens = f"{len(values.position)} answer token{'s' if len(values.position) != 1 else ''}"
    return f"{counted} conflict{'s' if counted != 1 else ''} in {tokens}, mean weight {values.weight.mean():.2f}"


def _said(row: RowTokens, decode: Callable[[list[int]], str]) -> str:
    """What the model says of a single token."""
    values = row.values
    said = decode([int(values.top[0])])
    return (
        f"p {values.probability[0]:.2g}, the model says {said!r} with {values.top_probability[0]:.2g}, "
        f"weight {values.weight[0]:.2g}"
    )


def _article(row: RowTokens, config: EAFTConfig, head: str, decode: Callable[[list[int]], str]) -> str:
    values, conflicts = row.values, row.values.conflicts(config)
    place = {int(position): index for index, position in enumerate(values.position)}
    spans: list[str] = []
    for offset, text in enumerate(pieces(row.ids, decode)):
        index = place.get(row.first + offset)
        shown = html.escape(text.translate(_HIDDEN))
        if index is None:
            spans.append(f'<span class="prompt">{shown}</span>')
            continue
        said = decode([int(values.top[index])])
        about = (
            f"{text!r}  p {values.probability[index]:.3g}, model: {said!r} {values.top_probability[index]:.3g}, "
            f"H {values.entropy[index]:.3g} nats (ratio {values.entropy_ratio[index]:.3g}), "
            f"weight {values.weight[index]:.3g}, gradient {values.gradient[index]:.3g}, "
            f"position {values.position[index]}"
        )
        kind = "t c" if conflicts[index] else "t"
        weight = min(max(float(values.weight[index]), 0.0), 1.0)
        spans.append(
            f'<span class="{kind}" tabindex="0" style="--w:{weight:.3f}" title="{html.escape(about)}">'
            f"{shown or '&#xb7;'}</span>"
        )
    return f'<article><h3>{html.escape(head)}</h3><p class="text">{"".join(spans)}</p></article>\n'


def pieces(ids: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each token, so that together they are the text of all.

    A token may be part of a character: the first of those that make one gets it, the others get nothing. Tokens that
    never make one stand as U+FFFD. Each is decoded after the one before it, since some tokenizers drop a space at the
    beginning of a text.
    """
    texts: list[str] = []
    start = 0
    while start < len(ids):
        before = ids[start - 1 : start] if start else []
        prefix = decode(before) if before else ""
        for stop in range(start + 1, min(start + _LONGEST, len(ids)) + 1):
            whole = decode(before + ids[start:stop])
            text = whole[len(prefix) :] if whole.startswith(prefix) else decode(ids[start:stop])
            if "\N{REPLACEMENT CHARACTER}" not in text:
                break
        else:
            stop, text = start + 1, "\N{REPLACEMENT CHARACTER}"
        texts += [text, *[""] * (stop - start - 1)]
        start = stop
    return texts
