"""From a file of ``conf/`` and command-line overrides to one checked :class:`~nemo_eaft.settings.Settings`.

Hydra's compose API merges the files; nothing in them is ever run: ``_target_`` is refused and every value
must be a plain one of the declared type. What a file leaves out keeps the default of
:mod:`nemo_eaft.settings`.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args, get_type_hints

from nemo_eaft.atomic import replacing
from nemo_eaft.settings import Settings, known_keys
from nemo_eaft.settings_mapping import GROUPS, Finish, from_mapping, suggest, to_mapping, unknown_key

CONF_DIR = Path(__file__).parent / "conf"
"""The shipped configurations: one file per complete run, one folder per group."""

_SECRET = re.compile("TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
_LEAST_SECRET = 8  # characters: less is a flag


def shipped() -> list[str]:
    """Names of the complete runs in ``conf/``."""
    return sorted(path.stem for path in CONF_DIR.glob("*.yaml"))


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
    for file in (path, *(file for group in GROUPS for file in (path.parent / group).glob("*.yaml"))):
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
        hint = suggest(conf, shipped())
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
        if key in GROUPS and parsed.package is None:
            _check_choice(key, parsed.value(), override, folder)
            prepared.append(override.lstrip("+"))
        elif key in known_keys():
            texts.pop(key, None)
            prepared.append("++" + override.lstrip("+"))
        else:
            raise ValueError(unknown_key(override.partition("=")[0].lstrip("+"), "command line"))
    return prepared, texts


@functools.cache
def _text_keys() -> frozenset[str]:
    """Settings that hold free text: names and paths."""
    groups = get_type_hints(Settings)
    return frozenset(
        f"{group}.{name}"
        for group in GROUPS
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
        raise ValueError(f"{text!r}: no such file of group {group}{suggest(value, files)}; there are: {there}")


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
