"""``eaft_loss`` forward and backward on threaded ranks, gathered for comparison."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eaft import EAFTConfig, TokenLoss, eaft_loss
from tests.harness import run_threads
from tests.loss.formulas import expected, shard

# Absolute and relative, by quantity, for float32 statistics against float64.
LOSS: dict[str, Any] = {"rtol": 1.3e-6, "atol": 1e-5}
STATISTIC: dict[str, Any] = {"rtol": 0.0, "atol": 5e-6}
GRADIENT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-6}


class Ranked(NamedTuple):
    outs: list[TokenLoss]
    """Detached, one a rank."""

    gradient: Tensor
    """[..., V_padded], the ranks' gradients side by side."""

    @property
    def out(self) -> TokenLoss:
        return self.outs[0]

    def assert_ranks_identical(self) -> None:
        for other in self.outs[1:]:
            for name, mine, theirs in zip(TokenLoss._fields, self.outs[0], other, strict=True):
                assert bits_equal(mine, theirs), f"{name} differs between ranks"


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """``torch.equal``, but NaN equals NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def run_sharded(
    logits: Tensor,
    labels: Tensor,
    config: EAFTConfig,
    world_size: int,
    *,
    vocab_size: int,
    upstream: Tensor | None = None,
    **kwargs: Any,
) -> Ranked:
    """Split [..., V_padded] over threaded ranks (or none at size 1), run forward and backward, gather."""

    def rank_loss(rank: int) -> tuple[TokenLoss, Tensor]:
        part = shard(logits, rank, world_size)
        group = dist.group.WORLD if world_size > 1 else None
        out = eaft_loss(part, labels, config, vocab_size=vocab_size, group=group, **kwargs)
        grad = torch.ones_like(out.loss) if upstream is None else upstream.to(out.loss.dtype)
        out.loss.backward(grad)
        assert part.grad is not None
        assert part.grad.dtype == logits.dtype
        return TokenLoss(*(value.detach() for value in out)), part.grad

    results = [rank_loss(0)] if world_size == 1 else run_threads(rank_loss, world_size)
    return Ranked([out for out, _ in results], torch.cat([grad for _, grad in results], dim=-1))


def assert_matches(
    got: Ranked, logits: Tensor, labels: Tensor, config: EAFTConfig, vocab: int, mask: Tensor | None = None
) -> None:
    want = expected(logits, labels, config, vocab, mask)
    got.assert_ranks_identical()
    torch.testing.assert_close(got.out.loss.double(), want.loss, **LOSS)
    torch.testing.assert_close(got.out.cross_entropy.double(), want.cross_entropy, **LOSS)
    torch.testing.assert_close(got.out.entropy.double(), want.entropy, **STATISTIC)
    torch.testing.assert_close(got.gradient.double(), want.gradient, **GRADIENT)


def layouts() -> dict[str, Tensor]:
    """[6, 4, 40] of equal values behind different strides."""
    torch.manual_seed(0)
    base = torch.randn(6, 4, 40)
    wide = torch.randn(6, 4, 96)
    wide[..., 10:90:2] = base
    return {
        "contiguous": base,
        "batch first": base.transpose(0, 1).contiguous().transpose(0, 1),
        "vocabulary first": base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every second column of a slice": wide[..., 10:90:2],
        "every second token": torch.stack((base, base + 1), dim=1).flatten(0, 1)[::2],
        "negative strides made dense": base.flip(0).contiguous().flip(0),
    }
