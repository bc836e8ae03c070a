"""Exponentials are taken without subtracting the row's maximum."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.scratch",
    right='torch.softmax(z, dim=-1, out=self._room("probability", len(z)))',
    wrong="torch.div(z.exp(), z.exp().sum(dim=-1, keepdim=True))",
    caught_by=("loss/test_numbers.py::test_extreme_logits",),
)
