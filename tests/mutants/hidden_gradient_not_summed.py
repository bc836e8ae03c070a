"""Each rank keeps its own share of the hidden states' gradient: the all-reduce of backward is skipped."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.output_layer",
    right="sum_over_group(grad_tokens, job.group)",
    wrong="sum_over_group(grad_tokens, None)",
    caught_by=("loss/test_context_parallel.py::test_hidden_states_and_output_weight_get_the_uncut_gradient",),
)
