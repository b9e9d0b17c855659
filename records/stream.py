"""Which records a training reads, and in which order: files and shards, procedural worlds, mixed by weights.

    --data a.jsonl                                               JSON lines, the pictures beside them
    --data a.jsonl,b.jsonl                                       one set: every record as often as any other
    --data "a.jsonl=2,shards/{000..099}.tar=1,sketchbook=0.5"    by weights: two records of a.jsonl to one of the shards

Braces stand for several files: {000..099} counts, {a,b} lists. A file named twice counts double. In a mixture each source goes
through epochs of its own, and a source without a weight has weight 1.

A name that is no file may be a module that Python finds, such as sketchbook or my.world, with a function
`record(seed, split=..., kinds=...)`: the record of that seed, endlessly many of them. split is "train"; kinds is None, or the
weights of --kinds, {kind: weight}. It raises checkpoint.InputError for a split or kind that it does not have.

Order. Item number n of the whole sequence is a function of (seed, n) alone, whatever the number of ranks and workers: its
source by `Mix`, its place in the epoch by division, its record by a permutation that is computed and never stored (`permuted`).

Position. Of R ranks, rank r reads items r, r + R, r + 2 R, ...; a few of them wait for a pack that they fit into. What is done
is therefore not quite a prefix, and a rank's position is {"next": the first item that it has not read, "open": earlier items
that are not in a pack yet, "seen", "bad": the counts of its quarantine}. A checkpoint holds the positions of all ranks in a
list. As many ranks continue exactly; another number of them shares out the open items, then goes on behind the furthest "next".
Nothing is repeated or lost.
"""

import atexit
import ctypes
import fcntl
import faulthandler
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from checkpoint import InputError
from records.files import Files
from records.validate import BadRecord, Problem, one_line
from threads import usable_cores

ENDINGS = (".json", ".jsonl", ".tar")  # names of files, whether they exist or not

TOGETHER = 16  # items that a worker sends in one message

# -------------------------------------------------------------------------------------------------------------- order


def permuted(k: int, n: int, *key: int) -> int:
    """Where a pseudo-random permutation of range(n), chosen by the key, sends k. O(1): nothing is stored.

    A Feistel network permutes the smallest power of two that holds n; a value outside range(n) is sent on until it is inside
    (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Fewer than two passes on average.
    """
    bits = max(2, (n - 1).bit_length())
    low = bits // 2
    masks = (1 << low) - 1, (1 << (bits - low)) - 1
    keys = [_mix(_fold(key) + round) for round in range(8)]
    while True:
        halves = [k & masks[0], k >> low]
        for round, secret in enumerate(keys):
            halves[round % 2] ^= _mix(halves[1 - round % 2] ^ secret) & masks[round % 2]
        k = halves[1] << low | halves[0]
        if k < n:
            return k


def _mix(x):
    """The finaliser of splitmix64, of a number or an array of uint64: every bit of the result depends on every bit of x."""
    x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ x >> 31


@lru_cache(maxsize=64)
def _fold(key: tuple[int, ...]) -> int:
    state = 0
    for number in key:
        state = _mix(state ^ number)
    return state


class Mix:
    """Sources mixed by weights. A period is the smallest number of items that holds the weights exactly; in it each source has
    its share of the places, at random, and its items in their order. Item n is the k-th of its source, and k is computed."""

    def __init__(self, sources: list, weights: list[Fraction]):
        whole = [int(w * math.lcm(*(x.denominator for x in weights))) for w in weights]
        self.sources, self.counts = sources, [w // math.gcd(*whole) for w in whole]
        if sum(self.counts) > 2**16:
            ratio = ":".join(map(str, self.counts))
            raise InputError(f"weights in the ratio {ratio}: take rounder ones, with a sum of at most {2**16:,}")

    def locate(self, n: int, seed: int) -> tuple[int, int]:
        """Source of item n, and which of that source's items it is."""
        period, place = divmod(n, sum(self.counts))
        which, earlier = _period(tuple(self.counts), seed, period)
        s = int(which[place])
        return s, period * self.counts[s] + int(earlier[place])


@lru_cache(maxsize=8)
def _period(counts: tuple[int, ...], seed: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """For every place of a period its source, and how many places before it are that source's."""
    numbers = np.arange(sum(counts), dtype=np.uint64)
    order = _mix(numbers ^ np.uint64(_fold((seed, 1, period)))).argsort(kind="stable")
    which = np.repeat(np.arange(len(counts)), counts)[order]
    earlier = np.empty_like(which)
    for s, count in enumerate(counts):
        earlier[which == s] = np.arange(count)
    return which, earlier


def open_source(data: str, kinds: str = "", split: str = "train") -> "Files | Mix | Callable[[int], dict]":
    """What --data names, as at the top of this file.

    kinds: of the records of procedural worlds, with weights: "lesson=2,one=1" (empty: the world's own).
    """
    entries = []
    for entry in split_outside_braces(data):
        name, _, weight = entry.rpartition("=")
        weight = _weight(weight) if name else None
        entries.append((entry if weight is None else name, weight))
    if not entries:
        raise InputError("--data: no source given")
    worlds = {name: world for name, _ in entries if (world := find_world(name))}
    if kinds and not worlds:
        raise InputError(f"kinds {kinds!r}: files have none, only procedural worlds such as the sketchbook do")

    # Files alone, without weights, are one set.
    if not worlds and all(weight is None for _, weight in entries):
        return Files([file for name, _ in entries for file in expand(name)])
    sources = []
    for name, _ in entries:
        if name in worlds:
            sources.append(endless(worlds[name], kinds, split))
        else:
            sources.append(Files(expand(name)))
    if len(sources) == 1:
        return sources[0]
    if all(weight is None for _, weight in entries):
        name = next(iter(worlds))
        raise InputError(f"--data {data}: {name} never ends, so a mixture with it needs weights: {name}=0.5")
    return Mix(sources, [Fraction(1) if weight is None else weight for _, weight in entries])


def _weight(text: str) -> Fraction | None:
    """A weight, or None for what is no number and so the rest of a file's name."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,2})?|[+-]?inf|nan", text, re.IGNORECASE):
        return None
    weight = Fraction(text) if text[-1:].isdigit() or text.endswith(".") else Fraction(0)
    if not 0 < weight or weight.denominator > 10**6 or weight > 10**6:
        raise InputError(f"weight {text}: it must lie between 0.000001 and 1,000,000, with at most six decimals")
    return weight


def split_outside_braces(text: str) -> list[str]:
    return [part for part in re.findall(r"(?:\{[^{}]*\}|[^,])+", text) if part]


def expand(name: str) -> list[str]:
    """The names that braces stand for: {000..099} counts, with leading zeros if it has some, {a,b} lists."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", name)
    if not match:
        return [name]
    first, last, listed = match.groups()
    values = listed.split(",") if listed else [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    if not values:
        raise InputError(f"{name}: {match[0]} counts nothing")
    return [f for value in values for f in expand(f"{name[: match.start()]}{value}{name[match.end() :]}")]


def find_world(name: str) -> Callable[..., dict] | None:
    """The function `record` of the module of this name, which is imported; None where there is no such module, or a file."""
    if Path(name).is_file() or not all(word.isidentifier() for word in name.split(".")):
        return None
    # A file's name that is misspelt is no reason to import anything.
    if name.endswith(ENDINGS):
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):  # no package around it; a module that was not imported by its name
        spec = None
    if spec is None:
        return None

    record = getattr(importlib.import_module(name), "record", None)
    if callable(record):
        return record
    if Path(name).exists():  # a folder that was meant for files is told as such
        return None
    raise InputError(f"--data {name}: no such file, and the module of that name has no function record")


def endless(record: Callable[..., dict], kinds: str, split: str) -> Callable[[int], dict]:
    """The records of a procedural world by seed. kinds: as for `open_source`."""
    try:
        weights = {kind: float(weight or 1) for kind, _, weight in (item.partition("=") for item in kinds.split(",") if item)}
        if not all(0 < weight < float("inf") for weight in weights.values()):
            raise ValueError
    except ValueError:
        raise InputError(f"kinds {kinds!r}: write kinds and positive weights like lesson=2,one=1") from None
    source = partial(record, split=split, kinds=weights or None)
    source(0)  # an unknown kind or split shows here, before a run starts
    return source


# ------------------------------------------------------------------------------------------------------------- stream


class Quarantine:
    """Counts records that cannot be used, by kind, and stops a run in which they are more than `share` of at least `after`.

    file: where each of them is written as one JSON line {"file", "line" or "member", "field", "reason"}, once, however many
        epochs, ranks and starts of the run meet it.
    """

    def __init__(self, share: float = 0.05, after: int = 200, file: str | Path | None = None):
        self.share, self.after, self.file = share, after, file and Path(file)
        self.seen, self.kinds, self.first = 0, Counter(), {}
        self._listed: set[str] = set()
        self._read = 0  # bytes of the file that are in _listed

    def good(self) -> None:
        self.seen += 1

    def bad(self, problem: Problem) -> None:
        self.seen += 1
        self.kinds[problem.kind] += 1
        if self.file:
            self._write(problem)
        if problem.kind not in self.first:
            self.first[problem.kind] = problem
            print(f"skipped: {problem}", file=sys.stderr)  # once a kind; the others are counted
        bad = self.kinds.total()
        if self.seen >= self.after and bad > self.share * self.seen:
            which = f"{self.file} lists them" if self.file else "`python data.py check` tells which"
            raise InputError(
                f"{bad} of {self.seen} records cannot be used, more than {self.share:.0%}: {self.summary()}; "
                f"{which}, the first is {next(iter(self.first.values()))}"
            )

    def summary(self) -> str:
        """For example "no such picture (12), not valid JSON (1)"; empty when all is well."""
        return ", ".join(f"{kind} ({count})" for kind, count in self.kinds.most_common(3))

    def _write(self, problem: Problem) -> None:
        place = {"line" if isinstance(problem.line, int) else "member": problem.line}
        line = json.dumps({"file": problem.file, **place, "field": problem.field, "reason": problem.message}) + "\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the ranks share the file: what another has written is read first
            file.seek(self._read)
            self._listed.update(file.read().decode().splitlines(keepends=True))
            if line not in self._listed:
                file.write(line.encode())
            self._read = file.tell()
        self._listed.add(line)


def pick_workers(asked: int) -> int:
    """Of --workers: -1 is one for each core that this rank has, but for the one that it trains on; at most 16."""
    cores = len(usable_cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(16, max(1, cores - 1)) if asked < 0 else asked


class Stream:
    """An endless, reproducible sequence of records that continues where it stopped.

    source: `Files`, shuffled anew in every epoch, a `Mix`, or a function seed -> record, such as that of a procedural world.
    prepare: applied to every record and its item number. It may raise InputError (the record is skipped and counted) or return
        None (passed over).
    workers: background processes that read and prepare, `ahead` items before they are due or more; the sequence is the same.
    epochs: only with `Files`; None goes on for ever.

    `position` tells what is done, `resume` continues there (top of this file).
    """

    def __init__(
        self,
        source: Files | Mix | Callable[[int], dict],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        prepare: Callable[[dict, int], object] | None = None,
        workers: int = 0,
        ahead: int = 16,
        epochs: int | None = None,
        quarantine: Quarantine | None = None,
    ):
        self.source, self.seed, self.rank, self.world_size = source, seed, rank, world_size
        self.prepare, self.workers, self.ahead = prepare, workers, ahead
        self.end = 2**62 if epochs is None else epochs * len(source)
        self.quarantine = quarantine or Quarantine()
        self.open: deque[int] = deque()  # items before `next` that are still to be read
        self.next = rank
        self.item, self.where = -1, ""  # number and place of the item that came last

    @property
    def position(self) -> dict:
        return self.position_with([])

    def position_with(self, waiting: list[int]) -> dict:
        """The position if these items, already read, are still to be used."""
        counts = {"seen": self.quarantine.seen - len(waiting), "bad": dict(self.quarantine.kinds)}
        return {"next": self.next, "open": [*waiting, *self.open], **counts}

    def resume(self, positions: list[dict | int]) -> None:
        """Continue where a run stood, given the position of each of its ranks; there may have been more or fewer of them."""
        ranks = len(positions)
        # Older checkpoints hold how many items each rank had read.
        positions = [{"next": p * ranks + r, "open": []} if isinstance(p, int) else p for r, p in enumerate(positions)]
        if ranks == self.world_size:
            positions = [positions[self.rank]]
            self.next, self.open = positions[0]["next"], deque(positions[0]["open"])
        else:
            furthest = max(p["next"] for p in positions)
            left = sorted(n for p in positions for n in (*p["open"], *range(p["next"], furthest, ranks)))
            self.next, self.open = furthest + self.rank, deque(left[self.rank :: self.world_size])
            positions = positions if self.rank == 0 else []  # the first rank takes over what was counted
        self.quarantine.seen = sum(p.get("seen", 0) for p in positions)
        self.quarantine.kinds = sum((Counter(p.get("bad", {})) for p in positions), Counter())

    def __getitem__(self, number: int) -> tuple[tuple[str, int | str], object]:
        """Item `number` of the whole sequence, behind its place; a Problem stands for a record that cannot be used."""
        where = ("item", number)
        try:
            s, k, source = 0, number, self.source
            if isinstance(source, Mix):
                s, k = source.locate(number, self.seed)
                source = source.sources[s]
            if isinstance(source, Files):
                epoch, k = divmod(k, len(source))
                i = permuted(k, len(source), self.seed, 0, s, epoch)
                where = source.where(i)
                record = source[i]
            else:
                where = ("seed", (self.seed << 32) + k)
                record = source(where[1])
            return where, self.prepare(record, number) if self.prepare else record
        except BadRecord as e:
            return where, e.args[0]
        except InputError as e:
            return where, Problem(*where, "", one_line(e))

    def _numbers(self) -> Iterator[int]:
        """What is open, then every world_size-th item."""
        return itertools.chain(list(self.open), range(self.next, self.end, self.world_size))

    def __iter__(self) -> Iterator[object]:
        if self.workers:
            # Items travel pickled: as tensors each would hold a file descriptor, and a pack has thousands. A message costs as
            # much as an item, so several share one. The generator keeps the loader from drawing from, and so moving on, the
            # training's own random numbers.
            items = DataLoader(
                self,
                batch_size=TOGETHER,
                sampler=self._numbers(),
                num_workers=self.workers,
                prefetch_factor=max(2, self.ahead // TOGETHER // self.workers),
                collate_fn=pickle.dumps,
                worker_init_fn=end_with_training,
                generator=torch.Generator(),
            )
            items = until_closed(items)
        else:
            items = map(self.__getitem__, self._numbers())
        idle = 0
        for (file, line), item in items:
            if self.open:
                self.item = self.open.popleft()
            else:
                self.item, self.next = self.next, self.next + self.world_size
            self.where = f"{file}:{line}"
            if isinstance(item, Problem):
                self.quarantine.bad(item)
                continue
            self.quarantine.good()
            idle = idle + 1 if item is None else 0
            if idle == 10_000:
                raise InputError("10,000 records in a row have nothing to train on (no picture in an answer?)")
            if item is not None:
                yield item


def until_closed(loader: DataLoader) -> Iterator[object]:
    """The loader's items, unpickled. When nobody wants more of them its workers are gone, whatever they were doing."""
    before = multiprocessing.active_children()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a worker inherits it: Ctrl-C is the training's alone
    items = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    workers = [p for p in multiprocessing.active_children() if p not in before]

    def end() -> None:
        # Once: at the end of a program the generator is closed when Python has taken the modules apart already.
        while workers:
            workers.pop().kill()

    def end_quietly() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler takes a worker's end for a failure
        end()

    # A program may end with this generator half read. Then Python would send them one SIGTERM, and wait for ever.
    atexit.register(end_quietly)
    try:
        for message in items:
            yield from pickle.loads(message)
    finally:
        del items  # asks them to end, waits 5 s, sends SIGTERM
        end()  # one that was not running meanwhile takes that and the SIGTERM at this process' end for one
        atexit.unregister(end_quietly)


def end_with_training(worker: int) -> None:
    """A data worker ends when its training does: not before, and not after.

    A SIGTERM to the whole process group asks the training to finish its step, for which it needs its workers: a worker outlives
    the first one. A second one ends it. Ctrl-C, which a terminal sends to all as well, is none of its business.
    """
    if sys.platform == "linux":  # a killed training cannot end its workers, and they wait for ever on their own full pipe
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signals = itertools.count()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the training's own, and its thread must not take a worker's signals for its own
    signal.signal(signal.SIGTERM, lambda *_: next(signals) and os._exit(0))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2, sys.__stderr__)  # its training hangs, and asks where it is
