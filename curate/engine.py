"""Runs the steps of page.py over any number of pages: as blocks of datatrove, resumable, with the same bytes every time.

    job = Job("web", source, steps=(Extract(), Sides(), Repeated(), Dialogue()), out=Path("data/web"), workers=2)
    run(job)

    data/web/records.jsonl    the records of data.py, their pictures in pictures/
    data/web/shards/          the same as tar shards, by `python data.py pack`'s writer
    data/web/manifest.json    versions, thresholds, prompts, inputs, counts, checksums
    data/web/index.html       per step what came in, what was dropped or changed, with examples
    data/web/timings.json     seconds by step: this and index.html alone differ between two runs
    data/web/work/            datatrove's logs, statistics and completion markers, and what is on its way

The inputs are cut into tasks, by their number alone. A task's output gets its name when it is whole, and then datatrove marks
the task as completed: whenever a run is killed, the same command goes on, and the result has the bytes of an uninterrupted run.

A step that must know of all pages before it can decide about one (lines that a site repeats, pages that occur twice) is a
`Survey`. Before it there is a barrier: all pages up to there are written to disk, what it observed of each is gathered, and a
next stage goes on with what it concluded. Surveys that stand side by side share a barrier; each observes the pages as they are
before the first of them. A stage is an executor of datatrove; locally, with Ray or with Slurm, one begins when the one before
has ended.

A step may have a number `at_once`: it is then called for that many pages at a time, in threads, as models on a server like it.
Any exception of a step drops the page, under the name of the step; an InputError, as of a server that is dead, ends the run.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache, lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from tqdm import tqdm

import interrupt
from checkpoint import InputError, sha256
from curate import report
from curate.models import spent
from curate.page import Dropped, Page, Picture, Step, document_of, page_of
from curate.store import from_json, read_pages, to_json, whole, write_page
from records.files import pack_shards
from records.validate import one_line, validate

ROOT = Path(__file__).resolve().parent.parent
PER_TASK = 64  # inputs of a task, where nothing else is asked for
MOST_TASKS = 1000  # then a task gets more inputs
KEPT = 2  # examples of each kind that a step shows
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Source(Protocol):
    """Where pages come from."""

    def read(self, item: str) -> Iterator[Page | Dropped]:
        """The pages of one input, always in the same order; what cannot be one comes as the reason."""


class Survey(Protocol):
    """A step that must know of all pages before it can decide about one."""

    def observe(self, page: Page) -> Any:
        """What it wants to remember of a page: JSON, and small; None is not kept."""

    def conclude(self, observed: Iterator[tuple[str, Any]]) -> Any:
        """What follows from all (id of a page, observation), in the order of the pages: JSON."""

    def __call__(self, page: Page, found: Any) -> Page | Dropped:
        """found: what `conclude` gave."""


@dataclass(frozen=True)
class Slurm:
    """What Slurm has to be told of each task."""

    partition: str = "cpu"
    time: str = "24:00:00"
    memory: int = 4  # GB
    environment: str = ""  # a shell command that comes first, as "source .venv/bin/activate"


@dataclass(frozen=True)
class Job:
    """A run: what is read, what is done with it, and where the records go."""

    name: str  # of the command, and of the shards
    source: Source
    steps: tuple[Step | Survey, ...]
    inputs: tuple[tuple[str, int], ...]  # what the source reads, with sizes in bytes: order and number decide the tasks
    out: Path
    workers: int = 1  # tasks at a time
    tasks: int = 0  # 0: by the number of inputs
    how: str = "local"  # or "ray", "slurm"
    megabytes: float = 1000  # of a shard
    slurm: Slurm = Slurm()
    settings: dict = field(default_factory=dict)  # what the manifest says beside the steps
    calls: str = ""  # folder in which a model's answers are kept: what they took is shown
    price: tuple[float, float] | None = None  # of a million tokens read and written

    @property
    def work(self) -> Path:
        return self.out / "work"

    def slices(self) -> list[list[str]]:
        """The inputs of each task: neighbours, and about as many for each."""
        n = len(self.inputs)
        tasks = self.tasks or min(MOST_TASKS, -(-n // PER_TASK))
        tasks = max(1, min(tasks, n))
        names = [name for name, _ in self.inputs]
        return [names[n * k // tasks : n * (k + 1) // tasks] for k in range(tasks)]


# ---------------------------------------------------------------------------------------------------------------- blocks


class Example(NamedTuple):
    """What a step did to one page. after: None where it was dropped."""

    kind: str
    before: Page
    after: Page | None
    reason: str


def order_of(page_id: str) -> str:
    """Examples are those whose hash is lowest: any pages, and always the same ones."""
    return hashlib.sha256(page_id.encode("utf-8", "surrogatepass")).hexdigest()


def kind_of(reason: str) -> str:
    """Of a reason in the form "kind" or "kind: details"."""
    return reason.partition(":")[0]


class Reader(PipelineStep):
    """The first block: the pages of a task's inputs."""

    type = "read"
    name = "00 Read"

    def __init__(self, source: Source, inputs: Path):
        super().__init__()
        self.source = source
        self.inputs = inputs
        self.examples: dict[str, list] = {}

    def run(self, data, rank: int = 0, world_size: int = 1):
        for item in from_json((self.inputs / f"{rank:05d}.json").read_bytes()):
            pages = self.source.read(item)
            while True:
                with self.track_time():
                    page = next(pages, None)
                if page is None:
                    break
                self.stat_update("in")
                if isinstance(page, Dropped):
                    self.stat_update(f"dropped: {kind_of(page.reason)}")
                    keep(self.examples, Example(f"dropped: {kind_of(page.reason)}", Page(item), None, page.reason))
                    continue
                self.stat_update("out")
                yield document_of(page)


class Resumed(PipelineStep):
    """The first block of a later stage: the pages that the stage before has written."""

    type = "read"
    name = "pages of the stage before"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data, rank: int = 0, world_size: int = 1):
        for page in read_pages(self.folder / f"{rank:05d}.pages"):
            yield document_of(page)


def keep(examples: dict[str, list], example: Example) -> None:
    """Add it to those of its kind if its hash is among the lowest."""
    kept = examples.setdefault(example.kind, [])
    kept.append((order_of(example.before.id), example))
    kept.sort(key=itemgetter(0))
    del kept[KEPT:]


@lru_cache(maxsize=8)
def concluded(path: Path, mtime: int) -> Any:
    """What a survey concluded; read once by a process that does many tasks."""
    return json.loads(path.read_text(encoding="utf-8"))


class Block(PipelineStep):
    """A step as datatrove runs it: counted, timed, and with a few examples."""

    type = "step"

    def __init__(self, number: int, step: Step | Survey, found: Path | None = None):
        self.name = f"{number:02d} {type(step).__name__}"
        super().__init__()
        self.step = step
        self.found = found
        self.examples: dict[str, list] = {}

    def run(self, data, rank: int = 0, world_size: int = 1):
        call = self.step
        if self.found:
            call = partial(self.step, found=concluded(self.found, self.found.stat().st_mtime_ns))
        for before, after in self._results(call, map(page_of, data)):
            self._count(before, after)
            if isinstance(after, Page):
                yield document_of(after)

    def _results(self, call: Callable, pages: Iterable[Page]) -> Iterator[tuple[Page, Page | Dropped]]:
        threads = getattr(self.step, "at_once", 1)
        if threads == 1:
            for page in pages:
                with self.track_time():
                    result = attempt(call, page, type(self.step).__name__)
                yield page, result
            return
        # Twice as many wait as are at work, so that a slow one in front does not leave threads idle.
        waiting = deque()
        with ThreadPoolExecutor(threads) as pool:
            for page in pages:
                waiting.append((page, pool.submit(attempt, call, page, type(self.step).__name__)))
                if len(waiting) >= 2 * threads:
                    yield self._first(waiting)
            while waiting:
                yield self._first(waiting)

    def _first(self, waiting: deque) -> tuple[Page, Page | Dropped]:
        page, result = waiting.popleft()
        with self.track_time():
            return page, result.result()

    def _count(self, before: Page, after: Page | Dropped) -> None:
        self.stat_update("in")
        self.stat_update("pictures in", value=len(before.pictures))
        if isinstance(after, Dropped):
            kind = f"dropped: {kind_of(after.reason)}"
            self.stat_update(kind)
            self.stat_update("pictures dropped", value=len(before.pictures))
            keep(self.examples, Example(kind, before, None, after.reason))
            return
        self.stat_update("out")
        self.stat_update("pictures out", value=len(after.pictures))
        fresh = after.refused[len(before.refused) :]
        for refused in fresh:
            self.stat_update(f"refused: {kind_of(refused.reason)}")
        if len(before.pictures) > len(after.pictures) + len(fresh):
            self.stat_update("pictures lost", value=len(before.pictures) - len(after.pictures) - len(fresh))
        for kind, reason in {kind_of(refused.reason): refused.reason for refused in fresh}.items():
            keep(self.examples, Example(f"refused: {kind}", before, after, reason))
        if (before.parts, before.messages, before.title) != (after.parts, after.messages, after.title):
            self.stat_update("changed")
            if not fresh:
                keep(self.examples, Example("changed", before, after, ""))


def attempt(call: Callable[[Page], Page | Dropped], page: Page, name: str) -> Page | Dropped:
    """A step on a page. Whatever goes wrong in it costs this page alone, but for what the user has to put right."""
    try:
        return call(page)
    except InputError:
        raise
    except OSError as e:
        if e.errno in FULL:
            raise
        return Dropped(f"failed in {name}: {one_line(e)}")
    except Exception as e:  # pages come from anywhere, and so do the mistakes that they bring to light
        return Dropped(f"failed in {name}: {type(e).__name__}: {one_line(e)}")


class Observer(PipelineStep):
    """What a survey of the next stage remembers of each page, a line of JSON each."""

    type = "observe"

    def __init__(self, number: int, survey: Survey, folder: Path):
        self.name = f"{number:02d} {type(survey).__name__} observes"
        super().__init__()
        self.survey = survey
        self.folder = folder

    def run(self, data, rank: int = 0, world_size: int = 1):
        with whole(self.folder / f"{rank:05d}.jsonl") as file:
            for document in data:
                page = page_of(document)
                with self.track_time():
                    seen = attempt(self.survey.observe, page, type(self.survey).__name__)
                if isinstance(seen, Dropped):
                    self.stat_update(seen.reason)
                elif seen is not None:
                    file.write(to_json([page.id, seen]) + b"\n")
                yield document


class Writer(PipelineStep):
    """The last block of a stage: its pages to the disk, and the examples of its blocks."""

    type = "write"
    name = "pages"

    def __init__(self, folder: Path, blocks: list[Block | Reader]):
        super().__init__()
        self.folder = folder
        self.blocks = blocks

    def run(self, data, rank: int = 0, world_size: int = 1):
        with whole(self.folder / "pages" / f"{rank:05d}.pages") as file:
            for document in data:
                with self.track_time():
                    write_page(file, page_of(document))
                yield document
        shown = []
        for block in self.blocks:
            for kept in block.examples.values():
                shown += [{"step": block.name, "order": order, **report.example(*example)} for order, example in kept]
        with whole(self.folder / "examples" / f"{rank:05d}.json") as file:
            file.write(to_json(shown))


class Conclusion(PipelineStep):
    """A stage of one task: what a survey concludes from all that it has observed."""

    type = "conclude"

    def __init__(self, number: int, survey: Survey, folder: Path, found: Path):
        self.name = f"{number:02d} {type(survey).__name__} concludes"
        super().__init__()
        self.survey = survey
        self.folder = folder
        self.found = found

    def run(self, data, rank: int = 0, world_size: int = 1):
        with self.track_time():
            found = self.survey.conclude(self._observed())
        with whole(self.found) as file:
            file.write(to_json(found))
        yield from ()

    def _observed(self) -> Iterator[tuple[str, Any]]:
        for path in sorted(self.folder.glob("*.jsonl")):
            with open(path, "rb") as file:
                for line in file:
                    page_id, seen = from_json(line)
                    yield page_id, seen


class Finish(PipelineStep):
    """The last stage, of one task: records, shards, manifest and report."""

    type = "finish"
    name = "records"

    def __init__(self, job: "Job"):
        super().__init__()
        self.job = job

    def run(self, data, rank: int = 0, world_size: int = 1):
        finish(self.job)
        yield from ()


# --------------------------------------------------------------------------------------------------------------- records

# How the files of the usual formats begin, and how their names end.
STARTS = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG", "gif": b"GIF8", "webp": b"RIFF", "bmp": b"BM"}


def picture_name(picture: Picture) -> str:
    """Where its file lies, by its content: the same picture on two pages is one file."""
    ending = next((ending for ending, start in STARTS.items() if picture.data.startswith(start)), "image")
    return f"pictures/{picture.sha256[:2]}/{picture.sha256}.{ending}"


def record_of(page: Page) -> tuple[dict, dict[str, bytes]]:
    """A page's record, and its pictures by their names in it."""
    pictures = page.pictures
    files = {}
    messages = []
    for message in page.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [dict(part) for part in content]
            for part in content:
                if part["type"] == "image":
                    picture = pictures[part["image"]]
                    part["image"] = picture_name(picture)
                    files[part["image"]] = picture.data
        messages.append({"role": message["role"], "content": content})
    return {"messages": messages}, files


@dataclass(frozen=True)
class Valid:
    """The last step of every job: what `python data.py check` would refuse is dropped, with its words."""

    def __call__(self, page: Page) -> Page | Dropped:
        if not page.messages:
            return Dropped("no dialogue")
        record, files = record_of(page)
        for problem in validate(record, files.__getitem__):
            if not problem.warning:
                return Dropped(f"no valid record: {problem.field}: {problem.message}")
        return page


def write_records(job: Job, folder: Path) -> int:
    """records.jsonl and the pictures, of all tasks in order; the number of records."""
    n = 0
    with whole(job.out / "records.jsonl") as out:
        for path in tqdm(sorted(folder.glob("*.pages")), desc="records", unit=" tasks", disable=None, leave=False):
            for page in read_pages(path):
                record, files = record_of(page)
                for name, data in files.items():
                    if not (job.out / name).exists():
                        with whole(job.out / name) as file:
                            file.write(data)
                out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                n += 1
    return n


def finish(job: Job) -> None:
    """What the pages of the last stage become. May be done again from its beginning, whenever it was ended."""
    shutil.rmtree(job.out / "shards", ignore_errors=True)
    last = len(split(job.steps)) - 1
    n = write_records(job, job.work / f"stage-{last}" / "pages")
    if n:
        pack_shards(str(job.out / "records.jsonl"), str(job.out / "shards" / job.name), job.megabytes)
    files = sorted([job.out / "records.jsonl", *(job.out / "shards").glob("*.tar")])
    counts, seconds = report.statistics(job.work)
    manifest = settings(job) | {"records": n, "counts": counts}
    manifest["files"] = {str(path.relative_to(job.out)): [path.stat().st_size, sha256(path)] for path in files}
    with whole(job.out / "timings.json") as file:
        file.write(json.dumps(seconds, indent=1).encode())
    with whole(job.out / "index.html") as file:
        file.write(report.page(manifest, seconds, report.examples(job.work)).encode())
    # With it the job is complete.
    with whole(job.out / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    for path in [*job.work.glob("stage-*/pages"), *job.work.glob("stage-*/seen-*"), job.work / "fetched"]:
        shutil.rmtree(path, ignore_errors=True)
    # Of processes that were killed.
    for path in [*job.out.glob("*.part"), *job.out.glob("pictures/*/*.part"), *job.out.glob("shards/*.part")]:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------- stages


class Stage(NamedTuple):
    """An executor of datatrove, before it is one."""

    name: str
    pipeline: list[PipelineStep]
    tasks: int


def split(steps: Sequence[Step | Survey]) -> list[list[tuple[int, Step | Survey]]]:
    """Steps with their numbers from 1, by stage: a survey begins one, unless another stands right before it."""
    out = [[]]
    for number, step in enumerate(steps, 1):
        surveys = hasattr(step, "observe")
        follows = out[-1] and hasattr(out[-1][-1][1], "observe")
        if surveys and not follows:
            out.append([])
        out[-1].append((number, step))
    return out


def stages(job: Job) -> list[Stage]:
    """All that a job does, in order."""
    tasks = len(job.slices())
    parts = split([*job.steps, Valid()])
    out = []
    for k, part in enumerate(parts):
        folder = job.work / f"stage-{k}"
        following = parts[k + 1] if k + 1 < len(parts) else []
        surveys = [(number, step) for number, step in following if hasattr(step, "observe")]
        first = Resumed(job.work / f"stage-{k - 1}" / "pages") if k else Reader(job.source, job.work / "inputs")
        blocks = [Block(n, step, job.work / f"found-{n:02d}.json" if hasattr(step, "observe") else None) for n, step in part]
        observers = [Observer(n, survey, folder / f"seen-{n:02d}") for n, survey in surveys]
        writer = Writer(folder, blocks if k else [first, *blocks])
        out.append(Stage(f"stage-{k}", [first, *blocks, *observers, writer], tasks))
        for n, survey in surveys:
            conclusion = Conclusion(n, survey, folder / f"seen-{n:02d}", job.work / f"found-{n:02d}.json")
            out.append(Stage(f"found-{n:02d}", [conclusion], 1))
    return [*out, Stage("finish", [Finish(job)], 1)]


@cache
def leave_no_orphans() -> None:
    """What this process forks ends with it, even if it is killed: datatrove's manager of queues would else stay for ever."""
    if sys.platform == "linux":
        die = 1  # PR_SET_PDEATHSIG
        os.register_at_fork(after_in_child=partial(ctypes.CDLL(None).prctl, die, signal.SIGKILL))


class Local(LocalPipelineExecutor):
    """Whose logs go to their files alone, not to the terminal as well."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        # The logger takes sys.stderr as it is when the task begins.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            stats = super()._run_for_rank(rank, local_rank, node_rank)
            logger.remove()
            return stats


def executor(job: Job, stage: Stage, before: PipelineExecutor | None) -> PipelineExecutor:
    logs = str(job.work / stage.name)
    if job.how == "ray":
        memory = 1.0  # GB that Ray sets aside for a task
        return RayPipelineExecutor(
            stage.pipeline, tasks=stage.tasks, workers=job.workers, logging_dir=logs, mem_per_cpu_gb=memory
        )
    if job.how == "slurm":
        # A job finds datatrove's commands and this project, whatever its shell has begun with.
        bin = Path(sys.executable).parent
        return SlurmPipelineExecutor(
            stage.pipeline,
            tasks=stage.tasks,
            workers=job.workers,
            logging_dir=logs,
            depends=before,
            job_name=f"curate-{job.name}-{stage.name}",
            partition=job.slurm.partition,
            time=job.slurm.time,
            mem_per_cpu_gb=job.slurm.memory,
            env_command=f"{job.slurm.environment or ':'}\nexport PATH={bin}:$PATH PYTHONPATH={ROOT}",
            qos=None,
        )
    workers = min(job.workers, stage.tasks)
    return Local(stage.pipeline, tasks=stage.tasks, workers=workers, logging_dir=logs)


# ------------------------------------------------------------------------------------------------------------------- run


def described(step: Step | Survey) -> dict:
    """A step in the manifest: its name and all its thresholds, and what it says of itself."""
    values = asdict(step) if is_dataclass(step) else {}
    more = step.manifest() if hasattr(step, "manifest") else {}
    return {"name": type(step).__name__, **json.loads(json.dumps(values | more, default=str, sort_keys=True))}


def settings(job: Job) -> dict:
    """What decides the output: the part of the manifest that is known before anything is done."""
    return {
        "command": job.name,
        "steps": [described(step) for step in [*job.steps, Valid()]],
        **job.settings,
        "tasks": len(job.slices()),
        "inputs": dict(job.inputs),
    }


def claim(out: Path) -> None:
    """An InputError where a folder holds something else. Whoever writes into job.work before `run` asks first."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is no folder; choose another --out")
    if out.exists() and any(out.iterdir()) and not (out / "work").is_dir():
        raise InputError(f"{out}: is no folder of this command; choose another --out")


def prepare(job: Job) -> None:
    """The work folder: what each task reads, and the settings, which must be those that the folder was begun with."""
    wanted = from_json(to_json(settings(job)))
    path = job.work / "settings.json"
    if path.exists():
        begun = from_json(path.read_bytes())
        different = sorted(key for key in wanted.keys() | begun.keys() if wanted.get(key) != begun.get(key))
        if different:
            raise InputError(f"{job.out}: was begun with other {', '.join(different)}; choose another --out, or give --fresh")
        return
    for k, names in enumerate(job.slices()):
        with whole(job.work / "inputs" / f"{k:05d}.json") as file:
            file.write(to_json(names))
    with whole(path) as file:
        file.write(to_json(wanted))


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One run at a time in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            # Of this process alone: those that it starts do not hold the lock after it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder.parent}: another run is at work there") from None
        yield


@contextlib.contextmanager
def heard() -> Iterator[threading.Event]:
    """interrupt.heard, and an event that is set when a signal has come: an exception in the midst of a fork is lost."""
    asked = threading.Event()
    with interrupt.heard(), losses_unsaid():
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    signal.signal(number, partial(note, asked, handler))
        yield asked


@contextlib.contextmanager
def losses_unsaid() -> Iterator[None]:
    """Python prints an exception that it cannot raise; not so the interrupts among them, which progress makes up for."""
    before = sys.unraisablehook

    def say(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            before(lost)

    sys.unraisablehook = say
    try:
        yield
    finally:
        sys.unraisablehook = before


def note(asked: threading.Event, handler: Callable, number: int, frame: Any) -> None:
    asked.set()
    handler(number, frame)


@contextlib.contextmanager
def progress(job: Job, stage: Stage, asked: threading.Event) -> Iterator[None]:
    """A bar of the tasks that datatrove has marked as completed, with what a model's answers took so far.

    It insists on a signal that has not ended the stage.
    """
    folder = job.work / stage.name
    done = threading.Event()

    def watch(bar: tqdm) -> None:
        waited = 0.0
        while not done.wait(0.5):
            waited += 0.5 * asked.is_set()
            if waited >= 3:
                waited = 0.0
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            with contextlib.suppress(OSError):
                bar.update(len(os.listdir(folder / "completions")) - bar.n)
            # Where nobody sees the bar, nobody has to add up.
            if job.calls and not bar.disable:
                bar.set_postfix_str(spent(job.calls).told(job.price))

    with tqdm(total=stage.tasks, desc=stage.name, unit=" tasks", disable=None, leave=False, file=sys.stderr) as bar:
        watcher = threading.Thread(target=watch, args=(bar,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def start_ray() -> None:
    """Ray, of the cluster that RAY_ADDRESS names, or on this machine alone."""
    try:
        import ray
    except ImportError:
        raise InputError("--ray: the package ray is missing: pip install ray") from None
    # Its workers import this project as we do.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, include_dashboard=False, log_to_driver=False)


def run(job: Job) -> None:
    """Do what is left of a job. Errors: InputError for what the user can put right, OSError for a full disk."""
    claim(job.out)
    with alone(job.work), heard() as asked:
        prepare(job)
        if (job.out / "manifest.json").exists():
            print(f"{job.out}: is complete; --fresh makes it anew")
            return
        logger.remove()
        leave_no_orphans()
        # The processes of all stages are forked from one that has imported what they need.
        multiprocess.set_forkserver_preload(["curate.report", *{type(step).__module__ for step in job.steps}])
        if job.how == "ray":
            start_ray()
        before = None
        for stage in stages(job):
            before = executor(job, stage, before)
            with progress(job, stage, asked), sorted_out(job):
                before.run()
            # A signal whose exception was lost, in a stage that has ended meanwhile.
            if asked.is_set():
                raise KeyboardInterrupt
            # Ray's executor only logs that a task has failed.
            if job.how == "ray" and (failed := before.get_incomplete_ranks()):
                raise InputError(f"{len(failed)} tasks of {stage.name} failed: {job.work / stage.name / 'logs'} says why")
        if job.how == "slurm":
            print(f"{job.out}: submitted, the last job is {before.job_id}; the same command goes on after a failure")
            return
        records = json.loads((job.out / "manifest.json").read_text(encoding="utf-8"))["records"]
        took = f"; model: {spent(job.calls).told(job.price)}" if job.calls else ""
        print(f"{job.out / 'index.html'}: {records:,} records{took}")


@contextlib.contextmanager
def sorted_out(job: Job) -> Iterator[None]:
    """What a task ended with, as whoever gave the command should see it."""
    try:
        yield
    except InputError:
        raise
    except OSError as e:
        if e.errno in FULL:
            where = e.filename or job.out
            raise InputError(f"{where}: cannot be written ({e.strerror}): make room, and the same command goes on") from None
        raise
