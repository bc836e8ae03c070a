"""The table of README.md with the best layout of each model on so many GPUs, as `nemo-eaft plan --gpus` ranks them.

python -m tests.plan.readme_table      # writes it
"""

from __future__ import annotations

from pathlib import Path

from nemo_eaft.compose import compose
from nemo_eaft.plan.command import START
from nemo_eaft.plan.hardware import Hardware
from nemo_eaft.plan.layouts import search
from nemo_eaft.plan.plan import Plan
from nemo_eaft.plan.shape import find_shape

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- made by tests/plan/readme_table.py -->\n", "<!-- end of layouts -->\n"

MODELS = (
    "Qwen/Qwen3-4B-Instruct-2507",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen3-8B",
    "THUDM/GLM-4-9B-0414",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen2.5-32B-Instruct",
    "Qwen/Qwen3-32B",
    "THUDM/GLM-4-32B-0414",
)
GPUS = (8, 16, 32, 64, 128, 256, 512)
WORDS = ("trainer.seq_length=4096", "trainer.global_batch_size=512")


def cell(plan: Plan) -> str:
    """Layout, memory of the fullest rank, and the verdict where it is not `fits`."""
    layout = plan.layout
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "EP": layout.expert, "DP": layout.data_parallel}
    text = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
    if plan.settings.trainer.recompute == "full":
        text += " R"
    text += f", {plan.peak / 1e9:.0f} GB"
    return text if plan.verdict == "fits" else f"{text}, {plan.verdict}"


def table() -> str:
    """Markdown, between the marks."""
    lines = ["| | " + " | ".join(f"{gpus} GPUs" for gpus in GPUS) + " |", "| --- |" + " --- |" * len(GPUS)]
    for model in MODELS:
        settings = compose(str(START), [f"model.hf={model}", *WORDS], unused=("data.train",))
        best = [search(settings, find_shape(model), Hardware(), machines=(gpus // 8, 8))[0] for gpus in GPUS]
        lines.append(f"| {model.partition('/')[2]} | " + " | ".join(map(cell, best)) + " |")
    return "\n".join(lines) + "\n"


def expected(readme: str) -> str:
    """README.md with the table as it should be."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + rest[rest.index(END) :]


if __name__ == "__main__":
    README.write_text(expected(README.read_text(encoding="utf-8")), encoding="utf-8")
