"""How fast: this repository beside what people would use instead, side by side in one process, equal results or no time.

    python -m bench                                  everything: on a GPU at full size with random weights, within 9 minutes;
                                                     on a CPU a reduced set against transformers and diffusers in fp32
    python -m bench --suite smoke                    every row once at toy sizes: does it run, are the results equal
    python -m bench --suite check                    every kernel configuration 50 times against float64
    python -m bench --readme docs/bench/cpu.jsonl    the README's table from a result file

A row is one thing that is computed and several ways to compute it. Each is run once and compared: attention and the fused steps
with float64 on the same rounded inputs (error |x - ref| / |ref|, largest over the results), models with their peer: in fp32 to
1e-4, while in bf16 two right implementations of 28 layers differ by 3e-2. If ours is too far off, the row has no time. Then all
of them run in turns and the medians count; a ratio above 1 means that we are faster.
Rows go to bench.jsonl in --out one by one, so that a run that is killed leaves what it had. A peer that is not installed or
refuses a shape is named with its reason; rows for which no time is left are said to be skipped.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from bench import peers as theirs
from checkpoint import InputError
from dit import DiT, DiTConfig
from flags import Parser
from flops import count
from flow import CONDITION_TIME, FlowLoss, Samples, denoise, shift_schedule
from model import MLLM, KVCache, MLLMConfig, VisionConfig
from model import PRESETS as MLLMS
from ops import Graph, Segments, attention
from training import LanguageLoss
from vae import VAE, VAEConfig

SUITES = ("smoke", "check", "attention", "fused", "system", "all")
SECONDS = 500  # on a GPU no row begins later: the last one and the start of Python stay within 9 minutes
GRADIENTS = "backward", "and backward", "training"  # so begin the rows that need them
MARKS = "<!-- bench -->", "<!-- end of bench -->"
README = Path(__file__).parent.parent / "README.md"
COLUMNS = "what", "shape", "ours", "error", "peer", "peer's", "ratio"


# ---------------------------------------------------------------------------------------------------------------- measuring


class Bench:
    """Runs rows, prints and writes them. dtype: bf16 on a GPU, fp32 on a CPU."""

    def __init__(self, device: str, suite: str, out: Path):
        self.device, self.cuda = torch.device(device), device.startswith("cuda")
        self.suite = suite
        self.size = "smoke" if suite == "smoke" else "gpu" if self.cuda else "cpu"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.memory = torch.cuda.get_device_properties(self.device).total_memory if self.cuda else 0
        self.started, self.rows, self.ceilings = time.monotonic(), [], {}
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "bench.jsonl").open("w")
        # Written before every timed call, so that nothing is read from the 50 MB L2 cache; the kernel's launch hides behind it.
        self.flush = torch.empty(2**28, dtype=torch.int8, device=self.device) if self.cuda else None
        self.write(environment(self.device) | {"suite": suite})

    def write(self, row: dict) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if "what" in row:
            self.rows.append(row)
            for line in lines(row):
                print(fit(line), flush=True)

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator(self.device).manual_seed(seed), device=self.device).to(self.dtype)

    @property
    def late(self) -> bool:
        return self.cuda and time.monotonic() - self.started > SECONDS

    def limit(self, cuda: float, cpu: float) -> float:
        return cuda if self.cuda else cpu

    def clock(self, call: Callable, own: bool) -> float:
        """Seconds of one call; own: the call says them itself."""
        if own:
            return call()[1]
        if not self.cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        self.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def race(self, calls: dict[str, Callable], own: bool) -> dict[str, list[float]]:
        """All in turns, a few times at least, until the row has had its seconds."""
        times, began = {name: [] for name in calls}, time.monotonic()
        budget, least = {"smoke": (0, 1), "cpu": (4, 3), "gpu": (0.6, 2 if own else 3)}[self.size]
        while len(times["ours"]) < least or (time.monotonic() - began < budget and len(times["ours"]) < 100):
            for name, call in calls.items():
                times[name].append(self.clock(call, own))
        return times

    def skip(self, suite: str, what: str, shape: str) -> None:
        self.write({"suite": suite, "what": what, "shape": shape, "peers": {}, "failed": "skipped: no time left"})

    def row(
        self, suite: str, what: str, shape: str, ours: Callable, peers: dict[str, Callable], *, reference=None, limit: float,
        flops: float = 0, moved: float = 0, own: bool = False, note: str = "",
    ) -> None:  # fmt: skip
        """ours and peers: functions without arguments that build a call, or (call, what turns its result into tensors).

        reference: the tensors to be met, else those of the first peer that runs. limit: of the error. flops, moved (bytes): of
        one call. own: a call returns (result, seconds) and these seconds count.
        """
        if self.late:
            return self.skip(suite, what, shape)
        row = {"suite": suite, "what": what, "shape": shape, "dtype": str(self.dtype)[6:], "peers": {}}
        row |= {"note": note} if note else {}
        calls, results = {}, {}
        for name, build in {"ours": ours, **peers}.items():
            try:
                with torch.set_grad_enabled(what.startswith(GRADIENTS)):
                    built = build()
                    calls[name], after = built if isinstance(built, tuple) else (built, lambda x: x)
                    result = calls[name]()
                    results[name] = tensors(after(result[0] if own else result))
            except Exception as e:
                calls.pop(name, None)
                if name == "ours":
                    return self.write(row | {"failed": reason(e)})
                row["peers"][name] = {"failed": reason(e)}
        if reference is None and len(results) > 1:
            reference = next(result for name, result in results.items() if name != "ours")
        for name, result in results.items() if reference is not None else ():
            error = distance(result, tensors(reference))
            bad = not error <= limit * (1 if name == "ours" else 10)
            (row if name == "ours" else row["peers"].setdefault(name, {}))["error"] = error
            if bad and name == "ours":
                return self.write(row | {"failed": f"wrong: error {error:.1e}, limit {limit:.0e}"})
            if bad:
                calls.pop(name)
                row["peers"][name]["failed"] = f"another result: error {error:.1e}"
        del results, reference
        with torch.set_grad_enabled(what.startswith(GRADIENTS)):
            try:
                times = self.race(calls, own)
            except Exception as e:
                return self.write(row | {"failed": reason(e)})
        for name, seconds in times.items():
            entry = row if name == "ours" else row["peers"].setdefault(name, {})
            entry |= {"ms": 1e3 * statistics.median(seconds), "runs": len(seconds)}
            entry |= {"p20": 1e3 * sorted(seconds)[len(seconds) // 5], "p80": 1e3 * sorted(seconds)[4 * len(seconds) // 5]}
            if name != "ours":
                entry["ratio"] = entry["ms"] / row["ms"]
                if self.cuda and suite == "attention":
                    entry["kernel"] = kernel_name(calls[name])
        for key, amount in (("tflops", flops / 1e9), ("gbs", moved / 1e6)):
            if amount:
                row[key] = amount / row["ms"]
                if what.startswith("ceiling"):
                    self.ceilings[key] = amount / 1e3 / min(times["ours"])
                elif key in self.ceilings and self.cuda:
                    row["share"] = row[key] / self.ceilings[key]  # of what a copy or one large product reaches here
        self.write(row)


def tensors(result) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in (result if isinstance(result, tuple | list) else (result,)) if x is not None)


def distance(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """Largest |a - b| / |b| over the tensors, in float64; NaN and another shape are infinitely far."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return math.inf
    far = [((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30)).item() for x, y in zip(a, b, strict=True)]
    return max(math.inf if math.isnan(d) else d for d in far)


def reason(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:160]


def kernel_name(call: Callable) -> str:
    """The kernel in which a call spends most of its time."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return max(profile.key_averages(), key=lambda e: e.self_device_time_total).key[:120]
    except Exception as e:
        return reason(e)


def environment(device: torch.device) -> dict:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers", "diffusers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
        try:
            clocks = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            clocks = "unknown"
        return {"device": torch.cuda.get_device_name(device), "clocks": clocks} | versions
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = models[0].partition(":")[2].strip()
    except (OSError, IndexError):
        model = platform.machine()
    vectors = torch.backends.cpu.get_cpu_capability()
    return {"device": f"{model} ({vectors}), {torch.get_num_threads()} threads"} | versions


# ------------------------------------------------------------------------------------------------------------------- tables


def value(entry: dict) -> str:
    """What a table says of ours or of a peer: why there is no time, bytes, or the time."""
    if "failed" in entry or "ms" not in entry:
        return entry.get("failed") or (f"{entry['bytes'] / 1e9:.3g} GB" if "bytes" in entry else entry.get("text", ""))
    ms = entry["ms"]
    return f"{ms / 1e3:.3g} s" if ms >= 1e3 else f"{ms:.3g} ms" if ms >= 0.1 else f"{1e3 * ms:.3g} us"


def lines(row: dict) -> list[tuple[str, ...]]:
    """A row as lines of COLUMNS, one for each peer."""
    rates = [f", {row['gbs']:.3g} GB/s"] if "gbs" in row else []
    if "tflops" in row:
        rates = [f", {row['tflops']:.3g} TFLOP/s" if row["tflops"] >= 1 else f", {1e3 * row['tflops']:.3g} GFLOP/s"]
    share = f" ({row['share']:.0%})" if "share" in row else ""
    own = value(row) + "".join(rates) + share
    head = row["what"], row["shape"], own, f"{row['error']:.0e}" if "error" in row else ""
    out = []
    for name, peer in row["peers"].items():
        out.append((*head, name, value(peer), f"{peer['ratio']:.2f}" if "ratio" in peer else ""))
        head = ("", "", "", "")
    return out or [(*head, "", "", "")]


def fit(line: tuple[str, ...]) -> str:
    """Columns of one width; a reason at the end of a line is never cut."""
    widths = (38, 48, 30, 6, 24, 8, 5)
    return "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()


def markdown(file: Path) -> str:
    """The README's table of a result file."""
    try:
        records = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: no result file of the bench ({e})") from None
    if not records or "device" not in records[0]:
        raise InputError(f"{file}: its first line does not say on which machine it was made")
    e = records[0]
    dtypes = " and ".join(sorted({r["dtype"] for r in records[1:] if "dtype" in r}))
    caption = f"{e['device']}; torch {e['torch']}, transformers {e['transformers']}, diffusers {e['diffusers']}; {dtypes}:"
    if "threads" in e["device"]:  # on a CPU others share the machine, and the ceiling moves
        for row in records:
            row.pop("share", None)
    rows = sorted((r for r in records[1:] if r["suite"] != "check"), key=lambda r: SUITES[::-1].index(r["suite"]))
    table = [COLUMNS, ("---",) * len(COLUMNS)] + [line for row in rows for line in lines(row)]
    return caption + "\n\n" + "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in table)


def write_readme(file: Path) -> None:
    before, start, rest = README.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (start and end):
        raise InputError(f"README.md has no lines {MARKS[0]} and {MARKS[1]} to put the table between")
    README.write_text(f"{before}{start}\n{markdown(file)}\n{end}{after}")


# ---------------------------------------------------------------------------------------------------------------- attention


class Case(NamedTuple):
    """lq, lk: lengths of the sequences on both sides."""

    what: str
    lq: list[int]
    lk: list[int]
    heads: int
    kv_heads: int
    dim: int
    causal: bool = False
    backward: bool = False
    flex: bool = False

    @property
    def shape(self) -> str:
        n = len(self.lq)
        lengths = f"{n} x {self.lq[0]}" if len(set(self.lq)) == 1 else f"{n} of {min(self.lq)}-{max(self.lq)}, {sum(self.lq)}"
        lengths += "" if self.lq == self.lk else f" on {self.lk[0]}"
        return f"{lengths}; {self.heads}:{self.kv_heads} heads of {self.dim}"

    @property
    def flops(self) -> float:
        """Four per unmasked pair, head and channel."""
        pairs = sum(a * (b - a) + a * (a + 1) / 2 if self.causal else a * b for a, b in zip(self.lq, self.lk, strict=True))
        return 4 * self.dim * self.heads * pairs


def cases(size: str) -> list[Case]:
    """In order of importance."""
    def same(what, n, length, *rest, **options):
        return Case(what, [length] * n, [length] * n, *rest, **options)

    ragged = {"gpu": [20480, 4500, 900, 3600, 1296, 8100], "cpu": [1280, 288, 64, 225, 81, 512], "smoke": [64, 15, 5, 17]}[size]
    documents = {"gpu": [int(n) for n in (4096, 64, 211, 2300, 388, 97, 1450, 640, 130, 905, 1210, 333, 1860, 520, 1204, 976)],
                 "cpu": [512, 16, 53, 287, 48, 12, 181, 80], "smoke": [33, 1, 17, 8]}[size]  # fmt: skip
    windows = {"gpu": [64] * 81 + [32] * 9 + [4], "cpu": [64] * 24 + [32] * 4, "smoke": [16] * 3 + [8]}[size]
    h, d, g = {"gpu": (16, 128, (28, 4)), "cpu": (8, 128, (14, 2)), "smoke": (2, 32, (4, 2))}[size]
    out = [
        Case("packed samples of pictures", ragged, ragged, h, h, d, backward=True, flex=True),
        Case("packed causal documents", documents, documents, *g, d, causal=True, backward=True),
        Case("cross-attention of the samples", ragged, [512 if size != "smoke" else 9] * len(ragged), h, h, d),
        Case("vision windows", windows, windows, h, h, 80 if size != "smoke" else 32),
    ]
    if size == "smoke":
        return [*out, same("dense", 2, 24, h, h, d, backward=True), same("dense causal", 2, 24, *g, d, causal=True)]
    if size == "cpu":
        return [*out, same("dense", 4, 512, h, h, d, backward=True), same("dense causal", 4, 512, *g, d, causal=True)]
    dense = [same("dense", 4, 4096, h, h, d, backward=True)]
    dense += [same("dense causal", 4, 4096, *g, d, causal=True, backward=True)]
    dense += [same("one sample of 1 + 4 pictures", 1, n, h, h, d, backward=True) for n in (4500, 20480)]
    more = [same("dense", 16384 // n, n, h, h, d) for n in (16384, 8192, 2048, 1024, 512)]
    more += [same("dense causal", 16384 // n, n, *g, d, causal=True) for n in (16384, 8192, 2048, 1024)]
    return dense + out + [same("vision, whole picture", 1, 5476, h, h, 80)] + more


def reference_attention(case: Case, q, k, v, do=None, kv: tuple[int, ...] = (0,)) -> list[Tensor]:
    """o, and with do also dq, dk, dv, in float64, for the query heads of these KV heads. One head and sequence at a time."""
    group, scale = case.heads // case.kv_heads, case.dim**-0.5
    heads = [h * group + r for h in kv for r in range(group)]
    out = [torch.zeros(len(x), n, case.dim, dtype=torch.float64, device=q.device)
           for x, n in ((q, len(heads)), (q, len(heads)), (k, len(kv)), (k, len(kv)))]  # fmt: skip
    a = b = 0
    for lq, lk in zip(case.lq, case.lk, strict=True):
        rows, cols, seen = slice(a, a + lq), slice(b, b + lk), None
        if case.causal:
            seen = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq)
        for i, head in enumerate(heads):
            x, y, z = q[rows, head].double(), k[cols, head // group].double(), v[cols, head // group].double()
            p = x @ y.T * scale
            p = (p if seen is None else p.masked_fill_(~seen, -math.inf)).softmax(1)
            out[0][rows, i] = p @ z
            if do is not None:
                g = do[rows, head].double()
                out[3][cols, i // group] += p.T @ g
                ds = p.mul_(g @ z.T - (g * out[0][rows, i]).sum(1, keepdim=True)).mul_(scale)
                out[1][rows, i] = ds @ y
                out[2][cols, i // group] += ds.T @ x
        a, b = a + lq, b + lk
    return out if do is not None else out[:1]


def attention_rows(b: Bench, case: Case) -> None:
    q, k, v = (b.randn(sum(n), h, case.dim, seed=s) for s, (n, h) in
               enumerate(((case.lq, case.heads), (case.lk, case.kv_heads), (case.lk, case.kv_heads))))  # fmt: skip
    do, group, kv = b.randn(*q.shape, seed=3), case.heads // case.kv_heads, (0, case.kv_heads - 1)
    of_q, of_k = [h * group + r for h in kv for r in range(group)], list(kv)
    sq = Segments(case.lq, b.device)
    sk = sq if case.lq == case.lk else Segments(case.lk, b.device)
    peers = theirs.attention_peers(case, sq, sk, b.device, flex=case.flex and b.cuda)

    def forward(*peer):
        run, back = theirs.prepared(peer, q, k, v, case)
        return run, lambda o: back(o)[:, of_q]

    def backward(layout, call):
        xs = [layout.into(x, n).detach().requires_grad_() for x, n in ((q, case.lq), (k, case.lk), (v, case.lk))]
        o, g = call(*xs), layout.into(do, case.lq)
        sides = (case.lq, of_q), (case.lk, of_k), (case.lk, of_k)
        after = lambda grads: [layout.back(x, n)[:, h] for x, (n, h) in zip(grads, sides, strict=True)]  # noqa: E731
        return lambda: torch.autograd.grad(o, xs, g, retain_graph=True), after

    def run(what, direction, options, expected, limit, flops):
        def mine(q, k, v):
            return attention(q, k, v, sq, sk, causal=case.causal, **options)

        others = {name: lambda p=peer: direction(*p()) for name, peer in peers.items()}
        b.row("attention", what, case.shape, lambda: direction(theirs.PACKED, mine), others,
              reference=expected, limit=limit, flops=flops)  # fmt: skip

    if b.late:
        return b.skip("attention", case.what, case.shape)
    o, *grads = reference_attention(case, q, k, v, do if case.backward else None, kv)
    run(case.what, forward, {}, o, b.limit(6e-3, 5e-6), case.flops)
    if case.backward:
        run(f"backward, {case.what}", backward, {}, grads, b.limit(1e-2, 5e-6), 2.5 * case.flops)
        if b.cuda:
            run(f"backward in one pass, {case.what}", backward, {"deterministic": False}, grads, 1e-2, 2.5 * case.flops)


def decode_attention(b: Bench) -> None:
    """One token against a static cache of equal buffers, all of it in use."""
    sizes = {"gpu": [(1, 2048), (8, 8192), (32, 2048), (2, 32768)], "cpu": [(1, 2048), (8, 512)], "smoke": [(2, 40)]}[b.size]
    heads, kv_heads, dim = (28, 4, 128) if b.size != "smoke" else (4, 2, 32)

    for batch, length in sizes:
        case = Case("", [1] * batch, [length] * batch, heads, kv_heads, dim)
        q, k, v = b.randn(batch, heads, dim), *(b.randn(batch * length, kv_heads, dim, seed=s) for s in (1, 2))
        sq, sk = Segments(case.lq, b.device), Segments(case.lk, b.device)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=b.device)
        peers = theirs.attention_peers(case, sq, sk, b.device)
        peers = {name: lambda p=peer, a=(q, k, v, case): theirs.prepared(p(), *a) for name, peer in peers.items()}
        shape = f"{batch} x {length} keys; {heads}:{kv_heads} heads of {dim}"
        expected = reference_attention(case, q, k, v, kv=tuple(range(kv_heads)))
        b.row("attention", "decode attention", shape, partial(partial, attention, q, k, v, sq, sk, k_lengths=lengths), peers,
              reference=expected, limit=b.limit(6e-3, 5e-6), moved=2 * k.nbytes + 2 * q.nbytes)  # fmt: skip


def check(b: Bench) -> None:
    """Every kernel configuration, 50 times, against float64: the assembler that comes with Triton is known to miscompile such
    loops. Deterministic results must also be the same bits each time. No times."""
    # Each kernel takes a second to compile: with everything else, the models' own type must do.
    dtypes = (torch.bfloat16, torch.float16) if b.suite == "check" else (b.dtype,)
    for dtype in dtypes if b.cuda else (torch.float32,):
        for dim in (64, 80, 128):
            for causal in (False, True):
                shape = f"{str(dtype)[6:]}, head dim {dim}, {'causal' if causal else 'all pairs'}"
                if b.late:
                    b.skip("check", "attention, every configuration", shape)
                    continue
                row = {"suite": "check", "what": "attention, every configuration", "shape": shape, "peers": {}}
                try:
                    worst, same = check_one(b, dtype, dim, causal, 50 if b.cuda else 2)
                    limits = {torch.bfloat16: (6e-3, 1e-2), torch.float16: (1e-3, 2e-3), torch.float32: (5e-6, 5e-6)}[dtype]
                    off = [name for name, error in worst.items() if not error <= limits[name.startswith("backward")]]
                    row |= {"error": max(worst.values()), "errors": worst, "text": "equal bits"}
                    if off or not same:
                        row["failed"] = f"wrong: {', '.join(off)}" if off else "other bits in another run"
                except Exception as e:
                    row["failed"] = reason(e)
                b.write(row)


def check_one(b: Bench, dtype: torch.dtype, dim: int, causal: bool, repeats: int) -> tuple[dict[str, float], bool]:
    """Largest error of each kernel, and whether the deterministic ones repeated their bits."""
    lengths = [1, 17, 64, 129, 300, 257, 900] if b.cuda else [1, 9, 20]
    case, segments = Case("", lengths, lengths, 4, 2, dim, causal), Segments(lengths, b.device)
    q, k, v, do = (b.randn(sum(lengths), h, dim, seed=s).to(dtype).requires_grad_() for s, h in enumerate((4, 2, 2, 4)))
    expected = [x.detach() for x in reference_attention(case, q, k, v, do, (0, 1))]
    last = torch.tensor(segments.bounds[1:], device=b.device) - 1  # decoding's query reads all of its sequence's keys
    one, worst, same, first = Segments([1] * len(last), b.device), {}, True, None

    def note(name, got, reference):
        worst[name] = max(worst.get(name, 0.0), distance(tensors(got), tensors(reference)))

    for _ in range(repeats):
        for deterministic in (True, False):
            o = attention(q, k, v, segments, causal=causal, deterministic=deterministic)
            grads = torch.autograd.grad(o, (q, k, v), do)
            note("forward", o, expected[0])
            note("backward" if deterministic else "backward in one pass", grads, expected[1:])
            if deterministic:
                first = first or tensors((o, *grads))
                same &= all(torch.equal(x, y) for x, y in zip(first, tensors((o, *grads)), strict=True))
        with torch.no_grad():
            note("decode", attention(q[last], k, v, one, segments), expected[0][last])
    return worst, same


# -------------------------------------------------------------------------------------------------------------- fused steps


def fused_rows(b: Bench) -> None:
    n, w, f, d = {"gpu": (20480, 2048, 18944, 128), "cpu": (900, 1024, 2816, 128), "smoke": (12, 64, 96, 32)}[b.size]
    heads, chunks = w // d, 4
    x, y, gain, head_gain = b.randn(n, w), b.randn(n, w, seed=1), b.randn(w, seed=2), b.randn(d, seed=5)
    angles = torch.rand(n, 1, d // 2, device=b.device) * 6
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    qkv, wide = b.randn(n, 3 * w, seed=4), b.randn(n // 4, 2 * f, seed=9)
    stream, (gate, *tables) = x.view(chunks, -1, w), [b.randn(chunks, 1, w, seed=s).float() for s in (6, 7, 8)]

    def add(x, delta, weight):
        return ops.add_rms_norm(x, delta, weight, 1e-6)

    def turn(p, g, c, s):
        return ops.norm_rope(p[:, :w].unflatten(1, (heads, d)), g, 1e-6, c, s)

    def turn_eager(p, g, c, s):
        return theirs.norm_rope(p[:, :w].unflatten(1, (heads, d)), g, c, s)

    # name, ours, theirs, arguments, how many of them have a gradient, bytes moved
    steps = [
        ("add, RMSNorm", add, theirs.add_rms_norm, (x, y, gain), 3, 4 * x.nbytes),
        ("norm of heads, rotation", turn, turn_eager, (qkv, head_gain, cos, sin), 2, 2 * x.nbytes),
        ("gate, add, modulate", ops.gate_add_modulate, theirs.gate_add_modulate, (stream, gate, y, *tables), 5, 4 * x.nbytes),
        ("SwiGLU", ops.swiglu, theirs.swiglu, (wide,), 1, wide.nbytes * 3 // 2),
    ]  # fmt: skip
    for step in steps:
        fused_step(b, *step)


def fused_step(b: Bench, name: str, ours: Callable, eager: Callable, args: tuple[Tensor, ...], moving: int, moved: int) -> None:
    """Forward alone, then forward and backward."""
    if b.late:
        return b.skip("fused", name, "")
    weights = [b.randn(*o.shape, seed=20 + i) for i, o in enumerate(tensors(eager(*args)))]
    ways = {"eager": lambda: eager} | ({"torch.compile": lambda: torch.compile(eager, dynamic=False)} if b.cuda else {})

    def gradients(function, args):
        leaves = [t.detach().requires_grad_(i < moving) for i, t in enumerate(args)]

        def call():
            out = function(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            given = [g.to(o.dtype).view_as(o) for g, o in zip(weights, out, strict=True)]
            return torch.autograd.grad(out, leaves[:moving], given)

        return call

    shape, doubles = " x ".join(map(str, args[0].shape)), [t.double() for t in args]
    peers = {n: lambda way=way: partial(way(), *args) for n, way in ways.items()}
    b.row("fused", name, shape, lambda: partial(ours, *args), peers, reference=eager(*doubles), limit=b.limit(6e-3, 5e-6),
          moved=moved)  # fmt: skip
    peers = {n: lambda way=way: gradients(way(), args) for n, way in ways.items()}
    b.row("fused", f"and backward: {name}", shape, lambda: gradients(ours, args), peers,
          reference=gradients(eager, doubles)(), limit=b.limit(1e-2, 1e-5))  # fmt: skip


def cross_entropy(b: Bench) -> None:
    """Loss and gradients of the last layer over the vocabulary; time, and the most memory that it needs."""
    t, h, v = {"gpu": (8192, 3584, 152064), "cpu": (512, 256, 152064), "smoke": (32, 16, 500)}[b.size]
    longer = 4 if b.size == "cpu" else 1  # tokens for the memory, which needs one call and no reference
    hidden, weight, labels = b.randn(t, h), b.randn(v, h, seed=1) * 0.02, torch.arange(t, device=b.device) * 7 % v
    hidden, weight = (x.requires_grad_() for x in (hidden, weight))

    def call(loss):
        def run():
            out = loss(hidden, weight, labels)
            return out, *torch.autograd.grad(out, (hidden, weight))

        return lambda: run

    plain = lambda h, w, y: F.cross_entropy((h @ w.T).float(), y, reduction="sum")  # noqa: E731
    loss = lambda h, w, y: ops.linear_cross_entropy(h, w, y, *(() if b.size != "smoke" else (8,)))  # noqa: E731
    shape = f"{t} tokens x {h} on {v}"
    expected = None
    if b.size != "gpu":  # 10 GB of float64 logits are no reference there: the unfused loss is
        doubles = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        out = F.cross_entropy(doubles[0] @ doubles[1].T, labels, reduction="sum")
        expected = (out, *torch.autograd.grad(out, doubles))
    b.row("fused", "training: linear + cross-entropy", shape, call(loss), {"unfused": call(plain)}, reference=expected,
          limit=b.limit(1e-2, 1e-5))  # fmt: skip
    if b.late:
        return b.skip("fused", "its memory beside the gradients", shape)
    hidden, labels = (x.detach().repeat_interleave(longer, 0) for x in (hidden, labels))
    hidden.requires_grad_()
    shape = f"{t * longer} tokens x {h} on {v}"
    row = {"suite": "fused", "what": "its memory beside the gradients", "shape": shape, "peers": {}}
    try:
        gradients = hidden.nbytes + weight.nbytes
        ours, unfused = (max(1, peak(call(f)(), b.device) - gradients) for f in (loss, plain))
        row |= {"bytes": ours, "peers": {"unfused": {"bytes": unfused, "ratio": unfused / ours}}}
    except Exception as e:
        row["failed"] = reason(e)
    b.write(row)


def peak(call: Callable, device: torch.device) -> int:
    """Most bytes of new tensors alive at once during a call."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    alive = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


# ------------------------------------------------------------------------------------------------------------------- system


def build(b: Bench, kind, config, dtype: torch.dtype | None = None) -> nn.Module:
    """A model of random weights at which activations stay near 1. Nothing is zero: gates and outputs say something."""
    with torch.device("meta"):
        module = kind(config)
    module = module.to(dtype or b.dtype).to_empty(device=b.device)
    g = torch.Generator(b.device).manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            gain = p.ndim == 1 and not name.endswith("bias")
            fan_in = p[0].numel() if p.ndim > 1 else 100
            adds = name.endswith(("o_proj.weight", "attn.proj.weight", "down_proj.weight", "to_out.0.weight", "net.2.weight"))
            p.normal_(1.0 if gain else 0.0, (fan_in * (20 if adds else 1)) ** -0.5, generator=g)
    return module.eval()


def mllm_config(b: Bench, layers: int | None = None) -> MLLMConfig:
    if b.size == "gpu":
        return replace(MLLMS["7B"], num_hidden_layers=layers or 28)
    if b.size == "smoke":
        return MLLMS["tiny"]
    vision = VisionConfig(640, 1024, depth=4, num_heads=8, intermediate_size=1708, fullatt_block_indexes=(1, 3))
    names = ("image", "video", "vision_start", "vision_end", "vision", "eos", "pad")
    ids = {f"{name}_token_id": 8191 - i for i, name in enumerate(names)}
    return MLLMConfig(1024, 2816, 4, 8, 2, 8192, 1e-6, vision, **ids)


def dit_config(b: Bench) -> DiTConfig:
    """qk_norm_eps as in diffusers, which has no other."""
    small = {"gpu": {}, "cpu": dict(num_layers=2, num_attention_heads=8, crossattn_proj_in_channels=4096),
             "smoke": dict(num_layers=2, num_attention_heads=2, attention_head_dim=32, adaln_lora_dim=8, text_embed_dim=24,
                           crossattn_proj_in_channels=48)}[b.size]  # fmt: skip
    return replace(DiTConfig(), qk_norm_eps=1e-5, **small)


def packed(b: Bench, c: MLLMConfig, lengths: list[int]) -> tuple[list[Tensor], Segments, Tensor]:
    """Documents of these lengths: token ids of each, where they lie in a pack, positions (3, N)."""
    ids = [torch.arange(n, device=b.device) * (37 + s) % (c.vocab_size - 30) for s, n in enumerate(lengths)]
    return ids, Segments(lengths, b.device), torch.cat([torch.arange(n, device=b.device) for n in lengths]).expand(3, -1)


def decode(b: Bench) -> None:
    """A token of one document on a static cache; on a GPU also as a recorded graph."""
    prompts, new = {"gpu": ((2048, 512), 64), "cpu": ((512,), 24), "smoke": ((20,), 3)}[b.size]
    mllm = build(b, MLLM, mllm_config(b)).fuse_for_inference()
    c = mllm.config
    peer = theirs.once(lambda: theirs.transformers_mllm(mllm))

    def ours(ids, where, prompt, wrap=lambda step: step):
        cache = KVCache(c, prompt + new, b.dtype, b.device)
        mllm(ids[:prompt], where[:, :prompt], Segments([prompt], b.device), cache=cache)
        decode = wrap(lambda ids, positions: mllm.logits(mllm.decode(ids, positions, cache)[-1]))

        def step(i):
            cache.advance([0])
            return decode(ids[i : i + 1], where[0, i : i + 1])[0].clone()  # a graph writes its next result to the same place

        def run():
            cache.length = prompt
            return theirs.tokens(step, range(prompt, prompt + new), b.device)

        return run

    for prompt in prompts:
        (ids,), _, where = packed(b, c, [prompt + new])
        peers = {"transformers": partial(lambda i, p: theirs.decode(peer(), i, p, new), ids, prompt)}
        peers |= {"ours, as a CUDA graph": partial(ours, ids, where, prompt, Graph)} if b.cuda else {}
        b.row("system", "decode token", f"{b_of(mllm)}, {prompt} tokens before", partial(ours, ids, where, prompt), peers,
              own=True, moved=sum(p.nbytes for p in (*mllm.model.layers.parameters(), *mllm.lm_head.parameters())),
              limit=b.limit(1e-1, 1e-4))  # fmt: skip


def b_of(module: nn.Module) -> str:
    n = count(module)
    return f"{n / 1e9:.2g}B" if n >= 1e8 else f"{n / 1e6:.2g}M"


def latent(b: Bench, height: int, width: int, seed: int) -> Tensor:
    """Of a picture of height x width pixels: (16, height / 8, width / 8)."""
    return b.randn(16, height // 8, width // 8, seed=seed).float()


def dit_step(b: Bench) -> None:
    """Samples as their pictures' (height, width) in pixels, the last one to be painted; both branches of guidance."""
    dit = build(b, DiT, dit_config(b)).fuse_for_inference()
    peer, steps = theirs.once(lambda: theirs.diffusers_dit(dit)), {"gpu": 5, "cpu": 3, "smoke": 3}[b.size]
    text, wide = {"gpu": 512, "cpu": 128, "smoke": 7}[b.size], dit.config.crossattn_proj_in_channels
    rows = {
        "gpu": {
            "480 px, 1 + 4": [[(480, 480)] * 5],
            "1024 px, 1 + 4": [[(1024, 1024)] * 5],
            "480 px alone": [[(480, 480)]],
            "ragged samples": [[(480, 480)] * 3, [(1024, 1024)], [(512, 768)] * 2, [(640, 640)] * 4],
            "mixed sizes": [[(480, 480), (512, 768), (640, 640), (512, 512), (1024, 1024)]],
        },
        "cpu": {
            "192 px, 1 + 2": [[(192, 192)] * 3],
            "192 px alone": [[(192, 192)]],
            "ragged samples": [[(128, 128)] * 2, [(192, 192)], [(96, 160)] * 3, [(64, 64)] * 5, [(192, 128)] * 2],
        },
        "smoke": {"32 px, 1 + 1": [[(32, 32)] * 2], "ragged samples": [[(32, 48)] * 2, [(64, 32)]]},
    }[b.size]

    def ours(graphs, *args):
        stamps, options = theirs.Stamps(b.device), {"guidance": 3.0, "method": "euler", "graphs": graphs}
        return denoise(dit, *args, sigmas=sigmas, progress=stamps, **options), stamps.step

    sigmas = shift_schedule(steps)
    for name, samples in rows.items():
        latents = [[latent(b, *size, 10 * s + k) for k, size in enumerate(sizes)] for s, sizes in enumerate(samples)]
        given, sizes, seeds = [z[:-1] for z in latents], [tuple(z[-1].shape[1:]) for z in latents], list(range(len(samples)))
        states = [[b.randn(text - 2 * s % 5, wide, seed=s + 50 * branch) for s in seeds] for branch in (1, 2)]
        with torch.no_grad():
            contexts = [[dit.crossattn_proj(f) for f in branch] for branch in states]
        same = all(len(set(sizes)) == 1 for sizes in samples)
        note = "" if same else "the peer knows one size per sample: it reads the other pictures at the target's, results differ"
        own, args = (given, sizes, *contexts, seeds), (given, sizes, states, seeds, sigmas, 3.0, CONDITION_TIME)
        peers = {"diffusers": lambda a=args: theirs.guided(peer(), *a)}
        peers |= {"ours, as a CUDA graph": lambda a=own: partial(ours, True, *a)} if b.cuda else {}
        b.row("system", "guided DiT step" + ("" if same else " (peer resizes)"), f"{b_of(dit)}, {name}",
              lambda a=own: partial(ours, False, *a), peers, own=True, note=note,
              limit=b.limit(1e-1, 1e-4) if same else math.inf)  # fmt: skip


def vision(b: Bench) -> None:
    ragged = [(18, 18), (24, 10), (6, 30)]
    grids = {"gpu": [[(74, 74)], [(34, 34)] * 4], "cpu": [[(36, 36)], ragged], "smoke": [[(8, 12), (4, 6)]]}[b.size]
    mllm = build(b, MLLM, mllm_config(b, layers=1))
    c = mllm.config.vision
    peer = theirs.once(lambda: theirs.transformers_mllm(mllm).model.visual)
    for grid in grids:
        pixels = b.randn(sum(h * w for h, w in grid), c.in_channels * c.temporal_patch_size * c.patch_size**2)
        shape = f"{b_of(mllm.visual)}, patches " + ", ".join(f"{h}x{w}" for h, w in grid)
        thw = torch.tensor([[1, h, w] for h, w in grid], device=b.device)
        peers = {"transformers": lambda x=pixels, t=thw: (partial(peer(), x, grid_thw=t), lambda out: out.pooler_output)}
        b.row("system", "vision tower", shape, partial(partial, mllm.visual, pixels, grid), peers, limit=b.limit(1e-1, 1e-4))


def autoencoder(b: Bench) -> None:
    config = VAEConfig() if b.size != "smoke" else VAEConfig(base_dim=8)
    vae = build(b, VAE, config, torch.float32).to(memory_format=torch.channels_last)
    peer = theirs.once(lambda: theirs.diffusers_vae(vae))
    for size in {"gpu": (480, 1024), "cpu": (128,), "smoke": (32,)}[b.size]:
        x = b.randn(1, 3, size, size).float().clamp(-1, 1)
        b.row("system", "VAE, there and back", f"{b_of(vae)}, {size} px, fp32",
              lambda x=x: lambda: vae.decode(vae.encode(x)[0]).clamp(-1, 1),
              {"diffusers": lambda x=x: theirs.there_and_back(peer(), x)}, limit=b.limit(1e-2, 1e-4))  # fmt: skip


def stage1(b: Bench) -> None:
    """Forward and backward over packed documents, without the optimizer, which is the same for both."""
    lengths = {"gpu": [2048, 300, 1210, 97, 620, 1500, 64, 905], "cpu": [256, 40, 151, 12], "smoke": [20, 5, 9]}[b.size]
    layers = {"gpu": 8}.get(b.size)
    mllm = build(b, MLLM, mllm_config(b, layers), torch.float32)
    loss_of, c = LanguageLoss(mllm), mllm.config
    ids, segments, where = packed(b, c, lengths)
    labels = torch.cat([F.pad(x[1:], (0, 1), value=-100) for x in ids])
    batch = SimpleNamespace(ids=torch.cat(ids), positions=where, cu_seqlens=segments, pixels=None, grids=None, labels=labels)
    targets = (labels >= 0).sum()
    watched = mllm.model.layers[0].mlp.down_proj.weight
    call = partial(theirs.train, b.device, mllm, lambda: loss_of(batch)[0] / targets, watched)
    linear = 6 * count(mllm.model.layers, mllm.lm_head) * sum(lengths)
    pairs = Case("", lengths, lengths, c.num_attention_heads, c.num_key_value_heads, c.head_dim, True).flops
    shape = f"{b_of(mllm)}, {c.num_hidden_layers} layers, {len(lengths)} documents, {sum(lengths)} tokens"
    b.row("system", "training step, stage 1", shape, lambda: call,
          {"transformers, padded": lambda: theirs.language_step(mllm, ids, b.device)}, limit=b.limit(1e-1, 1e-3),
          flops=linear + 3.5 * pairs * c.num_hidden_layers)  # fmt: skip


def stage2(b: Bench) -> None:
    """Forward of the frozen language model, forward and backward of the DiT, without the optimizer."""
    roomy = b.memory > 100e9
    pictures, reads = {
        "gpu": ([[(480, 480)] * (5 if roomy else 3), [(480, 480)] * 2, [(480, 480)]], [2048, 700, 300]),
        "cpu": ([[(128, 128)] * 3, [(192, 96)] * 2, [(64, 64)]], [160, 60, 24]),
        "smoke": ([[(32, 32)] * 2, [(32, 48)]], [12, 5]),
    }[b.size]
    mllm = build(b, MLLM, mllm_config(b)).requires_grad_(False)
    c = mllm.config
    config = replace(dit_config(b), crossattn_proj_in_channels=c.num_hidden_layers * c.hidden_size)
    dit = build(b, DiT, config, torch.float32)
    ids, segments, where = packed(b, c, reads)
    latents = [[latent(b, *size, 9 * s + k) for k, size in enumerate(sizes)] for s, sizes in enumerate(pictures)]
    clean, t, loss_of = [len(x) - 1 for x in pictures], torch.linspace(0.3, 0.9, len(pictures)), FlowLoss(dit, CONDITION_TIME)
    rows = [range(a, z) for a, z in pairwise(segments.bounds)]

    def loss():
        with torch.no_grad():
            states = theirs.features(mllm(torch.cat(ids), where, segments))
        error, count = loss_of(Samples(states, rows, latents, clean), t, torch.Generator().manual_seed(5))
        return error.sum() / count.sum()

    # Four per pair and channel, two per weight and token, three times as much with the backward pass (attention 3.5).
    patches = [sum(z.shape[1] * z.shape[2] // 4 for z in x) for x in latents]
    heads, d, block = config.num_attention_heads, config.attention_head_dim, dit.transformer_blocks[0]
    per_text = count(block.attn2.to_k, block.attn2.to_v) * config.num_layers + count(dit.crossattn_proj)
    per_patch = count(block.attn1, block.attn2.to_q, block.attn2.to_out, block.ff) * config.num_layers
    pairs = Case("", patches, patches, heads, heads, d).flops + Case("", patches, reads, heads, heads, d).flops
    flops = 6 * (per_text * sum(reads) + per_patch * sum(patches)) + 3.5 * pairs * config.num_layers
    reading = Case("", reads, reads, c.num_attention_heads, c.num_key_value_heads, c.head_dim, True).flops
    flops += 2 * count(mllm.model.layers) * sum(reads) + reading * c.num_hidden_layers
    call = partial(theirs.train, b.device, dit, loss, dit.transformer_blocks[0].ff.net[2].weight)
    args = mllm, dit, ids, latents, clean, t, CONDITION_TIME, 5
    shape = f"{b_of(mllm)} reads, {b_of(dit)} learns, {len(pictures)} samples"
    b.row("system", "training step, stage 2", shape, lambda: call,
          {"both, sample by sample": lambda: theirs.flow_step(*args)}, limit=b.limit(1e-1, 1e-3), flops=flops)  # fmt: skip


def document(b: Bench) -> None:
    """The bundled miniature writes and paints an answer; the peer is the same loop over transformers and diffusers."""
    from pipeline import DuoGen

    duo = DuoGen.from_pretrained(device=b.device)
    prompt = "How do I draw a red house with a blue door?"
    settings = duo.settings(**({"steps": 2, "max_images": 1} if b.size == "smoke" else {}))

    def ours():
        def run():
            answer = duo.generate(prompt, settings)
            return theirs.as_tensors(answer.text, [p.image for p in answer.pictures])

        return run

    b.row("system", "a document of the miniature", f"{settings.steps} steps a picture, fp32", ours,
          {"transformers + diffusers": lambda: theirs.document(duo, prompt, settings)}, limit=5e-3)  # fmt: skip


def ceilings(b: Bench) -> None:
    """What the machine can do: a copy, and one large product of random numbers."""
    n, m = {"gpu": (2**32, 8192), "cpu": (2**28, 2048), "smoke": (2**20, 128)}[b.size]
    source = torch.ones(n, dtype=torch.int8, device=b.device)
    target, x, y = torch.empty_like(source), b.randn(m, m), b.randn(m, m, seed=1)
    b.row("system", "ceiling: copy", f"{n / 1e9:.2g} GB", lambda: lambda: target.copy_(source), {}, limit=0, moved=2 * n)
    b.row("system", "ceiling: matrix product", f"{m} x {m} x {m}", lambda: lambda: x @ y, {}, limit=0, flops=2 * m**3)


def run(suite: str, device: str, out: Path) -> int:
    b = Bench(device, suite, out)
    print(fit(COLUMNS))
    attentions = [("attention", attention_rows, case) for case in cases(b.size)]
    jobs = [  # in order of importance: what comes last is skipped first
        ("system", ceilings), ("check", check), *attentions[:8], ("system", dit_step), ("system", decode),
        ("fused", cross_entropy), ("system", vision), ("attention", decode_attention), ("system", stage2), ("system", stage1),
        ("fused", fused_rows), ("system", document), ("system", autoencoder), *attentions[8:],
    ]  # fmt: skip
    for kind, job, *case in jobs:
        if suite not in ("smoke", "all", kind) and job is not ceilings:
            continue
        try:
            if b.late:
                b.skip(kind, job.__name__, "")
            else:
                job(b, *case)
        except Exception as e:
            b.write({"suite": kind, "what": job.__name__, "shape": "", "peers": {}, "failed": reason(e)})
        gc.collect()
        if b.cuda:
            torch.cuda.empty_cache()
    wrong = [r for r in b.rows if r.get("failed", "skipped").split(":")[0] != "skipped"]
    print(f"{len(b.rows)} rows in {time.monotonic() - b.started:.0f} s, {len(wrong)} failed: {b.file.name}")
    return len(wrong)


def command() -> None:
    parser = Parser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--suite", choices=SUITES, default="all")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of bench.jsonl (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the table of this result file into README.md, and end")
    args = parser.parse_args()
    if args.readme:
        return write_readme(args.readme)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    present = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if device.partition(":")[0] not in present:
        raise InputError(f"--device {args.device}: not on this machine, there is {' and '.join(present)}")
    sys.exit(1 if run(args.suite, device, args.out) else 0)
