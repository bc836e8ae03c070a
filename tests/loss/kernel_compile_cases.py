"""The kernels compiled for an H100 by Triton's own compiler, which needs no GPU for it.

The interpreter does not check shapes, types of loop variables or addresses; the compiler does. Each launch of the real
host code is caught, specialised as Triton would specialise it, and compiled down to machine code. ``test_kernels.py``
runs this file, without the interpreter and with an empty cache.
"""

import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from nemo_eaft.loss import kernels
from nemo_eaft.loss.shard import Shard
from tests.loss.kernel_passes import mutated

assert os.environ.get("TRITON_INTERPRET") != "1", "Triton was to be imported without its interpreter"

H100 = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
}


class Compiled(NamedTuple):
    ttir: str
    """Triton's intermediate code, with the type of every offset."""

    ptx: str
    shared: int
    registers: int
    stack: int
    """Bytes a thread spills to memory."""


def compiled(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compiled:
    """The kernel as this launch would compile it."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k != "num_warps"}
    signature, constants, attributes = {}, {}, {}
    for index, param in enumerate(kernel.params):
        value = values[param.name]
        special = not param.do_not_specialize
        if param.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature[param.name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, Tensor):
            # No tensor here is large; where it starts says what a real one's address would be.
            signature[param.name] = POINTERS[value.dtype]
            divisible = value.storage_offset() * value.element_size() % 16 == 0
        else:
            signature[param.name] = "i32" if value < 2**31 else "i64"
            divisible = value % 16 == 0
        if special and divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=H100, options={"num_warps": kwargs["num_warps"]})
    registers, stack = usage(result.asm["cubin"])
    return Compiled(result.asm["ttir"], result.asm["ptx"], result.metadata.shared, registers, stack)


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as NVIDIA's tool reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout + report.stderr)
    assert found is not None, report
    return int(found[1]), int(found[2])


@functools.cache
def launches(
    tokens: int, width: int, columns: int, dtype: torch.dtype, top_k: int | None, strides: tuple[int, ...] | None = None
) -> dict[str, Compiled]:
    """Every kernel of a forward and a backward on [tokens, width] logits, compiled; nothing is run."""
    caught: dict[str, Compiled] = {}

    class Catcher:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                caught[self.kernel.fn.__name__.strip("_")] = compiled(self.kernel, args, kwargs)

            return launch

    logits = torch.empty(tokens, width, dtype=dtype, device="meta")
    if strides is not None:
        logits = torch.empty_strided((tokens, width), strides, dtype=dtype, device="meta")
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    target = torch.empty(tokens, dtype=torch.int32, device="meta")
    per_token = [torch.empty(tokens, dtype=statistic, device="meta") for _ in range(3)]
    shard = Shard(0, columns, columns)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_statistics", "selection", "_gradient"):
            patch.setattr(kernels, name, Catcher(getattr(kernels, name)))
        kernels.local_records(logits, target, shard, top_k)
        gradient = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device="meta")
        kernels.write_gradient(gradient, logits, target, shard, *per_token)
    assert set(caught) == {"statistics", "gradient"} | ({"selection"} if top_k else set())
    return caught


def assert_fits(code: Compiled) -> None:
    assert code.shared <= SHARED_BYTES
    assert code.registers <= 255
    assert code.stack <= 32, "a thread's values spill to memory"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [20, None])
def test_a_whole_vocabulary_compiles_and_loads_16_bytes_at_once(dtype: torch.dtype, top_k: int | None) -> None:
    for name, code in launches(16384, 151936, 151936, dtype, top_k).items():
        assert_fits(code)
        wide = "v2.b64" if dtype == torch.float64 else "v4.b32"
        if name != "selection":
            assert re.search(rf"ld\.global\S*\.{re.escape(wide)}", code.ptx), name
        if name == "gradient":
            assert re.search(rf"st\.global\S*\.{re.escape(wide)}", code.ptx)
        if dtype == torch.bfloat16:
            # A multiprocessor has 65536 registers: at least 1024 threads that wait for memory in turn, and 800.
            assert code.registers <= (80 if name == "selection" else 64), (name, code.registers)
            assert code.stack == 0


@pytest.mark.parametrize(
    "width, columns, dtype, top_k, strides",
    [
        (18992, 18992, torch.bfloat16, 20, None),
        (50257, 50250, torch.bfloat16, 20, None),
        (50257, 50257, torch.float32, None, None),
        (1003, 1, torch.float32, 1, None),
        (2, 2, torch.float16, 300, None),
        (1003, 1000, torch.bfloat16, 200, (1, 8192)),
        (1003, 1000, torch.bfloat16, None, (2**31 + 16, 1)),
        (1003, 1000, torch.float64, 2, (2, 2**31 + 1)),
        (600000, 600000, torch.bfloat16, 20, None),
    ],
)
def test_other_shapes_compile(
    width: int, columns: int, dtype: torch.dtype, top_k: int | None, strides: tuple[int, ...] | None
) -> None:
    for code in launches(8192, width, columns, dtype, top_k, strides).values():
        assert_fits(code)


def row_offsets(code: Compiled, argument: str) -> set[str]:
    """The types of what is added to a kernel's argument first, which is always its row's offset."""
    return set(re.findall(rf"tt\.addptr %{argument}\w*, %\w+ : !tt\.ptr<\w+>, (\w+)", code.ttir))


def test_row_offsets_are_64_bit() -> None:
    """16384 x 151936 is past 2**31: offsets into the logits and the gradient must not be products of 32 bits."""
    code = launches(16384, 151936, 151936, torch.bfloat16, 20)
    for name, arguments in {
        "statistics": ("logits", "records", "maxima"),
        "selection": ("logits", "records", "maxima"),
        "gradient": ("logits", "grad"),
    }.items():
        for argument in arguments:
            assert row_offsets(code[name], argument) == {"i64"}, (name, argument)
        # Vectors of columns of logits: 64-bit, too, for strided columns.
        columns = re.findall(
            r"tt\.addptr %\w+, %\w+ : tensor<(\d+)x!tt\.ptr<bf16>>, tensor<\d+xi(\d+)>", code[name].ttir
        )
        wide = {"statistics": "8192", "gradient": "8192", "selection": "128"}[name]
        assert {bits for size, bits in columns if size == wide} == {"64"}, (name, columns)
        products = re.findall(r"arith\.muli %\w+, %\w+ : (i\d+)", code[name].ttir)
        assert "i64" in products, (name, products)


def test_32_bit_row_offsets_are_noticed(tmp_path: Path) -> None:
    right = "records + row.to(tl.int64) * record_width"
    with mutated("selection", right, right.replace(".to(tl.int64)", ""), tmp_path):
        code = launches.__wrapped__(16384, 151936, 151936, torch.bfloat16, 20)
    assert row_offsets(code["selection"], "records") == {"i32"}


def test_no_atomics_and_no_barriers_where_one_warp_does() -> None:
    code = launches(16384, 151936, 151936, torch.bfloat16, 20)
    for each in code.values():
        assert not re.search(r"\b(atom|red)\.(global|shared)", each.ptx)
    assert "bar.sync" not in code["selection"].ptx
    assert "bar.sync" not in code["gradient"].ptx
