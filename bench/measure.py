"""How a row of the bench is measured: first right, then timed; and the table of what came out.

A row is one thing that is computed and several ways to compute it. Each way runs once and is compared: with float64 on the same
rounded inputs where there is such a reference, else with the first peer that runs (error |x - ref| / |ref|, the largest over
the results). Models in fp32 agree to 1e-4, while in bf16 two right implementations of 28 layers differ by 3e-2. If ours is too
far off, the row has no time. Then all ways run in turns and the medians count: a ratio above 1 means that we are faster.

Every row is appended to the result file as soon as it is known, one JSON object a line, behind a first line that describes the
machine. A peer that is not installed, refuses a shape, computes something else or breaks its process is named with its reason,
and the others are measured all the same.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint import InputError
from flops import peak_flops

COLUMNS = "what", "shape", "ours", "error", "peer", "peer's", "ratio"
WIDTHS = 38, 48, 30, 6, 24, 8, 5  # of the columns on a terminal
MARKS = "<!-- bench -->", "<!-- end of bench -->"
README = Path(__file__).parent.parent / "README.md"
SKIPPED = "skipped: no time left"
BROKEN = 70  # exit status of a process that its own GPU no longer answers


# ------------------------------------------------------------------------------------------------------------------ a row


def as_is(result):
    return result


class Way(NamedTuple):
    """call() computes once; results(what it returned): the tensors that are compared."""

    call: Callable
    results: Callable = as_is


@dataclass
class Row:
    """ours, peers: functions without arguments that build a Way; building may raise where a peer does not exist."""

    what: str
    shape: str
    ours: Callable[[], Way]
    peers: dict[str, Callable[[], Way]]
    limit: float  # of our error; a peer may be ten times as far off before it counts as computing something else
    reference: object = None  # the tensors to be met, or what computes them; None: those of the first peer that runs
    gradients: bool = False  # whether autograd records
    flops: float = 0  # of one call
    moved: float = 0  # bytes that one call reads and writes at least
    own_clock: bool = False  # a call returns (result, seconds), and these seconds count, of the first call too
    samples: int = 0  # of a training step: the file then has samples/s and MFU
    kernels: bool = False  # whether the file names the kernel in which each peer spends its time
    note: str = ""


class Wrong(Exception):
    """Our result is not the reference's."""


class Bench:
    """Measures rows, prints them and appends them to a file. dtype: bf16 on a GPU, fp32 on a CPU.

    size: "gpu", "cpu" or "smoke" (toy sizes). deadline: time.time() after which no row begins. What groups.py needs in order to
    go on behind a call that kills its process: tell(cell, why) hears of each call before it is made; done holds the rows that
    the file has already; faults says which cells (what, shape, way) are not to be tried again, and why.

    share (i, n): nothing is measured or written. Of every n rows the i-th makes its own call once, which compiles its kernels.
    parts: what was asked for in the place of the usual models: presets as "mllm" and "dit", a folder as "ckpt".
    """

    def __init__(
        self,
        device: str,
        size: str,
        file: Path,
        group: str = "",
        deadline: float = math.inf,
        *,
        tell: Callable[[tuple[str, str, str], str], None] | None = None,
        done: Collection[tuple[str, str]] = (),
        faults: dict[tuple[str, str, str], str] | None = None,
        share: tuple[int, int] | None = None,
        parts: dict[str, str] | None = None,
    ):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.size = size
        self.file = file
        self.group = group
        self.deadline = deadline
        self.tell = tell or (lambda cell, why: None)
        self.done = set(done)
        self.faults = faults or {}
        self.share = share
        self.parts = parts or {}
        self.seen = 0  # rows that were asked for while compiling
        self.spent = 0.0  # seconds of a row's calls before their race that have timed themselves
        self.rows: list[dict] = []
        # Written before every timed call, so that nothing is read from the 50 MB L2 cache; the kernel's launch hides behind it.
        self.flush = None
        if self.cuda and share is None:
            self.flush = torch.empty(2**28, dtype=torch.int8, device=self.device)

    @property
    def compiling(self) -> bool:
        return self.share is not None

    @property
    def late(self) -> bool:
        return time.time() > self.deadline

    def preset(self, part: str) -> str | None:
        """Name of the preset that stands for a part; None where the bench has a size of its own."""
        usual = {
            "mllm": self.pick(gpu="7B", cpu=None, smoke="tiny"),
            "dit": self.pick(gpu="2B", cpu=None, smoke=None),
        }
        return self.parts.get(part, usual[part])

    def pick(self, *, gpu, cpu, smoke):
        return {"gpu": gpu, "cpu": cpu, "smoke": smoke}[self.size]

    def limit(self, cuda: float, cpu: float) -> float:
        return cuda if self.cuda else cpu

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)

    def record(self, what: str, shape: str) -> dict:
        """The beginning of a row in the file."""
        return {"group": self.group, "what": what, "shape": shape, "peers": {}}

    def write(self, record: dict) -> None:
        if self.compiling:
            return
        append(self.file, record)
        self.rows.append(record)
        for line in lines(record):
            print(aligned(line), flush=True)

    def passed(self, what: str, shape: str) -> bool:
        """Whether a row is not to be made: it is there, it has taken its process with it, or there is no time, which the file
        then says."""
        if self.compiling:
            self.seen += 1
            i, n = self.share
            return self.seen % n != i
        if (what, shape) in self.done:
            return True
        why = self.faults.get((what, shape, "ours"))
        if why is None and self.late:
            why = SKIPPED
        if why is not None:
            self.write(self.record(what, shape) | {"failed": why})
            return True
        self.tell((what, shape, "ours"), "")
        return False

    def measure(self, row: Row) -> None:
        """One line of the file, whatever happens."""
        if self.passed(row.what, row.shape):
            return
        if self.compiling:
            return self.compile(row)
        record = self.record(row.what, row.shape) | {"dtype": str(self.dtype)[6:]}
        if row.note:
            record["note"] = row.note
        try:
            with torch.set_grad_enabled(row.gradients):
                calls, times = self.right_calls(row, record)
                self.race(row, calls, times)
            self.note_times(row, record, times)
            if row.kernels and self.cuda:
                for name in calls.keys() - {"ours"}:
                    record["peers"][name]["kernel"] = kernel_name(calls[name])
        except Wrong as e:
            record["failed"] = str(e)
        except Exception as e:
            record["failed"] = reason(e)
            self.write(record)
            return self.end_if_broken()
        self.write(record)

    def compile(self, row: Row) -> None:
        """Our call, once. What fails here fails again where it is measured, and says so there."""
        try:
            with torch.set_grad_enabled(row.gradients):
                row.ours().call()
        except Exception:
            self.end_if_broken()

    def end_if_broken(self) -> None:
        """A GPU that has read where no memory is refuses all later work of the process: another process goes on."""
        if not self.cuda:
            return
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(BROKEN)

    def right_calls(self, row: Row, record: dict) -> tuple[dict[str, Callable], dict[str, list[float]]]:
        """The calls that compute what the row says, and the seconds of those that have timed themselves. The record gets the
        errors, and why a peer is not among the calls."""
        self.spent = 0.0
        calls = {}
        times = {}
        results = {}
        for name, build in {"ours": row.ours, **row.peers}.items():
            cell = row.what, row.shape, name
            if cell in self.faults:
                record["peers"][name] = {"failed": self.faults[cell]}
                continue
            self.tell(cell, "")
            try:
                way = build()
                began = time.monotonic()
                result = way.call()
                seconds = []
                if row.own_clock:
                    result, first = result
                    seconds.append(first)
                    self.spent += time.monotonic() - began
                # Here the host waits for the call: a fault shows in the cell that it belongs to.
                results[name] = tensors(way.results(result))
                if self.cuda:
                    torch.cuda.synchronize()
                calls[name] = way.call
                times[name] = seconds
            except Exception as e:
                # What peers cannot do is part of the result; without ours there is no row.
                if name == "ours":
                    raise
                record["peers"][name] = {"failed": reason(e)}
                self.tell(cell, reason(e))
                self.end_if_broken()

        # Without a reference the first peer that runs is one; without that there is nothing to be compared with.
        reference = row.reference() if callable(row.reference) else row.reference
        if reference is None:
            reference = next((result for name, result in results.items() if name != "ours"), None)
        if reference is None:
            return calls, times

        # Errors are compared so that NaN fails: it is not within any limit.
        for name, result in results.items():
            error = distance(result, tensors(reference))
            if name == "ours":
                record["error"] = error
                if not error <= row.limit:
                    raise Wrong(f"wrong: error {error:.1e}, limit {row.limit:.0e}")
                continue
            record["peers"][name] = {"error": error}
            if not error <= 10 * row.limit:
                record["peers"][name]["failed"] = f"another result: error {error:.1e}"
                del calls[name]
                del times[name]
        return calls, times

    def race(self, row: Row, calls: dict[str, Callable], times: dict[str, list[float]]) -> None:
        """All in turns until the row has had its seconds: three rounds, unless they are long, and at least one."""
        budget = self.pick(gpu=0.6, cpu=4, smoke=0)
        least = self.pick(gpu=3, cpu=3, smoke=1)
        # Whoever has a clock of his own has measured something already: where that took long, it is enough.
        began = time.monotonic() - self.spent

        def goes_on() -> bool:
            rounds = len(times["ours"])
            passed = time.monotonic() - began
            more = passed < budget or (rounds < least and passed < 4 * budget)
            return rounds == 0 or (rounds < 100 and more)

        # In turns: when the clock of the machine changes, it changes for all.
        while goes_on():
            for name, call in calls.items():
                self.tell((row.what, row.shape, name), "")
                if row.own_clock:
                    _, seconds = call()
                else:
                    seconds = self.clock(call)
                times[name].append(seconds)

    def clock(self, call: Callable) -> float:
        """Seconds of one call."""
        if not self.cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        # Events are stamped by the GPU when it comes to them, so the host's own work is not in the time.
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        self.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def note_times(self, row: Row, record: dict, times: dict[str, list[float]]) -> None:
        for name, seconds in times.items():
            entry = record if name == "ours" else record["peers"].setdefault(name, {})
            # The median: one call that somebody else has disturbed does not count.
            ordered = sorted(1e3 * s for s in seconds)
            entry["ms"] = statistics.median(ordered)
            entry["runs"] = len(ordered)
            entry["p20"] = ordered[len(ordered) // 5]
            entry["p80"] = ordered[4 * len(ordered) // 5]
            if name != "ours":
                entry["ratio"] = entry["ms"] / record["ms"]
        if row.flops:
            record["tflops"] = row.flops / 1e9 / record["ms"]
        if row.moved:
            record["gbs"] = row.moved / 1e6 / record["ms"]
        if row.samples:
            record["samples"] = 1e3 * row.samples / record["ms"]
            peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.cuda else None
            if peak:
                record["mfu"] = 1e12 * record["tflops"] / peak


def tensors(result) -> tuple[Tensor, ...]:
    several = result if isinstance(result, tuple | list) else (result,)
    return tuple(x.detach() for x in several if x is not None)


def distance(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """Largest |a - b| / |b| over the tensors, in float64; NaN and another shape are infinitely far."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return math.inf
    far = 0.0
    for x, y in zip(a, b, strict=True):
        norm = y.double().norm().clamp(min=1e-30)
        d = ((x.double() - y.double()).norm() / norm).item()
        far = max(far, math.inf if math.isnan(d) else d)
    return far


def reason(e: Exception) -> str:
    text = str(e).strip()
    return f"{type(e).__name__}: {text.splitlines()[0] if text else ''}"[:160]


def kernel_name(call: Callable) -> str:
    """The kernel in which a call spends most of its time."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        longest = max(profile.key_averages(), key=attrgetter("self_device_time_total"))
        return longest.key[:120]
    except Exception as e:
        return reason(e)


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
    # A CPU's allocator keeps no count, but the profiler notes each allocation and each release.
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    alive = 0
    most = 0
    for event in sorted(events, key=methodcaller("start_ns")):
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


# --------------------------------------------------------------------------------------------------------- the result file


def append(file: Path, record: dict) -> None:
    with file.open("a") as f:
        f.write(json.dumps(record) + "\n")


def read(file: Path) -> list[dict]:
    """The machine, then the rows."""
    try:
        records = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: no result file of the bench ({e})") from None
    if not records or "device" not in records[0]:
        raise InputError(f"{file}: its first line does not say on which machine it was made")
    return records


# --------------------------------------------------------------------------------------------------------------- the table


def value(entry: dict) -> str:
    """What a table says of ours or of a peer: why there is no time, the time, or bytes."""
    if "failed" in entry:
        return entry["failed"]
    if "ms" in entry:
        ms = entry["ms"]
        if ms >= 1e3:
            return f"{ms / 1e3:.3g} s"
        return f"{ms:.3g} ms" if ms >= 0.1 else f"{1e3 * ms:.3g} us"
    if "bytes" in entry:
        return f"{entry['bytes'] / 1e9:.3g} GB"
    return entry.get("text", "")


def rate(row: dict, ceilings: dict[str, float] | None) -> str:
    """How much it computed or moved in a second, and which part that is of the machine's ceiling."""
    if "tflops" in row:
        key = "tflops"
        text = f", {row[key]:.3g} TFLOP/s" if row[key] >= 1 else f", {1e3 * row[key]:.3g} GFLOP/s"
    elif "gbs" in row:
        key = "gbs"
        text = f", {row[key]:.3g} GB/s"
    else:
        return ""
    if key in (ceilings or {}) and row["group"] != "ceilings":
        text += f" ({row[key] / ceilings[key]:.0%})"
    if "mfu" in row:
        text += f", MFU {row['mfu']:.0%}"
    if "samples" in row:
        text += f", {row['samples']:.3g} samples/s"
    return text


def lines(row: dict, ceilings: dict[str, float] | None = None) -> list[tuple[str, ...]]:
    """A row as lines of COLUMNS, one for each peer."""
    error = f"{row['error']:.0e}" if "error" in row else ""
    head = row["what"], row["shape"], value(row) + rate(row, ceilings), error
    out = []
    for name, peer in row["peers"].items():
        ratio = f"{peer['ratio']:.2f}" if "ratio" in peer else ""
        out.append((*head, name, value(peer), ratio))
        head = ("", "", "", "")
    return out or [(*head, "", "", "")]


def aligned(line: tuple[str, ...]) -> str:
    """Columns of one width; a reason at the end of a line is never cut."""
    return "  ".join(f"{cell:{width}}" for cell, width in zip(line, WIDTHS, strict=True)).rstrip()


def markdown(file: Path) -> str:
    """The README's table of a result file: what was measured, without the checks."""
    # A check has no time.
    machine, *rows = read(file)
    rows = [row for row in rows if not row["group"].startswith("check")]
    dtypes = " and ".join(sorted({row["dtype"] for row in rows if "dtype" in row}))
    versions = ", ".join(f"{package} {machine[package]}" for package in ("torch", "transformers", "diffusers"))
    ceilings = {}
    for row in rows:
        if row["group"] == "ceilings":
            ceilings |= {key: row[key] for key in ("tflops", "gbs") if key in row}
    table = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        table += lines(row, ceilings)
    # A bar would end its cell.
    cells = [[cell.replace("|", "/") for cell in line] for line in table]
    text = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    return f"{machine['device']}; {versions}; {dtypes}:\n\n{text}"


def write_readme(files: list[Path]) -> None:
    """The tables of these files into the README, one behind the other."""
    before, start, rest = README.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (start and end):
        raise InputError(f"README.md has no lines {MARKS[0]} and {MARKS[1]} to put the table between")
    tables = "\n\n".join(markdown(file) for file in files)
    README.write_text(f"{before}{start}\n{tables}\n{end}{after}")
