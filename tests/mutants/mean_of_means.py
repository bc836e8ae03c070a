"""The loss is divided by the tokens of its own micro-batch, so that a step is a mean of means."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.vocab_parallel",
    right="values = (weight * statistics.cross_entropy,",
    wrong="values = (weight * statistics.cross_entropy / (target != IGNORED).sum(),",
    caught_by=(
        "loss/test_invariants.py::test_any_split_of_the_tokens_gives_the_same_step",
        "loss/test_context_parallel.py::test_sums_count_and_gradient_are_the_uncut_ones",
    ),
)
