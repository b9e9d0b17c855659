"""Answers and judgements by two ranks that are killed again and again: the report must be that of a run that was left alone.

    python tests/evaluate/kills.py runs/kills --kills 20 --n 40          torchrun, a few minutes; prints what it found

Half of the kills fall into `generate`, half into `judge` with 8 items at a time. SIGKILL hits all processes or one rank, at a
moment drawn by chance from a seed: between two files, or while everything starts. The judge is a server that answers each
question by its words, and remembers when every question came and when its answer had gone out.

An item is judged twice if its file is written again, and a question is asked twice if the server gets it twice. The first must
never be. The second cannot be avoided where a rank is killed after the answer left the server and before it is on the disk:
`Log.again` holds every repeated question against the moments of the kills.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from unruly import Unruly

ROOT = Path(__file__).parent.parent.parent
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["evaluate.generate", "evaluate.judging", "pipeline", "huggingface_hub"])


# ------------------------------------------------------------------------------------------------------------------ ranks


class Torchrun:
    """Two ranks as a user starts them."""

    def __init__(self, words: list[str]):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, "-m", "--", "evaluate"]
        self.log = open(words[words.index("--out") + 1] + ".log", "a")
        self.process = subprocess.Popen([*command, *words], cwd=ROOT, stdout=self.log, stderr=self.log)

    def running(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> list[int]:
        """torchrun starts them in sessions of their own."""
        try:
            return [int(n) for n in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]
        except OSError:
            return []

    def kill(self, all_of_them: bool, which: int) -> None:
        ranks = self.ranks()
        if all_of_them or not ranks:
            self.process.kill()
        elif len(ranks) > 1:
            ranks = [ranks[which]]
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)

    def wait(self) -> int:
        status = self.process.wait(timeout=300)
        self.log.close()
        return status


class Forked:
    """Two ranks forked from a server that has imported everything, for a test of seconds."""

    def __init__(self, words: list[str]):
        self.processes = [context.Process(target=rank, args=(words, number)) for number in range(2)]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self, all_of_them: bool, which: int) -> None:
        for process in self.processes if all_of_them else [self.processes[which % 2]]:
            process.kill()

    def wait(self) -> int:
        for process in self.processes:
            process.join()
        return max(abs(process.exitcode) for process in self.processes)


def rank(words: list[str], number: int) -> None:
    """What a forked rank does: the command, with all that it says left out."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
    sys.stdout = sys.stderr = open(os.devnull, "w")
    from evaluate import generate, judging

    {"generate": generate.main, "judge": judging.main}[words[0]](words[1:])


def killed(
    start: type, words: list[str], done: Path, pattern: str, kills: int, chance: random.Random, ended=lambda: None
) -> list[tuple[float, float]]:
    """The command again and again, killed so many times, and at last left alone; ended() is called whenever it has ended.

    -> of each kill its moment, and when the last rank had gone: torchrun ends the others a little later.
    """
    moments = []
    while True:
        ranks = start(words)
        at = None
        if len(moments) < kills:
            before = len(list(done.glob(pattern)))
            # One in four dies while it starts, the others behind a few more files.
            more = chance.choice([0, 1, 1, 2, 3])
            seconds = chance.uniform(0, 6) if more == 0 and start is Torchrun else chance.uniform(0, 0.1)
            while more and ranks.running() and len(list(done.glob(pattern))) < before + more:
                time.sleep(0.002)
            time.sleep(seconds)
            if ranks.running():
                at = time.monotonic()
                ranks.kill(chance.random() < 0.5, chance.randrange(2))
        status = ranks.wait()
        ended()
        if at is not None:
            moments.append((at, time.monotonic()))
        if status == 0:
            return moments
        assert moments, f"status {status} without a kill: {' '.join(words)}"


# ----------------------------------------------------------------------------------------------------------------- server


def obliging(body: dict) -> str:
    """An answer by the words of a question alone: two runs may differ by a rounding of the pictures."""
    words = "".join(part.get("text", "") for message in body["messages"] for part in message["content"])
    number = int(hashlib.sha256(words.encode()).hexdigest(), 16)
    if "JSON" not in words:
        return "yes" if number % 2 else "no"
    asked = re.findall(r'"(\w[\w -]*)" from (\d+) to (\d+)', words)
    return json.dumps({"reason": f"Reason {number % 97}."} | {k: int(low) + number % 5 for k, low, _ in asked})


class Log:
    """What the server was asked, and what of it twice."""

    def __init__(self, unruly: Unruly):
        self.asked = defaultdict(list)
        for body, times in zip(unruly.asked, unruly.times, strict=True):
            self.asked[json.dumps(body["messages"])].append(times)

    def again(self, moments: list[tuple], slack: float) -> dict:
        """Every earlier try of a repeated question was under way at a kill, or answered at most `slack` seconds before one."""
        repeated = [tries for tries in self.asked.values() if len(tries) > 1]
        unexplained = 0
        latest = 0.0  # seconds from an answer to the kill that lost it
        for tries in repeated:
            for came, *gone in tries[:-1]:
                kills = [at for at, over in moments if came <= over and (not gone or at <= gone[0] + slack)]
                unexplained += not kills
                if kills and gone:
                    latest = max(latest, kills[0] - gone[0])
        calls = sum(map(len, self.asked.values()))
        return {"questions": len(self.asked), "calls": calls, "repeated": len(repeated),
                "most tries": max(map(len, self.asked.values())), "unexplained": unexplained,
                "latest loss": round(latest, 3)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- the run


class Written:
    """The files of judgements: which were written twice."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: dict[str, int] = {}
        self.twice: set[str] = set()

    def look(self) -> None:
        for file in self.folder.glob("*/[!j]*.json"):
            written = file.stat().st_mtime_ns
            if self.seen.setdefault(file.name, written) != written:
                self.twice.add(file.name)


def undated(report: Path) -> dict[str, str]:
    """A report's three files without the dates in them."""
    names = ("report.json", "report.md", "report.html")
    return {name: re.sub(r"\d{4}-\d\d-\d\d", "DATE", (report / name).read_text()) for name in names}


def run(out: Path, benchmark: list[str], sampling: list[str], kills: int, seed: int, start: type, delay: float) -> dict:
    """The same benchmark left alone and killed -> what was found. delay: how many seconds the server takes at most."""
    from evaluate import figures

    chance = random.Random(seed)
    slow = random.Random(seed + 1)

    def answer(body: dict, n: int) -> str:
        time.sleep(slow.uniform(0.2, 1) * delay)
        return obliging(body)

    found = {}
    moments = {}
    for name, times in (("alone", 0), ("killed", kills)):
        place = out / name
        place.mkdir(parents=True)
        with Unruly(answer) as unruly:
            generate = ["generate", *benchmark, "--out", str(place), *sampling]
            at = killed(start, generate, place / "answers", "*/answer.json", times // 2, chance)
            judge = ["judge", benchmark[0], "--out", str(place), "--judge", unruly.url, "--judge-model", unruly.model]
            written = Written(place / "judged")
            judge += ["--at-once", "8"]
            at += killed(start, judge, place / "calls", "*/*.json", times - times // 2, chance, written.look)
        figures.main(["--out", str(place), "--draws", "200"])
        moments[name] = at
        found[name] = Log(unruly).again(at, 1.0) | {"kills": len(at), "judged twice": sorted(written.twice)}
    found["same report"] = undated(out / "alone") == undated(out / "killed")
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--n", type=int, default=40, help="items of howto500 (40)")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    sampling = ["--steps", "4", "--batch", "2", "--n", str(args.n), "--device", "cpu"]
    found = run(args.out, ["howto500"], sampling, args.kills, args.seed, Torchrun, 2.0)
    print(json.dumps(found, indent=2))
    right = found["same report"] and not found["killed"]["unexplained"] and not found["killed"]["judged twice"]
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
