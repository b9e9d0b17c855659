"""Votes of people on pairs of answers: what a voter sees next, and what was said.

    ballot = Ballot(contest, seed=0)
    ballot.next(voter)                                  two answers, as JSON for the page
    ballot.vote(voter, "red-house/1", "left")           a line of votes.jsonl, on the disk when this returns
    ballot.undo(voter)

The order of the pairs and the side of each system follow from the seed, the voter and the pair. What `next` gives names no
system and no file: a picture has its place in the pair as its address.
"""

import errno
import hashlib
import io
import json
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

from checkpoint import InputError
from evaluate.benchmark import Request, content_of
from evaluate.contest import Contest, Vote, read_votes
from pages.template import printable
from records.validate import load_image

CHOICES = ("left", "tie", "right")


class Task(NamedTuple):
    """Two answers to one request. The number of the pair stands for both names where a browser sees it."""

    request: Request
    pair: int
    a: str
    b: str

    @property
    def id(self) -> str:
        return f"{self.request.id}/{self.pair}"

    @property
    def about(self) -> tuple[str, str, str]:
        return self.request.id, self.a, self.b

    @property
    def texts(self) -> list[str]:
        """What was asked."""
        return [part["text"] for part in self.parts if part["type"] == "text"]

    @property
    def pictures(self) -> list[str | Image.Image]:
        """What was shown with it."""
        return [part["image"] for part in self.parts if part["type"] == "image"]

    @property
    def parts(self) -> list[dict]:
        return [part for m in self.request.messages if m["role"] != "system" for part in content_of(m)]


class Ballot:
    """Who has voted on what, and what comes next. Any number of threads may ask."""

    def __init__(self, contest: Contest, seed: int):
        self.contest = contest
        self.seed = seed
        self.file = contest.out / "votes.jsonl"
        self.tasks = {}
        for number, (a, b) in enumerate(contest.pairs, 1):
            for request in contest.common(a, b):
                task = Task(request, number, a, b)
                self.tasks[task.id] = task
        if not self.tasks:
            raise InputError(f"{contest.out}: there is no request that two systems have answered")
        self.by_about = {task.about: task for task in self.tasks.values()}
        self.check_pictures()
        mend_end(self.file)
        self.lock = threading.Lock()
        self.given: dict[str, dict[str, Vote]] = {}  # {voter: {id of task: vote}}, in the order in which they were given
        for vote in read_votes(self.file):
            if vote.about in self.by_about:
                self.given.setdefault(vote.voter, {})[self.by_about[vote.about].id] = vote

    def check_pictures(self) -> None:
        """InputError where a picture is not there: now, and not after an hour of voting."""
        for task in self.tasks.values():
            for source in task.pictures:
                size_of(source)
            for name in (task.a, task.b):
                for file in self.contest.systems[name].files(task.request.id)[1]:
                    size_of(file)

    def count(self) -> int:
        with self.lock:
            return sum(map(len, self.given.values()))

    def chance(self, voter: str, *about: object) -> bytes:
        """The same bytes for the same voter and the same thing, in every run."""
        return hashlib.sha256(json.dumps([self.seed, voter, *about]).encode()).digest()

    def sides(self, voter: str, task: Task) -> tuple[str, str]:
        """Which system stands left, and which right."""
        turned = self.chance(voter, "side", *task.about)[0] % 2
        return (task.b, task.a) if turned else (task.a, task.b)

    def order(self, voter: str) -> list[str]:
        return sorted(self.tasks, key=lambda id: self.chance(voter, "order", *self.tasks[id].about))

    def next(self, voter: str) -> dict:
        """What the page shows: how far this voter is, and two answers, or none when all is done."""
        with self.lock:
            done = dict(self.given.get(voter, {}))
        state = {"done": len(done), "of": len(self.tasks), "task": None}
        id = next((id for id in self.order(voter) if id not in done), None)
        if id is None:
            return state
        task = self.tasks[id]
        given = [picture(id, "given", k, size_of(source)) for k, source in enumerate(task.pictures)]
        shown = {"id": id, "asked": [printable(text) for text in task.texts], "given": given}
        for side, name in zip(("left", "right"), self.sides(voter, task), strict=True):
            texts, files = self.contest.systems[name].files(task.request.id)
            pictures = [picture(id, side, k, size_of(file)) for k, file in enumerate(files)]
            shown[side] = {"texts": [printable(text) for text in texts], "pictures": pictures}
        return state | {"task": shown}

    def vote(self, voter: str, id: str, choice: str) -> None:
        """The vote is on the disk when this returns. KeyError where there is no such pair."""
        task = self.tasks[id]
        left, right = self.sides(voter, task)
        better = {"left": left, "right": right, "tie": None}[choice]
        vote = Vote(voter, *task.about, left, better)
        with self.lock:
            self.append(vote, undone=False)
            votes = self.given.setdefault(voter, {})
            votes.pop(id, None)
            votes[id] = vote

    def undo(self, voter: str) -> None:
        """Take this voter's last vote back; KeyError where there is none."""
        with self.lock:
            id, vote = next(reversed(self.given.get(voter, {}).items()), (None, None))
            if vote is None:
                raise KeyError("nothing to undo")
            self.append(vote, undone=True)
            del self.given[voter][id]

    def append(self, vote: Vote, undone: bool) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps(vote._asdict() | {"undone": undone, "date": now}).encode() + b"\n"
        # Without a buffer, which would try again when the file is closed.
        with open(self.file, "ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                # A full disk may have taken half of it.
                file.truncate(before)
                raise

    def image(self, voter: str, id: str, side: str, number: int) -> Path | Image.Image:
        """A picture of the pair; LookupError where there is none."""
        task = self.tasks[id]
        if side == "given":
            return task.pictures[number]
        name = dict(zip(("left", "right"), self.sides(voter, task), strict=True))[side]
        return self.contest.systems[name].files(task.request.id)[1][number]


def mend_end(file: Path) -> None:
    """A last line that a kill has cut off goes: nobody was told that it was kept."""
    if not file.is_file():
        return
    data = file.read_bytes()
    end = data.rfind(b"\n") + 1
    try:
        json.loads(data[end:])
        with open(file, "ab") as f:
            f.write(b"\n")
    except ValueError:
        if end < len(data):
            os.truncate(file, end)


def picture(id: str, side: str, number: int, size: tuple[int, int]) -> dict:
    return {"url": f"/picture/{quote(id)}/{side}/{number}", "width": size[0], "height": size[1]}


def size_of(source: Path | str | Image.Image) -> tuple[int, int]:
    """(width, height) from its header, or InputError."""
    if isinstance(source, Image.Image):
        return source.size
    try:
        with Image.open(source) as image:
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError) as e:
        raise InputError(f"{source}: no picture ({e})") from None


def encoded(source: Path | str | Image.Image) -> bytes:
    """The pixels alone as PNG."""
    data = io.BytesIO()
    pixels = load_image(source)
    pixels.info.clear()
    # Quickly rather than small: it goes to this machine or its neighbour.
    pixels.save(data, "PNG", compress_level=1)
    return data.getvalue()
