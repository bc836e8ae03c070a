"""The whole way on a laptop: `python -m nemo_eaft.demo [key=value ...]`, which `make demo` runs.

SmolLM2-135M-Instruct learns function calling with EAFT, by real NeMo and Megatron-Core, tensor-parallel over three CPU
processes: Hugging Face weights -> NeMo checkpoint -> training -> Hugging Face weights. Held-out cross-entropy is
measured by `transformers` before and after, so the last number comes from the exported files and not from NeMo.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from nemo_eaft import cli, recorder
from nemo_eaft.atomic import replacing
from nemo_eaft.compose import compose, load
from nemo_eaft.demo_data import build
from nemo_eaft.hf_model import home
from nemo_eaft.launch import ERROR
from nemo_eaft.ready import READY
from nemo_eaft.run_dir import CONFIG
from nemo_eaft.settings import Settings
from nemo_eaft.stall import FOLDER
from nemo_eaft.stop import REQUEST, STOPPED

CONF = "demo"

_OURS = {
    CONFIG,
    ERROR,
    READY,
    "checkpoints",
    "data",
    "eaft.json",
    "hf",
    "landscape.jsonl",
    "metrics.jsonl",
    "nemo",
    "report.png",
    FOLDER,
    REQUEST,
    STOPPED,
}
_OURS |= {"summary.json", "tensorboard", FOLDER, REQUEST, STOPPED}


def main(overrides: list[str]) -> int:
    """Run the demo with overrides of `conf/demo.yaml` and write `summary.json`; returns the exit code."""
    started = time.perf_counter()
    settings = compose(CONF, overrides)
    run_dir = Path(settings.run.dir)
    rows = build(home() / "demo")
    print(f"demo: {rows[0]} training rows and {rows[1]} held-out rows of BFCL function calling", flush=True)
    _start_afresh(run_dir)
    code = cli.main(["train", CONF, *overrides])
    if code:
        return code
    code = cli.main(["export", str(run_dir), str(run_dir / "hf")])
    if code:
        return code
    held_out = run_dir / "data" / "validation.jsonl"
    limit = settings.trainer.val_batches * settings.trainer.global_batch_size
    before, tokens = held_out_cross_entropy(Path(settings.model.hf).expanduser(), held_out, limit)
    after, _ = held_out_cross_entropy(run_dir / "hf", held_out, limit)
    history = recorder.read(run_dir / "metrics.jsonl")
    steps = [row for row in history if "loss" in row]
    validations = [row["val_loss"] for row in history if "val_loss" in row]
    summary = {
        "model": model_name(settings),
        "gate": settings.loss.gate,
        "alpha": settings.loss.alpha,
        "tensor_parallel": settings.parallel.tensor,
        "steps": len(steps),
        "heldout_ce_before": before,
        "heldout_ce_after": after,
        "heldout_ce_after_nemo": validations[-1] if validations else None,
        "heldout_tokens": tokens,
        "tokens": sum(row["tokens"] for row in steps),
        "seconds": time.perf_counter() - started,
        "training_seconds": sum(row["seconds"] for row in steps),
    }
    with replacing(run_dir / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    _print_table(summary, steps, settings)
    return 0


def model_name(settings: Settings) -> str:
    """The name of the model: the demo's folder is just called `model`."""
    return "SmolLM2-135M-Instruct" if settings.model.hf == compose(CONF).model.hf else settings.model.hf


def held_out_cross_entropy(model_folder: Path, rows: Path, limit: int) -> tuple[float, int]:
    """Mean cross-entropy per answer token, nats, of a Hugging Face model on prepared rows, and the token count.

    rows: a `validation.jsonl` that `nemo_eaft.data.prepare` wrote: token ids and the ranges of the answers.
    limit: rows that count, from the first.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for line in rows.read_text().splitlines()[:limit]:
            row: dict[str, Any] = json.loads(line)
            ids = torch.tensor([row["input_ids"]])
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            for start, stop in row["answers"]:
                # The logits at position i predict token i + 1.
                total += losses[start - 1 : stop - 1].double().sum().item()
                count += stop - start
    return total / count, count


def _start_afresh(run_dir: Path) -> None:
    """The demo shows a whole run each time; only the converted model and the source rows are kept.

    Raises:
        ValueError: `run_dir` holds anything but an earlier run of the demo's own model and rows.
    """
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise ValueError(f"run.dir={run_dir} is a file")
    names = {path.name for path in run_dir.iterdir()}
    # Without a configuration nothing says whose run it is; what a demo that failed early leaves can stay.
    foreign = sorted(names - (_OURS if CONFIG in names else {"data", ERROR}))
    if foreign:
        raise ValueError(
            f"run.dir={run_dir} holds {', '.join(foreign)}, which no run of the demo left; choose another folder"
        )
    if CONFIG not in names:
        return
    demo, earlier = compose(CONF), load(run_dir / CONFIG)
    if (earlier.model.hf, earlier.data.train) != (demo.model.hf, demo.data.train):
        raise ValueError(
            f"run.dir={run_dir} holds a run of model.hf={earlier.model.hf} on data.train={earlier.data.train}, "
            f"which is not the demo's and would be deleted; choose another folder"
        )
    print(f"demo: replacing the earlier run in {run_dir}", flush=True)
    shutil.rmtree(run_dir)


def _print_table(summary: dict[str, Any], steps: list[dict[str, Any]], settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{summary['model']}, gate={summary['gate']}, TP={summary['tensor_parallel']}, {summary['steps']} steps"
    table = Table(title=f"{title}, {settings.run.backend}")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        "held-out cross-entropy, transformers (nats/token)",
        f"{summary['heldout_ce_before']:.4f}",
        f"{summary['heldout_ce_after']:.4f}",
    )
    nemo = summary["heldout_ce_after_nemo"]
    table.add_row("held-out cross-entropy, NeMo", "", "" if nemo is None else f"{nemo:.4f}")
    for name, label in (("cross_entropy", "training cross-entropy"), ("entropy", "entropy"), ("weight", "mean weight")):
        table.add_row(label, f"{steps[0][name]:.3f}", f"{steps[-1][name]:.3f}")
    table.add_row(
        "confident conflicts",
        f"{100 * steps[0]['conflict_fraction']:.1f} %",
        f"{100 * steps[-1]['conflict_fraction']:.1f} %",
    )
    console = Console()
    console.print(table)
    console.print(
        f"{summary['tokens']} answer tokens, {summary['training_seconds']:.0f} s of training, "
        f"{summary['seconds']:.0f} s in all; "
        f"results in {settings.run.dir}/ (hf/, metrics.jsonl, report.png, summary.json)",
        highlight=False,
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"nemo-eaft demo: {error}")
