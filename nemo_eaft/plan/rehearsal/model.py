"""The model of a run without its weights: from Hugging Face's configuration by NeMo's importer, on the meta device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_eaft import convert
from nemo_eaft.cpu.meta import on_meta_device
from nemo_eaft.plan.rehearsal.parameters import parameters_of
from nemo_eaft.plan.rehearsal.records import Whole
from nemo_eaft.settings import Settings


def write_hf_files(config: Mapping[str, Any], folder: Path) -> None:
    """Write what NeMo's importers read of a Hugging Face folder, besides weights and tokenizer."""
    from transformers import AutoConfig, GenerationConfig

    # The dtype of the weights is the run's; the importers ask for one all the same.
    values = {"torch_dtype": "bfloat16", **config}
    AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(folder)
    GenerationConfig().save_pretrained(folder)


def nemo_model(settings: Settings, hf_files: Path) -> Any:
    """NeMo's model as `train.build_model` has it from an imported checkpoint, not yet built."""
    from nemo_eaft.train import build_optimizer, model_overrides, set_model_config

    importer = _importer(hf_files)
    model_class = convert.nemo_model_class(json.loads((hf_files / "config.json").read_text())["model_type"])
    model = model_class(importer.config, optim=build_optimizer(settings))
    set_model_config(model, model_overrides(settings))
    return model


def whole_model(settings: Settings, hf_files: Path) -> Whole:
    """The model on a single rank, filled from the Hugging Face model by NeMo's importer.

    The process groups must be those of one rank.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with on_meta_device():
        model = nemo_model(settings, hf_files)
        model.configure_model()
        # As an imported checkpoint has them: norms, too.
        dtype = model.config.params_dtype
        model.module.to(dtype)
        source = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf_files), dtype=dtype)
    parameters = parameters_of(model.module)
    _seem_on_the_host(source)
    conversion = None
    try:
        _importer(hf_files).convert_state(source, model)
    except Exception as error:  # a shape or a name that does not fit is said in several ways; all are findings
        conversion = f"{type(error).__name__}: {error}"
    return Whole(
        parameters=parameters,
        hf_parameters=sum(parameter.numel() for parameter in source.parameters()),
        vocab_size=source.config.vocab_size,
        conversion=conversion,
    )


def _seem_on_the_host(model: torch.nn.Module) -> None:
    """Make the parameters fake tensors on the CPU: NeMo takes what is on the meta device after a conversion for
    forgotten (nemo 2.7.3, lightning/io/state.py), and so it is, if only the source is not."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    # The importers put small real tensors between them.
    mode, fakes = FakeTensorMode(allow_non_fake_inputs=True), {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Tied ones stay one.
            if parameter not in fakes:
                fake = FakeTensor(mode, parameter.data, torch.device("cpu"))
                fakes[parameter] = torch.nn.Parameter(fake, requires_grad=False)
            setattr(module, name, fakes[parameter])


def _importer(hf_files: Path) -> Any:
    importer = convert.build_importer(hf_files, hf_files, trust_remote_code=False)
    # Set by `apply`, which would also load the weights.
    importer.trust_remote_code = False
    return importer
