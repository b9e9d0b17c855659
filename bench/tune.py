"""Which tiles, and whose attention, are fastest on this GPU: the measurements behind HOPPER and SDPA_FROM in kernels.py.

    python -m bench.tune --out out/tune.json                                   on a GPU, within 75 seconds
    python -m bench.tune --summary docs/bench/tune_h200.json                   and what of it is kept with the tables
    TRITON_INTERPRET=1 python -m bench.tune --smoke --out out/tune.json        toy sizes on a CPU: does it run

First every candidate is compiled and compared with float64 on short sequences, in many processes at the same time. Those that
are right are then timed one by one in a single process, on shapes that the models have, and compared once more on one KV head.
A candidate that crashes or hangs costs its own cell.

A time is a median of several rows of calls, with whatever the calls before left in the L2 cache. The host is ahead of the GPU
all the while, so what it takes to launch is not in it. The table marks by * what `kernels.quickest` takes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
import ops
from bench.attention_peers import Case, Peers, query_heads, reference_attention
from bench.processes import process_context
from kernels import Tiles
from ops import Segments

LIMITS = {"forward": 6e-3, "dq": 1e-2, "dkv": 1e-2, "backward": 1e-2}  # relative errors of 16-bit numbers
LATE = "the time was over"
PATIENCE = 40  # seconds for one job, compilation included
PROCESSES = 14
SMALL = "small"  # what the case of a compile job is called


class Candidate(NamedTuple):
    what: str  # forward, dq, dkv
    dim: int
    tiles: Tiles
    by_tma: bool = True

    @property
    def name(self) -> str:
        t = self.tiles
        return f"{t.m}x{t.n}/{t.warps}/{t.stages}" + ("" if self.by_tma else " addresses")


def candidates(smoke: bool) -> list[Candidate]:
    """Queries, keys, warps, stages."""
    if smoke:
        table = {
            ("forward", 32): [(16, 16, 4, 1), (32, 16, 4, 1)],
            ("dq", 32): [(16, 16, 4, 1)],
            ("dkv", 32): [(16, 16, 4, 1)],
        }
    else:
        table = {
            ("forward", 128): [
                (128, 64, 8, 4), (128, 64, 4, 2), (128, 128, 8, 2), (128, 64, 8, 3),
                (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 4),
            ],
            ("forward", 80): [(128, 64, 8, 4), (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 2)],
            ("forward", 64): [(128, 128, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 64, 4, 3)],
            ("dq", 128): [(128, 64, 8, 3), (128, 32, 4, 3), (64, 128, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3)],
            ("dq", 80): [(128, 64, 8, 3), (64, 64, 4, 2)],
            ("dq", 64): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
            ("dkv", 128): [(64, 64, 4, 2), (64, 128, 8, 3), (32, 64, 4, 3), (32, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 3)],
            ("dkv", 80): [(64, 64, 4, 2), (64, 128, 8, 2)],
            ("dkv", 64): [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2)],
        }  # fmt: skip
    found = []
    for (what, dim), sizes in table.items():
        found += [Candidate(what, dim, Tiles(*size)) for size in sizes]
    # One without the TMA unit, for comparison.
    old = Tiles(16, 16, 4, 1) if smoke else Tiles(64, 128, 8, 1)
    found += [Candidate("dkv", dim, old, by_tma=False) for dim in ((32,) if smoke else (128, 64))]
    return found


def cases(smoke: bool) -> list[Case]:
    """In order of what matters. All head dims of full attention have one query head for each KV head, causal ones seven or as
    many as here: other proportions would be compiled anew."""
    if smoke:
        return [
            Case("dense", [24] * 2, [24] * 2, 2, 2, 32, backward=True),
            Case("packed causal", [33, 1, 17], [33, 1, 17], 4, 2, 32, causal=True, backward=True),
        ]

    def same(n: int, length: int, *heads_and_dim: int, **options) -> Case:
        return Case("dense", [length] * n, [length] * n, *heads_and_dim, **options)

    pictures = [20480, 4500, 900, 3600, 1296, 8100]
    documents = [4096, 64, 211, 2300, 388, 97, 1450, 640, 130, 905, 1210, 333, 1860, 520, 1204, 976]
    windows = [64] * 81 + [32] * 9 + [4]
    return [
        same(4, 4096, 16, 16, 128, backward=True),
        same(4, 4096, 28, 4, 128, causal=True, backward=True),
        same(1, 4500, 16, 16, 128, backward=True),
        same(8, 900, 16, 16, 128, backward=True),
        Case("pictures", pictures, pictures, 16, 16, 128, backward=True),
        Case("documents", documents, documents, 28, 4, 128, causal=True, backward=True),
        same(2, 900, 16, 16, 128),
        same(2, 4500, 16, 16, 128),
        Case("cross", pictures, [512] * len(pictures), 16, 16, 128, backward=True),
        same(1, 2048, 28, 4, 128, causal=True, backward=True),
        same(1, 512, 28, 4, 128, causal=True),
        same(32, 512, 16, 16, 128, backward=True),
        same(64, 256, 16, 16, 128),
        same(256, 64, 16, 16, 128),
        same(1, 20480, 16, 16, 128, backward=True),
        same(16, 1024, 28, 4, 128, causal=True, backward=True),
        Case("windows", windows, windows, 16, 16, 80, backward=True),
        same(1, 5476, 16, 16, 80, backward=True),
        same(4, 4096, 16, 16, 64, backward=True),
    ]


# --------------------------------------------------------------------------------------------------------------------- jobs


class Job(NamedTuple):
    """What a process is asked for. kind: compile, time, way, fresh or machine."""

    kind: str
    case: Case | None
    candidate: Candidate | None = None
    way: str = ""
    backward: bool = False


def compile_jobs(shapes: list[Case], found: list[Candidate]) -> list[Job]:
    """Each candidate on short sequences, for every kind of kernel that the shapes need of it."""
    lengths = [1, 17, 64, 129, 300, 257, 128] if max(c.dim for c in found) > 32 else [1, 20]
    kinds = {(x.dim, x.heads // x.kv_heads, x.causal) for x in shapes}
    jobs = []
    for candidate in found:
        for dim, group, causal in sorted(kinds):
            if dim == candidate.dim:
                small = Case(SMALL, lengths, lengths, group * 2, 2, dim, causal, backward=True)
                jobs.append(Job("compile", small, candidate))
    # What takes longest comes first, so that no process ends long after the others.
    jobs.sort(key=lambda job: ("dkv", "dq", "forward").index(job.candidate.what))
    return jobs


def timing_jobs(case: Case, right: set[tuple], found: list[Candidate], cuda: bool) -> Iterator[Job]:
    ways = ["ours", "sdpa"]
    if cuda and len(set(case.lq)) == 1:
        ways += ["cuDNN", "flash"]
    if cuda:
        ways.append("varlen_attn")
    for backward in (False, True) if case.backward else (False,):
        for way in ways:
            yield Job("way", case, way=way, backward=backward)
    for candidate in found:
        needed = case.backward or candidate.what == "forward"
        if needed and (candidate, kind_of(case)) in right:
            yield Job("time", case, candidate)


def kind_of(case: Case) -> tuple[int, int, bool]:
    return case.dim, case.heads // case.kv_heads, case.causal


# ------------------------------------------------------------------------------------------------- inside one of the processes


class Inputs:
    """Tensors of a case, and the float64 results of its last KV head."""

    def __init__(self, case: Case, device: torch.device):
        self.case = case
        # Triton's interpreter knows no bf16.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
        generator = torch.Generator(device).manual_seed(0)

        def randn(length: int, heads: int) -> Tensor:
            return torch.randn(length, heads, case.dim, generator=generator, device=device).to(dtype)

        self.q = randn(sum(case.lq), case.heads)
        self.k = randn(sum(case.lk), case.kv_heads)
        self.v = randn(sum(case.lk), case.kv_heads)
        self.do = randn(sum(case.lq), case.heads)
        self.sq = Segments(case.lq, device)
        self.sk = self.sq if case.lq == case.lk else Segments(case.lk, device)
        self.kv = case.kv_heads - 1
        do = self.do if case.backward else None
        self.expected = reference_attention(case, self.q, self.k, self.v, do, (self.kv,))
        self.call = kernels.Call(self.sq, self.sk, case.causal, case.dim**-0.5)
        if case.what == SMALL:
            self.lse, self.delta = self.plainly()
        elif case.backward:
            o, self.lse = kernels.forward(self.q, self.k, self.v, self.call)
            self.delta = kernels.output_sums(o, self.do)

    def plainly(self) -> tuple[Tensor, Tensor]:
        """L and delta without a kernel, which every process would first have to compile."""
        case = self.case
        q, k, v, do = (x.float().transpose(0, 1) for x in (self.q, self.k, self.v, self.do))
        group = case.heads // case.kv_heads
        k = k.repeat_interleave(group, 0)
        v = v.repeat_interleave(group, 0)
        lse = []
        delta = []
        for a, b in pairwise(self.sq.bounds):
            x = q[:, a:b] @ k[:, a:b].mT * self.call.scale
            if case.causal:
                x = x.masked_fill(torch.ones_like(x[0], dtype=torch.bool).triu(1), -math.inf)
            lse.append(x.logsumexp(2) * kernels.LOG2E)
            delta.append((x.softmax(2) @ v[:, a:b] * do[:, a:b]).sum(2))
        return torch.cat(lse, 1), torch.cat(delta, 1)

    def error(self, what: str, results: tuple[Tensor, ...]) -> float:
        """The largest relative distance; NaN if anything is."""
        names = {"forward": ["o"], "dq": ["dq"], "dkv": ["dk", "dv"], "backward": ["dq", "dk", "dv"]}[what]
        worst = 0.0
        for name, x in zip(names, results, strict=True):
            expected = self.expected[("o", "dq", "dk", "dv").index(name)]
            heads = query_heads(self.case, (self.kv,)) if name in ("o", "dq") else [self.kv]
            error = ((x[:, heads].double() - expected).norm() / expected.norm()).item()
            worst = max(worst, error) if error == error else math.nan
        return worst

    def candidate(self, c: Candidate) -> Callable[[], tuple[Tensor, ...]]:
        saved = self.q, self.k, self.v
        if c.what == "forward":
            return lambda: kernels.forward(*saved, self.call, c.tiles)[:1]
        saved += self.do, self.lse, self.delta, self.call
        if c.what == "dq":
            return lambda: (kernels.backward_dq(*saved, c.tiles),)
        return lambda: kernels.backward_dkv(*saved, c.tiles, c.by_tma)

    def way(self, name: str, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [x.detach().requires_grad_(backward) for x in (self.q, self.k, self.v)]
        forced = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        varlen = None
        if name == "varlen_attn":
            _, varlen = Peers(self.case, self.sq, self.sk, self.q.device).varlen()

        def forward() -> Tensor:
            if varlen:
                return varlen(*leaves)
            backend = "triton" if name == "ours" else "sdpa"
            with sdpa_kernel(forced[name]) if name in forced else nullcontext():
                return ops.attention(*leaves, self.sq, self.sk, causal=self.case.causal, backend=backend)

        if not backward:
            return lambda: (forward(),)
        o = forward()
        return lambda: torch.autograd.grad(o, leaves, self.do, retain_graph=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable, device: torch.device) -> float:
    """The median of a few rows of calls."""
    began = time.perf_counter()
    call()
    launched = time.perf_counter() - began
    synchronize(device)
    once = time.perf_counter() - began
    if device.type != "cuda":
        return 1e3 * once
    n = max(2, min(20, int(0.006 / once)))
    times = []
    for _ in range(3):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        # The GPU waits, in cycles at 2 GHz, until the host has launched everything.
        torch.cuda._sleep(int(2e9 * 1.3 * n * min(launched, 2e-3)))
        start.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / n)
    return statistics.median(times)


def do(job: Job, inputs: Callable[[Case], Inputs], device: torch.device) -> dict:
    if job.kind == "machine":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return {"device": name, "cudnn": torch.backends.cudnn.version()}
    x = inputs(job.case)
    if job.kind == "fresh":
        return {"ms": fresh(x, job.backward, device)}
    if job.kind == "way":
        what = "backward" if job.backward else "forward"
        began = time.perf_counter()
        call = x.way(job.way, job.backward)
    else:
        what = job.candidate.what
        began = time.perf_counter()
        call = x.candidate(job.candidate)
    results = call()
    synchronize(device)
    first = 1e3 * (time.perf_counter() - began)
    error = x.error(what, results)
    record = {"error": error, "first_ms": first}
    # Written so that NaN fails.
    if not error <= LIMITS[what]:
        return record | {"failed": f"wrong: error {error:.1e}"}
    again = call()
    record["equal_bits"] = all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    del results, again
    if job.kind != "compile":
        record["ms"] = milliseconds(call, device)
    return record


def fresh(x: Inputs, backward: bool, device: torch.device) -> float:
    """Wall time of a first call on PyTorch's attention with a length that was never there: cuDNN plans each shape anew."""
    synchronize(device)
    began = time.perf_counter()
    x.way("sdpa", backward)()
    synchronize(device)
    return 1e3 * (time.perf_counter() - began)


def serve(pipe: connection.Connection, device: str) -> None:
    """One job after the other, until the parent ends. A result with "ended" says that this process is of no more use."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    where = torch.device(device)
    held: dict[Case, Inputs] = {}

    def inputs(case: Case) -> Inputs:
        key = repr(case)
        if key not in held:
            held.clear()
            held[key] = Inputs(case, where)
        return held[key]

    while True:
        job = pipe.recv()
        try:
            result = do(job, inputs, where)
        except Exception as e:
            text = str(e).strip().splitlines() or [""]
            result = {"failed": f"{type(e).__name__}: {text[0]}"[:160]}
        # An illegal access leaves every later call of the process in error.
        try:
            synchronize(where)
        except Exception:
            result["ended"] = True
        pipe.send(result)


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


# ------------------------------------------------------------------------------------------------------------- the processes


class Workers:
    """`count` processes that take one job at a time. What ends or blocks one costs the job that it had."""

    def __init__(self, count: int, device: str, serve: Callable = serve):
        self.count = count
        self.device = device
        self.serve = serve
        self.context = process_context(["bench.attention_peers"], device)
        self.free: list[tuple] = []

    def start(self) -> tuple:
        mine, theirs = self.context.Pipe()
        process = self.context.Process(target=self.serve, args=(theirs, self.device), daemon=True)
        process.start()
        theirs.close()
        return mine, process

    def run(self, jobs: list[Job], deadline: float) -> Iterator[tuple[Job, dict]]:
        """(job, result) as they come; a job that has no time left is not begun."""
        waiting = deque(jobs)
        busy: dict = {}  # pipe -> process, job, since when
        while waiting or busy:
            while waiting and len(busy) < self.count and time.time() < deadline:
                pipe, process = self.free.pop() if self.free else self.start()
                job = waiting.popleft()
                busy[pipe] = process, job, time.time()
                try:
                    pipe.send(job)
                except OSError:  # it has ended, which is found below
                    pass
            if not busy:
                break
            for pipe in connection.wait(list(busy), timeout=1):
                process, job, _ = busy.pop(pipe)
                try:
                    result = pipe.recv()
                    if result.pop("ended", False):
                        process.kill()
                    else:
                        self.free.append((pipe, process))
                except (EOFError, OSError):
                    process.join()
                    result = {"failed": f"its process ended with {process.exitcode}"}
                yield job, result
            for pipe, (process, job, since) in list(busy.items()):
                late = time.time() > deadline + 5
                if time.time() - since > PATIENCE or late:
                    del busy[pipe]
                    process.kill()
                    yield job, {"failed": LATE if late else f"no result in {PATIENCE} s"}
        for job in waiting:
            yield job, {"failed": LATE}

    def close(self) -> None:
        for _, process in self.free:
            process.kill()
        self.free.clear()


# -------------------------------------------------------------------------------------------------------------------- the run


def record_of(job: Job, result: dict) -> dict:
    record = {"kind": job.kind, "shape": job.case.shape, "causal": job.case.causal, "case": job.case.what}
    if job.candidate:
        c = job.candidate
        record |= {"what": c.what, "tiles": c.tiles[:4], "by_tma": c.by_tma, "name": c.name}
    else:
        record |= {"what": "backward" if job.backward else "forward", "name": job.way}
    return record | result


def run(device: str, smoke: bool, seconds: float, file: Path, processes: int) -> tuple[dict, list[dict]]:
    began = time.time()
    deadline = began + seconds
    shapes = cases(smoke)
    found = candidates(smoke)
    records: list[dict] = []

    def note(job: Job, result: dict) -> None:
        records.append(record_of(job, result))

    # Every kind of kernel of every candidate. Those that are wrong, or crash, are not timed.
    right = set()
    workers = Workers(processes, device)
    for job, result in workers.run(compile_jobs(shapes, found), began + 0.6 * seconds):
        note(job, result)
        if "failed" not in result:
            right.add((job.candidate, kind_of(job.case)))
    workers.close()
    print(f"compiled {len(right)} of {len(records)} in {time.time() - began:.0f} s", flush=True)

    # One process, so that nothing else runs on the GPU.
    timer = Workers(1, device)
    machine = {"torch": torch.__version__, "triton": kernels.triton.__version__, "cache": "L2 warm"}
    for _, result in timer.run([Job("machine", None)], deadline):
        machine |= result
    write(file, records, machine)
    cuda = device.startswith("cuda")
    for number, case in enumerate(shapes):
        for job, result in timer.run(list(timing_jobs(case, right, found, cuda)), deadline):
            note(job, result)
        write(file, records, machine)
        # Behind the first shape, with which cuDNN itself has started.
        if number == 0:
            lengths = [20] if smoke else [3001, 3504, 4008]
            jobs = []
            for n in lengths:
                for backward in (False, True):
                    odd = Case("fresh", [n + backward], [n + backward], case.heads, case.kv_heads, case.dim, backward=backward)
                    jobs.append(Job("fresh", odd, way="sdpa", backward=backward))
            for job, result in timer.run(jobs, deadline):
                note(job, result)
    timer.close()
    write(file, records, machine)
    print(f"all in {time.time() - began:.0f} s, {machine.get('device')}: {file}", flush=True)
    return machine, records


def write(file: Path, records: list[dict], machine: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(record) for record in records)
    file.write_text(f'{{"machine": {json.dumps(machine)},\n"records": [\n{rows}\n]}}\n')


def summary(records: list[dict], shapes: list[Case], machine: dict) -> str:
    """JSON with a line for each shape: times in ms, largest errors, and the tiles that "ours" ran with. Without what failed."""
    lines = []
    for case in shapes:
        own = of_case(records, case)
        line: dict = {"case": case.what, "shape": case.shape, "causal": case.causal}
        for what in ("forward", "dq", "dkv"):
            timed = [r for r in own if r["kind"] == "time" and r["what"] == what and "ms" in r]
            if timed:
                line[what] = {r["name"]: short(r["ms"], 4) for r in timed}
                line[f"{what} error"] = short(max(r["error"] for r in timed), 2)
                line[f"{what} of ours"] = Candidate(what, case.dim, taken(case, what)).name
        ways = [r for r in own if r["kind"] == "way" and "ms" in r]
        for what in ("forward", "backward"):
            timed = {r["name"]: short(r["ms"], 4) for r in ways if r["what"] == what}
            if timed:
                line[f"ways {what}"] = timed
                line[f"bits differ {what}"] = [r["name"] for r in ways if r["what"] == what and not r["equal_bits"]]
        lines.append(json.dumps(line))
    news = {name: round(ms) for name, ms in first_calls(records)}
    rows = ",\n".join(lines)
    return f'{{"machine": {json.dumps(machine)},\n"first call": {json.dumps(news)},\n"shapes": [\n{rows}\n]}}\n'


def short(x: float, digits: int) -> float:
    return float(f"{x:.{digits}g}")


def of_case(records: list[dict], case: Case) -> list[dict]:
    return [r for r in records if r["shape"] == case.shape and r["case"] == case.what and r["causal"] == case.causal]


def first_calls(records: list[dict]) -> list[tuple[str, float]]:
    """Of PyTorch's attention with lengths that were never there: which, and ms."""
    return [(f"{r['shape'].partition(';')[0]} {r['what']}", r["ms"]) for r in records if r["kind"] == "fresh" and "ms" in r]


# ------------------------------------------------------------------------------------------------------------------ the table


def taken(case: Case, what: str) -> Tiles:
    """What `kernels.quickest` takes of HOPPER for this case."""
    dim = max(64, 1 << (case.dim - 1).bit_length())
    sq = Segments(case.lq)
    sk = sq if case.lq == case.lk else Segments(case.lk)
    sides = (sk, sq, case.causal, case.kv_heads, "keys") if what == "dkv" else (sq, sk, case.causal, case.heads, "queries")
    return kernels.quickest(kernels.HOPPER[what, dim], *sides)


def table(records: list[dict], shapes: list[Case]) -> str:
    """A line for each shape and pass: the fastest candidates, ms."""
    lines = []
    for record in records:
        if "failed" in record and record["failed"] != LATE:
            why = record["failed"][:100]
            lines.append(f"FAILED {record['kind']} {record['shape']} {record['what']} {record['name']}: {why}")
    # The file holds them all.
    if len(lines) > 12:
        lines = [f"{len(lines)} failures, of which the first:", *lines[:12]]
    late = sum(r.get("failed") == LATE for r in records)
    if late:
        lines.append(f"{late} cells were not begun: {LATE}")
    for case in shapes:
        own = of_case(records, case)
        lines.append(f"{case.what}{', causal' if case.causal else ''}: {case.shape}")
        for what in ("forward", "dq", "dkv"):
            timed = sorted((r for r in own if r["kind"] == "time" and r["what"] == what and "ms" in r), key=lambda r: r["ms"])
            mine = taken(case, what)[:4]
            cells = [f"{r['name']}{'*' * (tuple(r['tiles']) == mine)} {r['ms']:.4g}" for r in timed[:4]]
            if cells:
                lines.append(f"  {what:8} " + "  ".join(cells))
        for what in ("forward", "backward"):
            ways = [r for r in own if r["kind"] == "way" and r["what"] == what and "ms" in r]
            cells = []
            for r in ways:
                cells.append(f"{r['name']} {r['ms']:.4g}" + ("" if r["equal_bits"] else " (bits differ)"))
            if cells:
                lines.append(f"  {what:8} " + " | ".join(cells))
    news = [f"{name} {ms:.0f}" for name, ms in first_calls(records)]
    lines.append("first call of PyTorch's with a new length, ms: " + ", ".join(news))
    return "\n".join(lines)


def command() -> None:
    parser = argparse.ArgumentParser("python -m bench.tune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tune.json"), help="the measurements")
    parser.add_argument("--summary", type=Path, help="the times alone, short enough to be committed")
    parser.add_argument("--seconds", type=float, default=75, help="of the whole run; what is left over is not begun")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="that compile at the same time")
    parser.add_argument("--smoke", action="store_true", help="toy sizes in Triton's interpreter, on a CPU")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    machine, records = run(device, args.smoke, args.seconds, args.out, args.processes)
    print(table(records, cases(args.smoke)))
    if args.summary:
        args.summary.write_text(summary(records, cases(args.smoke), machine))
    sys.exit(0 if any("ms" in r for r in records) else 1)


if __name__ == "__main__":
    command()
