"""Groups of rows, in order of what matters, each in a process of its own, which may die.

A group tells its parent which call comes next. If its process dies or falls silent there, the parent knows whose fault it was:
it starts the group again, which passes over the rows that the file has and over that one call.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import torch

from bench import attention, memory, steps, system
from bench.measure import BROKEN, COLUMNS, SKIPPED, Bench, aligned, append, lines, read, reason
from bench.processes import process_context, start_server
from checkpoint import InputError

JOBS = attention.GROUPS | steps.GROUPS | system.GROUPS | memory.GROUPS
# In order of what matters: what comes last is skipped first.
ORDER = (
    "ceilings",
    "guided",
    "decode",
    "stage2",
    "stage1",
    "packed",
    "dense",
    "vision",
    "linear-cross-entropy",
    "decode-attention",
    "fused",
    "pictures",
    "memory",
    "document",
    "vae",
    "mixed",
    "check",
    "lengths",
    "check-fp16",
    "flex",
)
# What of the models a group is about. The others know none, or the VAE, which is the same for all.
PARTS = {
    "guided": {"dit"},
    "decode": {"mllm"},
    "stage2": {"mllm", "dit"},
    "stage1": {"mllm"},
    "vision": {"mllm"},
    "pictures": {"dit"},
    "memory": {"mllm", "dit"},
    "document": {"ckpt"},
    "mixed": {"dit"},
}
PRELOAD = ["bench.preload"]
DOCS = Path(__file__).parent.parent / "docs" / "bench"
MINUTES = 8.0  # on a GPU
# Seconds without a word after which a call counts as hanging. The longest known one takes 20 on a GPU. Two cores take minutes
# to make the weights of a 2B and to read a prompt with them.
PATIENCE = {"cuda": 90, "cpu": 900}
STOPPED = "stopped: its time was over"
# Attention has the most kernels, and each takes the compiler seconds: so many processes share the rows of such a group.
SHARES = {"packed": 4, "dense": 3, "check": 6, "check-fp16": 6, "lengths": 2}


# ------------------------------------------------------------------------------------------------------ a process per group


class Place(NamedTuple):
    """Where and at which size a group is measured, what its rows go into, and until when."""

    device: str
    size: str
    file: Path
    deadline: float = math.inf  # no row begins after it
    end: float = math.inf  # what runs then is stopped
    parts: dict[str, str] = {}  # models in the place of the usual ones, see Bench


class Fault(NamedTuple):
    """Why a process has ended, and the cell (what, shape, way) that it was at, None: outside of all rows."""

    cell: tuple[str, str, str] | None
    why: str


def run_group(job: Callable, place: Place, name: str, link, done, faults, share) -> None:
    """The process of a group. It ends with its parent, however that ends; Ctrl-C is the parent's."""
    # Ctrl-C goes to all processes of a terminal: the parent alone decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()

    def tell(cell: tuple[str, str, str], why: str) -> None:
        link.send(Fault(cell, why))

    try:
        b = Bench(
            place.device,
            place.size,
            place.file,
            name,
            place.deadline,
            tell=tell,
            done=done,
            faults=faults,
            share=share,
            parts=place.parts,
        )
        job(b)
    except Exception as e:
        if share is None:
            write_failed(place.file, name, reason(e))


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def start(job: Callable, place: Place, name: str, done=(), faults=None, share=None):
    """(process of a group, what it tells)."""
    context = process_context(PRELOAD, place.device)
    heard, told = context.Pipe(duplex=False)
    process = context.Process(target=run_group, args=(job, place, name, told, done, faults or {}, share))
    process.start()
    told.close()
    return process, heard


def attempt(job: Callable, place: Place, name: str, done, faults) -> Fault | None:
    """One process of a group until it ends, falls silent or its time is over. None: it has done all that it could."""
    process, heard = start(job, place, name, done, faults)
    last = Fault(None, "")
    silence = PATIENCE[torch.device(place.device).type]
    while True:
        patience = min(silence, place.end - time.time())
        ready = connection.wait([heard, process.sentinel], max(0.0, patience))
        if heard in ready:
            try:
                last = heard.recv()
                continue
            except EOFError:
                pass
        if ready:
            process.join(max(1.0, patience))
            process.kill()  # where even the end hangs
            process.join()
            if not process.exitcode:
                return None
            return Fault(last.cell, last.why or f"the process died of {ending(process.exitcode)}")
        # Nothing was heard, neither of the next call nor of an end.
        process.kill()
        process.join()
        if time.time() >= place.end:
            return Fault(last.cell, STOPPED)
        return Fault(last.cell, f"hung: nothing happened for {silence} s")


def run_apart(job: Callable, place: Place, name: str) -> None:
    """A group in processes of its own: as many as it takes until every row has been made, or has its reason."""
    faults: dict[tuple[str, str, str], str] = {}
    while True:
        done = rows_of(place.file, name)
        fault = attempt(job, place, name, done, faults)
        if fault is None:
            return
        # A row that says itself why it failed is in the file by now, and its process has ended behind it.
        written = fault.cell is not None and fault.cell[:2] in rows_of(place.file, name)
        known = fault.cell in faults or fault.cell is None
        if fault.why == STOPPED or (known and not written):
            return write_failed(place.file, name, fault.why)
        if not written:
            faults[fault.cell] = fault.why


def rows_of(file: Path, name: str) -> set[tuple[str, str]]:
    """(what, shape) of the rows that a group has in the file."""
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(row["what"], row["shape"]) for row in records if row.get("group") == name}


def write_failed(file: Path, name: str, why: str) -> None:
    """A row in place of those that a group did not come to."""
    record = {"group": name, "what": name, "shape": "", "peers": {}, "failed": why}
    append(file, record)
    print(aligned(lines(record)[0]), flush=True)


def ending(exitcode: int) -> str:
    if exitcode == BROKEN:
        return "a fault of the GPU"
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"status {exitcode}"


# ------------------------------------------------------------------------------------------------------------------ the run


def run(groups: list[str], device: str, size: str, file: Path, minutes: float, parts: dict[str, str] | None = None) -> int:
    """How many rows failed."""
    parts = parts or {}
    began = time.time()
    # No row begins shortly before the end, which comes in any case.
    end = began + 60 * minutes
    place = Place(device, size, file, end - min(30, 9 * minutes), end, parts)
    # Its imports take seconds, in which this process looks at the machine.
    start_server(PRELOAD)
    # The first line of the file says of which parts its rows are: those of others are not of one table.
    before = begin(file, environment(torch.device(device)) | parts, groups)
    # Here, and not in one of the threads that compile.
    process_context(PRELOAD, device)
    if device.startswith("cuda"):
        compile_first(groups, place, seconds=min(90, 20 * minutes))
        print(f"kernels compiled in {time.time() - began:.0f} s", flush=True)
    print(aligned(COLUMNS), flush=True)
    for name in groups:
        if time.time() > place.deadline:
            write_failed(file, name, SKIPPED)
        else:
            run_apart(JOBS[name], place, name)
    machine, *rows = read(file)
    rewrite(file, [machine, *merged(before, rows)])
    made = [row for row in rows if row["group"] in groups]
    left = [row for row in made if no_time(row)]
    wrong = [row for row in made if "failed" in row and row not in left]
    print(f"{len(made) - len(left)} rows in {time.time() - began:.0f} s, {len(left)} had no time, {len(wrong)} failed: {file}")
    return len(wrong)


def compile_first(groups: list[str], place: Place, seconds: float) -> None:
    """Every group's own calls once, all groups at a time: what they compile, Triton keeps on disk for those that measure.

    The rows are the same, so nobody has to list what they will compile. Models have few layers here, since layers share their
    kernels. In turns, while they are measured, the kernels would take minutes. A fault here costs nothing: it comes again where
    it is measured. Whatever is not done in time is compiled when its turn comes.
    """
    end = time.time() + seconds
    tasks = []
    for name in groups:
        n = SHARES.get(name, 1)
        tasks += [(name, (i, n)) for i in range(n)]

    def one(task: tuple[str, tuple[int, int]]) -> None:
        name, share = task
        if time.time() > end:
            return
        process, heard = start(JOBS[name], place, name, share=share)
        process.join(max(0.0, end - time.time()))
        process.kill()
        heard.close()

    # In a short run only what all cores do at once: the groups behind will hardly be reached.
    workers = max(1, (os.cpu_count() or 1) - 3)
    if seconds < 60:
        tasks = tasks[:workers]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, tasks))


# ---------------------------------------------------------------------------------------------------------- the result file


def begin(file: Path, machine: dict, groups: list[str]) -> list[dict]:
    """The machine on the first line, then what the file holds of other groups, if the same machine and versions made it. The
    rows of these groups that it held."""
    before = []
    if file.exists():
        old, *rows = read(file)
        if same_machine(old, machine):
            before = rows
    file.parent.mkdir(parents=True, exist_ok=True)
    others = [row for row in before if row["group"] not in groups]
    rewrite(file, [machine, *others])
    return [row for row in before if row["group"] in groups]


def same_machine(a: dict, b: dict) -> bool:
    """The same versions and models too; clocks move from run to run."""
    return a | {"clocks": None} == b | {"clocks": None}


def merged(before: list[dict], after: list[dict]) -> list[dict]:
    """Rows of two runs in their order. The newer one counts, unless it had no time for a row that the older one has."""
    # A group that came to its end says all there is; what an older run called otherwise is gone.
    unfinished = {row["group"] for row in after if no_time(row)}
    finished = {row["group"] for row in after} - unfinished
    rows = {row_key(row): row for row in before if row["group"] not in finished}
    for row in after:
        if not no_time(row) or row_key(row) not in rows:
            rows[row_key(row)] = row
    # That a group had no time is said in place of its rows: not beside those of another run.
    real = {row["group"] for row in rows.values() if row["what"] != row["group"]}
    kept = [row for row in rows.values() if row["group"] not in real or row["what"] != row["group"] or not no_time(row)]
    return sorted(kept, key=place_of)


def no_time(row: dict) -> bool:
    return row.get("failed") in (SKIPPED, STOPPED)


def row_key(row: dict) -> tuple[str, str, str]:
    return row["group"], row["what"], row["shape"]


def merge(files: list[Path], out: Path) -> None:
    """Result files of one machine into one; where two have a row, the later file's counts."""
    machine, *rows = read(files[0])
    for file in files[1:]:
        other, *more = read(file)
        if not same_machine(machine, other):
            raise InputError(
                f"{file}: another machine, other versions or other models than {files[0]}: their times are not of one table"
            )
        rows = merged(rows, more)
    out.parent.mkdir(parents=True, exist_ok=True)
    rewrite(out, [machine, *sorted(rows, key=place_of)])


def place_of(row: dict) -> int:
    return ORDER.index(row["group"]) if row["group"] in ORDER else len(ORDER)


def rewrite(file: Path, records: list[dict]) -> None:
    """At no time is there half a file."""
    new = file.with_name(file.name + ".new")
    new.write_text("".join(json.dumps(record) + "\n" for record in records))
    new.replace(file)


# ---------------------------------------------------------------------------------------------------------------- the machine


def environment(device: torch.device) -> dict:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers", "diffusers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    # Two machines with one name may differ in power and clock, and so in speed.
    if device.type == "cuda":
        fields = "driver_version,clocks.sm,clocks.max.sm,power.limit"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
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


def result_file(device: str, parts: dict[str, str]) -> Path:
    """One for each machine, and for each choice of models."""
    name = "cpu"
    if device != "cpu":
        name = "gpu_" + re.sub(r"\W+", "_", torch.cuda.get_device_name(device))
    for part in parts.values():
        name += "_" + re.sub(r"[^\w.-]+", "-", part)
    return DOCS / f"{name}.jsonl"


def committed() -> list[Path]:
    """All result files of docs/bench, those of GPUs first."""
    return sorted(DOCS.glob("*.jsonl"), key=lambda file: (not file.name.startswith("gpu"), file.name))
