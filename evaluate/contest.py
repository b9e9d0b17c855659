"""Systems side by side: whose answers to the same requests are compared, and where verdicts on them lie.

    run.json                                the benchmark, its items, the systems: whatever of it differs, it is another contest
    calls/                                  every question to a judge, and what it said (judges.py)
    judged/JUDGE/A against B/ID.json        what a judge said of two answers, in both orders (pairs.py)
    votes.jsonl                             what people said, a line a vote (vote.py)

A system is the folder of a run (generate.py), or answers of another's making (answers.py).
"""

import argparse
import json
import re
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from checkpoint import InputError, read_text
from evaluate.answers import Answers, claim, items_of, read_run
from evaluate.benchmark import Answer, Request, find
from flags import Parser

LETTERS = "abcdefgh"  # as many systems at most: every two of them are compared
# What a judge says of two answers, as a number between the first and the second (prompts/pairs.md).
FIRST, BOTH, SECOND = 1, 2, 3
# The two questions about a pair a, b: in the second, b comes first.
IN_ORDER, TURNED = "in order", "turned"
NAME = re.compile(r"[\w.+-]+")  # of a system: it names a folder


class Contest(NamedTuple):
    module: ModuleType
    requests: list[Request]
    systems: dict[str, Answers]
    out: Path

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every two systems, in the order of the command line."""
        return list(combinations(self.systems, 2))

    def common(self, a: str, b: str) -> list[Request]:
        """The requests that both have answered."""
        return [r for r in self.requests if self.systems[a].has(r.id) and self.systems[b].has(r.id)]

    def read(self, name: str, id: str) -> Answer:
        """A system's answer; where there is none, an empty one."""
        answers = self.systems[name]
        return answers.read(id) if answers.has(id) else Answer([""], [])


def pair_name(a: str, b: str) -> str:
    """Two systems as a folder and in tables: no name has a blank, so it is one pair's alone."""
    return f"{a} against {b}"


# ------------------------------------------------------------------------------------------------------------------- begin


def add_contest_flags(p: Parser) -> None:
    p.add_argument("benchmark", help="name of a benchmark, or a .py file that is one")
    p.add_argument("--out", required=True, help="folder of the comparison")
    for letter in LETTERS:
        p.add_argument(f"--{letter}", metavar="[NAME=]PATH", help="a system: folder of a run, or answers (evaluate/answers.py)")
    p.add_argument("--items", metavar="PATH", help="folder or file of items (default: those of the first run)")
    p.add_argument("--n", type=int, help="only the first so many items (default: as many as all runs have)")


def begin(args: argparse.Namespace) -> Contest:
    """The contest of the command line; its folder is made, or held against what stands in it."""
    if args.n is not None and args.n < 1:
        raise InputError(f"--n {args.n}: must be 1 or more")
    module = find(args.benchmark)
    paths = named(args)
    # What the runs themselves say of their items decides, unless the command line does.
    runs = {name: read_run(Path(path)) for name, path in paths.items() if (Path(path) / "run.json").is_file()}
    items = args.items
    for run in runs.values():
        items = items or run.get("items from")
    sizes = [run["n"] for run in runs.values() if run.get("n")]
    n = args.n or min(sizes, default=None)
    requests, digest = items_of(module, items, n)
    for name, run in runs.items():
        check_run(paths[name], run, args.benchmark, module, len(requests), digest)
    systems = {name: open_answers(path, requests) for name, path in paths.items()}
    out = Path(args.out)
    claim(out, {"benchmark": args.benchmark, "items": digest, "items from": items, "n": n, "systems": paths})
    return Contest(module, requests, systems, out)


def reopen(out: Path) -> Contest:
    """The contest that lies in a folder."""
    run = read_run(out)
    module = find(run["benchmark"])
    requests, digest = items_of(module, run.get("items from"), run.get("n"))
    if digest != run["items"]:
        raise InputError(f"{out}: its items were others ({run['items']}, now {digest}): take the benchmark's file of then")
    systems = {name: open_answers(path, requests) for name, path in run["systems"].items()}
    return Contest(module, requests, systems, out)


def named(args: argparse.Namespace) -> dict[str, str]:
    """{name: path} of the systems; without a name it is that of the folder or file."""
    found = {}
    for letter in LETTERS:
        value = getattr(args, letter)
        if value is None:
            continue
        name, equals, path = value.partition("=")
        if not equals or Path(value).exists():
            name, path = Path(value).stem, value
        if not NAME.fullmatch(name):
            raise InputError(f"--{letter} {value}: {name!r} is no name for a system (letters, digits, _ . + -): give NAME=PATH")
        if name in found:
            raise InputError(f"--{letter} {value}: there is a system {name} already: give NAME=PATH")
        found[name] = path
    if len(found) < 2:
        raise InputError("two systems at least are compared: give --a and --b")
    return found


def check_run(path: str, run: dict, benchmark: str, module: ModuleType, n: int, digest: str) -> None:
    """InputError unless the first n items of a run are those that are compared."""
    if run["benchmark"] != benchmark:
        raise InputError(f"{path}: holds answers to {run['benchmark']}, not to {benchmark}")
    if items_of(module, run.get("items from"), run.get("n"))[1] != run["items"]:
        raise InputError(f"{path}: its items were others: take the benchmark's file of then")
    if items_of(module, run.get("items from"), n)[1] != digest:
        raise InputError(f"{path}: holds answers to other items: compare what answers the same, see --items and --n")


def open_answers(path: str, requests: list[Request]) -> Answers:
    folder = Path(path)
    if (folder / "run.json").is_file():
        run = read_run(folder)
        folder = Path(run["answers"]) if "answers" in run else folder / "answers"
    return Answers(folder, requests)


# ------------------------------------------------------------------------------------------------------------------- votes


class Vote(NamedTuple):
    """What a person said of two answers. better: the system's name, None for a tie."""

    voter: str
    item: str
    a: str
    b: str
    left: str  # the system that stood left, or above
    better: str | None

    @property
    def about(self) -> tuple[str, str, str]:
        return self.item, self.a, self.b


def read_votes(file: Path) -> list[Vote]:
    """The votes that hold, in the order in which they were given: of a voter's on the same two answers the last, unless undone.

    A last line that a kill has cut off was never confirmed to anybody, and is nothing.
    """
    if not file.is_file():
        return []
    found = {}
    lines = read_text(file).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            vote = Vote(*(row[field] for field in Vote._fields))
            key = vote.voter, *vote.about
            found.pop(key, None)
            if not row["undone"]:
                found[key] = vote
        except (ValueError, KeyError, TypeError) as e:
            if number < len(lines):
                raise InputError(f"{file}:{number}: no vote ({type(e).__name__}: {e})") from None
    return list(found.values())
