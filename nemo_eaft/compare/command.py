"""``nemo-eaft compare``."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_eaft.atomic import replacing
from nemo_eaft.checkpoints import steps_done
from nemo_eaft.compare import record
from nemo_eaft.compare.arguments import NUMBERS
from nemo_eaft.compare.base import Samples, texts_of_base
from nemo_eaft.compare.cache import Store, content_digest, digest
from nemo_eaft.compare.matching import match
from nemo_eaft.compare.measure import Task, load_model, measure
from nemo_eaft.compare.plot import write_figures
from nemo_eaft.compare.probe import read_questions
from nemo_eaft.compare.report import as_mapping, comparisons, findings, markdown
from nemo_eaft.compare.runs import Source, check_sources, find_sources, kept_checkpoints, method_names
from nemo_eaft.compare.target import read_rows
from nemo_eaft.compare.text import windows
from nemo_eaft.convert import hf_folder
from nemo_eaft.settings import Settings
from nemo_eaft.settings_checks import at_least


def run(arguments: argparse.Namespace) -> int:
    """Train what is not trained, measure what is not measured, and write ``compare.md``, ``compare.json`` and pictures.

    Returns:
        0, or the exit code of a training or an export that did not end well.

    Raises:
        ValueError: what cannot be compared, or files that cannot be read; nothing was trained then.
    """
    for name, (_, least, _) in NUMBERS.items():
        at_least(f"--{name.replace('_', '-')}", getattr(arguments, name), least)
    sources, overrides = find_sources([*arguments.conf, *arguments.overrides])
    settings = check_sources(sources)
    methods = method_names(sources)
    chosen = arguments.reference or ("sft" if "sft" in methods else methods[0])
    if chosen not in methods:
        raise ValueError(f"--reference {chosen} is none of the methods {', '.join(dict.fromkeys(methods))}")
    _where(arguments)
    base = hf_folder(settings.model.hf)
    pieces, questions, tokenizer = _read(arguments, settings, base)
    for source in sources:
        if source.trains and (code := _command("train", source.word, *overrides)):
            return code
    prepared = _held_out(sources)
    rows = read_rows(prepared, tokenizer, settings.data.prompt_template, arguments.rows)
    weights = content_digest(base)
    depends_on = _depends_on(arguments, weights, rows, pieces, questions)

    def load(folder: Path) -> Any:
        trusted = settings.model.trust_remote_code
        return load_model(folder, arguments.dtype, arguments.device, trusted)

    samples: list[list[int]] = []
    reference = None
    if arguments.samples:
        wanted = Samples(arguments.samples, arguments.sample_tokens, arguments.seed)
        identity = {"weights": weights, "dtype": arguments.dtype, "device": arguments.device}
        samples, reference = texts_of_base(arguments.output / "base", lambda: load(base), tokenizer, wanted, identity)
    task = Task(rows, samples, pieces, questions, arguments.probe_score)
    store = Store(arguments.output / "measured", depends_on)

    def measured(folder: Path, content: str) -> record.Measures:
        return store.put(content, measure(load(folder), task, reference or _no_reference))

    start = store.get(weights)
    if start is None:
        print(f"base model: {base}", flush=True)
        start = measured(base, weights)
    _warn_of_probe(start, arguments.probe)
    kept = [kept_checkpoints(source) for source in sources]
    total, number = sum(map(len, kept)), 0
    paths = []
    for source, method, checkpoints in zip(sources, methods, kept, strict=True):
        steps, points = [0], [start]
        for checkpoint in checkpoints:
            number += 1
            # Before its files are read through, which may take minutes.
            print(f"checkpoint {number} of {total}: {checkpoint}", flush=True)
            content = content_digest(checkpoint)
            found = store.get(content)
            if found is not None:
                print("measured before", flush=True)
            elif source.settings is None:
                found = measured(checkpoint, content)
            else:
                exported = arguments.output / "exported" / f"{content[:16]}"
                if not (exported / "config.json").is_file():
                    code = _command("export", str(checkpoint), str(exported), "--backend", arguments.device)
                    if code:
                        return code
                found = measured(exported, content)
                if not arguments.keep_exports:
                    shutil.rmtree(exported)
                    with contextlib.suppress(OSError):  # others are kept there
                        exported.parent.rmdir()
            steps.append(steps_done(checkpoint) if source.settings is not None else 1)
            points.append(found)
        paths.append(_path(source, method, steps, points))
    _write(arguments, paths, chosen, settings, depends_on)
    return 0


def _where(arguments: argparse.Namespace) -> None:
    import torch

    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU here; allowed is cpu")
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")


def _read(arguments: argparse.Namespace, settings: Settings, base: Path) -> tuple[list[list[int]], list[Any], Any]:
    """What is read from files before anything is trained."""
    from nemo_eaft.ready import open_model

    tokenizer = open_model(settings).tokenizer
    pieces, questions = [], []
    if arguments.text is not None:
        try:
            text = arguments.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text {arguments.text} cannot be read: {error}") from error
        pieces = windows(tokenizer, text, arguments.windows, arguments.window_tokens)
    if arguments.probe is not None:
        questions = read_questions(arguments.probe, tokenizer, arguments.probe_score)
    return pieces, questions, tokenizer


def _held_out(sources: Sequence[Source]) -> Path:
    """The prepared held-out rows, which must be the same in every run."""
    files = {
        source.word: source.folder / "data" / "validation.jsonl" for source in sources if source.settings is not None
    }
    for word, file in files.items():
        if not file.is_file():
            raise ValueError(f"{word}: {file} is not there, so it cannot be measured on the rows of its run")
    (first, text), *others = ((word, file.read_bytes()) for word, file in files.items())
    for word, other in others:
        if other != text:
            raise ValueError(f"the held-out rows of {first} and {word} are not the same: {files[first]}, {files[word]}")
    return files[first]


def _depends_on(
    arguments: argparse.Namespace, weights: str, rows: Sequence[Any], pieces: Any, questions: Sequence[Any]
) -> dict[str, Any]:
    return {
        "base": weights,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "rows": digest([[row.input_ids, row.answers] for row in rows]),
        "samples": [arguments.samples, arguments.sample_tokens, arguments.seed] if arguments.samples else [],
        "text": digest(pieces),
        "probe": digest([[each.prompt, each.answers, each.right] for each in questions]),
        "probe_score": arguments.probe_score,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _warn_of_probe(base: record.Measures, file: Path | None) -> None:
    """What the base model does not know it cannot forget."""
    if "probe" not in base:
        return
    right, asked = sum(base["probe"].values), len(base["probe"].counts)
    if right == 0:
        warnings.warn(
            f"--probe {file}: the base model has none of {asked} questions right, so no run can be seen to forget one; "
            f"give questions that it answers",
            stacklevel=1,
        )


def _no_reference(number: int) -> Any:
    raise AssertionError("no sample was asked for")


def _path(source: Source, method: str, steps: list[int], points: list[record.Measures]) -> record.Path:
    if len(points) < 3 and source.settings is not None:
        warnings.warn(
            f"{source.word} has {len(points) - 1} checkpoint, so it can be compared at one level alone; "
            f"trainer.save_every and trainer.keep_checkpoints=-1 keep more",
            stacklevel=1,
        )
    trainer = source.settings.trainer if source.settings is not None else None
    return record.Path(
        source.word,
        method,
        None if trainer is None else trainer.learning_rate,
        None if trainer is None else trainer.seed,
        tuple(steps),
        tuple(points),
    )


def _command(*words: str) -> int:
    from nemo_eaft import cli

    return cli.main(list(words))


def _write(
    arguments: argparse.Namespace,
    paths: Sequence[record.Path],
    reference: str,
    settings: Settings,
    depends_on: dict[str, Any],
) -> None:
    output: Path = arguments.output
    matching = match(paths, reference, arguments.draws, arguments.seed)
    figures = write_figures(paths, matching, output, Path(settings.model.hf).name)
    content = {"base": settings.model.hf, "measured_with": depends_on} | as_mapping(paths, matching)
    with replacing(output / "compare.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = [f"# Runs from {settings.model.hf}", "", *_how(arguments, paths), ""]
    lines += markdown(paths, matching, [figure.name for figure in figures])
    with replacing(output / "compare.md") as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print("\n".join([*findings(matching), *comparisons(matching)]))
    print(f"report: {output / 'compare.md'}, {output / 'compare.json'}", flush=True)


def _how(arguments: argparse.Namespace, paths: Sequence[record.Path]) -> list[str]:
    """What was measured on, in words."""
    base = paths[0].points[0]
    lines = [
        f"Measured with transformers in {arguments.dtype} on {arguments.device}.",
        "",
        f"* target cross-entropy and exact match (greedy): {len(base['target'].counts)} held-out rows, "
        f"{sum(base['target'].counts)} answer tokens",
    ]
    if "drift" in base:
        lines.append(
            f"* drift: {len(base['drift'].counts)} texts, {sum(base['drift'].counts)} tokens, sampled from the base "
            f"model at temperature 1 with seed {arguments.seed}, each of at most {arguments.sample_tokens} tokens"
        )
    if "text" in base:
        lines.append(
            f"* general text: {len(base['text'].counts)} windows of {arguments.window_tokens} tokens of "
            f"{arguments.text.name}; perplexity is the exponential of its cross-entropy"
        )
    if "probe" in base:
        scored = "whole answers" if arguments.probe_score == "full" else "the first token of each answer"
        lines.append(f"* knowledge probe: {len(base['probe'].counts)} questions of {arguments.probe.name}, by {scored}")
    return lines
