"""The formulas of arXiv 2601.02151 for one process, as they stand in the paper.

    ce      = logsumexp(z) - z[y]
    q       = softmax of the K largest z
    H       = -sum q ln q
    weight  = gate(ce, H / normaliser), for EAFT (H / ln K) ** alpha
    loss    = weight * ce, the weight a constant

Plain autograd, whole rows, no blocks: what every other path is compared with. float64 logits give float64
results.
"""

import torch
from torch import Tensor

from nemo_eaft.config import EAFTConfig
from nemo_eaft.gates import gate_weight
from nemo_eaft.loss.token_loss import TokenLoss


def reference_loss(logits: Tensor, labels: Tensor, valid: Tensor, config: EAFTConfig, vocab_size: int) -> TokenLoss:
    """The loss of every token.

    Args:
        logits: [..., V_padded] float, columns from ``vocab_size`` on are padding.
        labels: [...] int64, in [0, V) where ``valid``.
        valid: [...] bool, which tokens count.
        config: gate and entropy settings.
        vocab_size: the true vocabulary size V.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = torch.where(valid.unsqueeze(-1), logits[..., :vocab_size], 0.0).to(dtype)
    y = torch.where(valid, labels, 0)

    log_p = torch.log_softmax(z, dim=-1)
    cross_entropy = -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        k = config.effective_top_k(vocab_size)
        log_q = log_p if k is None else torch.log_softmax(z.topk(k, dim=-1).values, dim=-1)
        # entr(q) is -q ln q with 0 ln 0 = 0; ln q is taken before q underflows.
        q = log_q.exp()
        entropy = -torch.where(q == 0, 0.0, q * log_q).sum(dim=-1)
        entropy = entropy.clamp(0.0, config.entropy_bound(vocab_size))
        ratio = entropy / config.entropy_normalizer(vocab_size)
        weight = gate_weight(cross_entropy, ratio, config)

    loss = torch.where(valid, weight * cross_entropy, 0.0)
    return TokenLoss(
        loss,
        torch.where(valid, cross_entropy.detach(), 0.0),
        torch.where(valid, entropy, 0.0),
        torch.where(valid, weight, 0.0),
    )
