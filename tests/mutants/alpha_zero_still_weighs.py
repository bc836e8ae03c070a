"""alpha = 0 leaves a little of the weight."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.vocab_parallel",
    right="weight = gate_weight(statistics.cross_entropy, ratio, config)",
    wrong="weight = gate_weight(statistics.cross_entropy, ratio, config) * ratio.clamp(min=0.99)",
    caught_by=("loss/test_numbers.py::test_alpha_zero_is_plain_cross_entropy_bit_for_bit",),
)
