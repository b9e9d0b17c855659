"""How good the system is: it holds the dialogues of sketchbook by itself, and the checker judges every word and picture.

    python evaluate.py sketchbook --ckpt checkpoints/tiny --n 170 --seed 0            held-out and seen, 170 dialogues of each
    python evaluate.py sketchbook --split held_out --kinds lesson,one --guidance 5    some kinds only, other sampling
    python evaluate.py sketchbook --dit runs/tiny/stage2 --ablations                  a part from a run; two small ablations

It writes results.json (settings, sources, every verdict with its reasons), table.md and index.html (the worst answers first).

A dialogue is free-running: the user's turns are given one after the other, and every answer is made from the dialogue so far,
with the model's own words and pictures in it. `METRICS`, each with its number of cases and a 95 % Wilson interval:

* text complete: an answer says everything that the request asks for. Per answer.
* pictures drawn: as many pictures as the request asks for, or more. Per answer that owes pictures.
* only where due: in all answers of a dialogue as many pictures as are due, each after a text of its own that says what it
  shows, in a lesson one step each; none where none is due. Per dialogue.
* image consistency: what had to stay is as in the picture really shown before; in a story, the hero keeps its colours. It asks
  nothing of what had to change: handing the picture before back passes here, and fails in the next. Per picture that builds on
  one before it, if the checker can tell in that one what the text speaks of.
* image-text: a picture shows what the text written just before it claims, and what the text leaves alone has stayed. Where the
  request leaves a colour open the model chooses, and is held to its own words. Per picture.
* whole dialogue: all of this throughout, every answer ended by the model itself.

Later requests of the user were written for the corpus' own answer. Their truth is computed anew from the picture really
shown: "make the roof blue" needs exactly one such thing with a roof that is not blue, "remove the cat" one cat among others, a
question the answer that is true of the picture; talk and a new background need nothing. Where a request makes no sense for what
was drawn, or the answer before did not end by itself, the dialogue is over, and what came before counts ("left_out").

There are as many dialogues of every kind, so that rare kinds count too. Held-out ones have what training never shows (a subject
in a colour, an arrangement of two, a phrasing) in the user's words or pictures, not just in the corpus' own answer. Beside the
model stand its ceilings, the corpus' own answers to the same dialogues: with their pictures as rendered ("truth": what is lost
there is the checker's own error), and with their pictures encoded and decoded by the VAE.

The second table is GenEval's (arXiv 2310.11513) on single requests: whether the picture satisfies the request itself.
"""

import argparse
import base64
import html
import io
import itertools
import json
import math
import platform
import random
import time
import typing
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType, SimpleNamespace

import numpy as np
import PIL
import torch
from PIL import Image
from tqdm import tqdm

import training
from checker import MATCH, Seen, Verdict, View, claims, expected_images, frame, judge, judge_text, plain, recognise, see
from checker import text_complete
from checkpoint import InputError, write_json
from pipeline import PARTS, STOPS, DuoGen, Settings, override
from scenes import OPPOSITE, SUBJECTS, Scene, Thing, main_part, touching
from sketchbook import HELD_OUT_COLOURS, HELD_OUT_RELATIONS, KINDS, Dialogue, dialogue, held_out_in, questions
from vae import VAE, to_image, to_tensor

SPLITS = {"held_out": "held-out", "seen": "seen"}
METRICS = {"text": "text complete", "drawn": "pictures drawn", "placed": "only where due", "stays": "image consistency",
           "shows": "image-text", "whole": "whole dialogue"}  # fmt: skip
CATEGORIES = {"single object": "one", "two objects": "two", "counting": "count", "colours": "colour", "position": "position",
              "colour attribution": "binding"}  # fmt: skip
# How the checker words its objections to what had to stay.
STAYS = ("kept", "something else changed", "the background became", "its colours changed", "its size changed", "it drifted",
         "the number of things changed")  # fmt: skip
GUIDANCES = (1.0, 2.0, 3.0, 5.0, 8.0)

# ---------------------------------------------------------------------------------------------------------------- dialogues


def held_out_request(record: dict) -> bool:
    """Whether the user's own words or pictures have something held out."""
    truth = record["truth"]
    if "phrasing" in record["held_out_by"] or any(
        i["role"] == "user" and held_out_in(Scene.from_json(i["scene"])) for i in truth["images"]
    ):
        return True

    def related(a: str, word: str, b: str) -> bool:
        return bool({(word, a, b), (OPPOSITE[word], b, a)} & HELD_OUT_RELATIONS)

    for need in (need for turn in truth["turns"] for need in turn["need"]):
        objects, subject = need.get("objects", []), need.get("subject")
        coloured = [(o["subject"], o["colour"]) for o in objects]
        if need["op"] == "lesson":
            coloured.append((subject, need["colours"].get(SUBJECTS[subject].main)))
        if need["op"] == "add" or need.get("part") == (SUBJECTS[subject].main if subject else ""):
            coloured.append((subject, need["colour"]))
        relations = [(objects[i]["subject"], word, objects[j]["subject"]) for i, word, j in need.get("relations") or []]
        relations += [(subject, need["relation"], need["anchor"])] if need["op"] == "add" else []
        if any(HELD_OUT_COLOURS[s] == c for s, c in coloured) or any(related(*r) for r in relations):
            return True
    return False


def draw_records(kind: str, split: str, n: int, seed: int, size: int, accept=lambda record: True) -> list[dict]:
    """n records of one kind, by their seeds alone; each knows its split and seed."""
    found = []
    for number in itertools.count(seed):
        if len(found) == n:
            return found
        record = dialogue(number, split, {kind: 1.0}, size)
        if accept(record) and (split != "held_out" or held_out_request(record)):
            found.append(record | {"split": split, "seed": number})


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
    view, things, unit = see(picture), [], picture.width / 64
    for t in view.things:
        if t.score < MATCH:
            return None
        x, y, size = (v / unit for v in frame(t, t.subject, t.drawn))
        undrawn = ("black",) * (len(SUBJECTS[t.subject].parts) - t.drawn)
        things.append(Thing(t.subject, x, y, size, (*t.colours, *undrawn), t.drawn))
    return Scene(view.background, tuple(things)) if 1 <= len(things) <= 4 else None


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
    subject, old = need["subject"], need["was" if need["op"] == "recolour" else "colour"]
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


def stayed(verdict: Verdict) -> bool | None:
    """Whether what had to stay has stayed; None where nothing had to, or where the checker could not tell what."""
    return not any(r.startswith(STAYS) for r in verdict.reasons) if "kept" in verdict.scores else None


def hero_stayed(picture: Image.Image, before: Image.Image | None, hero: str) -> bool | None:
    """Whether the hero of a story has the colours that it had in the picture before; None if it was not to be seen there."""

    def colours(image: Image.Image) -> tuple | None:
        things = [t for t in see(image).things if t.subject == hero and t.score >= MATCH]
        return max(things, key=lambda t: t.score).colours if things else None

    old = colours(before) if before else None
    return None if old is None else colours(picture) == old


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
        self.record, self.turns, self.left_out = record, [], None
        self.messages: list[dict] = []
        self.said, self.shown = "", []  # every word so far; every picture, as (role, picture)

    def ask(self) -> list[dict] | None:
        """The dialogue with its next request; None at its end, or where the next request cannot be judged."""
        k, truth = len(self.turns), self.record["truth"]["turns"]
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
        self.asked, self.said = asked, f"{self.said} {asked}"
        self.shown += [("user", p["image"]) for p in message["content"] if p["type"] == "image"]
        self.messages.append(message)
        return self.messages

    def take(self, answer) -> None:
        """Judge an answer (parts, stop, message: those of pipeline.Answer) to the request."""
        texts, pictures, rows, story = [""], [], [], None
        for part in answer.parts:
            if isinstance(part, str):
                texts[-1] += part
            else:
                pictures.append(part.image)
                texts.append("")
        turn, least_most = self.turn, expected_images(self.turn)
        row = {"kind": turn["kind"], "asked": self.asked, "texts": texts, "stop": answer.stop, "due": list(least_most)}
        row |= {"drawn": len(pictures), "placed": well_placed(turn, texts, self.said)}
        row["text"] = bool("".join(texts).strip()) and text_complete(turn, texts, self.said)
        for j, (picture, text) in enumerate(zip(pictures, texts, strict=False)):
            if j < least_most[1]:  # one too many is counted where pictures are counted
                before = self.shown[-1][1] if self.shown else None
                before = before.resize(picture.size) if before and before.size != picture.size else before
                verdict = judge_text(picture, text, before, self.said)
                stays = stayed(verdict)
                if turn["kind"] == "story":
                    stays, story = hero_stayed(picture, story, turn["need"][0]["objects"][0]["subject"]), picture
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
        return f"{100 * self.share:.0f} {100 * low:.0f}-{100 * high:.0f} /{self.n}" if self.n else "-"


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share (E. B. Wilson, 1927): unlike the normal one it stays in [0, 1] and is never a point."""
    if n == 0:
        return 0.0, 1.0
    p, q = right / n, z * z / n
    middle, half = p + q / 2, z * math.sqrt(p * (1 - p) / n + q / (4 * n))
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

    def share(self, metric: str, split: str | None = None, kind: str | None = None) -> Share:
        """One metric over the dialogues of a split and a kind; None: of all."""
        of = [c for c in self.cases if split in (None, c.record["split"]) and kind in (None, c.record["kind"])]
        marks = [m for c in of for m in c.marks()[metric]]
        return Share(sum(marks), len(marks))

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
    began, cases = time.perf_counter(), [Case(r) for r in records]
    with tqdm(total=sum(len(r["truth"]["turns"]) for r in records), desc=title, unit="answer", disable=quiet) as bar:
        for turn in itertools.count():
            asking = [(case, messages) for case in cases if (messages := case.ask())]
            if not asking:
                break
            prompts, first = [messages for _, messages in asking], turn * len(cases)  # so that no noise is used twice
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
    device, again = next(vae.parameters()).device, {}
    for i in range(0, len(pictures), batch):
        some = pictures[i : i + batch]
        x = torch.stack([to_tensor(p) for p in some]).to(device)                       # (B, 3, H, W)
        decoded = vae.decode_latents(vae.encode_latents(x))
        again |= {id(p): to_image(y) for p, y in zip(some, decoded, strict=True)}
    return again


def single_requests(n: int, seed: int = 0, splits=tuple(SPLITS), size: int = 64) -> list[dict]:
    """n records of every split and category, each with its "category"; only their first request counts."""

    def no_attributes(record: dict) -> bool:  # GenEval asks for a single object by its name alone, which is never held out
        asked, by = record["truth"]["turns"][0]["need"][0]["objects"][0], record["held_out_by"]
        return not asked["colour"] and not asked["parts"] and (by == [] or "phrasing" in by)

    drawn = []
    for split in splits:
        for category, kind in CATEGORIES.items():
            rule = {"accept": no_attributes} if kind == "one" else {}
            drawn += [r | {"category": category} for r in draw_records(kind, split, n, seed * 10**9 + 10**8, size, **rule)]
    return drawn


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
        cell.right, cell.n = cell.right + row["ok"], cell.n + 1
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


# ------------------------------------------------------------------------------------------------------------------ telling

Table = tuple[str, list[str], list[list[str]]]  # caption, head, rows


def summary_table(report: Report, truth: Report, vae: Report) -> Table:
    rows = [[name, *(str(kinds["all"][m]) for kinds in report.shares().values()), str(truth.share(m)), str(vae.share(m))]
            for m, name in METRICS.items()]  # fmt: skip
    head = ["", *(SPLITS[s] for s in report.shares()), "truth", "truth by VAE"]
    return "Percent right, 95 % interval, of how many", head, rows


def kinds_table(report: Report, truth: Report, vae: Report) -> Table:
    shares, rows = report.shares(), []
    for kind in list(next(iter(shares.values())))[1:]:
        for split, kinds in shares.items():
            tops = [f"{100 * r.share('shows', split, kind).share:.0f}" for r in (truth, vae) if r.share("shows", split, kind).n]
            rows.append([kind, SPLITS[split], *map(str, kinds[kind].values()), " / ".join(tops) or "-"])
    head = ["kind", "split", *METRICS.values(), "truth / VAE"]
    return "The same by kind of dialogue; last the ceilings of image-text", head, rows


def single_table(found: dict[str, list[dict]]) -> Table:
    rows = []
    for who, answers in found.items():
        for split, shares in single_shares(answers).items():
            rows.append([who, SPLITS[split], *(str(shares[c]) for c in CATEGORIES), f"{100 * overall(shares):.0f}"])
    return "Single requests: percent of pictures that satisfy the request", ["", "split", *CATEGORIES, "overall"], rows


def ablation_tables(runs: dict[str, dict[str, Share]]) -> list[Table]:
    modes = ("chunk", "empty", "none")
    grid = [[f"{g:g}", *(str(runs[f"guidance {g:g} {m}"]["shows"]) for m in modes)] for g in GUIDANCES]
    seen = [[name, str(runs[name]["stays"]), str(runs[name]["shows"])] for name in runs if name.endswith("images")]
    return [("Image-text by guidance and what its negative branch leaves out", ["guidance", *modes], grid),
            ("What the earlier pictures are good for", ["", METRICS["stays"], METRICS["shows"]], seen)]  # fmt: skip


def markdown(table: Table) -> str:
    caption, head, rows = table
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in [head, ["-" * w for w in widths], *rows])
    return f"{caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in padded)


def html_table(table: Table) -> str:
    caption, head, rows = table
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in [head, *rows])
    return f"<h2>{html.escape(caption)}</h2><div class=wide><table>{body}</table></div>"


HEAD = """<!doctype html><html lang=en><meta charset=utf-8><title>TITLE</title>
<meta name=viewport content="width=device-width,initial-scale=1">"""
STYLE = """
:root{color-scheme:light dark}body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:72rem}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin-top:2rem}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.8rem}
td{padding:.2rem .6rem;border-bottom:1px solid #8884;text-align:left;white-space:nowrap}tr:first-child{font-weight:600}
article{border:1px solid #8886;border-left:6px solid #2a2;border-radius:6px;padding:.6rem .8rem;margin:1rem 0}
article.bad{border-left-color:#c33}article>header{font-size:.8rem;opacity:.75}.user{font-weight:600;margin:.6rem 0 .3rem}
.row{display:flex;flex-wrap:wrap;gap:.8rem}figure{margin:0;width:9rem}figcaption{font-size:.85rem}
img{width:9rem;max-width:100%;image-rendering:pixelated;border:1px solid #8886}.no{color:#c33;font-size:.8rem}"""


def figure(picture: Image.Image | None, text: str, objections: list[str] = ()) -> str:
    """A picture with the words before it and what the checker objected to, as HTML."""
    data = io.BytesIO()
    if picture:
        picture.save(data, "PNG")
    image = f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">' if picture else ""
    no = "".join(f"<div class=no>{html.escape(o)}</div>" for o in objections)
    return f"<figure>{image}<figcaption>{html.escape(text)}</figcaption>{no}</figure>"


def card(case: Case) -> str:
    """One dialogue as HTML."""
    marks = [m for metric, values in case.marks().items() if metric != "whole" for m in values]
    record, shown = case.record, iter(case.shown)
    by = f" ({', '.join(record['held_out_by'])})" if record["held_out_by"] else ""
    what = f"{record['kind']}, {SPLITS[record['split']]}{by}, seed {record['seed']}"
    parts = [f"<header>{what}: {sum(marks)} of {len(marks)} right</header>"]
    for k, turn in enumerate(case.turns):
        given = [next(shown)[1] for p in case.messages[2 * k]["content"] if p["type"] == "image"]
        parts.append(f"<div class=user>{html.escape(turn['asked'])}</div>")
        parts.append("<div class=row>" + "".join(figure(p, "") for p in given) + "</div>" if given else "")
        figures = []
        for j, text in enumerate(turn["texts"]):
            if j < turn["drawn"]:
                verdict = turn["pictures"][j] if j < len(turn["pictures"]) else {"reasons": ["one too many"], "stays": None}
                lost = ["the hero is not as before"] if turn["kind"] == "story" and verdict["stays"] is False else []
                figures.append(figure(next(shown)[1], text, verdict["reasons"] + lost))
            elif text.strip():
                figures.append(figure(None, text))
        parts.append(f"<div class=row>{''.join(figures)}</div>")
        due = " to ".join(str(n) for n in sorted(set(turn["due"])))
        objections = {
            "the text does not say all that was asked for": turn["text"],
            f"{turn['drawn']} pictures, {due} due, each after a text that says what it shows": turn["placed"],
            f"the answer stopped: {STOPS.get(turn['stop'], turn['stop'])}": turn["stop"] == "end",
        }
        parts += [f"<div class=no>{html.escape(o)}</div>" for o, fine in objections.items() if not fine]
    parts += [f"<header>left out after this: {html.escape(case.left_out)}</header>"] if case.left_out else []
    return f"<article{'' if case.marks()['whole'][0] else ' class=bad'}>{''.join(parts)}</article>"


def page(title: str, tables: list[Table], report: Report, single: list[dict], worst: int = 60, best: int = 15) -> str:
    """The contact sheet: one HTML file with everything in it."""

    def quality(case: Case) -> float:
        marks = sum(case.marks().values(), [])
        return sum(marks) / len(marks)

    order = sorted(report.cases, key=quality)  # stable, and kinds take turns: equally bad ones show all kinds
    bad = [c for c in order if not c.marks()["whole"][0]][:worst]
    good = [c for c in reversed(order) if c.marks()["whole"][0] and any(t["drawn"] for t in c.turns)][:best]
    failed = sorted(single, key=lambda row: row["ok"])[: worst + best]
    cards = "<h2>The worst</h2>" + "".join(map(card, bad)) if bad else "<h2>Nothing went wrong</h2>"
    cards += "<h2>Some that are right throughout</h2>" + "".join(map(card, good)) if good else ""
    singles = "".join(figure(r["picture"], r["asked"], r["reasons"]) for r in failed)
    singles = f"<h2>Single requests, those that failed first</h2><div class=row>{singles}</div>" if failed else ""
    body = f"<h1>{html.escape(title)}</h1>{''.join(map(html_table, tables))}{cards}{singles}"
    return HEAD.replace("TITLE", html.escape(title)) + f"<style>{STYLE}</style><body>{body}</body></html>\n"


# ------------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(message)


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """(options, sampling settings that were given)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("corpus", choices=("sketchbook",))
    parser.add_argument("--ckpt", help="checkpoint: folder or Hub name; default the bundled miniature")
    for part in PARTS:
        parser.add_argument(f"--{part}", help="this part from a run, a folder or a Hub name")
    parser.add_argument("--n", type=int, default=170, help="dialogues of each split (170)")
    parser.add_argument("--seed", type=int, default=0, help="of the dialogues and of sampling (0)")
    parser.add_argument("--split", choices=(*SPLITS, "both"), default="both")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of dialogue, separated by commas; default all")
    parser.add_argument("--single", type=int, default=20, help="single requests of each category and split (20); 0: none")
    parser.add_argument("--ablations", action="store_true", help="also guidance and condition images, on fewer dialogues")
    parser.add_argument("--ablation-n", type=int, default=34, help="dialogues of each split for them (34)")
    parser.add_argument("--batch", type=int, default=64, help="dialogues in lockstep (64)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="out/eval")
    parser.add_argument("--json-line", metavar="FILE", help="append a summary to this file, one line a call")
    group = parser.add_argument_group("sampling", "these override the checkpoint's defaults")
    names = [f.name for f in fields(Settings) if f.name not in ("seed", "use_condition_images")]
    for name in names:
        kinds = typing.get_args(typing.get_type_hints(Settings)[name]) or (typing.get_type_hints(Settings)[name],)
        group.add_argument(f"--{name.replace('_', '-')}", type=next(k for k in kinds if k is not NoneType))
    group.add_argument("--no-condition-images", dest="use_condition_images", action="store_false", default=None)
    args = parser.parse_args(argv)
    for name, least in (("n", 1), ("single", 0), ("ablation_n", 1), ("batch", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {least} or more")
    args.kinds = args.kinds.split(",")
    for kind in args.kinds:
        if kind not in KINDS:
            raise InputError(f"--kinds: no kind called {kind!r}; there are {', '.join(KINDS)}")
    given = {name: getattr(args, name) for name in (*names, "use_condition_images") if getattr(args, name) is not None}
    # An answer of the corpus has 160 tokens at most; one that rambles need not be read to the checkpoint's limit.
    given = {"max_tokens": 400, **given, "seed": args.seed}
    override(Settings(), given, "sampling")  # a mistake is told before anything is loaded
    return args, given


def trained(duo: DuoGen) -> dict:
    """Step and hours of the training run that the DiT was taken from, if it was."""
    state = Path(duo.sources.get("dit", "")).parent / "state.json"
    if not state.is_file():
        return {}
    state = json.loads(state.read_text())
    return {"step": state["step"], "hours": round(state["seconds"] / 3600, 4)}


def load(args: argparse.Namespace, given: dict) -> tuple[DuoGen, Settings, int]:
    """The system, its settings, and the side of its pictures."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: no CUDA device here; use --device cpu")
    torch.set_flush_denormal(True)  # as in training: numbers near 1e-40 are as good as 0 and cost a CPU a hundred times as much
    parts = {part: training.part_folder(getattr(args, part), part) for part in PARTS if getattr(args, part)}
    duo = DuoGen.from_pretrained(args.ckpt, **parts, device=args.device)
    settings = duo.settings(**given)
    height, width = settings.height or duo.size[0], settings.width or duo.size[1]
    if height != width:
        raise InputError(f"pictures of {width} x {height}: those of sketchbook are square, give --height and --width")
    return duo, settings, height


def numbers(shares: dict) -> dict:
    """Nested shares as JSON."""
    return {k: v.to_json() if isinstance(v, Share) else numbers(v) for k, v in shares.items()}


def main(argv: list[str] | None = None) -> None:
    args, given = arguments(argv)
    duo, settings, side = load(args, given)
    began, quiet = time.perf_counter(), {"quiet": True}
    splits = list(SPLITS) if args.split == "both" else [args.split]
    records = dialogues(args.n, args.seed, splits, args.kinds, side)
    report = evaluate(duo, records, settings, batch=args.batch)
    truth = evaluate(Corpus(records), records, **quiet)
    vae = evaluate(Corpus(records, through(duo.vae, records)), records, **quiet)
    tables, single, runs = [summary_table(report, truth, vae), kinds_table(report, truth, vae)], {}, {}
    if args.single:
        asked = single_requests(args.single, args.seed, splits, side)
        single["model"] = evaluate_single(duo, asked, settings, batch=args.batch)
        single["truth"] = evaluate_single(Corpus(asked), asked, **quiet)
        single["VAE"] = evaluate_single(Corpus(asked, through(duo.vae, asked)), asked, **quiet)
        tables.append(single_table(single))
    if args.ablations:
        drawing = [k for k in args.kinds if k not in ("question", "text")] or args.kinds
        runs = ablations(duo, dialogues(args.ablation_n, args.seed, splits, drawing, side), settings, batch=args.batch)
        tables += ablation_tables(runs)

    seconds = {"dialogues": round(report.seconds, 2), "all": round(time.perf_counter() - began, 2)}
    rate = report.drawn / report.seconds
    left = Counter(c.left_out.split(":")[0] for c in report.cases if c.left_out)
    notes = [
        f"{len(records)} dialogues, {report.drawn} pictures in {report.seconds:.0f} s, {rate:.2f} a second; "
        f"{seconds['all']:.0f} s in all",
        "answers ended: " + ", ".join(f"{n} {reason}" for reason, n in report.stops.items()),
        *(f"{n} dialogues left before their end: {reason}" for reason, n in left.items()),
    ]
    text = "\n\n".join([*map(markdown, tables), "\n".join(f"* {note}" for note in notes)]) + "\n"
    versions = {m.__name__: m.__version__ for m in (torch, np, PIL)} | {"python": platform.python_version()}
    results = {
        "settings": asdict(settings),
        "options": vars(args) | {"splits": splits},
        "sources": duo.sources,
        "trained": trained(duo),
        "versions": versions | {"machine": platform.platform()},
        "seconds": seconds,
        "pictures": {"drawn": report.drawn, "per second": round(rate, 3)},
        "stops": report.stops,
        "table": {who: numbers(r.shares()) for who, r in (("model", report), ("truth", truth), ("VAE", vae))},
        "single": {who: numbers(single_shares(rows)) for who, rows in single.items()},
        "overall": {who: {s: overall(c) for s, c in single_shares(rows).items()} for who, rows in single.items()},
        "ablations": numbers(runs),
        "dialogues": [c.to_json() for c in report.cases],
        "single requests": [{k: v for k, v in row.items() if k != "picture"} for row in single.get("model", [])],
    }
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results)
    (out / "table.md").write_text(text, encoding="utf-8")
    title = f"Evaluation of {args.ckpt or 'the bundled miniature'} on {args.corpus}"
    (out / "index.html").write_text(page(title, tables, report, single.get("model", [])), encoding="utf-8")
    if args.json_line:
        line = {"ckpt": args.ckpt, **results["trained"], "n": args.n, "seed": args.seed, "seconds": seconds["dialogues"]}
        line |= report.summary() | {"single": results["overall"].get("model", {})}
        with open(args.json_line, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
    print(f"\n{text}\n{out / 'index.html'}")


if __name__ == "__main__":
    training.main(main)
