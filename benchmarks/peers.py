"""How each peer is called, and why it cannot be where it cannot.

A peer is imported only when it is asked for. Every function takes the inputs of a case and returns the loss
per token, [tokens] or [tokens, 1], or the sum where the peer is built for that.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Inputs


def missing(package: str) -> str | None:
    """Why a package cannot be used, or None."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def missing_megatron() -> str | None:
    """As ``missing``; ``find_spec`` of a part fails where the namespace ``megatron`` is not there."""
    return missing("megatron") or missing("megatron.core")


def imported(name: str) -> ModuleType:
    """A peer's module; what it warns of on import is not about this benchmark."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def describe(error: BaseException) -> str:
    """One line for a result file: no path of this machine, no host name."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = re.sub(r"/(?:[\w.+-]+/)+", "", text)
    text = text.replace(os.uname().nodename, "localhost") if os.uname().nodename else text
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def peers_eaft(inputs: Inputs, case: Case) -> Tensor:
    """EAFT as LlamaFactory and axolotl compute it, in our words, not their code: one rank only.

    The logits in float32, plain cross-entropy, ``torch.topk`` on a copy of the rows that count, the entropy of
    their softmax over ln K, weight times cross-entropy. (LlamaFactory divides by 3.0 and axolotl by nothing;
    ln K here, so that the result can be compared. The cost is the same.)
    """
    assert case.top_k is not None
    (logits,) = inputs.tensors
    wide = logits.float()
    cross_entropy = F.cross_entropy(wide, inputs.labels, reduction="none")
    counted = inputs.labels != -100
    k = min(case.top_k, case.width)
    with torch.no_grad():
        values = torch.topk(wide[counted].detach(), k, dim=-1).values
        log_q = values - torch.logsumexp(values, dim=-1, keepdim=True)
        entropy = -(log_q.exp() * log_q).sum(dim=-1)
        weight = entropy / math.log(k)
    loss = torch.zeros_like(cross_entropy)
    loss[counted] = cross_entropy[counted] * weight
    return loss


def megatron_unfused(inputs: Inputs, case: Case) -> Tensor:
    _megatron_group(inputs.labels.device)
    module = imported("megatron.core.tensor_parallel.cross_entropy")
    return module.vocab_parallel_cross_entropy(_three_dimensional(inputs), inputs.labels.unsqueeze(1))


def megatron_fused(inputs: Inputs, case: Case) -> Tensor:
    _compiled()
    group = _megatron_group(inputs.labels.device)
    module = imported("megatron.core.fusions.fused_cross_entropy")
    return module.fused_vocab_parallel_cross_entropy(_three_dimensional(inputs), inputs.labels.unsqueeze(1), group)


def liger_vocab_parallel(inputs: Inputs, case: Case) -> Tensor:
    module = imported("liger_kernel.megatron.cross_entropy")
    return module.LigerMegatronCrossEntropy()(_three_dimensional(inputs), inputs.labels.unsqueeze(1))


def transformer_engine(inputs: Inputs, case: Case) -> Tensor:
    module = imported("transformer_engine.pytorch.cross_entropy")
    return module.parallel_cross_entropy(_three_dimensional(inputs), inputs.labels.unsqueeze(1), 0.0, False, None)


def liger_fused_linear(inputs: Inputs, case: Case) -> Tensor:
    """Summed over the tokens: only then does it compute the gradient in forward, as it is meant to."""
    module = imported("liger_kernel.transformers.functional")
    hidden, weight = inputs.tensors
    return module.liger_fused_linear_cross_entropy(hidden, weight, inputs.labels, reduction="sum")


def cut_cross_entropy(inputs: Inputs, case: Case) -> Tensor:
    """Its kernels on a GPU, its ``torch_compile`` implementation on a CPU."""
    module = imported("cut_cross_entropy")
    hidden, weight = inputs.tensors
    on_gpu = hidden.device.type == "cuda"
    if not on_gpu:
        _compiled()
    implementation = "cce" if on_gpu else "torch_compile"
    return module.linear_cross_entropy(hidden, weight, inputs.labels, reduction="none", impl=implementation)


def _three_dimensional(inputs: Inputs) -> Tensor:
    """[tokens, 1, V / TP]: Megatron's [sequence, batch, vocabulary]."""
    return inputs.tensors[0].unsqueeze(1)


def fresh_compiler() -> None:
    """Forget earlier sizes: a compiler that has seen two makes code for any, which is slower than for one."""
    torch._dynamo.reset()


def _compiled() -> None:
    """Never fall back to eager code because of the many sizes of this benchmark: that would be another peer."""
    config: Any = imported("torch._dynamo.config")
    config.recompile_limit = 128
    config.fail_on_recompile_limit_hit = True


def _megatron_group(device: torch.device) -> Any:
    """The tensor-parallel group of one rank that Megatron's functions ask for."""
    state = imported("megatron.core.parallel_state")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=imported("torch.distributed").HashStore(), rank=0, world_size=1)
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel(tensor_model_parallel_size=1)
    return state.get_tensor_model_parallel_group()
