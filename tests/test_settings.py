"""Settings: every default is allowed, every impossible value or combination is refused by name."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nemo_eaft import settings as module
from nemo_eaft import settings_data
from nemo_eaft.config import EAFTConfig
from nemo_eaft.settings import LossSettings, Settings, known_keys
from nemo_eaft.settings_mapping import from_mapping

Groups = dict[str, dict[str, Any]]


def make(**groups: dict[str, Any]) -> Settings:
    base: Groups = {"model": {"hf": "m"}, "data": {"train": "t.jsonl"}, "run": {"dir": "r"}}
    for name, values in groups.items():
        base[name] = base.get(name, {}) | values
    return from_mapping(base)


def test_defaults_are_allowed_and_frozen() -> None:
    settings = make()
    assert (settings.world_size, settings.data_parallel, settings.num_micro_batches) == (1, 1, 128)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.trainer.max_steps = 5  # type: ignore[misc]


def test_every_key_says_what_it_is() -> None:
    """A docstring stands under each field; the reader of the source needs no other page."""
    import ast
    import inspect

    body = [node for source in (module, settings_data) for node in ast.parse(inspect.getsource(source)).body]
    for group in [node for node in body if isinstance(node, ast.ClassDef) and node.name != "Settings"]:
        body = group.body
        for index, node in enumerate(body):
            if isinstance(node, ast.AnnAssign):
                following = body[index + 1]
                assert isinstance(following, ast.Expr), f"{group.name}.{ast.unparse(node.target)}"
                assert isinstance(following.value, ast.Constant)


def test_the_names_others_rely_on() -> None:
    fixed = {
        "model": "hf",
        "data": "train validation",
        "run": "dir resume backend",
        "loss": "gate alpha top_k normalizer fused_linear check_replicas",
        "parallel": "tensor pipeline virtual_pipeline context expert sequence",
        "trainer": "max_steps num_nodes gpus_per_node micro_batch_size global_batch_size "
        "seq_length learning_rate precision save_every seed",
    }
    assert {f"{group}.{name}" for group, names in fixed.items() for name in names.split()} <= set(known_keys())


def test_loss_settings_and_config_agree() -> None:
    """A name or default that differs between the two would be a second truth."""
    ours = {field.name: field.default for field in dataclasses.fields(LossSettings)}
    theirs = {field.name: field.default for field in dataclasses.fields(EAFTConfig)}
    shared = set(ours) & set(theirs)
    assert shared == set(theirs) - {"ignore_index"}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize(
    "group, values, named",
    [
        ("model", {"hf": " "}, "model.hf is empty"),
        ("data", {"num_workers": -1}, "data.num_workers=-1 must be 0 or more"),
        ("data", {"prompt_template": "{input}"}, "data.prompt_template"),
        ("data", {"prompt_template": "{output} {input}"}, "data.prompt_template"),
        ("data", {"packed": True, "packed_size": 1}, "data.packed_size=1 must be 2 or more"),
        ("loss", {"alpha": -1.0}, "loss.alpha must be a finite number of at least 0, got -1.0"),
        ("loss", {"alpha": math.nan}, "loss.alpha must be a finite number of at least 0, got nan"),
        ("loss", {"top_k": 1}, "loss.top_k must be an integer of at least 2"),
        ("loss", {"normalizer": 0.0}, "loss.normalizer must be"),
        ("loss", {"conflict_probability": 1.5}, "loss.conflict_probability must be a number in [0, 1], got 1.5"),
        ("loss", {"gate": "sigmoid", "gate_slope": 0.0}, "loss.gate_slope must be a finite number above 0, got 0.0"),
        ("loss", {"gate": "stock", "alpha": -1.0}, "loss.alpha must be"),
        ("loss", {"check_replicas": -1}, "loss.check_replicas=-1 must be 0 or more"),
        ("loss", {"fused_linear": True, "gate": "stock"}, "loss.fused_linear=true with loss.gate=stock"),
        ("parallel", {"tensor": 0}, "parallel.tensor=0 must be 1 or more"),
        (
            "parallel",
            {"virtual_pipeline": 2},
            "parallel.virtual_pipeline=2 needs parallel.pipeline of 2 or more",
        ),
        (
            "parallel",
            {"last_stage_layers": 2},
            "parallel.last_stage_layers=2 needs parallel.pipeline of 2 or more and no parallel.virtual_pipeline",
        ),
        (
            "parallel",
            {"pipeline": 2, "virtual_pipeline": 2, "last_stage_layers": 2},
            "got 2 and 2",
        ),
        ("parallel", {"sequence": True}, "parallel.sequence=true needs parallel.tensor of 2 or more"),
        ("trainer", {"max_steps": 0}, "trainer.max_steps=0 must be 1 or more"),
        ("trainer", {"seed": 2**32}, "trainer.seed=4294967296 must be below 2**32"),
        ("trainer", {"learning_rate": math.inf}, "trainer.learning_rate=inf"),
        ("trainer", {"min_learning_rate": 1.0}, "trainer.min_learning_rate=1.0 is above"),
        (
            "trainer",
            {"max_steps": 5, "warmup_steps": 5},
            "trainer.warmup_steps=5 must be below trainer.max_steps=5",
        ),
        ("trainer", {"keep_checkpoints": 0}, "trainer.keep_checkpoints=0 must be 1 or more or -1"),
        ("run", {"dir": ""}, "run.dir is empty"),
    ],
)
def test_one_impossible_value(group: str, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as error:
        make(**{group: values})
    assert named in str(error.value)


@pytest.mark.parametrize(
    "groups, named",
    [
        ({"parallel": {"tensor": 2}}, "1 ranks must be a multiple of parallel.tensor=2"),
        (
            {"parallel": {"tensor": 2}, "trainer": {"gpus_per_node": 4, "global_batch_size": 3}},
            "trainer.global_batch_size=3 must be a multiple of trainer.micro_batch_size=1 x 2 data-parallel ranks = 2",
        ),
        (
            {
                "parallel": {"pipeline": 2, "virtual_pipeline": 2},
                "trainer": {"gpus_per_node": 2, "global_batch_size": 3},
            },
            "parallel.virtual_pipeline=2 needs a number of micro-batches per step that is a multiple of",
        ),
        ({"parallel": {"expert": 2}}, "parallel.expert=2 must divide the 1 ranks"),
        (
            {"parallel": {"expert": 2, "tensor": 2}, "trainer": {"gpus_per_node": 4}},
            "needs parallel.sequence=true",
        ),
        (
            {"parallel": {"tensor": 3, "sequence": True}, "trainer": {"gpus_per_node": 3, "seq_length": 256}},
            "trainer.seq_length=256 must be a multiple of 3",
        ),
        (
            {"parallel": {"context": 2}, "trainer": {"gpus_per_node": 2, "seq_length": 258}},
            "trainer.seq_length=258 must be a multiple of 4",
        ),
        (
            {"data": {"packed": True}, "trainer": {"micro_batch_size": 2}},
            "data.packed=true needs trainer.micro_batch_size=1, got 2",
        ),
        (
            {"data": {"packed": True}, "parallel": {"context": 2}, "trainer": {"gpus_per_node": 2}},
            "data.packed=true with parallel.context=2 is refused",
        ),
        (
            {"data": {"packed": True, "packed_size": 100}},
            "data.packed_size=100 must be at least trainer.seq_length",
        ),
    ],
)
def test_impossible_combinations(groups: Groups, named: str) -> None:
    with pytest.raises(ValueError) as error:
        make(**groups)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "groups, named",
    [
        ({"data": {"packed_size": 4096}}, "data.packed_size has no effect"),
        ({"trainer": {"val_every": 7}}, "trainer.val_every=7 has no effect without data.validation"),
        ({"loss": {"gate": "none", "alpha": 0.5}}, "loss.alpha=0.5 has no effect: gate='none'"),
        ({"loss": {"gate": "stock", "alpha": 0.5}}, "loss.alpha=0.5 has no effect: gate='stock'"),
        ({"loss": {"gate": "eaft", "gate_slope": 3.0}}, "loss.gate_slope=3.0 has no effect: gate='eaft'"),
    ],
)
def test_what_has_no_effect_is_said_once(groups: Groups, named: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make(**groups).loss.eaft_config()
    [warning] = said
    assert named in str(warning.message)
    # The command line shows in one line what comes from a file of this package.
    assert Path(warning.filename).parent == Path(module.__file__).parent


@pytest.mark.parametrize("gate", ["eaft", "none", "dft", "mask", "sigmoid", "stock"])
def test_the_loss_gets_every_setting(gate: str) -> None:
    values = {"top_k": None, "normalizer": 2.5, "conflict_probability": 0.3, "conflict_entropy": 0.4}
    config = make(loss={"gate": gate, **values}).loss.eaft_config()
    assert config == EAFTConfig(**values, gate="none" if gate == "stock" else gate)  # type: ignore[arg-type]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("context", [1, 2, 3, 4])
@pytest.mark.parametrize("tensor", [2, 3, 4])
def test_sequence_unit_is_the_least_length_that_can_be_cut(tensor: int, context: int, sequence: bool) -> None:
    """By the rules themselves: two pieces for each context rank, whole tokens for each tensor rank within one."""

    def fits(length: int) -> bool:
        whole = context == 1 or length % (2 * context) == 0
        return whole and (not sequence or (length % context == 0 and (length // context) % tensor == 0))

    parallel = {"tensor": tensor, "context": context, "sequence": sequence}
    trainer = {"gpus_per_node": tensor * context, "seq_length": 2 * tensor * context * 12}
    unit = make(parallel=parallel, trainer=trainer).sequence_unit
    assert [length for length in range(1, 4 * unit + 1) if fits(length)] == [unit, 2 * unit, 3 * unit, 4 * unit]


def test_a_length_that_only_fits_without_context_is_refused() -> None:
    """20 is a multiple of tensor=4 and of 2 x context=4, but each context rank holds 10 tokens for 4 tensor ranks."""
    groups: Groups = {"parallel": {"tensor": 4, "context": 2, "sequence": True}, "trainer": {"gpus_per_node": 8}}
    make(**groups | {"trainer": {"gpus_per_node": 8, "seq_length": 24}})
    with pytest.raises(ValueError, match=r"trainer\.seq_length=20 must be a multiple of 8"):
        make(**groups | {"trainer": {"gpus_per_node": 8, "seq_length": 20}})


sizes = st.integers(1, 4)


@given(
    tensor=sizes,
    pipeline=sizes,
    context=sizes,
    nodes=sizes,
    gpus=st.integers(1, 8),
    micro=sizes,
    batch=st.integers(1, 64),
)
def test_what_passes_is_what_nemo_accepts(
    tensor: int, pipeline: int, context: int, nodes: int, gpus: int, micro: int, batch: int
) -> None:
    """The rules of NeMo 2.7.3 `_validate_config`, written once more and compared both ways."""
    world = nodes * gpus
    model = tensor * pipeline * context
    # float division, as upstream: a data-parallel size that is no whole number passes there only if caught
    # before
    nemo = world % model == 0 and batch % (micro * (world / model)) == 0
    assume(context == 1 or 2520 % (2 * context) == 0)
    groups: Groups = {
        "parallel": {"tensor": tensor, "pipeline": pipeline, "context": context},
        "trainer": {
            "num_nodes": nodes,
            "gpus_per_node": gpus,
            "micro_batch_size": micro,
            "global_batch_size": batch,
            "seq_length": 2520,
        },
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            settings = make(**groups)
        except ValueError:
            assert not nemo
        else:
            assert nemo
            assert settings.data_parallel * model == world
            assert settings.num_micro_batches * micro * settings.data_parallel == batch


def test_the_fused_output_layer_is_a_choice() -> None:
    for choice in (True, False, "auto"):
        assert make(loss={"fused_linear": choice}).loss.fused_linear == choice
    for choice in (False, "auto"):
        assert make(loss={"fused_linear": choice, "gate": "stock"}).loss.gate == "stock"
