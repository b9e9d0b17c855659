"""One thread that owns the models and writes all answers that are asked for, together.

    worker = Worker(duo, places=8, waiting=64, capacity=8192)
    worker.start()
    job = worker.submit(answer, told)        told(event) hears, in the worker's thread, Text, Picture, Preview, at the end Ended
    worker.cancel(job)                       its reader has gone
    worker.close()                           what is being written is finished, what waits is refused

Answers come and go one by one: each token is one pass over all that are being written (pipeline.Table), so one that begins late
does not wait for those that began before it.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from checkpoint import InputError
from pipeline import Answer, DuoGen, Event, Paint, Stop, Table


class Refused(Exception):
    """No place for one more: try again later, or elsewhere."""


@dataclass
class Preview:
    """What a picture looks like so far."""

    number: int  # of the picture in the answer, from 0
    step: int
    steps: int
    image: Image.Image


@dataclass
class Ended:
    """Nothing more comes. problem: one line where the answer could not be finished, else empty."""

    problem: str = ""


@dataclass(eq=False)
class Job:
    """One answer on its way. every: so many steps between two previews; 0 is none."""

    answer: Answer
    told: Callable[[Event | Preview | Ended], None]
    every: int = 0
    cancelled: bool = False


class Worker(threading.Thread):
    """See above. places: answers that are written together; waiting: how many may wait for a place; capacity: tokens of one."""

    def __init__(self, duo: DuoGen, places: int, waiting: int, capacity: int):
        super().__init__(name="worker", daemon=True)
        self.duo = duo
        self.most = waiting
        self.capacity = capacity
        self.table = Table(duo, capacity, places, self._told)
        self.queue: deque[Job] = deque()
        self.jobs: dict[Answer, Job] = {}
        self.change = threading.Condition()  # guards queue and closing
        self.closing = False
        duo.watch = self._watch

    # ---- from any thread

    def submit(self, answer: Answer, told: Callable, every: int = 0) -> Job:
        """Raises Refused where too many wait or the server is about to end, InputError for an answer that is too long."""
        if answer.capacity > self.capacity:
            raise InputError(
                f"prompt and answer may have {answer.capacity:,} tokens together, here it is {self.capacity:,} at most: "
                "ask for fewer max_tokens or max_images"
            )
        job = Job(answer, told, every)
        with self.change:
            if self.closing:
                raise Refused("the server is about to end")
            if len(self.queue) >= self.most:
                raise Refused(f"{len(self.queue)} requests are waiting already")
            self.queue.append(job)
            self.change.notify()
        return job

    def cancel(self, job: Job) -> None:
        """It ends before its next token, or once its picture is painted."""
        job.cancelled = True

    def close(self) -> None:
        """What is being written is finished, what waits is refused, and then the thread ends."""
        with self.change:
            self.closing = True
            refused = list(self.queue)
            self.queue.clear()
            self.change.notify()
        for job in refused:
            job.told(Ended("the server is about to end"))

    # ---- in the thread

    def run(self) -> None:
        while self._seat():
            try:
                finished = self.table.turn()
            except Exception as e:  # whatever it is, it must not end a server
                self._fail(e)
                continue
            for answer in finished:
                self.jobs.pop(answer).told(Ended())

    def _seat(self) -> bool:
        """Let those begin for whom there is a place; wait for work where there is none. False: all is done."""
        with self.change:
            while not (self.queue or self.jobs or self.closing):
                self.change.wait()
            starting = []
            while self.queue and len(starting) < len(self.table.free):
                starting.append(self.queue.popleft())
        for job in starting:
            self._begin(job)
        # Places of those whom nobody reads any more.
        for answer, job in list(self.jobs.items()):
            if job.cancelled and answer in self.table.active:
                self.table.leave(answer)
                self.jobs.pop(answer).told(Ended("cancelled"))
        return bool(self.jobs) or not self.closing

    def _begin(self, job: Job) -> None:
        self.jobs[job.answer] = job
        try:
            self.table.seat(job.answer)
        except Exception as e:  # of this answer alone: others are not concerned
            self.table.free.append(job.answer.document)
            self.jobs.pop(job.answer).told(Ended(reason(e)))

    def _fail(self, e: Exception) -> None:
        """A pass has failed for all who took part in it, and nobody knows what is left in the cache."""
        for answer in self.table.ended:
            self.jobs.pop(answer).told(Ended())
        self.table.ended = []
        for answer in list(self.table.active):
            self.table.leave(answer)
        for job in self.jobs.values():
            job.told(Ended(reason(e)))
        self.jobs.clear()

    def _told(self, answer: Answer, event: Event) -> None:
        # The reason of a Stop is in the answer; that it is over is told when its place is free.
        if not isinstance(event, Stop):
            self.jobs[answer].told(event)

    def _watch(self, request: Paint, step: int, latent: Tensor) -> None:
        job = self.jobs.get(request.answer)
        steps = request.answer.settings.steps
        # The last step is the picture itself, which is about to come.
        if job is not None and job.every and step and step % job.every == 0 and step < steps - 1:
            job.told(Preview(request.number, step, steps, self.duo.decoded(latent)))


def reason(e: Exception) -> str:
    """An error in one line."""
    text = str(e) if isinstance(e, InputError) else f"{type(e).__name__}: {e}"
    return " ".join(text.split())[:500]
