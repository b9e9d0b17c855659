"""What hopper.py compiles to with the Triton that is there, found without a GPU: lines for tests/aot_hopper.jsonl.

    make aot        compiles with every version in that file, each in a folder of its own, and rewrites it

One line per type and mask. registers, spill (bytes of stack) and instructions are read from the machine code; TMA copies,
wgmma, barriers of a group of warps (bar), waits for and arrivals at barriers in memory (wait, arrive) are counted in the PTX.

A consumer has a loop over tiles with a mask and one without, which is where the time goes. Of the latter, both consumers
together: loop: instructions; local: those that move spilled registers; exp: those that are 2^x; under: those of exp between
the two waits, where the second product runs meanwhile.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

import hopper

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MASKS = {"full": False, "causal": True}
COUNTS = ("total", "heads", "tiles", "group")  # any number; `so` is a multiple of 128
PTX = {
    "tma": r"cp\.async\.bulk\.tensor",
    "wgmma": r"wgmma\.mma_async",
    "bar": r"\b(?:bar|barrier)\.sync",
    "wait": r"mbarrier\.try_wait",
    "arrive": r"mbarrier\.arrive",
}


def signature(kind: str) -> tuple[dict[str, str], dict]:
    """What each argument is, and which addresses and numbers are multiples of 16: as at a launch."""
    types = {}
    attributes = {}
    for i, name in enumerate(hopper._forward.arg_names):
        if name.endswith("_box"):
            rows = hopper.M.value if name == "q_box" else hopper.N.value
            types[name] = f"tensordesc<{kind}[{rows}, 128],{hopper.layout(rows, TYPES[kind])!r}>"
        elif name == "CAUSAL":
            types[name] = "constexpr"
        elif name.isupper():
            types[name] = {"O": f"*{kind}", "LSE": "*fp32"}.get(name, "*i32")
        else:
            types[name] = "fp32" if name == "scale" else "i32"
        if types[name][0] in "*i" and name not in COUNTS:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, attributes


def compile_one(kind: str, mask: str) -> dict[str, int]:
    types, attributes = signature(kind)
    source = GluonASTSource(hopper._forward, types, {"CAUSAL": MASKS[mask]}, attributes)
    # enable_fp_fusion: what a launch has by default up to Triton 3.9, which warns that this will change.
    options = {"num_warps": 4, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = cuobjdump("-res-usage", file.name)
        loops = unmasked_loops(cuobjdump("-sass", file.name))
    row = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": binary.metadata.shared,
    }
    row |= {name: len(re.findall(pattern, binary.asm["ptx"])) for name, pattern in PTX.items()}
    return row | {name: sum(loop[name] for loop in loops) for name in ("loop", "local", "exp", "under")}


def cuobjdump(flag: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, file], check=True, capture_output=True, text=True).stdout


def unmasked_loops(sass: str) -> list[dict[str, int]]:
    """The loops over tiles without a mask, one of each consumer: of the loops with two products they are the shortest."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", sass)]
    jumps = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", text))]
    bodies = [[text for at, text in code if start <= at <= end] for start, end in jumps if start < end]
    # A product of 64 x 128 x 128 is eight instructions.
    loops = sorted((body for body in bodies if sum("HGMMA" in text for text in body) == 16), key=len)
    return [in_loop(body) for body in loops[: hopper.CONSUMERS.value]]


def in_loop(body: list[str]) -> dict[str, int]:
    first, second = [i for i, text in enumerate(body) if "WARPGROUP.DEPBAR" in text]
    exps = [i for i, text in enumerate(body) if "MUFU.EX2" in text]
    return {
        "loop": len(body),
        "local": sum(re.search(r"\b(STL|LDL)\b", text) is not None for text in body),
        "exp": len(exps),
        "under": sum(first < i < second for i in exps),
    }


if __name__ == "__main__":
    for kind, mask in product(TYPES, MASKS):
        print(json.dumps({"triton": triton.__version__, "what": f"{kind}, {mask}"} | compile_one(kind, mask)), flush=True)
