"""From a finished state to the three files and the line of advice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_eaft.analyze import summary as summaries
from nemo_eaft.analyze.page import FILE as PAGE
from nemo_eaft.analyze.page import write_page
from nemo_eaft.analyze.state import State
from nemo_eaft.atomic import replacing
from nemo_eaft.settings import Settings

PICTURE = "landscape.png"
"""File in ``run.dir``."""
FILES = (summaries.FILE, PICTURE, PAGE)
"""All that a finished analysis leaves for its reader; the first is written last."""


def write_report(settings: Settings, state: State, model: str, vocab_size: int, tokenizer: Any) -> dict[str, Any]:
    """Write ``analysis.json``, ``landscape.png`` and ``conflicts.html``, and print the advice.

    Args:
        settings: of the analysis.
        state: of all rows.
        model: what was analysed, in words.
        vocab_size: the true vocabulary size.
        tokenizer: a Hugging Face tokenizer.
    """
    from nemo_eaft.landscape.plot import Picture, draw

    run_dir, tally, config = Path(settings.run.dir), state.tally, settings.loss.eaft_config()
    content = summaries.summarise(tally, settings, model, vocab_size)
    conflicts = content["conflicts"]
    title = (
        f"Confident conflicts: {conflicts['share_of_tokens']:.2%} of the tokens,\n"
        f"{conflicts['share_of_sft_gradient']:.1%} of the gradient norm of SFT, "
        f"{conflicts['share_of_gated_gradient']:.1%} with "
        f"{f'EAFT, alpha {config.alpha:g}' if config.gate == 'eaft' else f'gate {config.gate}'}"
    )
    # Two lines: names may be long, and are what is cut.
    note = f"{model} on {Path(settings.data.train).name}\n{tally.tokens:,} answer tokens of {tally.rows:,} rows"
    figure = draw(Picture(tally.grid, config, vocab_size, title, note))
    with replacing(run_dir / PICTURE) as temporary:
        figure.savefig(temporary, format="png")
    shown = [*tally.top_rows, *tally.top_tokens]
    lines = _lines(run_dir / "data" / "training.jsonl", {row.row for row in shown})
    names = [f"line {lines[row.row]} of {Path(settings.data.train).name}" for row in shown]

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    with replacing(run_dir / PAGE) as temporary:
        temporary.write_text(write_page(tally, content, config, names, decode), encoding="utf-8")
    # Last: where it is, the others are too.
    with replacing(run_dir / summaries.FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return content


def _lines(path: Path, rows: Iterable[int]) -> dict[int, int]:
    """The line in the user's file of each row of the prepared one."""
    wanted = set(rows)
    found = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number in wanted:
                found[number] = int(json.loads(line)["line"])
    return found
