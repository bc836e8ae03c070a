"""Rehearsals of tiny models, right ones and some with a fault put into what is built, all in one process:
`python -m tests.plan.rehearsal_variants RESULT FAMILY`. NeMo's `__io__` records serve one family a process."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nemo_eaft.cpu
from nemo_eaft.plan.shape import find_config
from nemo_eaft.settings import Settings
from tests.plan import rehearsal_cases as cases

Fault = Callable[[], contextlib.AbstractContextManager[Any]]


def attached_everywhere() -> Any:
    """EAFT also on chunks without the loss."""
    from nemo_eaft import megatron, nemo

    def attach(model: Any, *args: Any, **kwargs: Any) -> Any:
        core: Any = megatron.unwrap(model)
        post_process, core.post_process = core.post_process, True
        try:
            return megatron.attach(model, *args, **{**kwargs, "fused_linear": False})
        finally:
            core.post_process = post_process

    return mock.patch.object(nemo, "attach", attach)


def attached_nowhere() -> Any:
    from nemo_eaft import nemo

    return mock.patch.object(nemo, "attach", return_value=None)


def vocabulary_too_small() -> Any:
    """The loss is given fewer tokens than the model has."""
    from nemo_eaft import megatron, nemo

    def attach(model: Any, *args: Any, **kwargs: Any) -> Any:
        return megatron.attach(model, *args, **{**kwargs, "vocab_size": kwargs["vocab_size"] - 8})

    return mock.patch.object(nemo, "attach", attach)


def vocabulary_too_large() -> Any:
    from nemo_eaft import megatron, nemo

    def attach(model: Any, *args: Any, **kwargs: Any) -> Any:
        return megatron.attach(model, *args, **{**kwargs, "vocab_size": kwargs["vocab_size"] + 8})

    return mock.patch.object(nemo, "attach", attach)


@contextlib.contextmanager
def _field(name: str, value: Any) -> Iterator[None]:
    """A field that the importer's correction would have set is another."""
    from nemo_eaft import convert

    fields = convert._nemo_fields
    with mock.patch.object(convert, "_nemo_fields", lambda hf_config: fields(hf_config) | {name: value}):
        yield


def untied() -> Any:
    return _field("share_embeddings_and_output_weights", False)


def heads_of_another_size() -> Any:
    return _field("kv_channels", 16)


def too_few_experts() -> Any:
    return _field("num_moe_experts", 4)


def uneven_stages() -> Any:
    """Megatron is told to cut the layers otherwise than the plan."""
    from nemo_eaft import train

    strategy = train.build_strategy

    def build_strategy(settings: Settings) -> Any:
        built = strategy(settings)
        if settings.parallel.pipeline > 1:
            built.num_layers_in_first_pipeline_stage = 2
        return built

    return mock.patch.object(train, "build_strategy", build_strategy)


def right() -> Any:
    return contextlib.nullcontext()


def right_in_float32() -> Any:
    return contextlib.nullcontext()


def right_with_whole_optimizer() -> Any:
    return contextlib.nullcontext()


def qwen3_30b_a3b() -> Any:
    """The real one, right; here because NeMo's import takes as long as a small rehearsal."""
    return contextlib.nullcontext()


def glm_4_32b() -> Any:
    """The real one, right."""
    return contextlib.nullcontext()


VARIANTS: dict[str, list[tuple[Fault, dict[str, Any], Settings]]] = {
    "qwen2": [
        (right, cases.QWEN2, cases.TIED),
        (right_in_float32, cases.QWEN2, cases.STAGES),
        (right_with_whole_optimizer, cases.QWEN2, cases.WHOLE_OPTIMIZER),
        (attached_everywhere, cases.QWEN2, cases.TIED),
        (attached_nowhere, cases.QWEN2, cases.TIED),
        (vocabulary_too_small, cases.QWEN2, cases.TIED),
        (vocabulary_too_large, cases.QWEN2, cases.TIED),
        (untied, cases.QWEN2, cases.TIED),
        (uneven_stages, cases.QWEN2, cases.STAGES),
    ],
    "qwen3_moe": [
        (right, cases.QWEN3_MOE, cases.EXPERTS),
        (heads_of_another_size, cases.QWEN3_MOE, cases.EXPERTS),
        (too_few_experts, cases.QWEN3_MOE, cases.EXPERTS),
        (qwen3_30b_a3b, find_config("Qwen/Qwen3-30B-A3B"), cases.QWEN3_30B_A3B),
    ],
    "glm4": [
        (right, cases.GLM4, cases.SANDWICHED),
        (glm_4_32b, find_config("THUDM/GLM-4-32B-0414"), cases.GLM_4_32B),
    ],
}


def main(result: str, family: str) -> None:
    """Build the variants of a family and write, by name, what was built, or the error that was raised."""
    nemo_eaft.cpu.enable()
    from nemo_eaft.plan.rehearsal.worker import build

    found: dict[str, Any] = {}
    for fault, hf_config, settings in VARIANTS[family]:
        with fault():
            try:
                found[fault.__name__] = build(settings, hf_config, settings.loss.fused_linear is True).as_mapping()
            except ValueError as error:
                found[fault.__name__] = {"error": str(error)}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
