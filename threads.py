"""How many CPU threads compute: as many as the work is worth and as no other program needs. The program decides and says so.

    crew = Crew(parameters, device)
    crew.adapt()                       now and then while working: other programs come and go

OpenMP's threads meet after every operation, and whoever comes first spins until the last is there. Where another program has
one of the cores, a thread may wait for a time slice of some milliseconds, thousands of times a second: a picture of the
miniature took 30 s instead of 0.3 s. One thread waits for nobody. So of the cores only those are used that the others leave.

Whoever sets OMP_NUM_THREADS (as torchrun does for several ranks) has decided, and nothing is changed. Results do not depend on
the number of threads beyond rounding; a training of the miniature gave the same bytes with one and with two.
"""

import os
import sys
import time
from pathlib import Path

import torch

STAT = Path("/proc/stat")  # of Linux; elsewhere only the size of the work decides
INTERVAL = 0.5  # seconds between two looks: the counters tick a hundred times a second
WORTH = 4_000_000  # parameters that keep a thread busy long enough between two meetings
SLACK = 0.4  # of a core: so much others may use of it and it is still ours


def usable_cores() -> set[int]:
    """Numbers of the cores that this process may run on."""
    # In a container or under taskset fewer than the machine has. Only Linux tells.
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def busy_seconds() -> float | None:
    """What all programs together have computed on these cores so far; None where the system does not tell."""
    names = {f"cpu{k}" for k in usable_cores()}
    ticks = 0
    try:
        lines = STAT.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if fields and fields[0] in names:
            # Idle and waiting for a disk leave the core to us; what a hypervisor steals of it does not.
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


class Watch:
    """How many cores other programs use, from one look to the next."""

    def __init__(self):
        self.used = 0.0
        self.since = time.monotonic()
        self.busy = busy_seconds()
        self.own = time.process_time()

    def others(self) -> float:
        """Cores that others have used since the last look; the same again where that was less than INTERVAL ago."""
        # In a short time a tick of the counters, a hundredth of a second, would be much of all.
        now = time.monotonic()
        elapsed = now - self.since
        if elapsed < INTERVAL or self.busy is None:
            return self.used
        busy = busy_seconds()
        own = time.process_time()
        # What all have computed less what we have. The counters are not read at the same moment: a little below 0 is 0.
        by_others = busy - self.busy - (own - self.own)
        self.used = max(0.0, by_others / elapsed)
        self.since = now
        self.busy = busy
        self.own = own
        return self.used


WATCH = Watch()  # begins with the program: while torch is imported and a model is read it has its first look


class Crew:
    """The threads that compute on one model. Only on a CPU, and only if nobody has decided, is anything decided here.

    parameters: of the largest network at work.
    """

    def __init__(self, parameters: int, device: str):
        # A thread more for every so many parameters: the meetings after each operation cost the same, however little there is
        # to compute between two of them.
        self.decides = device == "cpu" and "OMP_NUM_THREADS" not in os.environ
        self.most = min(len(usable_cores()), 1 + parameters // WORTH)
        self.number = 0  # not decided yet
        self.adapt()

    def adapt(self) -> None:
        """Compute in as many threads as cores are left. Costs next to nothing: call it before every piece of work."""
        if not self.decides:
            return
        cores = len(usable_cores())
        others = WATCH.others()
        left = int(cores - others + SLACK)
        number = max(1, min(self.most, left))
        if number == self.number:
            return
        torch.set_num_threads(number)
        # That all goes as usual is not worth a line; that somebody else is at work, or no longer, is.
        if self.number or number < self.most:
            threads = "1 thread" if number == 1 else f"{number} threads"
            print(f"computing in {threads}: other programs use {others:.1f} of {cores} cores", file=sys.stderr, flush=True)
        self.number = number
