"""What is compared: configurations, finished runs and exported folders, all from one base model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nemo_eaft.checkpoints import checkpoints_in, choose
from nemo_eaft.compose import compose, load
from nemo_eaft.convert import hf_folder
from nemo_eaft.run_dir import CONFIG, LAYOUT, MAY_DIFFER
from nemo_eaft.settings import Settings, known_keys
from nemo_eaft.settings_data import DataSettings
from nemo_eaft.settings_mapping import to_mapping

_TRAINED_ON = ("train", "train_split", "train_rows")
_SAME_ROWS = (
    *(f"data.{entry.name}" for entry in fields(DataSettings) if entry.name not in _TRAINED_ON),
    "model.hf",
    "model.tokenizer",
)
"""Settings by which held-out rows become tokens. Packing and workers do not touch them."""
_NOT_ROWS = ("data.packed", "data.packed_size", "data.num_workers", "data.on_bad_row")
_NOT_THE_METHOD = {
    *MAY_DIFFER,
    *LAYOUT,
    *_SAME_ROWS,
    "model.imported",
    "loss.gate",
    "loss.alpha",
    "loss.check_replicas",
    "trainer.learning_rate",
    "trainer.min_learning_rate",
    "trainer.seed",
    "trainer.save_every",
    "trainer.val_every",
    "trainer.val_batches",
    "run.dir",
    "run.backend",
}
"""Settings that are shown apart, or change no number; any other one that differs makes another method."""


@dataclass(frozen=True)
class Source:
    """One of the words that were given."""

    word: str
    folder: Path
    """``run.dir``, or the exported folder."""
    settings: Settings | None
    """None: an exported folder, which does not say how it was trained."""
    trains: bool = False
    """A configuration, which is trained if it is not finished."""


def find_sources(words: Sequence[str]) -> tuple[list[Source], list[str]]:
    """What the words name, and the overrides among them, which are for the configurations.

    Raises:
        ValueError: a word names nothing; an override without a configuration; nothing says which rows to measure on;
            two words name one folder.
    """
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    sources = [_find(word, overrides) for word in words if word not in overrides]
    if not sources:
        raise ValueError("compare needs a configuration, a run.dir or an exported folder")
    if overrides and not any(source.trains for source in sources):
        raise ValueError(f"{overrides[0]} has no effect: overrides are for configurations, and none is given")
    if not any(source.settings is not None for source in sources):
        raise ValueError(
            "only exported folders are given, which do not say what they were trained on: give a configuration or a "
            "run.dir beside them"
        )
    seen: dict[Path, str] = {}
    for source in sources:
        folder = source.folder.resolve()
        if folder in seen:
            raise ValueError(f"{seen[folder]} and {source.word} are one run, {folder}; each needs a run.dir of its own")
        seen[folder] = source.word
    return sources, overrides


def _find(word: str, overrides: Sequence[str]) -> Source:
    folder = Path(word).expanduser()
    if (folder / CONFIG).is_file():
        settings = load(folder / CONFIG)
        steps = choose(folder).steps
        if steps < settings.trainer.max_steps:
            raise ValueError(
                f"{word} has done {steps} of {settings.trainer.max_steps} steps; give its configuration to have it "
                f"trained to its end"
            )
        return Source(word, folder, settings)
    if (folder / "config.json").is_file():
        return Source(word, hf_folder(word), None)
    if folder.is_dir():
        raise ValueError(f"{word} is neither a run.dir ({CONFIG}) nor an exported model (config.json)")
    if os.sep in word and not word.endswith(".yaml"):
        raise ValueError(f"{word}: no such folder, nor a configuration, whose name ends with .yaml")
    settings = compose(word, overrides)
    return Source(word, Path(settings.run.dir), settings, trains=True)


def check_sources(sources: Sequence[Source]) -> Settings:
    """Refuse what cannot be compared. Nothing is trained or measured before.

    Returns:
        Settings that say what all are measured on.

    Raises:
        ValueError: another base model or other held-out rows, naming the setting and both values.
    """
    known = [source for source in sources if source.settings is not None]
    first = known[0]
    assert first.settings is not None
    if first.settings.data.validation is None:
        raise ValueError(f"{first.word}: data.validation is null; held-out rows are needed to measure the target on")
    for source in known[1:]:
        assert source.settings is not None
        mine, theirs = flat(first.settings), flat(source.settings)
        for key in _SAME_ROWS:
            if key not in _NOT_ROWS and not _same(key, mine[key], theirs[key]):
                what = "base model" if key.startswith("model.") else "held-out rows"
                raise ValueError(
                    f"{first.word} has {key}={json.dumps(mine[key])}, {source.word} has {json.dumps(theirs[key])}: "
                    f"only runs with the same {what} can be compared"
                )
    base = hf_folder(first.settings.model.hf)
    for source in sources:
        if source.settings is None:
            _check_exported(source, base)
    return first.settings


def _same(key: str, one: Any, other: Any) -> bool:
    if key in ("model.hf", "data.validation") and isinstance(one, str) and isinstance(other, str):
        # A path may be written in several ways; a name of the hub is no path.
        return os.path.realpath(one) == os.path.realpath(other)
    return bool(one == other)


def _check_exported(source: Source, base: Path) -> None:
    """Weights do not say what they were trained from, but architecture and tokenizer must be the base model's."""
    from transformers import AutoConfig, AutoTokenizer

    # What changes no prediction, and what tools that fine-tune leave behind. Padding is never attended to.
    passing = {"torch_dtype", "dtype", "transformers_version", "use_cache", "pad_token_id"}
    kinds = []
    for folder in (base, source.folder):
        found = AutoConfig.from_pretrained(folder).to_dict()
        config = {key: value for key, value in found.items() if key not in passing and not key.startswith("_")}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        kinds.append(config | {"tokenizer": tokenizer.get_vocab(), "chat_template": tokenizer.chat_template})
    different = sorted(key for key in {*kinds[0], *kinds[1]} if kinds[0].get(key) != kinds[1].get(key))
    if different:
        raise ValueError(
            f"{source.word} is not made from the base model {base}: {', '.join(different)} differ; only runs from one "
            f"base model can be compared"
        )


def flat(settings: Settings) -> dict[str, Any]:
    """Full key -> value."""
    groups = to_mapping(settings)
    return {key: groups[group][name] for key in known_keys() for group, name in [key.split(".")]}


def method_names(sources: Sequence[Source]) -> list[str]:
    """For each source how it was trained: ``sft``, ``eaft alpha=1``, another gate, with whatever else differs among
    them; the name of an exported folder."""
    values = [flat(source.settings) for source in sources if source.settings is not None]
    differing = [
        key
        for key in known_keys()
        if key not in _NOT_THE_METHOD and len({json.dumps(each[key], sort_keys=True) for each in values}) > 1
    ]
    names = []
    for source in sources:
        if source.settings is None:
            names.append(source.folder.name)
            continue
        mine = flat(source.settings)
        names.append(" ".join([loss_name(source.settings), *(f"{key}={mine[key]}" for key in differing)]))
    return names


def loss_name(settings: Settings) -> str:
    """The method by its loss alone."""
    loss = settings.loss
    if loss.gate in ("none", "stock"):
        return "sft"
    return f"eaft alpha={loss.alpha:g}" if loss.gate == "eaft" else loss.gate


def kept_checkpoints(source: Source) -> list[Path]:
    """What is measured, oldest first: the finished checkpoints of a run, or the exported folder."""
    return [source.folder] if source.settings is None else checkpoints_in(source.folder)
