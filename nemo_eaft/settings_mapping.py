"""Plain values to one checked :class:`~nemo_eaft.settings.Settings` and back: keys, types and how two differ."""

from __future__ import annotations

import difflib
import json
import os
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nemo_eaft.settings import Settings, known_keys

GROUPS = tuple(entry.name for entry in fields(Settings))
"""The groups that the settings are in."""

_PATHS = ("model.hf", "model.imported", "model.tokenizer", "data.train", "data.validation", "run.dir")

Finish = Callable[[dict[str, Any]], dict[str, Any]]
"""The groups of settings by name, each checked by itself, to those that are checked together."""


def from_mapping(mapping: Mapping[Any, Any], where: str = "configuration", finish: Finish | None = None) -> Settings:
    """Build settings from nested plain values, refusing unknown keys and wrong types.

    Raises:
        ValueError: naming the full key.
    """
    _refuse_targets(mapping, "")
    for name in mapping:
        if name not in GROUPS:
            raise ValueError(unknown_key(str(name), where))
    groups: dict[str, Any] = {}
    hints = get_type_hints(Settings)
    for name in GROUPS:
        values = mapping.get(name)
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{name}={_show(values)} must be a group of settings; a file of conf/{name}/ is named in the "
                f"defaults list"
            )
        groups[name] = _group(name, hints[name], values, where)
    return Settings(**(groups if finish is None else finish(groups)))


def to_mapping(settings: Settings) -> dict[str, dict[str, Any]]:
    """The settings as nested dictionaries of plain values."""
    return asdict(settings)


def difference(old: Settings, new: Settings, ignore: Iterable[str] = ()) -> list[str]:
    """Lines ``key: old -> new`` for every setting that differs, except the full keys in ``ignore``."""
    skipped = set(ignore)
    before, after = to_mapping(old), to_mapping(new)
    return [
        f"{key}: {_show(before[group][name])} -> {_show(after[group][name])}"
        for key in known_keys()
        for group, name in [key.split(".")]
        if key not in skipped and before[group][name] != after[group][name]
    ]


def _group(name: str, kind: type, values: Mapping[Any, Any], where: str) -> Any:
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(unknown_key(f"{name}.{key}", where))
        full = f"{name}.{key}"
        value = _typed(full, value, hints[key])
        if full in _PATHS and isinstance(value, str):
            value = os.path.expanduser(value)
        arguments[key] = value
    for entry in fields(kind):
        if entry.default is MISSING and entry.name not in arguments:
            raise ValueError(f"{name}.{entry.name} must be given, for example {name}.{entry.name}=...")
    return kind(**arguments)


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Return ``value`` if it has the declared type. An integer may stand for a float, nothing else is
    converted."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for choice in choices:
        if get_origin(choice) is Literal:
            if isinstance(value, str) and value in get_args(choice):
                return value
        elif choice is float and type(value) in (int, float):
            return float(value)
        elif type(value) is choice:  # not isinstance: True must not pass for 1
            return value
    allowed = " or ".join(_describe(choice) for choice in choices)
    hint_text = ""
    if isinstance(value, str):
        words = [word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)]
        hint_text = suggest(value, words)
    raise ValueError(f"{key}={_show(value)} must be {allowed}{hint_text}")


def _describe(choice: Any) -> str:
    if get_origin(choice) is Literal:
        return "one of " + ", ".join(map(str, get_args(choice)))
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names[choice]


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _refuse_targets(value: Any, key: str) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            full = f"{key}.{name}" if key else str(name)
            if str(name).startswith("_") and str(name).endswith("_"):
                raise ValueError(f"{full} is refused: a configuration holds values, it never names code to run")
            _refuse_targets(inner, full)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_targets(inner, f"{key}[{index}]")


def unknown_key(key: str, where: str) -> str:
    """The message for a key that there is not, with the one that was meant."""
    group = key.partition(".")[0]
    if "." not in key:
        hint = suggest(key, [*GROUPS, *known_keys()]) or _suggest_last(key)
        return f"{where}: unknown key {key}{hint}; the groups are {', '.join(GROUPS)}"
    # The right group first: trainer.lr is nearer to trainer.val_every by letters, to learning_rate by initials.
    hint = _suggest_initials(key) or suggest(key, known_keys()) or _suggest_last(key.rpartition(".")[2])
    inside = [known for known in known_keys() if known.startswith(group + ".")]
    listed = f"; {group} has {', '.join(known.partition('.')[2] for known in inside)}" if inside else ""
    if not inside:
        listed = f"; the groups are {', '.join(GROUPS)}"
    return f"{where}: unknown key {key}{hint}{listed}"


def suggest(word: str, known: Iterable[str]) -> str:
    """``, did you mean ...?`` with the nearest of ``known`` by letters; empty where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def _suggest_initials(key: str) -> str:
    """``trainer.lr`` is short for ``trainer.learning_rate``."""
    group, _, last = key.rpartition(".")
    for known in known_keys():
        there, _, name = known.rpartition(".")
        if there == group and "_" in name and last == "".join(part[0] for part in name.split("_")):
            return f", did you mean {known}?"
    return ""


def _suggest_last(word: str) -> str:
    """Suggest by the last part alone: the right name in the wrong group, or with no group."""
    by_last = {known.rpartition(".")[2]: known for known in known_keys()}
    close = difflib.get_close_matches(word, by_last, n=1, cutoff=0.6)
    return f", did you mean {by_last[close[0]]}?" if close else ""
