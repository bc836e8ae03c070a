"""Read, check and write the rows of a run, once, before any rank trains.

Into ``run.dir/data`` go ``training.jsonl`` and ``validation.jsonl``, the names NeMo's data modules look for.
A pair row keeps its text. A chat row becomes token ids with the ranges of its answers. Packed rows become
NeMo's ``.npy`` files."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_eaft.atomic import replacing
from nemo_eaft.data.bad_rows import BadRows
from nemo_eaft.data.chat import FunctionsError, check_template, tokenize_chat
from nemo_eaft.data.mapping import Kind, kind_of, needed_columns, to_chat
from nemo_eaft.data.packing import PACKED_NAMES, metadata_path, pack
from nemo_eaft.data.rows import Row, RowError, Source
from nemo_eaft.data.tokens import Tokens, tokenize_pair
from nemo_eaft.settings import Settings
from nemo_eaft.settings_data import DataSettings

_log = logging.getLogger(__name__)
_FORMAT = 4  # raise when what is written changes, so that files of an older version are written anew
_NAMES = {"train": "training.jsonl", "validation": "validation.jsonl"}


def _keys(data: DataSettings) -> dict[Kind, str]:
    return {"chat": repr(data.turns_column), "pair": "'input' and 'output'"}


@dataclass(frozen=True)
class PreparedData:
    """What :func:`prepare` wrote. Row and token counts are of the rows kept."""

    kind: Kind
    """``chat``: rows of token ids; ``pair``: rows of ``input``/``output`` text."""
    packed: bool
    """Whether ``training_packed.npy`` (and ``validation_packed.npy``) take the place of the rows."""
    train_rows: int
    train_samples: int
    """Sequences that can be drawn: rows, or packs."""
    train_answer_tokens: int
    """Tokens in the loss, in all rows."""
    train_skipped: int
    validation_rows: int = 0
    validation_samples: int = 0
    validation_answer_tokens: int = 0
    validation_skipped: int = 0
    longest: int = 0
    """Tokens of the longest row."""


def prepare(settings: Settings, tokenizer: Any) -> PreparedData:
    """Write the rows NeMo will read, or find them written already.

    One process at a time may call this for a ``run.dir``. Nothing is written unless every row passed, and a
    run that dies half-way leaves no file that a later one would take for whole.

    Args:
        settings: the run; ``data``, ``trainer.seq_length``, ``trainer.seed`` and ``run.dir`` matter.
        tokenizer: the Hugging Face tokenizer of the model.

    Raises:
        ValueError: no rows, rows that cannot be used (the first ten by file and line, and how many),
            a tokenizer that cannot be used, fewer validation rows than one global batch, or a file that changed
            meanwhile.
    """
    sources = _sources(settings)
    for source in sources.values():
        source.check()
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token (eos_token)")
    root = Path(settings.run.dir) / "data"
    identity = _identity(settings, tokenizer, sources)
    found = _already(root, identity)
    if found is not None:
        return found
    _warn_of_sources(sources, identity["sources"])
    kinds = {part: _kind(settings.data, source) for part, source in sources.items()}
    kind = kinds["train"]
    if kinds.get("validation", kind) != kind:
        raise ValueError(
            f"data.validation={settings.data.validation} holds {kinds['validation']} rows, but data.train="
            f"{settings.data.train} holds {kind} rows: both must be of one kind"
        )
    for name in settings.data.without_effect(kind):
        _log.warning("data.%s has no effect: the rows of data.train have %s", name, _keys(settings.data)[kind])
    if kind == "chat":
        check_template(tokenizer)
    counts: dict[str, Any] = {"longest": 0}
    with _removed_if_empty(root.parent), _removed_if_empty(root), ExitStack() as files:
        # All files take their names together, at the end of the block, and only if no row stopped it.
        for part, source in sources.items():
            part_counts = _write(settings, tokenizer, source, part, kind, root, files)
            counts["longest"] = max(counts["longest"], part_counts.pop("longest"))
            counts |= {f"{part}_{name}": value for name, value in part_counts.items()}
        prepared = PreparedData(kind=kind, packed=settings.data.packed, **counts)
        _check_validation(settings, prepared)
        for part, source in sources.items():
            if source.identity() != identity["sources"][part]:
                raise ValueError(f"{source.key}={source.name} changed while it was read; start again when it is whole")
        _forget(root)
    with replacing(root / "prepared.json") as temporary:
        temporary.write_text(json.dumps({"identity": identity, "prepared": asdict(prepared)}, indent=1))
    return prepared


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def is_prepared(root: Path) -> bool:
    """Whether every file that :func:`prepare` writes to ``root`` is there. It alone knows whether the sources have
    changed since."""
    return _written(root) is not None


def source_changes(settings: Settings, tokenizer: Any) -> list[str]:
    """What is not as it was when the rows in ``run.dir`` were written, one line each: files by their content, data
    sets by their fingerprint, and the tokenizer.

    Raises:
        ValueError: a source cannot be read.
    """
    root = Path(settings.run.dir) / "data"
    written = _written(root)
    if written is None:
        return [f"{root}: the rows of the run are not there, so it is not known what it was trained on"]
    if (form := written[0].get("format")) != _FORMAT:
        return [
            f"{root}: the rows were written by another version of nemo_eaft (form {form}, now {_FORMAT}); they are "
            f"written anew, and it is not known whether they are the same"
        ]
    sources = _sources(settings)
    for source in sources.values():
        source.check()
    old, new = written[0], _identity(settings, tokenizer, sources)
    lines = [] if old["tokenizer"] == new["tokenizer"] else ["tokenizer: its tokens or its chat template changed"]
    for part in sorted({*old["sources"], *new["sources"]}):
        before, now = (identity["sources"].get(part) for identity in (old, new))
        content = [{k: v for k, v in (it or {}).items() if k != "file"} for it in (before, now)]
        if content[0] != content[1]:
            lines.append(f"data.{part}: {_describe(before)} -> {_describe(now)}")
    return lines


def order_of(root: Path) -> Any:
    """What the order of the prepared rows depends on beside ``trainer.seed``, to be compared: how many there are, the
    form they were written in, and of packs all that they were made of. None: nothing is prepared."""
    written = _written(root)
    if written is None:
        return None
    identity, prepared = written
    made_of = {key: value for key, value in identity.items() if key != "validation"} if prepared.packed else {}
    return identity.get("format"), prepared.packed, prepared.train_samples, made_of


def _describe(source: dict[str, Any] | None) -> str:
    return "none" if source is None else " ".join(f"{key} {value}" for key, value in source.items())


def _sources(settings: Settings) -> dict[str, Source]:
    data = settings.data
    sources = {"train": Source("data.train", data.train, data.train_split, data.subset)}
    if data.validation is not None:
        sources["validation"] = Source("data.validation", data.validation, data.validation_split, data.subset)
    return sources


def _warn_of_sources(sources: dict[str, Source], identities: dict[str, Any]) -> None:
    for source in sources.values():
        for setting in source.ignored():
            _log.warning("%s has no effect: %s=%s is a file, which has no parts", setting, source.key, source.name)
    if identities["train"] == identities.get("validation"):
        _log.warning("data.validation is data.train: what is measured there was trained on")


def read_prepared(root: Path) -> PreparedData:
    """What an earlier :func:`prepare` wrote to ``root``, in any process.

    Raises:
        FileNotFoundError: nothing was prepared there.
    """
    return PreparedData(**json.loads((root / "prepared.json").read_text())["prepared"])


def _write(
    settings: Settings, tokenizer: Any, source: Source, part: str, kind: Kind, root: Path, files: ExitStack
) -> dict[str, int]:
    limit = settings.data.validation_rows if part == "validation" else settings.data.train_rows
    counts = {"rows": 0, "answer_tokens": 0, "longest": 0}
    bad = BadRows(f"{source.key}={source.name}")
    kept: list[Tokens] = []
    temporary = files.enter_context(replacing(root / _NAMES[part]))
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for row, tokens in _tokenized(settings, tokenizer, source, kind):
            if isinstance(tokens, str):
                bad.add(row.where, tokens)
                continue
            counts["rows"] += 1
            counts["answer_tokens"] += sum(end - start for start, end in tokens.answers)
            counts["longest"] = max(counts["longest"], len(tokens.input_ids))
            file.write(json.dumps(_line(row, tokens, kind)) + "\n")
            if settings.data.packed:
                kept.append(tokens)
            if counts["rows"] == limit:
                break
    bad.report(counts["rows"], settings.data.on_bad_row)
    counts |= {"samples": counts["rows"], "skipped": bad.count}
    if settings.data.packed:
        size = settings.data.packed_size or settings.trainer.seq_length
        path = root / PACKED_NAMES[part]
        pack_file, metadata = (files.enter_context(replacing(name)) for name in (path, metadata_path(path)))
        counts["samples"] = pack(kept, pack_file, metadata, size, tokenizer.eos_token_id, settings.trainer.seed)
    return counts


def _line(row: Row, tokens: Tokens, kind: Kind) -> dict[str, Any]:
    # NeMo carries keys that it does not know into the batch, as its metadata: an error can then name the row.
    if kind == "chat":
        return {"input_ids": tokens.input_ids, "answers": tokens.answers, "line": row.number}
    return {"input": row.values["input"], "output": row.values["output"], "line": row.number}


def _tokenized(settings: Settings, tokenizer: Any, source: Source, kind: Kind) -> Iterator[tuple[Row, Tokens | str]]:
    """Every row with its tokens, or with the reason why it cannot be used."""
    longest = settings.trainer.seq_length
    for row in source.rows():
        if row.error is not None:
            yield row, row.error
            continue
        form = kind_of(settings.data, row.values)
        if form not in (kind, None):
            keys = _keys(settings.data)
            yield row, f"has {keys[form]}, but the first row has {keys[kind]}: a source is of one form"
            continue
        try:
            if kind == "chat":
                tokens = tokenize_chat(tokenizer, to_chat(settings.data, row.values))
            else:
                tokens = tokenize_pair(tokenizer, settings.data.prompt_template, row.values)
        except RowError as error:
            yield row, str(error)
            continue
        except FunctionsError as error:
            raise ValueError(
                f"{source.key}={source.name}: {row.where}: {error}. The chat template of "
                f"{tokenizer.name_or_path} writes no functions, so every row with functions, calls or their results "
                f"would be left out: take another model, or other rows"
            ) from error
        if len(tokens.input_ids) > longest:
            yield (
                row,
                f"{len(tokens.input_ids)} tokens, trainer.seq_length={longest} allows no more than that",
            )
        else:
            yield row, tokens


def _kind(data: DataSettings, source: Source) -> Kind:
    """The kind of a source, by the first row that can be read; columns that are named must be among its own."""
    first_error = None
    for row in source.rows():
        if row.error is None:
            has = f"{row.where} has the keys {', '.join(row.values) or 'none'}"
            for setting, column in needed_columns(data).items():
                if column not in row.values:
                    raise ValueError(f"{setting}={column}: {source.key}={source.name}: {has}")
            if (kind := kind_of(data, row.values)) is not None:
                return kind
            raise ValueError(
                f"{source.key}={source.name}: {has}; a row needs {' or '.join(_keys(data).values())}, or data.mapping "
                f"says which of its columns hold what"
            )
        first_error = first_error or f"{row.where}: {row.error}"
    why = f"no row can be read, the first is {first_error}" if first_error else "there are no rows"
    raise ValueError(f"{source.key}={source.name}: {why}")


def _check_validation(settings: Settings, prepared: PreparedData) -> None:
    batch, samples = settings.trainer.global_batch_size, prepared.validation_samples
    if settings.data.validation is None or not settings.trainer.val_every:
        return
    what = "packed sequences" if prepared.packed else "rows"
    if samples < batch:
        raise ValueError(
            f"data.validation={settings.data.validation} gives {samples} {what}, fewer than one batch of "
            f"trainer.global_batch_size={batch}: NeMo leaves incomplete batches out, so nothing would be "
            f"validated. Give more rows, or set trainer.val_every=0"
        )
    used = min(settings.trainer.val_batches, samples // batch) * batch
    if used < samples:
        _log.warning(
            "data.validation: %d of %d %s are used (trainer.val_batches=%d batches of %d; NeMo leaves an "
            "incomplete "
            "batch out)", used, samples, what, settings.trainer.val_batches, batch,
        )  # fmt: skip


def _identity(settings: Settings, tokenizer: Any, sources: dict[str, Source]) -> dict[str, Any]:
    """What the written files depend on. Equal to itself after a round trip through JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spelled = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest = hashlib.sha256(f"{spelled}\0{tokenizer.chat_template}\0{tokenizer.eos_token}".encode()).hexdigest()
    data, trainer = settings.data, settings.trainer
    return {
        "format": _FORMAT,
        "sources": {part: source.identity() for part, source in sources.items()},
        "tokenizer": digest,
        "seq_length": trainer.seq_length,
        "prompt_template": data.prompt_template,
        "mapping": _mapping(data),
        "validation_rows": data.validation_rows,
        "packed": [data.packed, data.packed_size, trainer.seed] if data.packed else [],
        # A source with bad rows is refused under one and shortened under the other.
        "on_bad_row": data.on_bad_row,
        "validation": [trainer.global_batch_size, trainer.val_every, trainer.val_batches] if data.validation else [],
        # Nothing where it is not given: rows written before there was this setting stay good.
        **({} if data.train_rows is None else {"train_rows": data.train_rows}),
    }


def _mapping(data: DataSettings) -> list[Any]:
    names = ("mapping", "messages_column", "tools_column", "prompt_column", "response_column", "reasoning_column")
    return [getattr(data, name) for name in (*names, "system_column", "system")]


def _already(root: Path, identity: dict[str, Any]) -> PreparedData | None:
    written = _written(root)
    if written is None:
        return None
    old, prepared = written
    if "validation" not in identity["sources"]:
        # Earlier versions wrote how validation is done without any too. It changes no row, so those rows stay good.
        old = old | {"validation": []}
    return prepared if old == identity else None


def _written(root: Path) -> tuple[dict[str, Any], PreparedData] | None:
    """Identity and counts of the rows in ``root``, if all of their files are there."""
    try:
        written = json.loads((root / "prepared.json").read_text())
        identity, prepared = written["identity"], PreparedData(**written["prepared"])
        names = PACKED_NAMES if prepared.packed else _NAMES
        needed = [names[part] for part in identity["sources"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (identity, prepared) if all((root / name).is_file() for name in needed) else None


def _forget(root: Path) -> None:
    """Remove what an earlier preparation left, NeMo's indices of its files above all: NeMo would trust
    them."""
    (root / "prepared.json").unlink(missing_ok=True)
    for name in (*_NAMES.values(), *PACKED_NAMES.values()):
        for path in root.glob(f"{name}*"):
            path.unlink()
