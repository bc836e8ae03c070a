"""Each check of a rehearsal on records made by hand: right ones pass, and each way to be wrong is found by its name."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from nemo_eaft import cli
from nemo_eaft.plan import command
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.memory import StateBytes, state_bytes
from nemo_eaft.plan.parameters import rank_parameters
from nemo_eaft.plan.rehearsal import checks
from nemo_eaft.plan.rehearsal.records import Built, Chunk, Parameter, Place, Rank, Whole
from nemo_eaft.plan.rehearsal.report import Rehearsal
from nemo_eaft.plan.shape import ModelShape
from tests.plan import rehearsal_cases as cases

CONFIG = cases.QWEN2 | {"num_hidden_layers": 2, "vocab_size": 12, "hidden_size": 8, "intermediate_size": 6}
SHAPE = ModelShape.from_hf(CONFIG | {"num_attention_heads": 2, "num_key_value_heads": 2})
SETTINGS = cases.settings_of("tiny", 4, tensor=2, pipeline=2)
LAYER = {
    "self_attention.linear_proj.weight": Parameter((8, 8), 1),
    "self_attention.linear_qkv.weight": Parameter((24, 8), 0),
    "self_attention.linear_qkv.bias": Parameter((24,), 0),
    "input_layernorm.weight": Parameter((8,)),
    "pre_mlp_layernorm.weight": Parameter((8,)),
    "mlp.linear_fc1.weight": Parameter((12, 8), 0),
    "mlp.linear_fc2.weight": Parameter((8, 6), 1),
}


def named(layer: int) -> dict[str, Parameter]:
    return {f"decoder.layers.{layer}.{name}": parameter for name, parameter in LAYER.items()}


def part(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """What one of two TP ranks holds."""
    halves = {}
    for name, parameter in parameters.items():
        shape = tuple(size // (2 if at == parameter.cut else 1) for at, size in enumerate(parameter.shape))
        halves[name] = parameter._replace(shape=shape)
    return halves


EMBEDDING = {"embedding.word_embeddings.weight": Parameter((12, 8), 0)}
NORM = {"decoder.final_layernorm.weight": Parameter((8,))}
COPY = {"output_layer.weight": Parameter((12, 8), 0, True)}


def rank(tensor: int, pipeline: int) -> Rank:
    columns = (6 * tensor, 6 * tensor + 6)
    if pipeline == 0:
        chunk = Chunk(post_process=False, attached=False, parameters=part(EMBEDDING | named(0)), embedding_rows=columns)
    else:
        chunk = Chunk(
            post_process=True,
            attached=True,
            parameters=part(named(1) | NORM | COPY),
            vocab_size=12,
            loss_columns=columns,
        )
    layout = Layout.of(SETTINGS)
    sizes = dataclasses.asdict(state_bytes(rank_parameters(SHAPE, layout, pipeline), SETTINGS, layout))
    return Rank(number=2 * pipeline + tensor, place=Place(tensor, 0, pipeline), chunks=(chunk,), **sizes)


WHOLE = Whole(parameters=EMBEDDING | named(0) | named(1) | NORM, hf_parameters=0, vocab_size=12)
COUNT = sum(
    parameter.shape[0] * (parameter.shape[1] if len(parameter.shape) > 1 else 1)
    for parameter in WHOLE.parameters.values()
)
RIGHT = Built(
    whole=dataclasses.replace(WHOLE, hf_parameters=COUNT),
    ranks=tuple(rank(tensor, pipeline) for pipeline in range(2) for tensor in range(2)),
    seconds=1.0,
    peak_bytes=10**9,
)


def failed(built: Built) -> dict[str, str]:
    return {each.name: "\n".join(each.faults) for each in checks.check(built, SETTINGS, SHAPE) if each.faults}


def test_right_records_pass_and_survive_json() -> None:
    assert failed(RIGHT) == {}
    assert Built.from_mapping(json.loads(json.dumps(RIGHT.as_mapping()))) == RIGHT


def with_chunk(number: int, **changes: Any) -> Built:
    """A field of the chunk of one rank is another."""
    ranks = list(RIGHT.ranks)
    chunk = dataclasses.replace(ranks[number].chunks[0], **changes)
    ranks[number] = dataclasses.replace(ranks[number], chunks=(chunk,))
    return dataclasses.replace(RIGHT, ranks=tuple(ranks))


def with_parameter(number: int, name: str, parameter: Parameter | None) -> Built:
    parameters = dict(RIGHT.ranks[number].chunks[0].parameters)
    if parameter is None:
        del parameters[name]
    else:
        parameters[name] = parameter
    return with_chunk(number, parameters=parameters)


def with_whole(**changes: Any) -> Built:
    return dataclasses.replace(RIGHT, whole=dataclasses.replace(RIGHT.whole, **changes))


FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    "built, name, message",
    [
        (dataclasses.replace(RIGHT, ranks=RIGHT.ranks[:3]), "ranks", "no rank is at stage 1, TP rank 1"),
        (dataclasses.replace(RIGHT, ranks=RIGHT.ranks[:3] + RIGHT.ranks[2:3]), "ranks", "which is another's"),
        (with_whole(conversion="ValueError: Shape mismatch"), "conversion", "Shape mismatch"),
        (with_parameter(0, FC1, Parameter((5, 8), 0)), "shapes", "is [5, 8], 2 of which make [10, 8]"),
        (with_parameter(1, FC1, Parameter((12, 8))), "shapes", "is whole on every TP rank; expected cut along"),
        (with_parameter(0, FC1, None), "shapes", f"{FC1} is held 1 times, in stages [0]; expected 2 times"),
        (with_parameter(2, FC1, Parameter((6, 8), 0)), "shapes", "in stages [0, 1]; expected 2 times, in one stage"),
        (with_parameter(0, "extra.weight", Parameter((8,))), "shapes", "extra.weight is not in the uncut model"),
        (with_parameter(2, "output_layer.weight", Parameter((12, 8), 0, True)), "shapes", "expected [12, 8]"),
        (with_whole(hf_parameters=COUNT + 1), "parameters", f"hold {COUNT:,} parameters; expected {COUNT + 1:,}"),
        (with_parameter(0, FC1, None), "parameters", "the plan says"),
        (with_parameter(3, "output_layer.weight", None), "parameters", "stage 1, TP rank 1 holds"),
        (with_chunk(0, attached=True), "loss", "stage 0, TP rank 0, chunk 0 has an EAFT loss; expected none"),
        (with_chunk(3, attached=False), "loss", "stage 1, TP rank 1, chunk 0 has no EAFT loss; expected one"),
        (with_chunk(0, post_process=True), "loss", "post_process is True; expected False"),
        (with_chunk(2, post_process=False), "loss", "post_process is False; expected True"),
        (with_chunk(2, vocab_size=11), "vocabulary", "the loss was given 11 tokens; expected 12"),
        (with_chunk(3, loss_columns=(5, 12)), "vocabulary", "begins at token 5; the one before it ends at 6"),
        (with_chunk(3, loss_columns=(7, 12)), "vocabulary", "begins at token 7; the one before it ends at 6"),
        (with_chunk(3, loss_columns=(6, 11)), "vocabulary", "end at token 11; expected 12"),
        (with_chunk(3, loss_columns=(6, 13)), "vocabulary", "end at token 13; expected 12"),
        (with_chunk(3, loss_columns=None), "vocabulary", "expected one shard on each of 2"),
        (with_chunk(1, embedding_rows=(6, 11)), "vocabulary", "embedding rows: end at token 11"),
    ],
)
def test_a_fault_is_found_by_name(built: Built, name: str, message: str) -> None:
    found = failed(built)
    assert message in found.get(name, ""), found


def test_padding_after_the_vocabulary_belongs_to_the_embedding_alone() -> None:
    assert failed(with_chunk(1, embedding_rows=(6, 14))) == {}


@pytest.mark.parametrize("part_name", ["weights", "gradients", "optimizer"])
@pytest.mark.parametrize("factor, found", [(1.05, True), (0.95, True), (1.015, False)])
def test_a_plan_that_is_off(monkeypatch: pytest.MonkeyPatch, part_name: str, factor: float, found: bool) -> None:
    def off(*args: Any) -> StateBytes:
        right = state_bytes(*args)
        return dataclasses.replace(right, **{part_name: round(getattr(right, part_name) * factor)})

    monkeypatch.setattr(checks, "state_bytes", off)
    faults = failed(RIGHT)
    assert set(faults) == ({"memory"} if found else set())
    assert not found or f"stage 0: {part_name} take" in faults["memory"], faults


def run_plan(monkeypatch: pytest.MonkeyPatch, rehearse: Callable[..., Rehearsal], *words: str) -> int:
    monkeypatch.setattr(command, "rehearse", rehearse)
    return cli.main(["plan", "qwen3-0.6b", "--rehearse", *words])


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def rehearse(built: Built) -> Callable[..., Rehearsal]:
        return lambda *_: Rehearsal(SETTINGS, built, tuple(checks.check(built, SETTINGS, SHAPE)))

    assert run_plan(monkeypatch, rehearse(RIGHT)) == 0
    assert "ok      vocabulary" in capsys.readouterr().out
    assert run_plan(monkeypatch, rehearse(with_chunk(0, attached=True))) == 1
    out = capsys.readouterr().out
    assert "FAILED  loss" in out
    assert "stage 0, TP rank 0, chunk 0 has an EAFT loss" in out
    assert run_plan(monkeypatch, rehearse(with_chunk(0, attached=True)), "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["rehearsal"]["passed"] is False
    assert [each["name"] for each in said["rehearsal"]["checks"] if each["faults"]] == ["loss"]

    assert cli.main(["plan", "--gpus", "8", "--model", "Qwen/Qwen3-4B-Thinking-2507", "--rehearse"]) == 2
    assert "--rehearse needs the layout of a CONF" in capsys.readouterr().err
