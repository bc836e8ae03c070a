"""From Hugging Face to NeMo and back."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nemo import jobs
from tests.nemo.conftest import Workshop
from tests.nemo.models import WINDOW
from tests.nemo.ranks import run_ranks

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-untied": ("qwen2", {"tied": False}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same(workshop: Workshop, name: str) -> None:
    family, changes = MODELS[name]
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 250, (3, 40), generator=generator)
    with torch.no_grad():
        expected = workshop.model(family, **changes)(input_ids=tokens).logits
    (logits,) = run_ranks(jobs.nemo_logits, 1, workshop.nemo(family, **changes), tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)


def test_a_window_that_is_one_token_wider_is_seen(workshop: Workshop) -> None:
    """What NeMo's importer makes of it; the comparison above would not pass then."""
    model = copy.deepcopy(workshop.model("mistral"))
    tokens = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        config: Any = model.config
        config.sliding_window = WINDOW + 1
        wider = model(input_ids=tokens).logits
    assert (wider - expected).abs().max() > 1e-2
    assert torch.equal(wider[:, :WINDOW], expected[:, :WINDOW])


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_changes_nothing(workshop: Workshop, name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family, changes = MODELS[name]
    source, checkpoint, output = workshop.hf(family, **changes), workshop.nemo(family, **changes), tmp_path / "hf"
    run_ranks(jobs.to_hf, 1, checkpoint, output, checkpoint / "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, output))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype == torch.float32, key
        assert torch.equal(after[key], tensor), key
    assert read_config(output, "config.json") == read_config(source, "config.json")
    assert read_config(output, "generation_config.json") == read_config(source, "generation_config.json")
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, output)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].special_tokens_map == tokenizers[1].special_tokens_map
    assert tokenizers[1]("t1 t2 t3").input_ids == [1, 2, 3]
    # What is read back is used, too: nothing missing, tied where it was.
    model, loading = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == read_config(source, "config.json")["tie_word_embeddings"]


def read_config(folder: Path, name: str) -> dict[str, Any]:
    values = json.loads((folder / name).read_text())
    values.pop("transformers_version")
    return values


def test_a_tied_model_stays_tied_in_training(workshop: Workshop) -> None:
    """NeMo's importer of Qwen2 unties; the exported model would not be the trained one."""
    assert "output_layer.weight" not in run_ranks(jobs.parameter_names, 1, workshop.nemo("qwen2"))[0]
    assert "output_layer.weight" in run_ranks(jobs.parameter_names, 1, workshop.nemo("llama"))[0]


def test_a_checkpoint_needs_no_nemo_eaft(workshop: Workshop, tmp_path: Path) -> None:
    """Saved with the callback, loaded and exported by NeMo's own code in a Python that cannot import nemo_eaft."""
    run = workshop.train(
        "saved", world=2, parallel={"tensor": 2}, trainer={"max_steps": 2, "save_every": 2}, plan={"save": True}
    )
    (checkpoint,) = (path for path in (run.dir / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink())
    files = [path for path in (checkpoint / "context").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert b"nemo_eaft" not in path.read_bytes(), path
    (loaded,) = run_ranks(jobs.load_without_nemo_eaft, 1, checkpoint, tmp_path / "hf")
    assert loaded == ("Trainer", "LlamaModel")
    from safetensors.torch import load_file

    names = load_file(workshop.hf("llama") / "model.safetensors").keys()
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == names
    trained = run.ranks[0].final["module.decoder.final_layernorm.weight"][0].data
    assert torch.equal(exported["model.norm.weight"], trained)
