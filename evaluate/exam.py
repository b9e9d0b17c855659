"""The exam: the system holds dialogues of sketchbook by itself, and the checker judges every word and picture of its answers.

    report = evaluate(duo, dialogues(60), settings)     60 dialogues of each split; duo: a pipeline.DuoGen
    report.summary()                                    {"held_out": {"text": 0.9, "shows": 0.7, ...}, "seen": {...}}
    report.share("shows", "held_out", "lesson")         one figure, with its number of cases and 95 % interval

`report.py` is its command line.

A dialogue is free-running: the user's turns are given one after the other, and every answer is made from the dialogue so far,
with the model's own words and pictures in it. `METRICS`, each with its number of cases and a 95 % Wilson interval:

* text complete: an answer says everything that the request asks for, before its pictures where it owes any. Per answer.
* named details: every detail that the user names is in the words and in the pictures of the answer (details.py). Per detail.
* pictures drawn: as many pictures as the request asks for, or more. Per answer that owes pictures.
* only where due: in all answers of a dialogue as many pictures as are due, each after a text of its own that says what it
  shows, in a lesson one step each; none where none is due. Per dialogue.
* image consistency: what had to stay is as in the picture really shown before; in a story, the hero keeps its colours. It asks
  nothing of what had to change: handing the picture before back passes here, and fails in the next. Per picture that builds on
  one before it; where the checker cannot tell in that one what the text speaks of, or the text tells of no change, it has not.
* image-text: a picture shows what the text written just before it claims, and what the text leaves alone has stayed. Where the
  request leaves a colour open the model chooses, and is held to its own words. Per picture.
* whole dialogue: all of this throughout, every answer ended by the model itself.

Questions about a picture are counted apart, too: whether the answer is right ("answers right", by SORTS: yes or no, how many,
...). It is `text complete` of these answers; in the row "question" of image-text stand only the pictures of later requests, for
a question owes none.

Later requests of the user were written for the corpus' own answer. Their truth is computed anew from the picture really
shown: "make the roof blue" needs exactly one such thing with a roof that is not blue, "remove the cat" one cat among others, a
question the answer that is true of the picture; talk and a new background need nothing. Where a request makes no sense for what
was drawn, or the answer before did not end by itself, the dialogue is over, and what came before counts ("left_out").

There are as many dialogues of every kind, so that rare kinds count too. Held-out ones have what training never shows (a subject
in a colour, an arrangement of two, a phrasing, a way to attach a detail) in the user's words or pictures, not just in the
corpus' own answer. Beside the model stand its ceilings, the corpus' own answers to the same dialogues: with their pictures as
rendered ("truth": what is lost there is the checker's own error), and with their pictures encoded and decoded by the VAE.

Requests worded freely, by somebody who has not seen the sketchbook's (free_requests.json), are judged in the same way.

Beside the dialogues stand single requests of GenEval's six categories (arXiv 2310.11513), of which only this is asked: does the
picture satisfy the request itself?
"""

import itertools
import json
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from tqdm import tqdm

from evaluate.details import kept
from pipeline import STOPS, Settings
from sketchbook.checker import MATCH, Seen, Verdict, View, claims, expected_images, frame, judge, judge_text, plain, recognise
from sketchbook.checker import see, text_complete
from sketchbook.dialogues import HELD_OUT_COLOURS, HELD_OUT_RELATIONS, KINDS, Dialogue, dialogue, held_out_in, questions
from sketchbook.scenes import BACKGROUNDS, COLOURS, OPPOSITE, SUBJECTS, Scene, Thing, main_part, touching
from sketchbook.words import NUMBERS
from vae import VAE, to_image, to_tensor

SPLITS = {"held_out": "held-out", "seen": "seen"}
METRICS = {"text": "text complete", "named": "named details", "drawn": "pictures drawn", "placed": "only where due",
           "stays": "image consistency", "shows": "image-text", "whole": "whole dialogue"}  # fmt: skip
MEANS = {
    "text": "answers whose words say everything that was asked for; of all answers",
    "named": "details named by the user that both the words and a picture of the answer keep; of all details",
    "drawn": "answers with as many pictures as are due, or more; of the answers that owe pictures",
    "placed": "dialogues with pictures exactly where they are due, each after words that say what it shows; of all dialogues",
    "stays": "pictures that have kept what had to stay of the picture before; of the pictures that build on one",
    "shows": "pictures that show what the words just before them say; of all pictures",
    "whole": "dialogues with all of this throughout, every answer ended by the model itself; of all dialogues",
}
SORTS = {"yes or no": "is there a house, is the house red", "how many": "how many cats, how many things",
         "which colour": "of a thing, a part, the background", "which part": "which part is red",
         "what": "what is this, what is left of the house", "where": "where is the cat"}  # fmt: skip
CATEGORIES = {"single object": "one", "two objects": "two", "counting": "count", "colours": "colour", "position": "position",
              "colour attribution": "binding"}  # fmt: skip
ASKED = {"single object": "one thing by its name", "two objects": "two things by their names", "counting": "so many things",
         "colours": "a thing in a colour", "position": "one thing beside, above or below another",
         "colour attribution": "two things, each in its own colour"}  # fmt: skip
EDITS = ("recolour", "remove", "add", "add_part", "move", "background")  # kinds whose picture changes the one before
IDLE = ("question", "text")  # kinds of dialogue whose first request owes no picture
GUIDANCES = (1.0, 2.0, 3.0, 5.0, 8.0)

# ---------------------------------------------------------------------------------------------------------------- dialogues


def held_out_request(record: dict) -> set[str]:
    """What the user's own words and pictures have of held-out content: "colour", "relation", "phrasing", "attached"."""
    truth = record["truth"]
    given = (Scene.from_json(i["scene"]) for i in truth["images"] if i["role"] == "user")
    found = set.union({"phrasing", "attached"} & set(record["held_out_by"]), *map(held_out_in, given))
    for need in (need for turn in truth["turns"] for need in turn["need"]):
        objects, subject = need.get("objects", []), need.get("subject")
        coloured = [(o["subject"], o["colour"]) for o in objects]
        related = [(objects[i]["subject"], word, objects[j]["subject"]) for i, word, j in need.get("relations") or []]
        if need["op"] == "lesson":
            coloured.append((subject, need["colours"].get(SUBJECTS[subject].main)))
        if need["op"] == "add":
            related.append((subject, need["relation"], need["anchor"]))
        if need["op"] == "add" or (subject and need.get("part") == SUBJECTS[subject].main):
            coloured.append((subject, need["colour"]))
        found |= {"colour" for s, c in coloured if HELD_OUT_COLOURS[s] == c}
        found |= {"relation" for a, word, b in related if {(word, a, b), (OPPOSITE[word], b, a)} & HELD_OUT_RELATIONS}
    return found


def draw_records(kind: str, split: str, n: int, seed: int, size: int, accept=lambda record: True) -> list[dict]:
    """n records of one kind, by their seeds alone; each knows its split, its seed and what in its requests is held out."""
    found = []
    for number in itertools.count(seed + 10**6 * list(KINDS).index(kind)):  # kinds share no stream of chance
        if len(found) == n:
            return found
        record = dialogue(number, split, {kind: 1.0}, size)
        by = sorted(held_out_request(record))
        if accept(record) and (by or split != "held_out"):
            found.append(record | {"split": split, "seed": number, "held_out_by": by})


def dialogues(n: int, seed: int = 0, splits=tuple(SPLITS), kinds=tuple(KINDS), size: int = 64) -> list[dict]:
    """n records of every split, in equal numbers of every kind, kinds taking turns."""
    drawn = []
    for split in splits:
        rows = [draw_records(kind, split, -(-n // len(kinds)), seed * 10**9, size) for kind in kinds]
        drawn += [record for row in zip(*rows, strict=True) for record in row][:n]
    return drawn


def reads_as(view: View, subject: str) -> list[Seen]:
    """The things of a picture that are this subject, else those that can be read as a stage of its drawing."""
    whole = [t for t in view.things if t.subject == subject and t.score >= MATCH]
    stages = [(subject, k) for k in range(main_part(subject) + 1, len(SUBJECTS[subject].parts) + 1)]
    again = (recognise(view.labels, Seen(t.mask, t.box), stages) for t in view.things)
    return whole or [t for t in again if t.score >= MATCH]


def scene_of(picture: Image.Image) -> Scene | None:
    """What a picture shows, as the checker reads it; None if it does not recognise every thing."""
    view = see(picture)
    unit = picture.width / 64
    things = []
    for t in view.things:
        if t.score < MATCH:
            return None
        x, y, size = (v / unit for v in frame(t, t.subject, t.drawn))
        undrawn = ("black",) * (len(SUBJECTS[t.subject].parts) - t.drawn)
        things.append(Thing(t.subject, x, y, size, (*t.colours, *undrawn), t.drawn))
    return Scene(view.background, tuple(things)) if 1 <= len(things) <= 4 else None


def sort_of(turn: dict) -> str:
    """Which of SORTS a question about a picture is, by the words that its answer must have."""
    first, *rest = turn["words"]
    if first in ("yes", "no"):
        return "yes or no"
    if not isinstance(first, str):
        return "where"
    if rest:
        return "what"
    if first in NUMBERS:
        return "how many"
    return "which colour" if first in {*COLOURS, *BACKGROUNDS} else "which part"


def redefine(turn: dict, asked: str, picture: Image.Image | None) -> dict | None:
    """The truth of a later exchange, anew for the picture really shown; None where the request makes no sense for it."""
    if turn["kind"] == "text":
        return turn
    if picture is None:
        return None
    if turn["kind"] == "question":
        scene = scene_of(picture)
        for k in range(400 if scene else 0):  # what one may ask of a scene is drawn at random: until it is what was asked
            for _, asks, _, words, avoid in questions(Dialogue(random.Random(k)), scene):
                if plain(asked) in map(plain, asks):
                    return turn | {"words": words, "avoid": list(avoid)}
        return None
    need = turn["need"][0]
    if need["op"] == "background":
        return turn
    subject = need["subject"]
    old = need["was" if need["op"] == "recolour" else "colour"]
    view = see(picture)
    things = reads_as(view, subject)
    if f"{old} {subject}" in plain(asked):
        things = [t for t in things if t.colour == old]
    if len(things) != 1:
        return None
    thing = things[0]
    if need["op"] == "remove":
        return turn | {"need": [need | {"colour": thing.colour}]} if len(view.things) > 1 else None
    part = [p.name for p in SUBJECTS[subject].parts].index(need["part"])
    taken = {part, *touching(subject)[part]}  # the new colour must be new, and differ from that of the parts beside it
    if part >= thing.drawn or need["colour"] in [c for i, c in enumerate(thing.colours) if i in taken]:
        return None
    return turn | {"need": [need | {"was": thing.colour}]}


# ------------------------------------------------------------------------------------------------------------------ judging


def hero_stayed(picture: Image.Image, before: Image.Image | None, hero: str) -> bool | None:
    """Whether the hero of a story has the colours that it had in the picture before; None if it was not to be seen there."""

    def colours(image: Image.Image) -> tuple | None:
        things = [t for t in see(image).things if t.subject == hero and t.score >= MATCH]
        return max(things, key=lambda t: t.score).colours if things else None

    old = colours(before) if before else None
    return None if old is None else colours(picture) == old


def builds_on_one(kind: str, number: int) -> bool:
    """Whether a picture of an answer (its number from 0) has to keep something of the one before it."""
    return kind in EDITS or (kind in ("lesson", "story") and number > 0)


def well_placed(turn: dict, texts: list[str], said: str) -> bool:
    """Whether pictures stand exactly where they are due. texts: what is before every picture, and after the last."""
    least, most = expected_images(turn)
    if not least <= len(texts) - 1 <= most:
        return False
    for text in texts[:-1]:
        stated = claims(text, said)
        steps = [c for c in stated if c["op"] in ("start", "part")]
        if not stated or (turn["kind"] == "lesson" and len(steps) != 1):
            return False
        said += f" {text}"
    return turn["kind"] != "lesson" or not any(c["op"] in ("start", "part") for c in claims(texts[-1], said))


class Case:
    """One dialogue as it is held, and what the checker says of it."""

    def __init__(self, record: dict):
        self.record = record
        self.turns = []  # what is judged, an answer each
        self.left_out = None  # why the dialogue is over before its end
        self.messages: list[dict] = []
        self.said = ""  # every word so far
        self.shown = []  # every picture, as (role, picture)

    def ask(self) -> list[dict] | None:
        """The dialogue with its next request; None at its end, or where the next request cannot be judged."""
        k = len(self.turns)
        truth = self.record["truth"]["turns"]
        if k == len(truth) or self.left_out:
            return None
        message = self.record["messages"][2 * k]
        asked = " ".join(p["text"] for p in message["content"] if p["type"] == "text")
        told = [m["role"] for m in self.record["messages"][: 2 * k] for p in m["content"] if p["type"] == "image"]
        self.turn = truth[k]
        if "assistant" in told[-1:] + [role for role, _ in self.shown[-1:]]:  # it speaks of a picture that the corpus drew
            self.turn = redefine(truth[k], asked, self.shown[-1][1] if self.shown else None)
        if k and self.turns[-1]["stop"] != "end":
            self.left_out = "the answer before did not end by itself"
        elif self.turn is None:
            self.left_out = f"the picture gives the request no meaning: {asked}"
        if self.left_out:
            return None
        self.asked = asked
        self.said += f" {asked}"
        self.shown += [("user", p["image"]) for p in message["content"] if p["type"] == "image"]
        self.messages.append(message)
        return self.messages

    def take(self, answer) -> None:
        """Judge an answer (parts, stop, message: those of pipeline.Answer) to the request."""
        texts = [""]  # what stands before each picture, and behind the last
        pictures = []
        for part in answer.parts:
            if isinstance(part, str):
                texts[-1] += part
            else:
                pictures.append(part.image)
                texts.append("")
        turn = self.turn
        least, most = expected_images(turn)
        row = {"kind": turn["kind"], "asked": self.asked, "texts": texts, "stop": answer.stop, "due": [least, most]}
        row |= {"drawn": len(pictures), "placed": well_placed(turn, texts, self.said)}
        if turn["kind"] == "question":
            row |= {"sort": sort_of(turn), "words": turn["words"]}
        # What is asked for must be said of a picture: after the last one it would be said of none.
        told = texts[:-1] if len(pictures) >= least > 0 else texts
        row["text"] = bool("".join(texts).strip()) and text_complete(turn, told, self.said)
        if turn["kind"] == "question":
            row["named"] = [{"of": "answer", "told": row["text"], "shown": True}]
        else:
            row["named"] = kept(turn, texts, pictures, self.shown[-1][1] if self.shown else None, self.said)

        # Picture by picture, each against the words just before it and the picture before.
        rows = []
        story = None  # the picture before, if the dialogue is a story
        # Not strict: one text more than pictures, the one behind the last.
        for j, (picture, text) in enumerate(zip(pictures, texts, strict=False)):
            if j < most:  # one too many is counted where pictures are counted
                before = self.shown[-1][1] if self.shown else None
                before = before.resize(picture.size) if before and before.size != picture.size else before
                verdict = judge_text(picture, text, before, self.said)
                stays = verdict.stayed
                if turn["kind"] == "story":
                    hero = turn["need"][0]["objects"][0]["subject"]
                    stays = hero_stayed(picture, story, hero)
                    story = picture
                if stays is None and builds_on_one(turn["kind"], j):
                    stays = False  # a picture that cannot be read is not one that has kept everything
                scores = {k: round(float(v), 3) for k, v in verdict.scores.items()}
                rows.append({"shows": bool(verdict.ok), "stays": stays, "reasons": verdict.reasons, "scores": scores})
            self.said += f" {text}"
            self.shown.append(("assistant", picture))
        self.said += f" {texts[-1]}"
        self.turns.append(row | {"pictures": rows})
        self.messages.append(answer.message)

    def marks(self) -> dict[str, list[bool]]:
        """For each metric what is counted."""
        pictures = [p for t in self.turns for p in t["pictures"]]
        marks = {
            "text": [t["text"] for t in self.turns],
            "named": [d["told"] and d["shown"] for t in self.turns for d in t["named"]],
            "drawn": [t["drawn"] >= t["due"][0] for t in self.turns if t["due"][0]],
            "placed": [all(t["placed"] for t in self.turns)],
            "stays": [p["stays"] for p in pictures if p["stays"] is not None],
            "shows": [p["shows"] for p in pictures],
        }
        ended = all(t["stop"] == "end" for t in self.turns)
        return marks | {"whole": [ended and all(all(values) for values in marks.values())]}

    def to_json(self) -> dict:
        kept = {k: self.record[k] for k in ("split", "kind", "seed", "held_out_by")}
        return kept | {"turns": self.turns, "left_out": self.left_out}


@dataclass
class Share:
    """So many of n, with the 95 % interval of Wilson."""

    right: int
    n: int

    @property
    def share(self) -> float:
        return self.right / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)

    def to_json(self) -> dict:
        low, high = self.interval
        return {"right": self.right, "n": self.n} | ({"share": self.share, "low": low, "high": high} if self.n else {})

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.0f}% {100 * low:.0f}-{100 * high:.0f} /{self.n}" if self.n else "-"


def lowest(shares: list[tuple[str, Share]], of_all: Share, n: int = 3) -> list[tuple[str, Share]]:
    """The n lowest of some named shares, the lowest first; none that is not below the share of all."""
    return sorted((x for x in shares if x[1].n and x[1].share < of_all.share), key=lambda x: x[1].share)[:n]


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share (E. B. Wilson, 1927): unlike the normal one it stays in [0, 1] and is never a point."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    q = z * z / n
    middle = p + q / 2
    half = z * math.sqrt(p * (1 - p) / n + q / (4 * n))
    return max(0.0, (middle - half) / (1 + q)), min(1.0, (middle + half) / (1 + q))


@dataclass
class Report:
    """What `evaluate` found. seconds: all it took, the judging too."""

    cases: list[Case]
    seconds: float

    @property
    def drawn(self) -> int:
        return sum(t["drawn"] for c in self.cases for t in c.turns)

    @property
    def stops(self) -> dict[str, int]:
        """How often answers ended for each reason."""
        count = Counter(t["stop"] for c in self.cases for t in c.turns)
        return {reason: count[reason] for reason in STOPS if count[reason]}

    def share(self, metric: str, split: str | None = None, kind: str | None = None, by: str | None = None) -> Share:
        """One metric over the dialogues of a split and a kind, that are held out by `by`; None: over all."""

        def chosen(r: dict) -> bool:
            return split in (None, r["split"]) and kind in (None, r["kind"]) and by in (None, *r["held_out_by"])

        of = [c for c in self.cases if chosen(c.record)]
        marks = [m for c in of for m in c.marks()[metric]]
        return Share(sum(marks), len(marks))

    def followed(self) -> Share:
        """Requests of which every named detail is kept."""
        rows = [t["named"] for c in self.cases for t in c.turns if t["named"]]
        return Share(sum(all(d["told"] and d["shown"] for d in named) for named in rows), len(rows))

    def details(self, sort: str, split: str | None = None, side: str | None = None, by: str | None = None) -> Share:
        """Of the named details of a sort (details.SORTS): how many are kept, or "told" or "shown" alone."""
        cases = [c for c in self.cases if split in (None, c.record["split"]) and by in (None, *c.record["held_out_by"])]
        found = [d for c in cases for t in c.turns for d in t["named"] if d["of"] == sort]
        sides = [side] if side else ["told", "shown"]
        return Share(sum(all(d[s] for s in sides) for d in found), len(found))

    def questions(self, split: str | None = None, sort: str | None = None) -> list[dict]:
        """The answers to questions about a picture, whatever the kind of their dialogue; sort: one of SORTS, None: all."""
        answers = [t for c in self.cases if split in (None, c.record["split"]) for t in c.turns if t.get("sort")]
        return [t for t in answers if sort in (None, t["sort"])]

    def answered(self, split: str | None = None, sort: str | None = None) -> Share:
        """How many questions about a picture are answered right: what `text` says of these answers."""
        answers = self.questions(split, sort)
        return Share(sum(t["text"] for t in answers), len(answers))

    def guessed(self, sort: str | None = None) -> Share:
        """How many would be right if each sort of question always got its most frequent right answer."""
        sorts = [self.questions(None, s) for s in SORTS if sort in (None, s)]
        keys = [[t["words"][0] if t["sort"] == "yes or no" else str(t["words"]) for t in answers] for answers in sorts]
        return Share(sum(max(Counter(k).values()) for k in keys if k), sum(map(len, keys)))

    def weakest(self, metric: str, n: int = 3) -> list[tuple[str, Share]]:
        """The n kinds of dialogue lowest in a metric, splits together, the lowest first; of those below the share of all.

        By pictures the kinds that owe none are not judged: theirs are of whatever request comes later.
        """
        kinds = [(k, self.share(metric, kind=k)) for k in KINDS if k not in IDLE or metric not in ("drawn", "stays", "shows")]
        return lowest(kinds, self.share(metric), n)

    def shares(self) -> dict[str, dict[str, dict[str, Share]]]:
        """{split: {kind or "all": {metric: Share}}}."""
        kinds = [k for k in KINDS if any(c.record["kind"] == k for c in self.cases)]
        splits = [s for s in SPLITS if any(c.record["split"] == s for c in self.cases)]
        rows = {None: "all", **{k: k for k in kinds}}
        return {s: {name: {m: self.share(m, s, k) for m in METRICS} for k, name in rows.items()} for s in splits}

    def summary(self) -> dict[str, dict[str, float]]:
        """{split: {metric: share}}, for a curve over training."""
        return {s: {m: round(c.share, 4) for m, c in kinds["all"].items() if c.n} for s, kinds in self.shares().items()}


def evaluate(duo, records: list[dict], settings: Settings | None = None, *, batch=64, title="dialogues", quiet=False) -> Report:
    """Hold the dialogues of `records` (see `dialogues`) with duo.generate_many, turn by turn, and judge them."""
    began = time.perf_counter()
    cases = [Case(r) for r in records]
    with tqdm(total=sum(len(r["truth"]["turns"]) for r in records), desc=title, unit="answer", disable=quiet) as bar:
        for turn in itertools.count():
            asking = [(case, messages) for case in cases if (messages := case.ask())]
            if not asking:
                break
            prompts = [messages for _, messages in asking]
            first = turn * len(cases)  # so that no noise is used twice
            answers = duo.generate_many(prompts, settings, batch=batch, first=first, done=lambda _: bar.update())
            for (case, _), answer in zip(asking, answers, strict=True):
                case.take(answer)
    return Report(cases, time.perf_counter() - began)


# ------------------------------------------------------------------------------------- ceilings, single requests, ablations


class Corpus:
    """Answers as the corpus itself does, its pictures through `redraw`: {id of a picture: picture}."""

    def __init__(self, records: list[dict], redraw: dict[int, Image.Image] | None = None):
        self.records = {id(r["messages"][0]): r for r in records}
        self.redraw = redraw or {}

    def generate_many(self, dialogues, settings=None, *, batch=64, first=0, done=lambda answer: None) -> list[SimpleNamespace]:
        answers = []
        for messages in dialogues:
            answers.append(self.answer(self.records[id(messages[0])], len(messages)))
            done(answers[-1])
        return answers

    def answer(self, record: dict, k: int) -> SimpleNamespace:
        message = record["messages"][k]
        parts = [p["text"] if p["type"] == "text" else SimpleNamespace(image=self.redraw.get(id(p["image"]), p["image"]))
                 for p in message["content"]]  # fmt: skip
        return SimpleNamespace(parts=parts, stop="end", message=message)


@torch.no_grad()
def through(vae: VAE, records: list[dict], batch: int = 64) -> dict[int, Image.Image]:
    """{id of a picture of the assistant's: the picture encoded and decoded}."""
    told = [m for r in records for m in r["messages"] if m["role"] == "assistant"]
    pictures = [p["image"] for m in told for p in m["content"] if p["type"] == "image"]
    device = next(vae.parameters()).device
    again = {}
    for i in range(0, len(pictures), batch):
        some = pictures[i : i + batch]
        x = torch.stack([to_tensor(p) for p in some]).to(device)                       # (B, 3, H, W)
        decoded = vae.decode_latents(vae.encode_latents(x))
        again |= {id(p): to_image(y) for p, y in zip(some, decoded, strict=True)}
    return again


def single_requests(n: int, seed: int = 0, splits=tuple(SPLITS), size: int = 64) -> list[dict]:
    """n records of every split and category, dialogues of one exchange, each with its "category"."""

    def fits(record: dict) -> bool:
        asked = record["truth"]["turns"][0]["need"][0]["objects"][0]
        bare = not asked["colour"] and not asked["parts"]  # a single object is asked for by its name alone
        return len(record["truth"]["turns"]) == 1 and (record["kind"] != "one" or bare)

    drawn = []
    for split in splits:
        for category, kind in CATEGORIES.items():
            drawn += [r | {"category": category} for r in draw_records(kind, split, n, seed * 10**9 + 10**8, size, fits)]
    return drawn


def free_requests(n: int | None = None) -> list[dict]:
    """The first n requests of free_requests.json as records.

    The file is [{"list": 1 or 2, "text", "kind", "details": as in sketchbook/grammar.py}]. Each list is by somebody else. What
    was lost of the first has since told which forms of request the grammar lacks; nobody has looked at the second for that.
    """
    entries = json.loads(Path(__file__).with_name("free_requests.json").read_text(encoding="utf-8"))
    return [record_of(entry, number) for number, entry in enumerate(entries[:n])]


def record_of(entry: dict, number: int) -> dict:
    """A record of one exchange from a request and the details that it names; the corpus has no answer to it."""
    objects: dict[str, dict] = {}
    relations = []
    page = pictures = None
    for detail in entry["details"]:
        of, subject = detail["of"], detail.get("subject")
        if subject:
            one = objects.setdefault(subject, {"subject": subject, "colour": None, "count": 1, "parts": {}})
        if of == "part":
            one["parts"][detail["part"]] = detail["colour"]
        elif of in ("colour", "count"):
            one[of] = detail[of]
        elif of == "place":
            relations.append([subject, detail["relation"], detail["other"]])
        elif of == "page":
            page = detail["background"]
        elif of == "pictures":
            pictures = detail["count"]

    found = list(objects.values())
    order = list(objects)
    if entry["kind"] == "lesson":
        subject = order[0]
        colours = dict(found[0]["parts"])
        if found[0]["colour"]:
            colours[SUBJECTS[subject].main] = found[0]["colour"]
        due = [pictures or len(SUBJECTS[subject].parts)] * 2
        need = [{"op": "lesson", "subject": subject, "colours": colours, "steps": due[0], "background": page}]
    elif entry["kind"] == "story":
        due = [pictures or 2, pictures or 4]
        need = [{"op": "scene", "objects": [one]} for one in found]
    else:
        due = [1, 1]
        places = [[order.index(a), word, order.index(b)] for a, word, b in relations]
        need = [{"op": "scene", "objects": found, "relations": places, "background": page}]
    turn = {"kind": entry["kind"], "images": due, "need": need, "words": [], "avoid": [], "named": entry["details"]}
    asked = {"role": "user", "content": [{"type": "text", "text": entry["text"]}]}
    record = {"messages": [asked], "kind": entry["kind"], "held_out_by": [], "split": "free", "seed": number}
    return record | {"list": entry["list"], "truth": {"images": [], "turns": [turn]}}


def evaluate_single(duo, records: list[dict], settings: Settings | None = None, *, batch=64, quiet=False) -> list[dict]:
    """For each of the `single_requests` whether the first picture of the answer satisfies the request."""
    prompts = [r["messages"][:1] for r in records]
    with tqdm(total=len(records), desc="single requests", unit="answer", disable=quiet) as bar:
        answers = duo.generate_many(prompts, settings, batch=batch, done=lambda _: bar.update())
    rows = []
    for record, answer in zip(records, answers, strict=True):
        picture = next((p.image for p in answer.parts if not isinstance(p, str)), None)
        request = record["truth"]["turns"][0]["need"][0]
        verdict = judge(picture, request) if picture else Verdict(False, ["no picture was drawn"])
        asked = next(p["text"] for p in record["messages"][0]["content"] if p["type"] == "text")
        row = {k: record[k] for k in ("split", "category", "seed")} | {"asked": asked, "ok": bool(verdict.ok)}
        rows.append(row | {"reasons": verdict.reasons, "picture": picture})
    return rows


def single_shares(rows: list[dict]) -> dict[str, dict[str, Share]]:
    """{split: {category: Share}}."""
    shares = {}
    for row in rows:
        cell = shares.setdefault(row["split"], {}).setdefault(row["category"], Share(0, 0))
        cell.right += row["ok"]
        cell.n += 1
    return shares


def overall(shares: dict[str, Share]) -> float:
    """GenEval's overall score, the mean over categories."""
    return sum(s.share for s in shares.values()) / len(shares)


def ablations(duo, records: list[dict], settings: Settings, *, batch=64, quiet=False) -> dict[str, dict[str, Share]]:
    """The same dialogues under other guidance, {run: {"shows", "stays"}}. Without a negative branch every scale is 1."""

    def run(name: str, **changed) -> dict[str, Share]:
        report = evaluate(duo, records, replace(settings, **changed), batch=batch, title=name, quiet=quiet)
        return {metric: report.share(metric) for metric in ("shows", "stays")}

    none = run("guidance 1", negative="none")
    runs = {f"guidance {g:g} {negative}": none if g == 1 or negative == "none" else
            run(f"guidance {g:g} {negative}", guidance=g, negative=negative)
            for g in GUIDANCES for negative in ("chunk", "empty", "none")}  # fmt: skip
    for seen in (True, False):
        name = f"{'with' if seen else 'without'} condition images"
        runs[name] = run(name, use_condition_images=seen)
    return runs
