"""Training in several processes: who the ranks are, what they say to one another, and how all of them end when one is lost.

    ranks = Ranks("auto", timeout=900)      one plain process, or one rank under torchrun
    ranks.claim("runs/x")                   the folder is ours until we end
    loss_of = ranks.wrap(module)            DDP where there are peers
    total = ranks.sum(value)                the same number on every rank

A rank that hangs would keep all others waiting for ever. So each has a watchdog, fed by `alive` wherever a rank comes on; the
collectives below feed it, too. One that is not fed in time prints the stack of every thread and ends the process.
"""

import contextlib
import datetime
import errno
import faulthandler
import fcntl
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import InputError, make_out, pick_device

LATE_LOCK = 100.0  # seconds until a lock that a lost host held is free again: a server of NFS takes 90 to see it


class Ranks:
    """This process among its peers: one plain process, or one rank under torchrun (NCCL on GPUs, gloo on CPUs)."""

    def __init__(self, device: str = "auto", timeout: float = 900.0):
        # torchrun says in the environment who we are; without it there is one process, of rank 0.
        check_restarts()
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.main = self.rank == 0
        self.device = local_device(device)
        flush_denormals()
        if self.size > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            # Later than `_watch`, which knows where the rank is.
            limit = datetime.timedelta(seconds=timeout + 5)
            dist.init_process_group(backend, timeout=limit)
        self.wrapped: list[DistributedDataParallel] = []
        self.lock: typing.TextIO | None = None
        self.timeout = timeout
        self.due = math.inf
        threading.Thread(target=self._watch, daemon=True).start()

    # ---------------------------------------------------------------------------------------------- the folder of the run

    def claim(self, out: str) -> None:
        """Make the run's folder ours. What is wrong with it is told before anything is loaded, by one rank."""
        # All ranks learn of it, and all end: one that ended alone would leave the others waiting for it.
        problem = self.first(self._claim(Path(out)) if self.main else "")
        if problem and self.main:
            raise InputError(problem)
        if problem:
            sys.exit(2)

    def _claim(self, out: Path) -> str:
        """What keeps this process from writing there; empty if nothing does."""
        try:
            make_out(out)
            self.lock = open(out / "lock", "a+")
        except InputError as e:
            return str(e)
        except OSError as e:
            return f"--out {out}: cannot be written ({e.strerror}): choose another folder"

        # After a restart by torchrun the lock may still be that of a rank on a host that was lost.
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        patience = min(LATE_LOCK, self.timeout / 2) if restarted else 0.0
        try:
            held = not take_lock(self.lock, patience)
        except OSError as e:
            print(f"--out {out}: no locks on its file system ({e.strerror}): see to it yourself that only one training "
                  "writes there", file=sys.stderr, flush=True)  # fmt: skip
            return ""
        if held:
            self.lock.seek(0)
            holder = self.lock.read().strip() or "another training"
            return f"--out {out}: {holder} is training there: wait for its end, or choose another folder"

        # Who comes second reads here whom to wait for.
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.lock.flush()
        return ""

    # ------------------------------------------------------------------------------------------------------- the watchdog

    def alive(self) -> None:
        """A rank that does not get here again in time says so, prints the stacks of its threads and data workers, and ends;
        so do its peers."""
        # Two watches: a thread that can say what has happened, and a second later one in C, which needs no interpreter lock and
        # comes through where some library holds it.
        self.due = time.monotonic() + self.timeout
        faulthandler.dump_traceback_later(self.timeout + 1, exit=True, file=sys.__stderr__)

    def unwatched(self) -> None:
        """From here on nothing has to be done in time."""
        self.due = math.inf
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        # In short naps: `alive` moves the moment on while we sleep.
        while (left := self.due - time.monotonic()) > 0:
            time.sleep(min(left, 1))
        print(f"error: rank {self.rank} did not come on for {self.timeout:g} s: it hangs, or it waits for a rank that hangs or "
              "that the network has lost; this is where it is:", file=sys.__stderr__, flush=True)  # fmt: skip
        # Data workers say where they are, too: it may be a slow disk.
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGUSR2)

    # ----------------------------------------------------------------------------------------- what ranks say to one another
    # Waiting counts anew in each: of a rank that hangs and one that waits for it, the first has to speak first.

    def sum(self, value: float | list[float]) -> float | list[float]:
        """The sum of a number, or of each number of a list, over all ranks."""
        if self.size == 1:
            return value
        self.alive()
        # In float64: counts of tokens stay whole numbers beyond 2^24.
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_statistics(self, stats: dict[str, float | tuple[float, float]]) -> dict[str, float | list[float]]:
        """Each statistic summed over all ranks, with one exchange for all: a number, or both numbers of a (sum, weight)."""
        flat = []
        for value in stats.values():
            flat += value if isinstance(value, tuple) else [value]
        summed = iter(self.sum(flat))
        # Back in the order in which they were laid flat.
        totals = {}
        for name, value in stats.items():
            if isinstance(value, tuple):
                totals[name] = [next(summed), next(summed)]
            else:
                totals[name] = next(summed)
        return totals

    def gather(self, value: object) -> list:
        """That value of every rank."""
        if self.size == 1:
            return [value]
        self.alive()
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, value: object) -> object:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        self.alive()
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    # ------------------------------------------------------------------------------------------------------------ gradients

    def wrap(self, module: nn.Module, *, find_unused: bool = False) -> nn.Module:
        """In DDP when there are peers. find_unused: some parameters may have no part in a loss."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Views of the buckets that are sent: gradients are in memory once, not a second time beside what is exchanged.
        wrapped = DistributedDataParallel(
            module,
            device_ids=ids,
            find_unused_parameters=find_unused,
            gradient_as_bucket_view=True,
        )
        self.wrapped.append(wrapped)
        return wrapped

    def micro_batches(self, module: nn.Module, batches: list) -> Iterator:
        """Each micro-batch of a step; only with the last one the ranks exchange gradients."""
        # A sum is sent as well once as after every part of it.
        for batch in batches[:-1]:
            apart = contextlib.nullcontext() if self.size == 1 else module.no_sync()
            with apart:
                yield batch
        yield batches[-1]

    def backward(self, share: Tensor) -> float:
        """Gradients of this rank's share of the step's loss. Returns the share."""
        # DDP takes the mean over ranks. The shares are parts of one loss, whose gradient is their sum: size times the mean.
        (share * self.size).backward()
        return share.item()

    def close(self) -> None:
        self.unwatched()
        # A reducer that held the group last would wait for gloo's threads to end, under the interpreter's lock; one of them may
        # itself wait for that lock, to free the last tensor it summed.
        for module in self.wrapped:
            module.reducer = None
            module.logger = None
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.lock:
            self.lock.close()


def check_restarts() -> None:
    """torchrun's own store outlives a restart, and in it the new ranks would find the addresses of the dead ones."""
    own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if own_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise InputError("torchrun --max-restarts heals only with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, "
                         "and with --standalone or --rdzv-backend=c10d")  # fmt: skip


def local_device(name: str) -> torch.device:
    """This rank's device: of several GPUs the one that torchrun gives it, without torchrun the one that is named."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = pick_device(name)
    named = device.index is not None and "LOCAL_RANK" not in os.environ
    if device.type == "cuda" and not named:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def flush_denormals() -> None:
    """Numbers near 1e-40 are as good as 0 and cost a CPU a hundred times as much."""
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)  # numpy must have looked at them before
    torch.set_flush_denormal(True)


def take_lock(file: typing.TextIO, patience: float) -> bool:
    """Whether the lock is ours after so many seconds at most; OSError where a file system has no locks.

    The kernel frees it when the process ends, however it ends, and over NFS the server does.
    """
    # POSIX locks, which NFS knows too. They belong to the process and are not inherited, so a data worker cannot keep one.
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as e:
            # POSIX allows either to say that somebody else has it.
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() >= until:
            return False
        time.sleep(1)


def lost_peer(error: RuntimeError) -> str:
    """What to say of an error if it means that another rank is gone; empty if it is an error of this rank's own."""
    if not isinstance(error, dist.DistError) and "gloo" not in str(error):
        return ""
    # The first sentence, without the place in gloo's sources.
    text = re.sub(r"\[/\S+\] ", "", str(error))
    reason = text.split(". ")[0].splitlines()[0]
    return f"rank {os.environ.get('RANK', 0)} has lost another rank, whose own output says more: {reason}"
