"""From a file of ``conf/`` and command-line overrides to one checked :class:`~nemo_eaft.settings.Settings`.

Hydra's compose API merges the files; nothing in them is ever run: ``_target_`` is refused and every value
must be a plain one of the declared type. What a file leaves out keeps the default of
:mod:`nemo_eaft.settings`.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import os
import re
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nemo_eaft.atomic import replacing
from nemo_eaft.settings import Settings, known_keys

CONF_DIR = Path(__file__).parent / "conf"
"""The shipped configurations: one file per complete run, one folder per group."""

_PATHS = ("model.hf", "model.imported", "model.tokenizer", "data.train", "data.validation", "run.dir")
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
_LEAST_SECRET = 8  # characters: less is a flag
_GROUPS = tuple(entry.name for entry in fields(Settings))


def shipped() -> list[str]:
    """Names of the complete runs in ``conf/``."""
    return sorted(path.stem for path in CONF_DIR.glob("*.yaml"))


Finish = Callable[[dict[str, Any]], dict[str, Any]]
"""The groups of settings by name, each checked by itself, to those that are checked together."""


def compose(
    conf: str, overrides: Iterable[str] = (), unused: Iterable[str] = (), finish: Finish | None = None
) -> Settings:
    """Read one configuration and apply overrides.

    Args:
        conf: a name of ``conf/`` (``demo``) or the path of a ``.yaml`` file. Such a file may use the shipped
            groups in its defaults list, and groups of its own beside it.
        overrides: ``group.key=value`` (``trainer.max_steps=5``), or ``group=file`` (``loss=sft``).
        unused: full keys of text settings that the caller does not read; where one is not given, it is ``unused``.
        finish: fills in what follows from other groups.

    Raises:
        ValueError: anything wrong in the file or the overrides, naming key, value and what is allowed.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = _find(conf)
    for file in (path, *(file for group in _GROUPS for file in (path.parent / group).glob("*.yaml"))):
        _refuse_references(file)
    prepared, texts = _prepare(overrides, path.parent)
    # A file elsewhere finds the shipped groups through Hydra's search path. JSON quoting is Hydra's quoting.
    search = f"hydra.searchpath=[{json.dumps('file://' + str(CONF_DIR))}]"
    GlobalHydra.instance().clear()
    try:
        with _quiet_plugins(), initialize_config_dir(str(path.parent), version_base="1.3"):
            while True:
                try:
                    merged = hydra_compose(path.name, [*prepared, search])
                    break
                except HydraException as error:
                    # A file that does not name the group in its defaults list may still be given one.
                    group = re.match(r"Could not override '(\w+)'\.", str(error))
                    if group is None or f"+{group[1]}=" in "".join(prepared):
                        raise
                    prepared = [f"+{text}" if text.startswith(f"{group[1]}=") else text for text in prepared]
        with open_dict(merged):
            for key, text in texts.items():
                OmegaConf.update(merged, key, text)
            for key in unused:
                if OmegaConf.select(merged, key) is None:
                    OmegaConf.update(merged, key, "unused")
        mapping = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path}: {_explain(error)}") from error
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(mapping, dict)
    settings = from_mapping(mapping, conf, finish)
    _refuse_secrets(settings)
    return settings


def from_mapping(mapping: Mapping[Any, Any], where: str = "configuration", finish: Finish | None = None) -> Settings:
    """Build settings from nested plain values, refusing unknown keys and wrong types.

    Raises:
        ValueError: naming the full key.
    """
    _refuse_targets(mapping, "")
    for name in mapping:
        if name not in _GROUPS:
            raise ValueError(_unknown(str(name), where))
    groups: dict[str, Any] = {}
    hints = get_type_hints(Settings)
    for name in _GROUPS:
        values = mapping.get(name)
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{name}={_show(values)} must be a group of settings; a file of conf/{name}/ is named in the "
                f"defaults list"
            )
        groups[name] = _group(name, hints[name], values, where)
    return Settings(**(groups if finish is None else finish(groups)))


def _refuse_references(path: Path) -> None:
    """A few lines of references to references (``&``, ``*``) can stand for more values than memory holds."""
    import yaml

    try:
        used = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # Whoever reads it says what is wrong.
    if used:
        raise ValueError(f"{path}: references (&name, *name) are refused; write the value where it belongs")


def _refuse_secrets(settings: Settings) -> None:
    """Settings are written into run.dir and into logs, so ``${oc.env:HF_TOKEN}`` has no place in them."""
    for name, value in os.environ.items():
        if len(value) < _LEAST_SECRET or not _SECRET.search(name) or name.startswith("TOKENIZERS_"):
            continue
        for group, values in to_mapping(settings).items():
            for key, text in values.items():
                if isinstance(text, str) and value in text:
                    raise ValueError(
                        f"{group}.{key} holds the value of ${name}, which would be written into run.dir; programs read "
                        f"${name} from the environment themselves"
                    )


def to_mapping(settings: Settings) -> dict[str, dict[str, Any]]:
    """The settings as nested dictionaries of plain values."""
    return asdict(settings)


def save(settings: Settings, path: str | Path) -> None:
    """Write every setting, defaults included, as plain YAML; the file is whole or absent at any moment."""
    import yaml

    with replacing(Path(path)) as temporary:
        temporary.write_text(yaml.safe_dump(to_mapping(settings), sort_keys=False), encoding="utf-8")


def load(path: str | Path) -> Settings:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: not YAML, or not settings.
        FileNotFoundError: no such file.
    """
    import yaml

    try:
        _refuse_references(Path(path))
        mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} does not hold settings")
    return from_mapping(mapping, where=str(path))


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


def _find(conf: str) -> Path:
    looks_like_path = os.sep in conf or conf.endswith((".yaml", ".yml"))
    if looks_like_path:
        path = Path(conf).expanduser().absolute()
        if path.suffix != ".yaml":
            raise ValueError(f"{conf}: the name of a configuration file must end with .yaml")
        if not path.is_file():
            raise ValueError(f"{conf}: no such file")
        return path
    path = CONF_DIR / f"{conf}.yaml"
    if not path.is_file():
        hint = _suggest(conf, shipped())
        raise ValueError(
            f"{conf!r} is no shipped configuration{hint}; there are {', '.join(shipped())}, "
            f"or give the path of a .yaml file"
        )
    return path


@contextmanager
def _quiet_plugins() -> Iterator[None]:
    """Hold back one plugin's noise: multistorageclient, which NeMo brings along, adds a remote search path to
    every Hydra application and logs a traceback where no remote storage is configured."""
    log = logging.getLogger("multistorageclient.contrib.hydra")
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="provider=msc-universal", category=UserWarning)
            yield
    finally:
        log.disabled = before


def _prepare(overrides: Iterable[str], folder: Path) -> tuple[list[str], dict[str, str]]:
    """Check the keys of overrides, and let them set keys that the files leave at their default.

    Returns:
        Overrides for Hydra, and the values of text settings, which are taken as they stand: Hydra would want
        quotes around a path with a space, a ``~`` or an ``=``.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    prepared: list[str] = []
    texts: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        as_it_stands = equals and value != "null" and not value.startswith(("'", '"')) and "${" not in value
        if key in _text_keys() and as_it_stands:
            texts[key] = value
            continue
        if override.startswith("-"):
            raise ValueError(f"{override!r} is no override; write key=value, for example trainer.max_steps=5")
        try:
            parsed = parser.parse_override(override)
        except HydraException as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"{override!r} is no override: {first}; write key=value, for example loss=sft") from error
        key = parsed.key_or_group
        if parsed.type == OverrideType.DEL:
            raise ValueError(f"{override!r}: a setting cannot be removed, only given a value")
        if parsed.is_sweep_override():
            raise ValueError(f"{override!r}: one value is allowed; a list of values would be a sweep")
        if key in _GROUPS and parsed.package is None:
            _check_choice(key, parsed.value(), override, folder)
            prepared.append(override.lstrip("+"))
        elif key in known_keys():
            texts.pop(key, None)
            prepared.append("++" + override.lstrip("+"))
        else:
            raise ValueError(_unknown(override.partition("=")[0].lstrip("+"), "command line"))
    return prepared, texts


@functools.cache
def _text_keys() -> frozenset[str]:
    """Settings that hold free text: names and paths."""
    groups = get_type_hints(Settings)
    return frozenset(
        f"{group}.{name}"
        for group in _GROUPS
        for name, hint in get_type_hints(groups[group]).items()
        if hint is str or str in get_args(hint)
    )


def _check_choice(group: str, value: object, text: str, folder: Path) -> None:
    if not isinstance(value, str):
        raise ValueError(
            f"{text!r}: {group} takes the name of a file in conf/{group}/; set one key with {group}.KEY=VALUE"
        )
    files = {path.stem for place in (CONF_DIR, folder) for path in (place / group).glob("*.yaml")}
    if value not in files:
        there = ", ".join(sorted(files)) or "none"
        raise ValueError(f"{text!r}: no such file of group {group}{_suggest(value, files)}; there are: {there}")


def _group(name: str, kind: type, values: Mapping[Any, Any], where: str) -> Any:
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(_unknown(f"{name}.{key}", where))
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
        hint_text = _suggest(value, words)
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


def _unknown(key: str, where: str) -> str:
    group = key.partition(".")[0]
    if "." not in key:
        hint = _suggest(key, [*_GROUPS, *known_keys()]) or _suggest_last(key)
        return f"{where}: unknown key {key}{hint}; the groups are {', '.join(_GROUPS)}"
    # The right group first: trainer.lr is nearer to trainer.val_every by letters, to learning_rate by initials.
    hint = _suggest_initials(key) or _suggest(key, known_keys()) or _suggest_last(key.rpartition(".")[2])
    inside = [known for known in known_keys() if known.startswith(group + ".")]
    listed = f"; {group} has {', '.join(known.partition('.')[2] for known in inside)}" if inside else ""
    if not inside:
        listed = f"; the groups are {', '.join(_GROUPS)}"
    return f"{where}: unknown key {key}{hint}{listed}"


def _suggest(word: str, known: Iterable[str]) -> str:
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


def _explain(error: Exception) -> str:
    """The cause in Hydra's or OmegaConf's own words, on one line, without their hints on other commands."""
    key = getattr(error, "full_key", None)
    if "Missing mandatory value" in str(error):
        return f"{key} must be given, for example {key}=..."
    text = " ".join(
        line.strip() for line in str(error).splitlines() if not line.strip().startswith(("full_key:", "object_type="))
    )
    text = text.replace("To append to your default list use", "Its defaults list must name the group, or use")
    cause = error.__cause__
    return f"{text} ({cause})" if cause is not None and str(cause) not in text else text
