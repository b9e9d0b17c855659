"""Where the processes come from that have a GPU each: forked off a server, which has imported their libraries once.

A fork can use a GPU only if CUDA has not started in the server. Importing a library may start it: PyTorch does, when it is
merely asked whether there is a GPU. A variable makes PyTorch ask the driver's management library instead, and what gets past
that is found by a first process, before any work is handed out.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from functools import cache
from multiprocessing import forkserver

import torch


def start_server(modules: list[str]) -> None:
    """The server begins to import, and this process goes on. Later calls change nothing: it is the same server."""
    # Handed down to it, and read by torch.cuda.is_available().
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    forkserver.ensure_running()


def process_context(modules: list[str], device: str):
    """What multiprocessing calls a context: its processes have imported these modules, and can use the device."""
    start_server(modules)
    return multiprocessing.get_context(method(device))


@cache
def method(device: str) -> str:
    """How processes for this device are started: "forkserver", or where that is of no use "spawn". The server is running."""
    if not device.startswith("cuda"):
        return "forkserver"
    first = multiprocessing.get_context("forkserver").Process(target=look)
    first.start()
    first.join()
    if first.exitcode == 0:
        return "forkserver"
    print("a library has started CUDA in the server: every process starts anew and imports by itself", flush=True)
    return "spawn"


def look() -> None:
    """Status 1 in a fork that could not use a GPU."""
    sys.exit(torch.cuda._is_in_bad_fork())
