"""Groups of rows, in order of what matters, each in a process of its own: what kills a process costs no other group."""

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
from pathlib import Path

import torch

from bench import attention, steps, system
from bench.measure import COLUMNS, SKIPPED, Bench, aligned, append, lines, read, reason

JOBS = attention.GROUPS | steps.GROUPS | system.GROUPS
# In order of what matters: what comes last is skipped first. The peer that has killed its process comes last of all.
ORDER = (
    "ceilings",
    "guided",
    "decode",
    "packed",
    "stage2",
    "stage1",
    "vision",
    "linear-cross-entropy",
    "decode-attention",
    "dense",
    "fused",
    "document",
    "vae",
    "check",
    "lengths",
    "check-fp16",
    "cudnn-varlen",
)
DOCS = Path(__file__).parent.parent / "docs" / "bench"
MINUTES = 9.0  # on a GPU
GRACE = 60  # seconds that a row may need beyond the deadline
# Imported once, before the groups' processes are forked. None of them touches a GPU when it is imported.
PRELOAD = [
    "bench.groups",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "diffusers.models.transformers.transformer_cosmos",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
]


# ------------------------------------------------------------------------------------------------------ a process per group


def run_group(job: Callable, device: str, size: str, file: Path, name: str, deadline: float) -> None:
    """The process of a group. It ends with its parent, however that ends; Ctrl-C is the parent's."""
    # Ctrl-C goes to all processes of a terminal: the parent alone decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    b = Bench(device, size, file, name, deadline)
    try:
        job(b)
    except Exception as e:
        b.write(b.record(name, "") | {"failed": reason(e)})


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def run_apart(job: Callable, device: str, size: str, file: Path, name: str, deadline: float = math.inf) -> None:
    """run_group in a process of its own. If that dies, the file says so behind the rows it had."""
    # Forked from a server that has imported the libraries and touched no GPU: a fork behind CUDA's start would be broken.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=run_group, args=(job, device, size, file, name, deadline))
    process.start()
    patience = None
    if not math.isinf(deadline):
        patience = max(0.0, deadline + GRACE - time.time())
    process.join(patience)
    if process.is_alive():
        process.kill()
        process.join()
        why = "stopped: its time was over"
    elif process.exitcode:
        why = f"the process died of {ending(process.exitcode)}"
    else:
        return
    write_failed(file, name, why)


def write_failed(file: Path, name: str, why: str) -> None:
    """A row in place of those that a group did not come to."""
    record = {"group": name, "what": name, "shape": "", "peers": {}, "failed": why}
    append(file, record)
    print(aligned(lines(record)[0]), flush=True)


def ending(exitcode: int) -> str:
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"status {exitcode}"


def run(groups: list[str], device: str, size: str, file: Path, minutes: float) -> int:
    """How many rows failed."""
    began = time.time()
    # No row begins in the last minute, which is for the one that runs.
    deadline = began + 60 * minutes - min(GRACE, 30 * minutes)
    begin(file, environment(torch.device(device)), groups)
    print(aligned(COLUMNS), flush=True)
    for name in groups:
        if time.time() > deadline:
            write_failed(file, name, SKIPPED)
        else:
            run_apart(JOBS[name], device, size, file, name, deadline)
    sort(file)
    rows = [row for row in read(file)[1:] if row["group"] in groups]
    wrong = [row for row in rows if row.get("failed", SKIPPED) != SKIPPED]
    print(f"{len(rows)} rows in {time.time() - began:.0f} s, {len(wrong)} failed: {file}")
    return len(wrong)


def begin(file: Path, machine: dict, groups: list[str]) -> None:
    """The machine on the first line, and what the file holds of other groups, if the same machine and versions made it."""
    kept = []
    if file.exists():
        before, *rows = read(file)
        # Clocks move from run to run.
        if before | {"clocks": None} == machine | {"clocks": None}:
            kept = [row for row in rows if row["group"] not in groups]
    file.parent.mkdir(parents=True, exist_ok=True)
    rewrite(file, [machine, *kept])


def sort(file: Path) -> None:
    """Rows of a group that was run by itself go where they belong."""
    machine, *rows = read(file)
    rows.sort(key=place)
    rewrite(file, [machine, *rows])


def place(row: dict) -> int:
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


def result_file(device: str) -> Path:
    if device == "cpu":
        return DOCS / "cpu.jsonl"
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name(device))
    return DOCS / f"gpu_{name}.jsonl"
