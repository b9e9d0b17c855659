"""Is hopper.py right on this GPU, and how fast beside the others? One command, half a minute.

    python3 -m tools.check_hopper                                     on a Hopper GPU; writes out/hopper.json
    python3 -m tools.check_hopper --summary docs/bench/hopper_h200.json      and what of it is kept with hopper.py
    python3 -m tools.check_hopper --summary docs/bench/hopper_h200_triton37.json     the same with another Triton
    TRITON_INTERPRET=1 python3 -m tools.check_hopper --rehearse       on a CPU: this script itself, with kernels.py in its place

First everything is compiled, in processes side by side. Then one process has the GPU for itself. It compares o and L with
float64, then the gradients that follow from them; every second call has to repeat the bits of the first. NaN or infinity lies
between the sequences that are compared, in front of the first and behind the last. At the end it measures. What hangs or
crashes costs the lines behind it: those that were there before are printed.

A time is a median, with nothing left in the L2 cache. Where it is that of a launch, the GPU has waited for the host.

It takes whichever Triton is there, also one that hopper.py declines. The column "before" is what docs/bench/hopper_h200.json
has of the same kind of GPU. Where all is right and faster than kernels.py, the version can go into hopper.TRITON, with its
summary beside the other one: tests/test_hopper.py asks for it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hopper
import kernels
from bench.processes import process_context
from checkpoint import InputError
from ops import Segments
from training import run_script

BEFORE = Path(__file__).parent.parent / "docs/bench/hopper_h200.json"
ROUNDS = 50
LENGTHS = [1, 17, 64, 129, 300, 257, 900, 128]
OTHERS = [300, 0, 17, 900, 64, 1, 0, 129]  # keys, where they are not as many as queries
GAP = 40  # rows of NaN behind each of them
LIMITS = {torch.bfloat16: 6e-3, torch.float16: 1e-3}  # relative distance of o from float64; twice that of a gradient
LSE_LIMIT = 1e-4
PACKED = [1000, 3000, 517, 4096, 77, 2310, 1, 128]


class Shape(NamedTuple):
    name: str
    lengths: list[int]
    heads: int = 16
    kv_heads: int = 16
    causal: bool = False

    @property
    def flops(self) -> float:
        pairs = sum(n * n / 2 if self.causal else n * n for n in self.lengths)
        return 4 * pairs * self.heads * 128


SHAPES = [
    Shape("4x4096", [4096] * 4),
    Shape("4x4096 causal", [4096] * 4, 28, 4, True),
    Shape("1x4500", [4500]),
    Shape("8x900", [900] * 8),
    Shape("1x16384", [16384]),
    Shape("packed", PACKED),
    Shape("packed causal", PACKED, 28, 4, True),
    Shape("2x900", [900] * 2),
    Shape("64x256", [256] * 64),
    Shape("256x64", [64] * 256),
]


# ------------------------------------------------------------------------------------------------------------------- inputs


class Pack(NamedTuple):
    """Sequences to compare, with poison between them, in front of the first and behind the last."""

    q: Tensor
    k: Tensor
    v: Tensor
    queries: Segments
    keys: Segments
    real: list[int]  # which sequences are compared


def poisoned(lengths: list[int], heads: int, dim: int, kind, device, generator, poison: float) -> tuple[Tensor, list[int]]:
    """x (N, heads, D), a slice out of the middle of a larger tensor, and the lengths with the gaps."""
    whole = [n for length in lengths for n in (length, GAP)]
    end = 150 + sum(whole)
    rows = torch.randn(end + 150, heads, dim, device=device, generator=generator).to(kind)
    rows[:150] = poison
    rows[end:] = poison
    start = 150
    for length in lengths:
        rows[start + length : start + length + GAP] = poison
        start += length + GAP
    return rows[150:end], whole


def make_pack(seed: int, form: str, heads: int, kv_heads: int, dim: int, kind, device, lengths, others) -> Pack:
    g = torch.Generator(device).manual_seed(seed)
    poison = (math.nan, math.inf)[seed % 2]
    # The edges fall elsewhere every time.
    turn = seed % len(lengths)
    lengths = lengths[turn:] + lengths[:turn]
    if form == "joint":
        # All heads of one projection, of which q, k and v are slices.
        x, whole = poisoned(lengths, heads + 2 * kv_heads, dim, kind, device, g, poison)
        q, k, v = x.split((heads, kv_heads, kv_heads), 1)
        segments = Segments(whole, device)
        return Pack(q, k, v, segments, segments, list(range(0, len(whole), 2)))
    q, whole = poisoned(lengths, heads, dim, kind, device, g, poison)
    k, whole_k = poisoned(others if form == "cross" else lengths, kv_heads, dim, kind, device, g, poison)
    v, _ = poisoned(others if form == "cross" else lengths, kv_heads, dim, kind, device, g, poison)
    return Pack(q, k, v, Segments(whole, device), Segments(whole_k, device), list(range(0, len(whole), 2)))


# ---------------------------------------------------------------------------------------------------------------- float64


def truth(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """o and L of one sequence in float64: q (n, H, D), k, v (m, Hkv, D)."""
    n, heads, dim = q.shape
    m, kv_heads = k.shape[:2]
    q = q.double().transpose(0, 1)
    k = k.double().transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
    v = v.double().transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
    s = q @ k.mT * dim**-0.5                                                            # (H, n, m)
    if causal:
        seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        s = s.masked_fill(~seen, -math.inf)
    lse = s.logsumexp(2)
    # A query without keys: o = 0 and L = +inf.
    blind = lse == -math.inf
    p = (s - lse.masked_fill(blind, 0.0)[:, :, None]).exp()
    return (p @ v).transpose(0, 1), lse.masked_fill(blind, math.inf) / math.log(2)


def rows_of(segments: Segments, s: int) -> slice:
    return slice(segments.bounds[s], segments.bounds[s + 1])


def distance(x: Tensor, expected: Tensor) -> Tensor:
    """Relative; where nothing is expected, what there is."""
    if expected.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    return (x.double() - expected).norm() / expected.norm().clamp(min=1e-30)


def other_bits(a: Tensor, b: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return (a.view(whole) != b.view(whole)).any()


# ----------------------------------------------------------------------------------------------------------------- checks


class Setup(NamedTuple):
    """Where it runs, and with what."""

    device: torch.device
    dim: int
    kinds: list
    lengths: list[int]
    others: list[int]
    forward: Callable  # (q, k, v, call) -> o, L
    rounds: int
    heads: tuple[tuple[int, int], tuple[int, int]]

    def kinds_and_heads(self) -> list[tuple]:
        """All heads in the first type, the last ones in every other."""
        return [(self.kinds[0], heads) for heads in self.heads] + [(kind, self.heads[-1]) for kind in self.kinds[1:]]

    @classmethod
    def of(cls, rehearse: bool) -> Setup:
        if rehearse:
            return cls(torch.device("cpu"), 16, [torch.float16], [1, 17], [20, 0], kernels.forward, 2, ((1, 1), (2, 1)))
        return cls(torch.device("cuda", 0), 128, [torch.bfloat16, torch.float16], LENGTHS, OTHERS, ours, ROUNDS, HEADS)


def ours(q: Tensor, k: Tensor, v: Tensor, call) -> tuple[Tensor, Tensor]:
    if not hopper.takes(q, k, v):
        raise RuntimeError("hopper.py declines this call")
    tiles = kernels.tile_list(call.queries, call.keys, call.causal, hopper.QUERIES, "queries")
    return hopper.forward(q, k, v, tiles, call)


FORMS = ("self", "cross", "joint")
HEADS = ((4, 4), (14, 2))


def check_forward(x: Setup, until: float) -> Iterator[dict]:
    """A record for each configuration; `until`: no further round begins."""
    found = {}
    for r in range(x.rounds):
        if time.time() > until:
            break
        for form, causal, (kind, heads) in product(FORMS, (False, True), x.kinds_and_heads()):
            pack = make_pack(r, form, *heads, x.dim, kind, x.device, x.lengths, x.others)
            call = kernels.Call(pack.queries, pack.keys, causal, x.dim**-0.5)
            o, lse = x.forward(pack.q, pack.k, pack.v, call)
            again, lse_again = x.forward(pack.q, pack.k, pack.v, call)
            errors, off = [], []
            for s in pack.real:
                a = rows_of(pack.queries, s)
                b = rows_of(pack.keys, s)
                expected, expected_lse = truth(pack.q[a], pack.k[b], pack.v[b], causal)
                errors.append(distance(o[a], expected))
                # inf where inf is expected is no difference; anything else there is one.
                same = lse[:, a] == expected_lse
                off.append((lse[:, a].double() - expected_lse).abs().masked_fill(same, 0.0).max())
            bits = other_bits(o, again) | other_bits(lse, lse_again)
            key = f"{form} {'causal' if causal else 'full'} {str(kind)[6:]} {heads[0]}:{heads[1]}"
            found.setdefault(key, []).append(torch.stack([torch.stack(errors).max(), torch.stack(off).max(), bits.double()]))
    for key, rounds in found.items():
        error, off, bits = torch.stack(rounds).max(0).values.tolist()
        limit = LIMITS[torch.bfloat16 if "bfloat16" in key else torch.float16]
        right = error <= limit and off <= LSE_LIMIT and not bits
        yield {"check": "forward", "what": key, "rounds": len(rounds), "error": error, "lse": off, "bits": bits, "right": right}


def check_backward(x: Setup, until: float) -> Iterator[dict]:
    """dq, dk and dv that follow from o and L, through autograd as training does it."""
    for form, (causal, heads) in product(FORMS, ((False, x.heads[0]), (True, x.heads[1]))):
        worst = [torch.zeros(3, dtype=torch.float64, device=x.device)]
        bits = torch.zeros((), dtype=torch.bool, device=x.device)
        rounds = 0
        while rounds < min(5, x.rounds) and time.time() < until:
            pack = make_pack(100 + rounds, form, *heads, x.dim, x.kinds[0], x.device, x.lengths, x.others)
            leaves = [t.detach().requires_grad_() for t in (pack.q, pack.k, pack.v)]
            do = torch.randn(pack.q.shape, device=x.device).to(pack.q.dtype)
            tries = []
            for _ in range(2):
                o = kernels.attention(*leaves, pack.queries, pack.keys, causal, None, None)
                tries.append(torch.autograd.grad(o, leaves, do))
            for mine, again in zip(*tries, strict=True):
                bits |= other_bits(mine.contiguous(), again.contiguous())
            for s in pack.real:
                a = rows_of(pack.queries, s)
                b = rows_of(pack.keys, s)
                if a.start == a.stop or b.start == b.stop:
                    continue
                exact = [t[rows].detach().double().requires_grad_() for t, rows in ((pack.q, a), (pack.k, b), (pack.v, b))]
                o, _ = truth(*exact, causal)
                grads = torch.autograd.grad(o, exact, do[a].double())
                mine = tries[0][0][a], tries[0][1][b], tries[0][2][b]
                # Of a sequence with one key the scores have no gradient at all: what is there is rounding.
                size = max(t.norm() for t in grads)
                off = [(m.double() - e).norm() / e.norm().clamp(min=0.01 * size) for m, e in zip(mine, grads, strict=True)]
                worst.append(torch.stack(off))
            rounds += 1
        errors = torch.stack(worst).max(0).values.tolist()
        right = all(e <= 2 * LIMITS[x.kinds[0]] for e in errors) and not bool(bits) and rounds > 0
        name = f"{form} {'causal' if causal else 'full'} {heads[0]}:{heads[1]}"
        yield {"check": "backward", "what": name, "rounds": rounds, "errors": errors, "bits": float(bits), "right": right}


# ------------------------------------------------------------------------------------------------------------------- times


def ways(x: Setup, shape: Shape) -> dict[str, Callable]:
    g = torch.Generator(x.device).manual_seed(1)

    def randn(heads: int) -> Tensor:
        return torch.randn(sum(shape.lengths), heads, x.dim, device=x.device, generator=g).to(x.kinds[0])

    q, k, v = randn(shape.heads), randn(shape.kv_heads), randn(shape.kv_heads)
    segments = Segments(shape.lengths, x.device)
    call = kernels.Call(segments, segments, shape.causal, x.dim**-0.5)
    found = {"hopper": lambda: x.forward(q, k, v, call), "triton": lambda: kernels.forward(q, k, v, call)}
    if x.device.type == "cpu":
        return found
    group = shape.heads // shape.kv_heads
    if len(set(shape.lengths)) == 1:
        dense = [t.unflatten(0, (len(shape.lengths), -1)).transpose(1, 2) for t in (q, k, v)]

        def forced(backend: SDPBackend) -> Callable:
            def run() -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(*dense, is_causal=shape.causal, enable_gqa=group > 1)

            return run

        return found | {"cudnn": forced(SDPBackend.CUDNN_ATTENTION), "fa2": forced(SDPBackend.FLASH_ATTENTION)}

    from torch.nn.attention.varlen import varlen_attn

    all_k, all_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    longest = max(shape.lengths)
    window = {"window_size": (-1, 0)} if shape.causal else {}
    return found | {"fa2": lambda: varlen_attn(q, all_k, all_v, segments.cu, segments.cu, longest, longest, **window)}


def milliseconds(run: Callable, cuda: bool) -> float:
    if cuda:
        return kernels.triton.testing.do_bench(run, warmup=8, rep=40, return_mode="median")
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def machine(device: torch.device) -> dict:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    versions = {"torch": torch.__version__, "triton": kernels.triton.__version__, "cudnn": torch.backends.cudnn.version()}
    return {"machine": {"device": name} | versions}


def measure(x: Setup, shapes: list[Shape], until: float) -> Iterator[dict]:
    cuda = x.device.type == "cuda"
    # What a launch takes of the host: so short a call that the GPU waits for it.
    for name, run in list(ways(x, Shape("host", [64], 4, 4)).items())[:2]:
        run()
        began = time.perf_counter()
        for _ in range(200 if cuda else 1):
            run()
        took = time.perf_counter() - began
        yield {"host": name, "us": 1e6 * took / (200 if cuda else 1)}
    for shape in shapes:
        for name, run in ways(x, shape).items():
            if time.time() > until:
                return
            record = {"time": name, "shape": shape.name}
            try:
                run()
                ms = milliseconds(run, cuda)
                record |= {"ms": ms, "tflops": shape.flops / ms / 1e9}
            except Exception as e:
                record |= {"failed": f"{type(e).__name__}: {e}"[:200]}
            yield record


# --------------------------------------------------------------------------------------------------------------- processes


def compile_jobs(rehearse: bool) -> list[tuple]:
    """Kernels of every kind that will be launched, by what they are compiled for. The slowest to compile come first."""
    if rehearse:
        return [("hopper", False, torch.float16)]
    jobs = [("backward", which, causal) for which in ("dkv", "dq") for causal in (False, True)]
    jobs += [("hopper", causal, kind) for kind in LIMITS for causal in (False, True)]
    return jobs + [("triton", n) for n in range(len(SHAPES)) if SHAPES[n].name not in ("1x16384", "64x256")]


def compile_one(rehearse: bool, job: tuple, failures) -> None:
    hopper.ANY_TRITON = True
    try:
        x = Setup.of(rehearse)
        if job[0] == "hopper":
            pack = make_pack(0, "self", 2, 2, x.dim, job[2], x.device, [17], [17])
            x.forward(pack.q, pack.k, pack.v, kernels.Call(pack.queries, pack.keys, job[1], 1.0))
        elif job[0] == "triton":
            ways(x, SHAPES[job[1]])["triton"]()
        else:
            heads = x.heads[job[2]]
            backward = kernels.backward_dkv if job[1] == "dkv" else kernels.backward_dq
            # The same lengths as in the check, which may ask for other tiles in one form than in another.
            for form in FORMS[:2]:
                q, k, v, queries, keys, _ = make_pack(0, form, *heads, x.dim, x.kinds[0], x.device, x.lengths, x.others)
                lse = torch.zeros(heads[0], len(q), device=x.device)
                backward(q, k, v, q, lse, kernels.output_sums(q, q), kernels.Call(queries, keys, job[2], 1.0))
        if x.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as e:
        failures.send({"failed": f"compiling {job}: {type(e).__name__}: {e}"[:300]})


def work(rehearse: bool, go, out, began: float, seconds: float) -> None:
    """The process that has the GPU for itself, from `go` on."""
    # What no GPU has run yet is what this is for.
    hopper.ANY_TRITON = True
    try:
        x = Setup.of(rehearse)
        # What float64 products load takes its time, and nobody waits for it yet.
        ones = torch.ones(64, 64, device=x.device, dtype=torch.float64)
        (ones @ ones).sum().item()
        go.wait()
        out.send({"stage": "begin", "at": time.time() - began})
        out.send(machine(x.device))
        end = began + seconds

        def part(name: str, share: float, records: Callable, *args) -> None:
            # share: of the time that is left. A check that fails leaves the times their chance.
            now = time.time()
            try:
                for record in records(x, *args, now + share * (end - now)):
                    out.send(record)
            except Exception:
                out.send({"failed": f"{name}: {traceback.format_exc()[-500:]}"})
            out.send({"stage": name, "at": time.time() - began})

        part("forward", 0.5, check_forward)
        part("backward", 0.3, check_backward)
        part("end", 1.0, measure, [Shape("rehearsal", [40, 20], 2, 2)] if rehearse else SHAPES)
    except Exception:
        out.send({"failed": traceback.format_exc()[-600:]})


def run(rehearse: bool, seconds: float) -> list[dict]:
    began = time.time()
    context = process_context(["kernels", "ops", "torch.nn.attention"], "cpu" if rehearse else "cuda")
    go = context.Event()
    receive, send = context.Pipe(duplex=False)
    main = context.Process(target=work, args=(rehearse, go, send, began, 1e6 if rehearse else seconds), daemon=True)
    main.start()
    compilers = []
    for job in compile_jobs(rehearse):
        compilers.append(context.Process(target=compile_one, args=(rehearse, job, send), daemon=True))
        compilers[-1].start()
    # Whoever is not done by then is compiled when it is needed.
    last = began + (60 if rehearse else 0.65 * seconds)
    for process in compilers:
        process.join(max(0.0, last - time.time()))
        if process.is_alive():
            process.kill()
    go.set()
    records = []
    stop = began + (600 if rehearse else seconds + 4)
    while time.time() < stop:
        if receive.poll(0.05):
            records.append(receive.recv())
            if records[-1].get("stage") == "end":
                break
        elif not main.is_alive():
            break
    if not any(r.get("stage") == "end" for r in records):
        why = "hung or late" if main.is_alive() else f"ended with {main.exitcode}"
        records.append({"failed": f"did not come to its end: {why}"})
    if main.is_alive():
        main.join(0.5)
        main.kill()
    return records


# -------------------------------------------------------------------------------------------------------------------- table


def table(records: list[dict]) -> str:
    here = next((r["machine"] for r in records if "machine" in r), {})
    lines = [", ".join(f"{name} {value}" for name, value in here.items())]
    for check in ("forward", "backward"):
        rows = [r for r in records if r.get("check") == check]
        wrong = [r for r in rows if not r["right"]]
        if rows:
            least = min(r["rounds"] for r in rows)
            errors = [e for r in rows for e in r.get("errors", [r.get("error")])]
            # max would lose a NaN.
            worst = math.nan if any(e != e for e in errors) else max(errors)
            good = f"{len(rows) - len(wrong)} of {len(rows)} right"
            lines.append(f"{check}: {good}, {least} rounds each, worst error {worst:.1e}")
            if check == "forward":
                lines[-1] += f", of L {max(r['lse'] for r in rows):.1e}"
        for r in wrong[:6]:
            numbers = [f"{e:.1e}" for e in r.get("errors", [r.get("error"), r.get("lse")])]
            lines.append(f"  WRONG {r['what']}: {' '.join(numbers)}, bits {'differ' if r['bits'] else 'equal'}")
    times = [r for r in records if "time" in r]
    times += before(here, {r["shape"] for r in times})
    names = list(dict.fromkeys(r["time"] for r in times))
    if names:
        lines.append(f"{'TFLOP/s':16}" + "".join(f"{n:>9}" for n in names))
    for shape in dict.fromkeys(r["shape"] for r in times):
        cells = {r["time"]: f"{r['tflops']:.0f}" if "ms" in r else "failed" for r in times if r["shape"] == shape}
        lines.append(f"{shape:16}" + "".join(f"{cells.get(n, ''):>9}" for n in names))
    lines += [f"host {r['host']}: {r['us']:.0f} us a launch" for r in records if "host" in r]
    lines.append("; ".join(f"{r['stage']} {r['at']:.0f} s" for r in records if "stage" in r))
    lines += [f"FAILED {r['failed']}" for r in records if "failed" in r]
    return "\n".join(line[:400] for line in lines)[:2400]


def before(here: dict, shapes: set[str]) -> list[dict]:
    """Records of hopper.py's times in the committed summary, if that is of the same kind of GPU."""
    committed = json.loads(BEFORE.read_text())
    if committed["machine"]["device"] != here.get("device"):
        return []
    found = []
    for shape in SHAPES:
        if shape.name in shapes:
            ms = committed["ms"][shape.name]["hopper"]
            found.append({"time": "before", "shape": shape.name, "ms": ms, "tflops": shape.flops / ms / 1e9})
    return found


def summary(records: list[dict]) -> str:
    """JSON: what was checked, ms of every shape and way, us of a launch. Without what failed."""
    checks = []
    for r in records:
        if r.get("right"):
            numbers = {"error": short(max(r.get("errors", [r.get("error")])))}
            if "lse" in r:
                numbers["lse"] = short(r["lse"])
            checks.append({name: r[name] for name in ("check", "what", "rounds")} | numbers)
    times: dict[str, dict] = {}
    for r in records:
        if "ms" in r:
            times.setdefault(r["shape"], {})[r["time"]] = short(r["ms"])
    parts = {
        "machine": next((r["machine"] for r in records if "machine" in r), {}),
        "launch us": {r["host"]: short(r["us"]) for r in records if "host" in r},
    }
    head = ",\n".join(f"{json.dumps(name)}: {json.dumps(part)}" for name, part in parts.items())
    checked = ",\n".join(json.dumps(check) for check in checks)
    timed = ",\n".join(f"{json.dumps(shape)}: {json.dumps(ways)}" for shape, ways in times.items())
    return f'{{{head},\n"checks": [\n{checked}\n],\n"ms": {{\n{timed}\n}}}}\n'


def short(x: float) -> float:
    return float(f"{x:.4g}")


def command() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m tools.check_hopper", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=25, help="of the whole run")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes in Triton's interpreter, on a CPU")
    parser.add_argument("--out", type=Path, default=Path("out/hopper.json"), help="every result (out/hopper.json)")
    parser.add_argument("--summary", type=Path, help="the results alone, short enough to be committed")
    args = parser.parse_args()
    if not args.rehearse and not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        raise InputError("no Hopper GPU here; --rehearse runs this script on a CPU")
    records = run(args.rehearse, args.seconds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")
    print(table(records))
    if args.summary:
        args.summary.write_text(summary(records))
    checks = [r["right"] for r in records if "check" in r]
    sys.exit(0 if checks and all(checks) and not any("failed" in r for r in records) else 1)


if __name__ == "__main__":
    run_script(command)
