"""What hopper.py compiles to with the Triton that is there, found without a GPU: lines for tests/aot_hopper.jsonl.

    make aot        compiles with every version in that file, each in a folder of its own, and rewrites it

hopper.forward itself is called, on a CPU's tensors: its arguments go through Triton as on a GPU, until something would run.
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
from collections.abc import Callable
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget

import hopper
import kernels
from ops import Segments

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MASKS = {"full": False, "causal": True}
CALLS = [([100, 200], 4, 1), ([64], 1, 1), ([4096] * 4, 16, 16)]  # lengths, query heads, KV heads: one kernel serves them all
PTX = {
    "tma": r"cp\.async\.bulk\.tensor",
    "wgmma": r"wgmma\.mma_async",
    "bar": r"\b(?:bar|barrier)\.sync",
    "wait": r"mbarrier\.try_wait",
    "arrive": r"mbarrier\.arrive",
}


class NoGPU:
    """Stands where Triton's driver is. Whatever is launched has been compiled as for an H200; nothing is computed."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @property
    def utils(self) -> "NoGPU":
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        # Module, function, registers, spills, threads.
        return 0, 0, 0, 0, 1024

    def launcher_cls(self, source, metadata) -> Callable:
        return lambda *launch: None


def compiled(kind: str, mask: str):
    """What hopper.forward would have launched: its arguments go the whole way that they go on a GPU, up to the driver."""
    before = len(cache())
    for lengths, heads, kv_heads in CALLS:
        x = torch.empty(sum(lengths), heads + 2 * kv_heads, 128, dtype=TYPES[kind])
        q, k, v = x.split((heads, kv_heads, kv_heads), 1)
        assert all(map(hopper.fits, (q, k, v)))
        segments = Segments(lengths)
        tiles = kernels.tile_list(segments, segments, MASKS[mask], hopper.QUERIES, "queries")
        hopper.forward(q, k, v, tiles, kernels.Call(segments, segments, MASKS[mask], 1.0))
    assert len(cache()) == before + 1, "lengths or heads asked for a kernel of their own"
    return list(cache().values())[-1]


def cache() -> dict:
    """Compiled kernels, in the order in which they were compiled."""
    return hopper._forward.device_caches[0][0]


def numbers(kind: str, mask: str) -> dict[str, int]:
    binary = compiled(kind, mask)
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
    triton.runtime.driver.set_active(NoGPU())
    hopper._processors = lambda device: kernels.PROCESSORS
    for kind, mask in product(TYPES, MASKS):
        print(json.dumps({"triton": triton.__version__, "what": f"{kind}, {mask}"} | numbers(kind, mask)), flush=True)
