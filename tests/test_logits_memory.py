"""`loss.fused_linear=auto`: a rule of settings and memory."""

import dataclasses
from typing import Any

import pytest

from nemo_eaft import logits_memory
from nemo_eaft.compose import compose
from nemo_eaft.logits_memory import choose_fused_linear, logits_bytes
from nemo_eaft.settings import Settings


def settings(*overrides: str) -> Settings:
    return compose("demo", ["data.train=x.jsonl", *overrides])


def test_bytes_of_logits_and_their_gradient() -> None:
    one = settings("parallel=single", "trainer.gpus_per_node=1", "trainer.micro_batch_size=2", "trainer.seq_length=256")
    assert logits_bytes(one, 1000) == 2 * 512 * 1000 * 4
    half = dataclasses.replace(one, trainer=dataclasses.replace(one.trainer, precision="bf16"))
    assert logits_bytes(half, 1000) == 2 * 512 * 1000 * 2
    three = settings("trainer.micro_batch_size=2", "trainer.seq_length=256")
    assert three.parallel.tensor == 3
    assert logits_bytes(three, 1000) == 2 * 512 * 334 * 4
    packed = settings("data.packed=true", "data.packed_size=4096", "trainer.micro_batch_size=1")
    assert logits_bytes(packed, 999) == 2 * 4096 * 333 * 4


def test_auto_fuses_above_a_tenth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    run = settings()
    need = logits_bytes(run, 49152)
    for memory, expected in ((10 * need, False), (10 * need - 1, True)):
        monkeypatch.setattr(logits_memory, "rank_memory", lambda _, memory=memory: memory)
        fused, why = choose_fused_linear(run, 49152)
        assert fused is expected
        assert why is not None
        assert f"means {str(expected).lower()}" in why


def test_a_given_choice_needs_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: Any) -> int:
        raise AssertionError("asked for the memory")

    monkeypatch.setattr(logits_memory, "rank_memory", never)
    assert choose_fused_linear(settings("loss.fused_linear=true"), 10**6) == (True, None)
    assert choose_fused_linear(settings("loss.fused_linear=false"), 10**6) == (False, None)
    assert choose_fused_linear(settings("loss.gate=stock"), 10**6) == (False, None)


def test_the_ranks_of_a_machine_share_its_memory() -> None:
    three = logits_memory.rank_memory(settings())
    one = logits_memory.rank_memory(settings("parallel=single", "trainer.gpus_per_node=1"))
    assert one // 3 == three > 0
