"""What every attention kernel of kernels.py compiles to on Hopper, found without a GPU: the table tests/aot_sm90.json.

    make aot        compiles with the pinned Triton in .venv-aot and rewrites the table (aot_hopper.py does so for hopper.py)

Registers, stack (spilled bytes) and instructions are read from the machine code. loop: instructions of the innermost loop
over tiles without a mask, which is where the time goes; TMA copies, wgmma and mma.sync are counted in the PTX.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels

KERNELS = {
    "forward": kernels._forward,
    "dq": kernels._backward_dq,
    "dkv": kernels._backward_dkv,
    "decode": kernels._decode,
}
INT32 = {"TILES", "CU_Q", "CU_K", "K_LENGTHS"}
UNALIGNED = {"total", "group", "heads", "tiles"}  # counts; all strides are multiples of 16 elements


def cases() -> dict[str, tuple]:
    """name -> (kernel, configuration, constants): bf16, which fp16 equals instruction by instruction."""
    table = {}
    for (what, dim), candidates in kernels.HOPPER.items():
        for t in candidates:
            for d in (64,) if dim == 64 else (80, 128):
                table |= options(what, d, dim, t)
    t = kernels.Tiles(64, 64, 4, 1)
    table["delta 128"] = kernels._delta, t, {"D": 128, "DIM": 128, "BM": 64}
    table["merge 128"] = kernels._merge, t, {"D": 128, "DIM": 128, "SPLITS": 8, "SLOTS": 8}
    return table


def options(what: str, d: int, dim: int, t: kernels.Tiles) -> dict[str, tuple]:
    """One configuration in each way it is compiled."""
    constants = {"D": d, "DIM": dim, "BN": t.n, "DOT": "tf32"}
    name = f"{what} {d} {t.m}x{t.n}, {t.warps} warps, {t.stages} stages"
    if what == "decode":
        variants = {f"splits{n}": {"STATIC": True, "SPLITS": n, "ROWS": t.m} for n in (1, 4)}
    else:
        variants = {"full": {"CAUSAL": False, "BM": t.m, "TMA": True}, "causal": {"CAUSAL": True, "BM": t.m, "TMA": True}}
    return {f"{name}, {variant}": (KERNELS[what], t, constants | more) for variant, more in variants.items()}


def compile_one(name: str) -> dict[str, int]:
    kernel, t, constants = cases()[name]
    fp32 = {"LSE", "DELTA", "PARTS"}
    fp32 |= {"O"} if name.startswith("decode") and constants["SPLITS"] > 1 else set()
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument.endswith("_box"):
            rows = t.n if argument in ("k_box", "v_box") else t.m
            signature[argument] = f"tensordesc<bf16[{rows}, 1, {constants['DIM']}]>"
        elif argument in constants:
            signature[argument] = "constexpr"
        elif argument.isupper():
            signature[argument] = "*fp32" if argument in fp32 else "*i32" if argument in INT32 else "*bf16"
        else:
            signature[argument] = "fp32" if argument.startswith("scale") else "i32"
        if signature[argument][0] in "*i" and argument not in UNALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": t.warps, "num_stages": t.stages})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": binary.metadata.shared,
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", binary.asm["ptx"])),
        "wgmma": len(re.findall(r"wgmma\.mma_async", binary.asm["ptx"])),
        "mma_sync": len(re.findall(r"\bmma\.sync", binary.asm["ptx"])),
        "loop": loop_length(sass),
    }


def loop_length(sass: str) -> int:
    """Instructions of the shortest innermost loop that multiplies matrices; 0 if there is none."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", sass)]
    jumps = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", text))]
    bodies = [[text for at, text in code if start <= at <= end] for start, end in jumps if start < end]
    return min((len(body) for body in bodies if any("MMA" in text for text in body)), default=0)


if __name__ == "__main__":
    names = sys.argv[1:] or list(cases())
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        table = dict(zip(names, pool.map(compile_one, names), strict=True))
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    print(f'{{\n  "triton": {json.dumps(triton.__version__)},\n{rows}\n}}')
