"""The complete runs of ``conf/`` in small: a random model of four layers, two ranks or four, rows of our own in the
columns of the data set. What a run is made of stays: the mapping, the features of its layout, recompute, optimizer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_eaft.checkpoints import checkpoints_in
from nemo_eaft.compose import compose
from nemo_eaft.data import prepare
from nemo_eaft.settings import Settings
from tests.data import support
from tests.nemo import jobs, models
from tests.nemo.conftest import Run
from tests.nemo.ranks import run_ranks

ROWS = 24
"""Of each domain; the first 8 are held out."""

LAYERS = 4

# Recipe -> family of tests.nemo.models, chat template.
FAMILIES: dict[str, tuple[str, str]] = {
    "qwen3-4b-instruct-2507": ("qwen3", support.QWEN25),
    "qwen3-4b-thinking-2507": ("qwen3", support.QWEN3_THINKING),
    "qwen3-8b": ("qwen3", support.QWEN3),
    "qwen3-32b": ("qwen3", support.QWEN3),
    "qwen3-30b-a3b": ("qwen3_moe", support.QWEN3),
    "qwen2.5-7b": ("qwen2", support.QWEN25),
    "qwen2.5-14b": ("qwen2", support.QWEN25),
    "qwen2.5-32b": ("qwen2", support.QWEN25),
    "glm-4-9b-0414": ("glm4", support.GLM4),
    "glm-4-32b-0414": ("glm4", support.GLM4),
    "smollm2-135m": ("llama", support.SMOLLM2),
}

# Recipe -> the domain that it is trained on in place of its own.
DOMAINS = {"qwen3-30b-a3b": "agent", "glm-4-32b-0414": "agent"}


@dataclass
class Recipes:
    """Makes the models, rows and runs, each once."""

    folder: Path
    runs: dict[Any, Run] = field(default_factory=dict)

    def rows(self, domain: str) -> Path:
        """A folder of Parquet as a data set of the hub is one, with the configuration that the recipe names."""
        import datasets

        folder = self.folder / domain
        if not folder.exists():
            folder.mkdir(parents=True)
            datasets.Dataset.from_list(support.domain_rows(domain, ROWS)).to_parquet(str(folder / "rows.parquet"))
            name = compose("qwen3-8b", [f"data={domain}"]).data.subset or "default"
            configs = json.dumps([{"config_name": name, "data_files": "rows.parquet"}])
            (folder / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
        return folder

    def model(self, family: str, template: str) -> Path:
        """A Hugging Face folder with a tokenizer that any text goes through; its weights depend on the family alone."""
        kind = next(name for name, text in vars(support).items() if text is template)
        folder = self.folder / f"{family}-{kind}"
        if not folder.exists():
            models.save_model(family, folder, vocab_size=512, tied=family == "llama")
            support.make_tokenizer(template).save_pretrained(folder)
        return folder

    def settings(self, name: str, domain: str | None = None, run_dir: str = "") -> Settings:
        """The recipe in small."""
        full = compose(name)
        domain = domain or DOMAINS.get(name)
        # conf/data/math.yaml is data=math.
        domain = domain or next(d for d in ("math", "medical", "agent") if compose(name, [f"data={d}"]) == full)
        rows = self.rows(domain)
        parallel, trainer = full.parallel, full.trainer
        tensor, pipeline, expert = (min(n, 2) for n in (parallel.tensor, parallel.pipeline, parallel.expert))
        # With one copy of the model there is nothing that the distributed optimizer could split.
        copies = 2 if tensor * pipeline == 1 and full.world_size > 1 else 1
        changes = {
            "model.hf": self.model(*FAMILIES[name]),
            "data.train": rows,
            "data.validation": rows,
            "data.train_split": "train[8:]",
            "data.validation_split": "train[:8]",
            "data.on_bad_row": "error",
            "data.num_workers": 0,
            "parallel.tensor": tensor,
            "parallel.pipeline": pipeline,
            "parallel.expert": expert,
            "parallel.last_stage_layers": "null" if parallel.last_stage_layers is None else 1,
            "trainer.num_nodes": 1,
            "trainer.gpus_per_node": tensor * pipeline * copies,
            "trainer.micro_batch_size": min(trainer.micro_batch_size, 2),
            "trainer.global_batch_size": 8,
            "trainer.seq_length": 256,
            "trainer.max_steps": 2,
            "trainer.warmup_steps": 1,
            "trainer.val_every": 2,
            "trainer.val_batches": 1,
            "trainer.save_every": 2,
            # So that layouts can be compared.
            "trainer.precision": "fp32",
            "run.backend": "cpu",
            "run.dir": self.folder / "runs" / (run_dir or name),
        }
        return compose(name, [f"data={domain}", *(f"{key}={value}" for key, value in changes.items())])

    def train(self, name: str) -> Run:
        """The recipe trained, with its checkpoint. Recipes that are the same in small share a run."""
        from transformers import AutoTokenizer

        settings = self.settings(name)
        key = (settings.model, settings.data, settings.parallel, settings.trainer)
        if key not in self.runs:
            source = Path(settings.model.hf)
            checkpoint = self.folder / f"nemo-{source.name}"
            if not checkpoint.exists():
                run_ranks(jobs.to_nemo, 1, source, checkpoint)
            prepare(settings, AutoTokenizer.from_pretrained(source))
            ranks = run_ranks(jobs.train, settings.world_size, jobs.Plan(settings, checkpoint, save=True))
            self.runs[key] = Run(settings, ranks)
        return self.runs[key]

    def export(self, name: str) -> Path:
        """What the recipe trained, as a Hugging Face folder."""
        run = self.train(name)
        output = run.dir.with_name(f"{run.dir.name}-exported")
        if not output.exists():
            (checkpoint,) = checkpoints_in(run.dir)
            run_ranks(jobs.to_hf, 1, checkpoint, output, checkpoint / "context" / "hf")
        return output
