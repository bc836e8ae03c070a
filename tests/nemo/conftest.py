"""Models, rows and finished runs that the tests of this folder share."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_eaft import recorder
from nemo_eaft.data import prepare
from nemo_eaft.settings import Settings
from tests.nemo import models, reference
from tests.nemo.ranks import run_ranks, start_server

TRAIN_ROWS = 32
VALIDATION_ROWS = 16


def pytest_collection_finish(session: pytest.Session) -> None:
    """NeMo's import starts while the first tests run."""
    if not session.config.option.collectonly and any("tests/nemo/" in item.nodeid for item in session.items):
        start_server()


@dataclass
class Run:
    """A finished training."""

    settings: Settings
    ranks: list[Any]
    """`jobs.Recorded` of each rank."""

    @property
    def dir(self) -> Path:
        return Path(self.settings.run.dir)

    @property
    def losses(self) -> list[float]:
        """By step, as NeMo logged them on rank 0, the one that it sends them to."""
        return self.ranks[0].losses

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are steps."""
        return [row for row in recorder.read(self.dir / "metrics.jsonl") if "loss" in row]

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [row for row in recorder.read(self.dir / "metrics.jsonl") if "val_loss" in row]

    def micro_batches(self, step: int) -> list[list[reference.Answer]]:
        """Of the whole global batch (step counts from 0); copies of the same data are left out."""
        seen: list[list[reference.Answer]] = []
        for rank in self.ranks:
            for micro_batch in rank.answers[step]:
                if micro_batch not in seen:
                    seen.append(micro_batch)
        return seen

    def answers(self, step: int) -> list[reference.Answer]:
        """The rows of the whole global batch, sorted."""
        return sorted(row for micro_batch in self.micro_batches(step) for row in micro_batch)


def assemble(parts: list[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
    """Whole tensors from the pieces of all ranks. Pieces that several ranks hold must be equal, bit for bit."""
    whole: dict[str, torch.Tensor] = {}
    filled: dict[str, torch.Tensor] = {}
    for rank, held in enumerate(parts):
        for name, pieces in held.items():
            for piece in pieces:
                tensor = whole.setdefault(name, torch.zeros(piece.shape, dtype=piece.data.dtype))
                known = filled.setdefault(name, torch.zeros(piece.shape, dtype=torch.bool))
                place = tuple(
                    slice(start, start + size) for start, size in zip(piece.offset, piece.data.shape, strict=True)
                )
                again = known[place]
                assert torch.equal(tensor[place][again], piece.data[again]), f"{name} differs on rank {rank}"
                tensor[place] = piece.data
                known[place] = True
    assert all(known.all() for known in filled.values())
    return whole


class Workshop:
    """Makes models, checkpoints and runs, each once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows = root / "rows"
        self.rows.mkdir()
        models.write_rows(self.rows / "training.jsonl", TRAIN_ROWS, seed=1)
        models.write_rows(self.rows / "validation.jsonl", VALIDATION_ROWS, seed=2)
        self.train_rows = reference.read_rows(self.rows / "training.jsonl")
        self.validation_rows = reference.read_rows(self.rows / "validation.jsonl")
        self._runs: dict[str, Run] = {}
        self._models: dict[str, torch.nn.Module] = {}
        self._sums: dict[str, dict[reference.Answer, reference.Sums]] = {}

    def hf(self, family: str, **changes: Any) -> Path:
        """Hugging Face folder of a family; `changes` as for `models.save_model`."""
        folder = self.root / "-".join(["hf", family, *(f"{k}{v}" for k, v in changes.items())])
        if not folder.exists():
            models.save_model(family, folder, **changes)
        return folder

    def nemo(self, family: str, **changes: Any) -> Path:
        """Its NeMo checkpoint."""
        from tests.nemo import jobs

        source = self.hf(family, **changes)
        output = source.with_name(source.name.replace("hf-", "nemo-", 1))
        if not output.exists():
            run_ranks(jobs.to_nemo, 1, source, output)
        return output

    def nemo_with_head(self, family: str, **changes: Any) -> Path:
        """A NeMo checkpoint of the same sizes with one multi-token-prediction head."""
        from tests.nemo import kinds

        source = self.nemo(family, **changes)
        output = source.with_name(f"{source.name}-head")
        if not output.exists():
            run_ranks(kinds.with_prediction_head, 1, source, output)
        return output

    def model(self, family: str, **changes: Any) -> torch.nn.Module:
        """The Hugging Face model in float64."""
        folder = self.hf(family, **changes)
        if folder.name not in self._models:
            self._models[folder.name] = reference.load_model(folder)
        return self._models[folder.name]

    def sums(self, family: str, **changes: Any) -> dict[reference.Answer, reference.Sums]:
        """Reference sums of every training row under the initial model."""
        name = self.hf(family, **changes).name
        if name not in self._sums:
            self._sums[name] = reference.row_sums(self.model(family, **changes), self.train_rows)
        return self._sums[name]

    def settings(self, name: str, family: str, model: dict[str, Any] | None = None, **changes: Any) -> Settings:
        """Checked settings with their rows prepared."""
        from transformers import AutoTokenizer

        source = self.hf(family, **(model or {}))
        settings = models.run_settings(source, self.rows, self.root / "runs" / name, **changes)
        prepare(settings, AutoTokenizer.from_pretrained(source))
        return settings

    def train(
        self,
        name: str,
        family: str = "llama",
        *,
        world: int = 1,
        model: dict[str, Any] | None = None,
        plan: dict[str, Any] | None = None,
        head: bool = False,
        **changes: Any,
    ) -> Run:
        """A training under this name, done once.

        model: `changes` of `models.save_model`; plan: fields of `jobs.Plan`; head: train a multi-token-prediction head
        beside it; the rest as for `models.run_settings`.
        """
        from tests.nemo import jobs

        if name not in self._runs:
            changes["trainer"] = {"gpus_per_node": world} | changes.get("trainer", {})
            settings = self.settings(name, family, model, **changes)
            checkpoint = (self.nemo_with_head if head else self.nemo)(family, **(model or {}))
            ranks = run_ranks(jobs.train, world, jobs.Plan(settings, checkpoint, **(plan or {})))
            self._runs[name] = Run(settings, ranks)
        return self._runs[name]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    yield Workshop(tmp_path_factory.mktemp("nemo"))
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made(workshop: Workshop) -> Iterator[Any]:
    """The recipes of ``conf/`` in small, each made once: a `tests.nemo.recipes.Recipes`."""
    import datasets

    from tests.nemo.recipes import Recipes

    folder = workshop.root / "recipes"
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    yield Recipes(folder)
    datasets.config.HF_DATASETS_CACHE = before
