"""`nemo_eaft.cpu.meta.on_meta_device`: all that is created has a shape and no memory, and nothing stays behind."""

import pytest
import torch

import nemo_eaft.cpu
from nemo_eaft.cpu import meta


def test_it_needs_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_eaft.cpu, "is_enabled", lambda: False)
    with pytest.raises(RuntimeError, match=r"call nemo_eaft\.cpu\.enable\(\) first"):
        with meta.on_meta_device():
            pass


def test_what_is_created_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_eaft.cpu, "is_enabled", lambda: True)
    patched = [(patch.owner, patch.name) for patch in meta.patches()]
    before = [getattr(owner, name) for owner, name in patched]
    with meta.on_meta_device():
        size = 1 << 50
        made = [
            torch.empty(size),
            torch.zeros(size, device=torch.cuda.current_device()),
            torch.nn.Linear(4, 4).weight,
            torch.rand(size),
            torch.ones(2, device=None),
            torch.arange(3),
            torch.tensor([1.0]),
        ]
        made[0].normal_(0.0, 0.02)
        # Where another device is named, it is meant.
        named = torch.zeros(2, device="cpu")
    assert {tensor.device.type for tensor in made} == {"meta"}
    assert named.device.type == "cpu"
    assert [getattr(owner, name) for owner, name in patched] == before
    assert torch.empty(1).device.type == "cpu"


def test_megatron_tells_dtypes_apart_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_eaft.cpu.torch_cuda import patches

    named = next(patch for patch in patches() if patch.name == "type")
    monkeypatch.setattr(nemo_eaft.cpu, "is_enabled", lambda: True)
    monkeypatch.setattr(torch.Tensor, "type", named.value)
    with meta.on_meta_device():
        assert torch.empty(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.nn.Parameter(torch.empty(1)).type() == "torch.cuda.FloatTensor"
