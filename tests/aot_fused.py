"""What the fused steps of kernels.py compile to on Hopper at the models' sizes, found without a GPU: JSON on standard output.

The public functions run on tensors without memory, forward and backward; every launch that they would make is written down
with its exact types, strides and warps, and compiled. test_ops.py reads the result.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
import ops

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
LAUNCHES: dict[str, tuple] = {}


class Recorder:
    """Stands where a kernel is and keeps what each launch would compile."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid) -> Callable:
        return self.launch

    def launch(self, *args, num_warps: int = 4, num_stages: int = 3, **constants) -> None:
        signature, attributes = dict.fromkeys(constants, "constexpr"), {}
        for i, (name, value) in enumerate(zip(self.kernel.arg_names, args, strict=False)):
            if isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
            elif value is None or value == 1:  # as Triton specialises at a launch
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        signature = {name: signature[name] for name in self.kernel.arg_names}
        types = [signature[n] + "16" * ((i,) in attributes) for i, n in enumerate(signature) if n not in constants]
        label = f"{self.kernel.__name__}({', '.join(types)}) {constants} {num_warps} warps"
        LAUNCHES[label] = self.kernel, signature, constants, attributes, {"num_warps": num_warps, "num_stages": num_stages}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def both(out: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> None:
    """The backward pass of what is there of the forward."""
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(out, inputs, [torch.empty_like(o) for o in out])


def launches() -> None:
    """Decoder 7B, vision tower, DiT 2B and 14B."""
    for n, width in ((2048, 3584), (5476, 1280)):
        x, delta, w = empty(n, width), empty(n, width), empty(width)
        both(ops.add_rms_norm(x, delta, w, 1e-6), x, delta, w)
        both(ops.rms_norm(x, w, 1e-6), x, w)
    for width in (2048, 5120):
        x, y, rows = empty(5, 900, width), empty(4500, width), empty(5, dtype=torch.int64)
        gate, shift, scale = empty(2, 9, width, dtype=torch.float32)[:, :3].split(1, 1)
        both(ops.gate_add_modulate(x, gate, y, shift, scale, rows), x, gate, y, shift, scale)
        both(ops.modulate(x, shift, scale, rows), x, shift, scale)
        both(ops.gate_add(x, gate, y, rows), x, gate, y)
    for heads in (16, 40):
        qkv, gains = empty(4500, 3 * heads, 128), empty(2, 128)
        cos, sin = (empty(4500, 1, 128, dtype=torch.float32) for _ in range(2))
        both(ops.norm_rope(qkv[:, : 2 * heads], gains, 1e-6, cos, sin), qkv, gains)
        both(ops.norm_rope(qkv[:, :heads], gains[0], 1e-6), qkv, gains)
    for heads, dim, dtype in ((32, 128, torch.bfloat16), (32, 80, torch.float32)):
        qkv, cos, sin = empty(2048, heads + 4, dim), *(empty(2048, 1, dim, dtype=dtype) for _ in range(2))
        both(ops.rope(qkv[:, :heads], cos, sin), qkv)
    cache = empty(4096, 4, 128)
    ops.rope_append(empty(1, 36 * 128), empty(1, 1, 128), empty(1, 1, 128), cache, cache, empty(1, dtype=torch.int64), 28)
    with torch.no_grad():
        few = empty(1, 3584), empty(1, 3584), empty(3584), 1e-6
        kernels.add_norm_swiglu(*few, empty(2 * 18944, 3584))
    x = empty(2048, 2 * 18944)
    both(ops.swiglu(x), x)
    ops.standardise_into(empty(2048, 28 * 3584)[:, :3584], empty(2048, 3584))
    for grad in (True, False):
        ops._loss_and_gradient(empty(1024, 152064), empty(1024, dtype=torch.int64), grad)


def compile_one(launch: tuple) -> dict[str, int]:
    kernel, signature, constants, attributes, options = launch
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    loads = re.findall(r"ld\.global\S*", binary.asm["ptx"])
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": binary.metadata.shared,
        "loads": len(loads),
        "wide": sum(".v4" in load for load in loads),  # 16 bytes at a time
    }


if __name__ == "__main__":
    ops.on_triton = lambda x: True
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        setattr(kernels, name, Recorder(getattr(kernels, name)))
    launches()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(compile_one, LAUNCHES.values())
        print(json.dumps(dict(zip(LAUNCHES, rows, strict=True)), indent=0))
