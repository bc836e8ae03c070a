"""Logits of the whole vocabulary on every rank pass for shards: the loss is ln TP too large."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.checks",
    right="vp_width >= vocab_size",
    wrong="vp_width > 10**9",
    caught_by=("loss/test_numbers.py::test_gathered_logits_are_refused",),
)
