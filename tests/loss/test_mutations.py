"""Deliberately wrong losses, each a line away from the right one, and the property that must catch it.

The source of one module is changed in memory, the package is imported afresh from it, and a compact set of
properties is run. A mutant that no property notices would mean a test that cannot fail. A mutant that crashes
proves nothing, so exceptions other than a failed comparison end the test.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig
from tests.harness import run_threads
from tests.loss.formulas import expected, pad, shard
from tests.loss.parallel import bits_equal

Loss = Callable[..., Any]


class _MutatingFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module of the package from a changed source."""

    def __init__(self, module: str, old: str, new: str) -> None:
        self._module, self._old, self._new = module, old, new

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert found is not None
        assert found.origin is not None
        self._origin = found.origin
        return importlib.util.spec_from_loader(fullname, self, origin=found.origin)

    def exec_module(self, module: ModuleType) -> None:
        with open(self._origin) as file:
            source = file.read()
        assert source.count(self._old) == 1, f"{self._old!r} stands {source.count(self._old)} times in {self._module}"
        exec(compile(source.replace(self._old, self._new), self._origin, "exec"), module.__dict__)


@contextlib.contextmanager
def mutated(module: str, old: str, new: str) -> Iterator[Loss]:
    """``eaft_loss`` of a second copy of ``nemo_eaft.loss`` in which ``old`` is ``new``."""

    def is_ours(name: str) -> bool:
        return name == "nemo_eaft.loss" or name.startswith("nemo_eaft.loss.")

    import nemo_eaft

    kept = {name: value for name, value in sys.modules.items() if is_ours(name)}
    original = nemo_eaft.loss
    for name in kept:
        del sys.modules[name]
    finder = _MutatingFinder(f"nemo_eaft.loss.{module}", old, new)
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module("nemo_eaft.loss").eaft_loss
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(kept)
        nemo_eaft.loss = original


def ranked(loss: Loss, logits: Tensor, labels: Tensor, config: EAFTConfig, world_size: int, vocab: int) -> Any:
    """(values of each rank, gradient, logits of each rank afterwards) with an uneven upstream gradient."""
    upstream = torch.arange(1.0, labels.numel() + 1).view(labels.shape)

    def rank_loss(rank: int) -> Any:
        part = shard(logits, rank, world_size)
        group = dist.group.WORLD if world_size > 1 else None
        out = loss(part, labels, config, vocab_size=vocab, group=group)
        out.loss.backward(upstream.to(out.loss.dtype))
        return [value.detach() for value in out], part.grad, part.detach()

    results = [rank_loss(0)] if world_size == 1 else run_threads(rank_loss, world_size)
    values, gradients, after = zip(*results, strict=True)
    return values, torch.cat(gradients, dim=-1), torch.cat(after, dim=-1)


def failures(loss: Loss) -> set[str]:
    """The names of the properties that ``loss`` does not have."""
    torch.manual_seed(0)
    failed: set[str] = set()

    def check(name: str, right: bool | Tensor) -> None:
        if not bool(right):
            failed.add(name)

    def compare(name: str, logits: Tensor, labels: Tensor, config: EAFTConfig, size: int, vocab: int) -> None:
        values, gradient, after = ranked(loss, logits, labels, config, size, vocab)
        upstream = torch.arange(1.0, labels.numel() + 1).view(labels.shape)
        want = expected(logits, labels, config, vocab, upstream=upstream)
        for value, reference in zip(values[0], want[:4], strict=True):
            check(name, torch.allclose(value, reference, rtol=1e-12, atol=1e-12))
        check(f"{name} gradient", torch.allclose(gradient, want.gradient, rtol=1e-12, atol=1e-11))
        check("ranks agree", all(bits_equal(a, b) for o in values for a, b in zip(values[0], o, strict=True)))
        check("inputs unchanged", bits_equal(after, logits))

    plain, labels = torch.randn(6, 60, dtype=torch.float64) * 3, torch.tensor([0, 14, 15, 29, 30, 59])
    with_ignored = torch.tensor([0, -100, 15, -100, 30, 59])
    for size in (1, 2, 4):
        for config in (EAFTConfig(), EAFTConfig(top_k=None)):
            compare("values", plain, labels, config, size, 60)
            compare("ignored", plain, with_ignored, config, size, 60)
            compare("padding", pad(plain[:, :57], 60, value=9.0), labels.clamp(max=56), config, size, 57)
            compare("extremes", plain * 1e4, labels, config, size, 60)
            holes = plain.clone()
            holes[:, 1:14] = -math.inf
            compare("minus infinity", holes, labels.where(labels != 14, 15), config, size, 60)

    dirty = plain.clone()
    dirty[1], dirty[3, 5] = math.nan, math.inf
    values, gradient, _ = ranked(loss, dirty, with_ignored, EAFTConfig(), 2, 60)
    counted = with_ignored != -100
    check("masked NaN", all(value.isfinite().all() for value in values[0]) and gradient.isfinite().all())
    check("masked NaN", (gradient[~counted] == 0).all())
    values, _, _ = ranked(loss, dirty, labels, EAFTConfig(), 2, 60)
    check("counted NaN", all(bool(value[0][[1, 3]].isnan().all()) for value in values))

    half = plain.bfloat16()
    _, rounded, _ = ranked(loss, half, labels, EAFTConfig(), 1, 60)
    _, exact, _ = ranked(loss, half.float(), labels, EAFTConfig(), 1, 60)
    check("one rounding", torch.equal(rounded, exact.bfloat16()))

    zero, _, _ = ranked(loss, plain, labels, EAFTConfig(alpha=0.0), 2, 60)
    check("alpha zero", torch.equal(zero[0][0], zero[0][1]))

    def gathered(rank: int) -> bool:
        try:
            loss(plain, labels, EAFTConfig(), vocab_size=60, group=dist.group.WORLD)
        except ValueError:
            return True
        return False

    check("gathered logits", all(run_threads(gathered, 2)))
    return failed


_GATHERED = "records = all_gather_records(backend.local_records(logits, target, shard, top_k), group)"

MUTANTS: dict[str, tuple[str, str, str, str]] = {
    # name: (module, right source, wrong source, a property that must fail)
    "top-K of the local shard": (
        "vocab_parallel",
        "statistics = merge_records(records, top_k)\n",
        "statistics = merge_records(records, top_k)._replace(entropy=merge_records(backend.local_records("
        "logits, target, shard, top_k).unsqueeze(0), top_k).entropy)\n",
        "ranks agree",
    ),
    "top-K of one rank for all": (
        "records",
        "for rank in range(ranks)], dim=-1)",
        "for rank in [0]], dim=-1)",
        "values",
    ),
    "no collective": ("vocab_parallel", _GATHERED, _GATHERED.replace(", group)", ", None)"), "ranks agree"),
    "mean of the micro-batch": (
        "vocab_parallel",
        "values = (weight * statistics.cross_entropy,",
        "values = (weight * statistics.cross_entropy / (target != IGNORED).sum(),",
        "values",
    ),
    "no maximum before the exponential": (
        "scratch",
        'torch.softmax(z, dim=-1, out=self._room("probability", len(z)))',
        "torch.div(z.exp(), z.exp().sum(dim=-1, keepdim=True))",
        "extremes",
    ),
    "sum of the maxima": (
        "records",
        "maximum = maxima.amax(dim=0)",
        "maximum = maxima.sum(dim=0)",
        "extremes",
    ),
    "no rescaling between ranks": ("records", "sums[rank] * scale[rank]", "sums[rank]", "values"),
    "mask by multiplication": (
        "vocab_parallel",
        "torch.where(target != IGNORED, value, 0.0)",
        "(value * (target != IGNORED))",
        "masked NaN",
    ),
    "local sum without its peak": (
        "records",
        "probability.sum(dim=-1).div_(peak)",
        "probability.sum(dim=-1)",
        "values",
    ),
    "local maximum in backward forgotten": (
        "gradient",
        "(local_maximum - maximum).sub_(log_sum)",
        "(-log_sum)",
        "values gradient",
    ),
    "NaN hidden": (
        "records",
        "return RowStatistics(maximum, log_sum, cross_entropy, entropy)",
        "return RowStatistics(maximum, log_sum, cross_entropy.nan_to_num(), entropy.nan_to_num())",
        "counted NaN",
    ),
    "0 times -Inf": (
        "records",
        "return shifted.clamp_(min=torch.finfo(shifted.dtype).min).mul_(",
        "return shifted.mul_(",
        "minus infinity",
    ),
    "no weight in backward": (
        "gradient",
        "weight * grad_loss.flatten()",
        "grad_loss.flatten()",
        "values gradient",
    ),
    "upstream gradient read as a scalar": (
        "gradient",
        "weight * grad_loss.flatten()",
        "weight * grad_loss.flatten()[0]",
        "values gradient",
    ),
    "gradient times the number of ranks": (
        "gradient",
        "weight * grad_loss.flatten()",
        "2 * weight * grad_loss.flatten()",
        "values gradient",
    ),
    "gradient at ignored tokens": (
        "gradient",
        "clear_rows(values, target == IGNORED)",
        "pass",
        "masked NaN",
    ),
    "first column of a shard lost": ("shard", "(local >= 0)", "(local > 0)", "values"),
    "shards off by one": (
        "shard",
        "first = rank * vp_width",
        "first = rank * vp_width + min(rank, 1)",
        "values",
    ),
    "padding columns included": ("shard", "min(max(vocab_size - first, 0), vp_width)", "vp_width", "padding"),
    "padding columns unwritten": ("rows", "        self._flat[start:stop, columns:] = 0\n", "", "padding gradient"),
    "gathered logits accepted": ("checks", "vp_width >= vocab_size", "vp_width > 10**9", "gathered logits"),
    "the authors' 3.0": ("vocab_parallel", "config.entropy_normalizer(vocab_size)", "3.0", "values"),
    "normaliser of the shard": (
        "vocab_parallel",
        "out = weigh(statistics, target, config, shard.vocab_size)",
        "out = weigh(statistics, target, config, max(shard.columns, 2))",
        "values",
    ),
    "gradient over the caller's logits": (
        "vocab_parallel",
        "if ctx.inplace_backward:\n            ctx.overwritten",
        "if True:\n            ctx.overwritten",
        "inputs unchanged",
    ),
    "rounding before scaling": (
        "gradient",
        "values = torch.mul(probability, (scale",
        "values = torch.mul(probability.copy_(probability.to(block.dtype)), (scale",
        "one rounding",
    ),
    "alpha zero still weighed": (
        "vocab_parallel",
        "weight = gate_weight(statistics.cross_entropy, ratio, config)",
        "weight = gate_weight(statistics.cross_entropy, ratio, config) * ratio.clamp(min=0.99)",
        "alpha zero",
    ),
}


def test_the_right_loss_has_every_property() -> None:
    with mutated("vocab_parallel", "class _VocabParallelLoss(", "class _VocabParallelLoss(") as same:
        assert failures(same) == set()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_loss_is_caught(name: str) -> None:
    module, old, new, caught_by = MUTANTS[name]
    with mutated(module, old, new) as wrong:
        assert caught_by in failures(wrong)


def test_the_package_is_itself_again() -> None:
    import nemo_eaft

    assert sys.modules["nemo_eaft.loss"].eaft_loss is nemo_eaft.eaft_loss
    assert failures(nemo_eaft.eaft_loss) == set()
