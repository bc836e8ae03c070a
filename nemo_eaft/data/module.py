"""NeMo's data module on the rows that :func:`nemo_eaft.data.prepare` wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from nemo.collections.llm.gpt.data.core import GPTSFTChatDataset, GPTSFTPackedDataset
from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs
from torch.utils.data import Dataset

from nemo_eaft.data.order import RowOrder
from nemo_eaft.data.packing import PACKED_NAMES, metadata_path
from nemo_eaft.data.prepare import read_prepared
from nemo_eaft.settings import Settings


class TokenRows(GPTSFTChatDataset):
    """NeMo's chat data set on rows that are tokens already: sampling, padding and collating are NeMo's.

    Why the tokens do not come from NeMo: see :mod:`nemo_eaft.data.chat`.
    """

    def _process_example(self, example: dict[str, Any]) -> dict[str, Any]:
        input_ids = torch.tensor(example["input_ids"], dtype=torch.long)
        loss_mask = torch.zeros(len(input_ids), dtype=torch.bool)
        for start, end in example["answers"]:
            loss_mask[start:end] = True
        context = example["answers"][-1][0]
        return {
            "input_ids": input_ids,
            "loss_mask": loss_mask,
            "context_ids": input_ids[:context],
            "answer_ids": input_ids[context:],
            "metadata": {"line": example["line"]},
        }


class NumberedPacks(Dataset[dict[str, Any]]):
    """NeMo's packed data set; a batch also says which packs it holds, counted from 0."""

    def __init__(self, packs: GPTSFTPackedDataset) -> None:
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        mapping = self.packs.samples_mapping
        number = int(index if mapping is None else mapping[index])
        return self.packs[index] | {"metadata": {"pack": number}}

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """NeMo's batch, with `metadata`."""
        return self.packs.collate_fn(batch) | {"metadata": [item["metadata"] for item in batch]}


class PreparedDataModule(FineTuningDataModule):
    """NeMo's fine-tuning data module, reading rows or packs that lie ready, in an order that a longer run continues.

    NeMo does not record data modules in a checkpoint, so loading one needs no ``nemo_eaft``.
    """

    def prepare_data(self) -> None:
        """Nothing is left to do: the rows were packed before, with a seed and only once."""

    def _create_dataset(
        self, path: str | Path, pack_metadata_path: Path | None = None, is_test: bool = False, **kwargs: Any
    ) -> Any:
        if Path(path).suffix == ".npy":
            # NeMo keeps one metadata file for both packs and appends to it; here each pack has its own.
            return NumberedPacks(super()._create_dataset(path, metadata_path(Path(path)), is_test, **kwargs))
        if "prompt_template" in kwargs:
            rows = super()._create_dataset(path, None, is_test, **kwargs)
        else:
            rows = TokenRows(
                file_path=str(path),
                tokenizer=self.tokenizer,
                max_seq_length=self.seq_length,
                memmap_workers=self.memmap_workers,
                seed=self.seed,
                is_test=is_test,
                **kwargs,
            )
        if rows.samples_mapping is not None:
            rows.samples_mapping = RowOrder(len(rows.indexed_dataset), rows.max_num_samples, self.seed)
        return rows


def build_module(
    settings: Settings, root: Path, tokenizer: Any, module: type[PreparedDataModule] = PreparedDataModule
) -> PreparedDataModule:
    """Build the data module, on every rank alike.

    Args:
        settings: the run.
        root: the folder that :func:`nemo_eaft.data.prepare` filled, ``run.dir/data``.
        tokenizer: NeMo's ``AutoTokenizer`` of the model. ``tokenizer="model"`` of ``llm.finetune`` is fine
        too.
    """
    prepared = read_prepared(root)
    trainer = settings.trainer
    # NeMo pads a batch to a multiple of 16 tokens; where the ranks need another multiple, to the full length.
    kwargs: dict[str, Any] = {"pad_to_max_length": 16 % settings.sequence_unit != 0}
    if settings.run.backend == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        # Transformer Engine makes the causal mask itself; a dense one would cost seq_length ** 2 bytes a row.
        kwargs["get_attention_mask_from_fusion"] = True
    common: dict[str, Any] = {
        "dataset_root": str(root),
        "seq_length": trainer.seq_length,
        "tokenizer": tokenizer,
        "micro_batch_size": trainer.micro_batch_size,
        "global_batch_size": trainer.global_batch_size,
        "seed": trainer.seed,
        "num_workers": settings.data.num_workers,
        "persistent_workers": settings.data.num_workers > 0,
        "pin_memory": settings.run.backend == "cuda",
    }
    if prepared.packed:
        specs = PackedSequenceSpecs(
            packed_sequence_size=settings.data.packed_size or trainer.seq_length,
            tokenizer_model_name="prepared",
            packed_train_data_path=str(root / PACKED_NAMES["train"]),
            packed_val_data_path=(str(root / PACKED_NAMES["validation"]) if prepared.validation_rows else None),
        )
        kwargs.pop("get_attention_mask_from_fusion", None)  # packs carry row boundaries instead of a mask
        return module(**common, packed_sequence_specs=specs, dataset_kwargs=kwargs)
    if prepared.kind == "pair":
        # NeMo un-escapes the template, which would garble anything but ASCII.
        kwargs["prompt_template"] = settings.data.prompt_template.encode("unicode_escape").decode("ascii")
    return module(**common, dataset_kwargs=kwargs)
