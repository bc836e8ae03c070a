"""Several rows in one sequence, by NeMo's own packing."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_eaft.data.tokens import Tokens

PACKED_NAMES = {"train": "training_packed.npy", "validation": "validation_packed.npy"}


def metadata_path(packed: Path) -> Path:
    """The file beside a packed one that NeMo reads with it."""
    return packed.with_name(packed.name + ".metadata.jsonl")


def pack(rows: list[Tokens], path: Path, metadata: Path, size: int, pad_id: int, seed: int) -> int:
    """Pack rows into sequences of at most ``size`` tokens and write NeMo's two files.

    The steps are those of ``prepare_packed_sequence_data`` (NeMo 2.7.3, ``llm/gpt/data/packed_sequence.py``),
    which cannot be called itself: it reads text, and it draws from numpy's global generator without a seed.

    Returns:
        How many packed sequences there are.
    """
    import numpy as np
    from nemo.utils.sequence_packing_utils import create_hist, create_packing_strategy, fill_packing_strategy

    # One token less: input and label of a row are shifted against each other.
    longest = max(len(row.input_ids) for row in rows)
    state = np.random.get_state()  # noqa: NPY002, NeMo draws from it
    np.random.seed(seed)  # noqa: NPY002
    try:
        plain = [{"input_ids": row.input_ids, "loss_mask": row.loss_mask} for row in rows]
        sequences, histogram = create_hist(plain, longest)
        assignments, summary = create_packing_strategy(histogram, size, "first_fit_shuffle")
        packed = fill_packing_strategy(assignments, sequences, size, pad_id)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    with open(path, "wb") as file:
        np.save(file, packed, allow_pickle=True)
    metadata.write_text(json.dumps([summary]))
    return len(packed)
