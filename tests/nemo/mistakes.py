"""Scripts that forget something. Each function changes what `scripts.script` builds, in the rank that runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback

from nemo_eaft import EAFTConfig
from nemo_eaft.megatron import unwrap
from nemo_eaft.nemo import EAFTCallback
from tests.nemo import jobs, scripts


def run(spec: scripts.Script, mistake: str) -> tuple[jobs.Recorded, list[str]]:
    """What the rank saw, and what was warned of."""
    import warnings

    from nemo.utils import logging

    said: list[str] = []
    warn = logging.warning

    def heard(message: Any, *args: Any, **kwargs: Any) -> None:
        said.append(str(message))
        warn(message)

    logging.warning = heard
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = scripts.script(MISTAKES[mistake](spec))
    return seen, said + [str(warning.message) for warning in caught]


def _built(name: str, change: Callable[[dict[str, Any]], None], after: Callable[[Any], None] | None = None) -> None:
    """Change the arguments of `nl.<name>`, or what it made."""
    import nemo.lightning as nl

    make = getattr(nl, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        change(kwargs)
        made = make(*args, **kwargs)
        if after is not None:
            after(made)
        return made

    setattr(nl, name, changed)


def _callback(spec: scripts.Script, **arguments: Any) -> scripts.Script:
    """Another EAFTCallback than the one of `scripts.script`."""
    callback = EAFTCallback(run_dir=spec.run_dir, **arguments)
    _built("Trainer", lambda kwargs: None, lambda trainer: trainer.callbacks.append(callback))
    return dataclasses.replace(spec, callback=False)


def in_the_constructor(spec: scripts.Script) -> scripts.Script:
    _built("Trainer", lambda kwargs: kwargs.update(callbacks=[EAFTCallback(run_dir=spec.run_dir)]))
    return dataclasses.replace(spec, callback=False)


def twice(spec: scripts.Script) -> scripts.Script:
    _callback(spec)
    return spec


def another_strategy(spec: scripts.Script) -> scripts.Script:
    from lightning.pytorch.strategies import DDPStrategy

    _built("Trainer", lambda kwargs: kwargs.update(strategy=DDPStrategy(process_group_backend="gloo")))
    return spec


def _strategy(**arguments: Any) -> None:
    import nemo.lightning as nl

    strategy = nl.MegatronStrategy(ckpt_async_save=False, **arguments)
    _built("Trainer", lambda kwargs: kwargs.update(strategy=strategy))


def pytorch_ddp(spec: scripts.Script) -> scripts.Script:
    _strategy(ddp="pytorch")
    return spec


def fsdp(spec: scripts.Script) -> scripts.Script:
    _strategy(fsdp="megatron")
    return spec


def accumulation(spec: scripts.Script) -> scripts.Script:
    _built("Trainer", lambda kwargs: kwargs.update(accumulate_grad_batches=2))
    return spec


def virtual_pipeline(spec: scripts.Script) -> scripts.Script:
    _strategy(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    return spec


def small_vocabulary(spec: scripts.Script) -> scripts.Script:
    return _callback(spec, vocab_size=200)


def large_vocabulary(spec: scripts.Script) -> scripts.Script:
    return _callback(spec, vocab_size=300)


class _Late(Callback):
    """Appends ours in the middle of a fit."""

    def __init__(self, spec: scripts.Script, event: str) -> None:
        self._spec = spec
        setattr(self, event, self._append)

    def _append(self, trainer: Any, *_: Any, **__: Any) -> None:
        if not any(isinstance(callback, EAFTCallback) for callback in trainer.callbacks):
            trainer.callbacks.append(EAFTCallback(run_dir=self._spec.run_dir))


def _late(event: str) -> Callable[[scripts.Script], scripts.Script]:
    def mistake(spec: scripts.Script) -> scripts.Script:
        late = _Late(spec, event)
        _built("Trainer", lambda kwargs: None, lambda trainer: trainer.callbacks.append(late))
        return dataclasses.replace(spec, callback=False)

    return mistake


class _Change(Callback):
    """Comes before EAFTCallback; does something to every chunk when the fit starts."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        self._change = change

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for chunk in trainer.strategy.megatron_parallel:
            self._change(unwrap(chunk))


class LoRALinear(torch.nn.Module):
    """As NeMo's adapter, which needs Transformer Engine: a layer in the place of another that it holds."""

    def __init__(self, to_wrap: Any) -> None:
        super().__init__()
        self.to_wrap: Any = to_wrap

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.to_wrap.sharded_state_dict(*args, **kwargs)


def lora_on_the_output_layer(spec: scripts.Script) -> scripts.Script:
    def adapt(model: Any) -> None:
        model.output_layer = LoRALinear(model.output_layer)

    change = _Change(adapt)
    _built("Trainer", lambda kwargs: None, lambda trainer: trainer.callbacks.append(change))
    return _callback(spec, fused_linear=True)


def another_loss(model: Any) -> None:
    """As a patch of somebody else would."""

    def their_loss(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().logsumexp(-1).transpose(0, 1).contiguous()

    model.compute_language_model_loss = their_loss


class _AfterFitStart(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for chunk in trainer.strategy.megatron_parallel:
            another_loss(unwrap(chunk))


def replaced(spec: scripts.Script) -> scripts.Script:
    _built("Trainer", lambda kwargs: None, lambda trainer: trainer.callbacks.append(_AfterFitStart()))
    return spec


def replaced_before(spec: scripts.Script) -> scripts.Script:
    change = _Change(another_loss)
    _built("Trainer", lambda kwargs: None, lambda trainer: trainer.callbacks.append(change))
    return spec


def _reduction(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Callable[[scripts.Script], scripts.Script]:
    def mistake(spec: scripts.Script) -> scripts.Script:
        from nemo.lightning import io
        from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

        class Reduction(MaskedTokenLossReduction):
            def forward(self, batch: Any, forward_out: Any) -> Any:
                return change(super().forward(batch, forward_out))

        load = io.load_context

        def loaded(*args: Any, **kwargs: Any) -> Any:
            model = load(*args, **kwargs)
            model._training_loss_reduction = Reduction()
            return model

        import nemo.lightning as nl

        nl.io.load_context = loaded
        return spec

    return mistake


def no_optimizer(spec: scripts.Script) -> scripts.Script:
    class Forgets(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            for chunk in trainer.strategy.megatron_parallel:
                chunk.config.finalize_model_grads_func = None

    _built("Trainer", lambda kwargs: None, lambda trainer: trainer.callbacks.append(Forgets()))
    return spec


def te_cross_entropy(spec: scripts.Script) -> scripts.Script:
    class Wants(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.config.cross_entropy_loss_fusion = True
            pl_module.config.cross_entropy_fusion_impl = "te"

    _built("Trainer", lambda kwargs: None, lambda trainer: trainer.callbacks.append(Wants()))
    return spec


def progress_printer(spec: scripts.Script) -> scripts.Script:
    _built("Trainer", lambda kwargs: kwargs.update(enable_progress_bar=True))
    return spec


def nothing(spec: scripts.Script) -> scripts.Script:
    return _callback(spec, config=EAFTConfig())


MISTAKES: dict[str, Callable[[scripts.Script], scripts.Script]] = {
    "nothing": nothing,
    "in the constructor": in_the_constructor,
    "twice": twice,
    "another strategy": another_strategy,
    "pytorch DDP": pytorch_ddp,
    "FSDP": fsdp,
    "accumulation": accumulation,
    "virtual pipeline": virtual_pipeline,
    "small vocabulary": small_vocabulary,
    "large vocabulary": large_vocabulary,
    "in on_fit_start": _late("on_fit_start"),
    "in on_train_start": _late("on_train_start"),
    "in on_train_batch_start": _late("on_train_batch_start"),
    "in on_train_batch_end": _late("on_train_batch_end"),
    "LoRA on the output layer": lora_on_the_output_layer,
    "replaced": replaced,
    "replaced before": replaced_before,
    "two values": _reduction(lambda values: (values[0], values[2])),
    "tokens not summed": _reduction(lambda values: (values[0], torch.ones_like(values[1]), values[2])),
    "no optimizer": no_optimizer,
    "progress printer": progress_printer,
    "TE cross-entropy": te_cross_entropy,
}
