"""Synthetic dialogues: python -m curate synth --out data/synth

    python -m curate synth --out data/synth                                             no model at hand: the miniature's world
    python -m curate synth --out data/synth --painter renderer --n 1000                 the same, painted by the sketchbook
    python -m curate synth --out data/synth --n 15000 --model http://localhost:8000/v1 --model-name Qwen/Qwen3-32B \\
        --painter http://localhost:8001/v1 --painter-name black-forest-labs/FLUX.1-dev \\
        --judge http://localhost:8002/v1 --judge-model Qwen/Qwen3-VL-32B-Instruct

With a model: the 453 requests of seeds.json are grown to --n (requests.py), each is answered in steps with a picture prompt for
every step, a painter paints them (painter.py: `self` is this project's sampler, which sees the pictures before), and a judge of
evaluate/ keeps the dialogue if each picture shows its step and all are of one world. Prompts lie in prompts/.

Without one (`--model none`): the sketchbook's grammar makes the requests, the bundled miniature answers and paints, and the
sketchbook's checker keeps what is right throughout (world.py). So the whole path runs on a laptop, with real pictures.

Whatever was asked, painted or judged is kept in OUT/kept, a file by the hash of its content: the same command goes on where it
was ended, and another filter over the same answers costs nothing.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from checkpoint import InputError, read_json
from curate.command import add_engine_flags, make_room, start, with_thresholds
from curate.engine import MOST_TASKS, claim
from curate.models import Model, asking, at_once, parsed, prompt, spent
from curate.page import Dropped, Page, Part, Picture
from curate.painter import Painter, tally
from curate.report import in_words
from curate.requests import SEEDS, Wish, grow, seeds
from curate.store import whole
from curate.world import Checked, Drawn, Requested, choose_seeds, image_of
from evaluate.judges import Asker, Unanswered
from evaluate.judging import load_judge, parse_price
from evaluate.rubrics import rubric
from flags import Parser
from families.registry import PARTS

CHUNK = 16  # requests of an input of the engine
STEPS = 2, 8  # of an answer, least and most
LONGEST = 1500  # characters of a step, or of what a painter is told
SHOWS = "Does this picture show what these words describe?"


# ------------------------------------------------------------------------------------------------------------------- source


@dataclass(frozen=True)
class Wished:
    """A source of the engine: requests of a file, by their numbers from the first to before the last."""

    path: str

    def read(self, item: str) -> Iterator[Page]:
        first, last = map(int, item.split("-"))
        for number, wish in enumerate(wishes_of(self.path)[first:last], first):
            notes = {"domain": wish.domain, "subcategory": wish.subcategory}
            message = {"role": "user", "content": [{"type": "text", "text": wish.text}]}
            yield Page(f"synth:{number}", title=wish.text, parts=(wish.text,), messages=(message,), notes=notes)


@cache
def wishes_of(path: str) -> list[Wish]:
    return [Wish(*each) for each in read_json(path)["requests"]]


# -------------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Answered:
    """A model writes the steps, and what a painter must know of each."""

    model: Model

    @property
    def at_once(self) -> int:
        return at_once(self.model)

    def manifest(self) -> dict:
        return asking(self.model, "answer")

    def __call__(self, page: Page) -> Page | Dropped:
        try:
            words = self.model.write([prompt("answer", request=page.title)], max_tokens=2048)
        except Unanswered as e:
            return Dropped(f"model without an answer: {e}")
        try:
            steps, end = read_answer(words)
        except InputError as e:
            return Dropped(str(e))
        return replace(page, notes=page.notes | {"steps": steps, "end": end})


def read_answer(words: str) -> tuple[list[dict], str]:
    """([{"text", "picture"}], the closing sentence) of a model's JSON. Strict: nothing is guessed."""
    answer = parsed(words)
    steps = answer.get("steps") if isinstance(answer, dict) else None
    if not isinstance(steps, list):
        raise InputError("answer without steps")
    least, most = STEPS
    if not least <= len(steps) <= most:
        raise InputError(f"answer with too few or too many steps: {len(steps)}")
    read = []
    for step in steps:
        texts = [step.get(key) if isinstance(step, dict) else None for key in ("text", "picture")]
        if not all(isinstance(text, str) and text.strip() and len(text) <= LONGEST for text in texts):
            raise InputError("answer with a step without words or picture")
        read.append(dict(zip(("text", "picture"), (text.strip() for text in texts), strict=True)))
    end = answer.get("end") or ""
    return read, end.strip() if isinstance(end, str) and len(end) <= LONGEST else ""


@dataclass(frozen=True)
class Painted:
    """The dialogue: the request, then each step with its picture."""

    painter: Painter

    @property
    def at_once(self) -> int:
        return 1 if self.painter.where == "self" else self.painter.at_once

    def manifest(self) -> dict:
        return {"painter": self.painter.manifest()}

    def __call__(self, page: Page) -> Page | Dropped:
        steps = page.notes["steps"]
        try:
            files = self.painter.paint(page.title, [step["picture"] for step in steps])
        except Unanswered as e:
            return Dropped(f"painter without a picture: {e}")
        except InputError as e:
            return Dropped(f"script that cannot be painted: {e}")
        parts: list[Part] = [page.title]
        content = []
        for k, (step, data) in enumerate(zip(steps, files, strict=True)):
            picture = Picture(f"{page.id}#{k}", caption=step["picture"]).filled(data)
            image = image_of(picture)
            parts += [step["text"], replace(picture, width=image.width, height=image.height)]
            content += [{"type": "text", "text": step["text"]}, {"type": "image", "image": k}]
        if page.notes["end"]:
            parts.append(page.notes["end"])
            content.append({"type": "text", "text": page.notes["end"]})
        notes = {key: value for key, value in page.notes.items() if key not in ("steps", "end")}
        messages = (*page.messages, {"role": "assistant", "content": content})
        return replace(page, parts=tuple(parts), messages=messages, notes=notes)


@dataclass(frozen=True)
class Judge:
    """Who is asked; the names are those of `python -m evaluate judge`."""

    judge: str  # self, or the address of a server
    judge_model: str | None = None
    calls: str = ""  # folder in which its answers are kept
    timeout: float = 120.0
    tries: int = 6
    max_tokens: int = 1024
    ckpt: str | None = None
    mllm: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    at_once: int = 8


@cache
def asker(judge: Judge, process: int) -> Asker:
    return Asker(load_judge(judge), Path(judge.calls))


@dataclass(frozen=True)
class Judged:
    """A judge of evaluate/ looks: each picture must show its step, and all of them one world."""

    judge: Judge
    shows: float = 0.5  # least probability that a picture shows its step, of each
    same: float = 3.0  # least rating from 1 to 5 that they are of one world

    @property
    def at_once(self) -> int:
        return 1 if self.judge.judge == "self" else self.judge.at_once

    def manifest(self) -> dict:
        questions = [SHOWS, rubric("howto", "I-Co")]
        hashed = hashlib.sha256(json.dumps(questions).encode()).hexdigest()
        return {"judge": self.judge.judge_model or "self", "questions": hashed}

    def __call__(self, page: Page) -> Page | Dropped:
        judge = asker(self.judge, os.getpid())
        pictures = page.pictures
        images = [image_of(picture) for picture in pictures]
        marks = []
        try:
            for picture, image in zip(pictures, images, strict=True):
                marks.append(judge.yes(SHOWS, image, f"Words: {picture.caption}"))
            same = judge.rating(rubric("howto", "I-Co"), *images, low=1, high=5) if len(images) > 1 else None
        except Unanswered as e:
            return Dropped(f"judge without an answer: {e}")
        values = [mark.value for mark in marks]
        if None in values or (same and same.value is None):
            return Dropped("judge without an answer: refused, or no number could be read")
        low = [value for value in values if value < self.shows]
        if low:
            return Dropped(f"picture that does not show its step: {len(low)} of {len(values)}")
        if same and same.value < self.same:
            return Dropped(f"pictures of different worlds: {same.value:.1f} of 5")
        judged = {"shows": [round(value, 3) for value in values], "same": round(same.value, 2) if same else None}
        return replace(page, notes=page.notes | {"judged": judged})


# ------------------------------------------------------------------------------------------------------------------ command


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(
        "python -m curate synth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--n", type=int, default=100, help="requests (100)")
    p.add_argument("--model", default="none", metavar="none|self|URL", help="who grows requests and answers (none)")
    p.add_argument("--model-name", default="", metavar="NAME", help="what the server calls its model")
    p.add_argument("--painter", default="self", metavar="self|renderer|URL", help="who paints (self)")
    p.add_argument("--painter-name", default="", metavar="NAME", help="what the painting server calls its model")
    p.add_argument("--judge", default="none", metavar="none|self|URL", help="who filters, with --model (none: nobody)")
    p.add_argument("--judge-model", metavar="NAME", help="what the judging server calls its model")
    p.add_argument("--at-once", type=int, default=16, help="questions to a model under way at the same time (16)")
    p.add_argument("--price", metavar="IN,OUT", help="of a million tokens read and written, to show the cost")
    p.add_argument("--seed", type=int, default=0, help="of the pictures, and without a model of the requests (0)")
    p.add_argument("--height", type=int, help="of a picture in pixels (the checkpoint's; of a server 1024)")
    p.add_argument("--width", type=int, help="likewise")
    p.add_argument("--steps", type=int, help="of self: calls of the DiT for a picture (the checkpoint's)")
    p.add_argument("--guidance", type=float, help="of self (the checkpoint's)")
    p.add_argument("--ckpt", help="of self: checkpoint, a folder or a Hub name (the bundled miniature)")
    for part in PARTS:
        p.add_argument(f"--{part}", help="of self: this part from a run, a folder or a Hub name")
    p.add_argument("--device", default="auto", help="of self: auto, cpu, cuda, cuda:N, mps")
    p.add_argument("--dtype", default="auto", help="of self: auto, bf16, fp32, fp16")
    add_engine_flags(p)
    args = p.parse_flags(argv)
    for name in ("n", "at_once"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if args.model == "none" and args.judge != "none":
        raise InputError("--judge: without a model the sketchbook's own checker judges; give --model")
    if args.model != "none" and args.painter == "renderer":
        raise InputError("--painter renderer: draws the sketchbook alone, without a model")
    args.price = parse_price(args.price)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    out = Path(args.out)
    kept = out / "kept"
    own = {name: getattr(args, name) for name in ("ckpt", "mllm", "device", "dtype")}
    named = {name: getattr(args, name) for name in ("seed", "height", "width", "steps", "guidance", "dit", "vae")}
    where = "self" if args.painter == "renderer" else args.painter
    painter = Painter(where, args.painter_name, str(kept / "painted"), **own, **named)
    painter.check()
    model = Model(args.model, args.model_name, str(kept / "calls"), args.at_once, **own)
    model.check()
    judge = None
    if args.judge != "none":
        judge = Judge(args.judge, args.judge_model, str(kept / "judged"), **own)
        asker(judge, os.getpid())  # one that is not there is told now
    claim(out)
    make_room(args)
    (out / "work").mkdir(parents=True, exist_ok=True)  # with it the folder is this command's, whatever is kept there
    if model:
        source, inputs, about = wished(args, model)
        steps = [Answered(model), Painted(painter), *([Judged(judge)] if judge else [])]
    else:
        source, inputs, about = requested(args)
        steps = [Drawn(painter, args.painter == "renderer"), Checked()]
    # What is painted takes long: each input is a task, so that several processes have work.
    args.tasks = args.tasks or min(MOST_TASKS, len(inputs))
    steps = tuple(with_thresholds(steps, args.set))
    start(args, name="synth", source=source, steps=steps, inputs=tuple(inputs), settings={"synth": about})
    print(f"{out}: {summary(out)}; {cost(args, model, painter, judge)}")


def wished(args: argparse.Namespace, model: Model) -> tuple[Wished, list, dict]:
    """Requests grown by the model. They are written down, so that a run goes on with those that it was begun with."""
    path = Path(args.out) / "work" / "requests.json"
    asked = {
        "n": args.n,
        "seeds": hashlib.sha256(SEEDS.read_bytes()).hexdigest(),
        **asking(model, "grow"),
    }
    if not path.is_file() or read_json(path)["asked"] != asked:
        wishes, refused = grow(seeds(), args.n, model)
        with whole(path) as file:
            file.write(json.dumps({"asked": asked, "refused": refused, "requests": wishes}, ensure_ascii=False).encode())
    grown = read_json(path)
    n = len(grown["requests"])
    if n < args.n:
        print(f"{n} of {args.n} requests: the model has nothing new to say")
    inputs = [(f"{k}-{min(k + CHUNK, n)}", min(CHUNK, n - k)) for k in range(0, n, CHUNK)]
    return Wished(str(path)), inputs, asked | {"requests": n, "refused": grown["refused"]}


def requested(args: argparse.Namespace) -> tuple[Requested, list, dict]:
    """Requests of the sketchbook."""
    chosen, refused = choose_seeds(args.n, args.seed)
    chunks = [chosen[k : k + CHUNK] for k in range(0, len(chosen), CHUNK)]
    inputs = [(",".join(map(str, chunk)), len(chunk)) for chunk in chunks]
    return Requested(), inputs, {"requests": len(chosen), "refused": dict(refused)}


def summary(out: Path) -> str:
    """What came of it, from the manifest."""
    if not (out / "manifest.json").is_file():
        return "not finished yet"
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return f"{manifest['synth']['requests']} requests; {in_words(manifest)}"


def cost(args: argparse.Namespace, model: Model, painter: Painter, judge: Judge | None) -> str:
    """What it took: of the model in all processes, of painter and judge in this one."""
    parts = []
    if args.workers == 1:
        pictures = tally(painter, os.getpid())
        parts.append(f"{pictures['painted']} pictures painted, {pictures['kept']} from disk")
    if model:
        parts.append(f"model: {spent(model.calls).told(args.price)}")
    if judge and args.workers == 1:
        parts.append(f"judge: {asker(judge, os.getpid()).tally.told(args.price)}")
    return "; ".join(parts) or "see manifest.json"
