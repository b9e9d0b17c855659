"""The checker of sketchbook: says whether a picture shows what it must, and whether a text says what it must.

It knows only the picture, the picture before it and a statement of what had to happen; it works by analysis through synthesis.
`see` takes a picture apart: the page has the colour of the border, every pixel gets the nearest colour of the palette,
connected foreground is a thing, and a thing is the subject whose part map, stretched over its box, explains it best. `judge`
compares that with a check (the form is told in dialogues.py). Steps and edits are judged against the picture really shown
before them: what had to change has changed, to the right colour at the right place, and what had to stay has stayed. The
thresholds (changed core 85 %, picture kept 97 %, foreground kept 93 %) were fixed before any model was trained.

`claims` reads the statements back out of an answer's sentences, so that `judge_text` measures whether the picture fits the text
just before it, whatever the request was, and `text_complete` whether the text answers the request. All that is said before a
picture must be true of it. Sentences that say what there is are taken together: "I drew a red house. Here is a blue circle."
wants both and nothing else. Beside a step or an edit such a sentence may also speak of the picture before.

What stays tolerated, in pixels of a picture of 64 x 64:

* on the page, apart from what was there before: marks of up to 3 joined pixels, on 3 % of the page together; a tint that is
  nearer to the right page than halfway to the next; anything nearly as pale, and anything within 2 pixels of a thing
* in a thing: wrong colours along the edges of its parts, in lines one pixel wide, and in blots of up to 6 pixels or 8 % of a
  part; a silhouette that overlaps the right one in three quarters or so
* in a step: a new part up to 2 pixels astray, of up to 1.4 times its area (1.18 times as long)
* in what had to stay: the same edges and lines, spots of up to 6 pixels, 3 % of all and 7 % of the foreground together
* in a text: what is only announced ("let us draw a red house"), things without a colour, and all words after the picture

    python -m sketchbook check --n 150
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from checkpoint import InputError
from sketchbook.dialogues import KINDS, dialogue
from sketchbook.scenes import (
    BACKGROUNDS,
    COLOURS,
    OPPOSITE,
    PLACES,
    RELATIONS,
    SUBJECTS,
    Scene,
    Thing,
    extent,
    fit,
    main_part,
    outlines,
    part_map,
    relation_cells,
    render,
    small,
    touching,
    usual_colours,
)
from sketchbook.words import MOVES, NUMBERS, RELATION_WORDS, plural

CHANGED, KEPT, KEPT_FOREGROUND = 0.85, 0.97, 0.93
MATCH = 0.72                 # least score of a thing that is recognised: silhouette IoU x agreement of colours inside the parts
STAGE_MATCH = MATCH - 0.07   # least score in the picture before, where it is known what to look for

# Lengths and areas are in pixels of a picture of 64 x 64. These limits lie between what the VAE makes of true pictures and what
# a person would call wrong. They are younger than those above: they were chosen with pictures of the bundled model in sight.
THING = 14                   # least area of a thing
SPECK = 4                    # least area of a mark on the page that counts
SCATTERED = 0.03             # largest share of the page that smaller marks may cover
BLOT, BLOT_SHARE = 6, 0.08   # largest solid area in a wrong colour, and its share of a part; within either it is no fault
LARGER = 1.4                 # largest area of a new part, in shares of the area due
STAIN = 42.0                 # distance from the page in RGB at which a pixel is a mark; two pages lie 53 apart or more
TINT = 26.0                  # how far the page may be from its own colour: not halfway to another page

NAMES = list(COLOURS)
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)

# ---------------------------------------------------------------------------------------------------------------------------
# Seeing


@dataclass
class Seen:
    """One connected thing of a picture. Boxes in pixels (x0, y0, x1, y1), x1 and y1 beyond the last."""
    mask: np.ndarray
    box: tuple[int, int, int, int]
    subject: str | None = None
    drawn: int = 0
    colours: tuple = ()
    score: float = 0.0

    @property
    def colour(self) -> str | None:
        i = main_part(self.subject) if self.subject else 0
        return self.colours[i] if i < len(self.colours) else None


@dataclass
class View:
    """A picture taken apart. labels: (H, W), 0 background, 1 + i the i-th colour of the palette."""
    background: str
    labels: np.ndarray
    things: list[Seen]
    tint: float                 # how far the page is from the colour that it should have
    marks: np.ndarray           # (H, W) mask of what is neither page nor thing
    unit: float                 # pixels of this picture in one of 64


@dataclass
class Verdict:
    ok: bool
    reasons: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    stayed: bool | None = None  # whether what had to stay has; None where nothing had to, or it could not be told what

    def __bool__(self) -> bool:
        return self.ok


def grow(mask: np.ndarray, steps: int = 1) -> np.ndarray:
    """Dilation of (..., H, W) by a 3x3 square, `steps` times."""
    for _ in range(steps):
        wide = mask.copy()
        wide[..., 1:] |= mask[..., :-1]
        wide[..., :-1] |= mask[..., 1:]
        mask = wide.copy()
        mask[..., 1:, :] |= wide[..., :-1, :]
        mask[..., :-1, :] |= wide[..., 1:, :]
    return mask


def core(mask: np.ndarray, steps: int = 1) -> np.ndarray:
    """Erosion: pixels whose neighbourhood lies in the mask."""
    return ~grow(~mask, steps)


def solid(mask: np.ndarray) -> np.ndarray:
    """What of a (H, W) mask is made of squares of 2 x 2 pixels: no lone pixels, no thin lines."""
    corner = np.zeros_like(mask)
    corner[:-1, :-1] = mask[:-1, :-1] & mask[1:, :-1] & mask[:-1, 1:] & mask[1:, 1:]
    whole = corner.copy()
    whole[1:] |= corner[:-1]
    whole[:, 1:] |= whole[:, :-1].copy()
    return whole


def uniform(labels: np.ndarray) -> np.ndarray:
    """Pixels whose 3x3 neighbourhood has one label: away from antialiased edges."""
    p = np.pad(labels, 1, mode="edge")
    h, w = labels.shape
    shifts = [p[y:y + h, x:x + w] for y in range(3) for x in range(3)]
    return np.all([s == labels for s in shifts], axis=0)


def components(mask: np.ndarray, least: float) -> list[np.ndarray]:
    """8-connected components of at least `least` pixels, largest first. Joins the runs of neighbouring rows."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    runs = list(zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True))
    root = list(range(len(runs)))

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    first = 0
    for i, (y, start, stop) in enumerate(runs):
        while runs[first][0] < y - 1:
            first += 1
        for j in range(first, i):
            if runs[j][0] == y - 1 and runs[j][1] <= stop and start <= runs[j][2]:
                root[find(i)] = find(j)
    found = {}
    for i, (y, start, stop) in enumerate(runs):
        found.setdefault(find(i), np.zeros_like(mask))[y, start:stop] = True
    return sorted((m for m in found.values() if m.sum() >= least), key=lambda m: -int(m.sum()))


def label(pixels: np.ndarray, page: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels, distance from the page), both (H, W): every pixel by its nearest colour, that of the page among them."""
    distance = ((pixels - np.concatenate([page[None], PALETTE])[:, None, None]) ** 2).sum(-1)       # (1 + colours, H, W)
    # A mixed pixel of an edge takes one of the pure colours beside it: half-covered black on white is not brown.
    pure = (distance < 45.0 ** 2) & (distance == distance.min(0))
    beside = grow(pure)
    return np.where(beside | ~beside.any(0), distance, np.inf).argmin(0), np.sqrt(distance[0])


@lru_cache(20_000)
def template(subject: str, drawn: int, h: int, w: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A partial drawing stretched to h x w pixels: the mask of all, and of each part the flat indices of its core."""
    m = part_map(subject, drawn)
    rows = ((np.arange(h) + 0.5) * m.shape[0] / h).astype(int)
    columns = ((np.arange(w) + 0.5) * m.shape[1] / w).astype(int)
    m = m[rows][:, columns]
    return m >= 0, [np.flatnonzero(core(m == i)) for i in range(drawn)]


def explain(labels: np.ndarray, thing: Seen, subject: str, drawn: int) -> tuple[float, tuple]:
    """(score, colours of the parts): how well the first `drawn` parts of a subject, in any colours, explain a thing."""
    x0, y0, x1, y1 = thing.box
    h, w = y1 - y0, x1 - x0
    ex0, ey0, ex1, ey1 = extent(subject, drawn)
    if abs(np.log((w / h) / ((ex1 - ex0) / (ey1 - ey0)))) > 0.22:
        return 0.0, ()
    inside, cores = template(subject, drawn, h, w)
    mine = thing.mask[y0:y1, x0:x1]
    overlap = (inside & mine).sum() / (inside | mine).sum()
    if overlap < 0.6:
        return 0.0, ()
    window, colours, right, total = labels[y0:y1, x0:x1].ravel(), [], 0, 0
    for i in range(drawn):
        counts = np.bincount(window[cores[i]], minlength=len(NAMES) + 1)
        best = int(counts[1:].argmax())
        colours.append(NAMES[best])
        right, total = right + counts[best + 1], total + counts.sum()
    if any(j < drawn and colours[i] == colours[j] for i in range(drawn) for j in touching(subject)[i]):
        return 0.0, ()                                          # parts that touch never share a colour: one is not there
    return float(overlap * right / max(total, 1)), tuple(colours)


def blotted(view: View, thing: Seen) -> list[str]:
    """The parts of a thing with a blot of another colour. Their edges do not count, nor does a thing that is nothing known."""
    if thing.subject is None:
        return []
    x0, y0, x1, y1 = thing.box
    window = view.labels[y0:y1, x0:x1]
    found = []
    _, cores = template(thing.subject, thing.drawn, *window.shape)
    # Not strict: of an unfinished drawing only the parts so far have colours.
    for part, inner, colour in zip(SUBJECTS[thing.subject].parts, cores, thing.colours, strict=False):
        wrong = np.zeros(window.size, dtype=bool)
        wrong[inner] = window.ravel()[inner] != NAMES.index(colour) + 1
        blot = int(solid(wrong.reshape(window.shape)).sum())
        if blot > max(BLOT * view.unit ** 2, BLOT_SHARE * len(inner)):
            found.append(part.name)
    return found


def recognise(labels: np.ndarray, thing: Seen, candidates) -> Seen:
    """The thing with the best of the candidates (subject, drawn) filled in."""
    for subject, drawn in candidates:
        score, colours = explain(labels, thing, subject, drawn)
        if score > thing.score:
            thing.subject, thing.drawn, thing.colours, thing.score = subject, drawn, colours, score
    return thing


WHOLE = [(s, k) for s, subject in SUBJECTS.items() for k in range(subject.small, len(subject.parts) + 1)]
EVERY = [(s, k) for s, subject in SUBJECTS.items() for k in range(1, len(subject.parts) + 1)]


def see(image: Image.Image, candidates=None) -> View:
    """A picture taken apart; candidates: which (subject, parts drawn) to consider, default whole subjects and small forms."""
    unit = image.width / 64
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    page = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    background = min(BACKGROUNDS, key=lambda b: float(np.abs(np.array(BACKGROUNDS[b]) - page).sum()))
    labels, distance = label(pixels, page)

    things, marks = [], np.zeros(labels.shape, dtype=bool)
    for mask in components(labels > 0, 1):
        if mask.sum() < THING * unit ** 2:
            marks |= mask
            continue
        ys, xs = np.nonzero(mask)
        thing = Seen(mask, (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1))
        things.append(recognise(labels, thing, WHOLE if candidates is None else candidates))

    # The page is all that is not a thing, inside as at the border; the rim of things is mixed with them.
    taken = labels > 0
    free = ~grow(taken & ~marks, round(2 * unit))
    inside = np.median(pixels[free], axis=0) if free.any() else page
    tint = max(float(np.linalg.norm(colour - BACKGROUNDS[background])) for colour in (page, inside))
    marks |= free & (distance > STAIN)
    return View(background, labels, things, tint, marks, unit)


# ---------------------------------------------------------------------------------------------------------------------------
# Judging


def frame(thing: Seen, subject: str, drawn: int) -> tuple[float, float, float]:
    """(x, y, size) in pixels of the whole subject's frame, from the box of its first `drawn` parts."""
    x0, y0, x1, y1 = extent(subject, drawn)
    bx0, by0, bx1, by1 = thing.box
    size = ((bx1 - bx0) + (by1 - by0)) / ((x1 - x0) + (y1 - y0))
    return (bx0 + bx1) / 2 - (x0 + x1) / 2 * size, (by0 + by1) / 2 - (y0 + y1) / 2 * size, size


def region(thing: Seen, subject: str, drawn: int, part: int, shape: tuple[int, int]) -> np.ndarray:
    """Where the visible area of a part belongs, (H, W) mask, once it is drawn on the thing that has `drawn` parts."""
    x, y, size = frame(thing, subject, drawn)
    x0, y0, x1, y1 = extent(subject, max(drawn, part + 1))
    m = part_map(subject, max(drawn, part + 1)) == part
    side = size * max(x1 - x0, y1 - y0) / max(m.shape)          # pixels per point of the map
    rows = np.floor((np.arange(shape[0]) + 0.5 - y - y0 * size) / side).astype(int)
    columns = np.floor((np.arange(shape[1]) + 0.5 - x - x0 * size) / side).astype(int)
    inside = ((rows >= 0) & (rows < m.shape[0]))[:, None] & ((columns >= 0) & (columns < m.shape[1]))[None]
    return inside & m[rows.clip(0, m.shape[0] - 1)][:, columns.clip(0, m.shape[1] - 1)]


class Judge:
    """One verdict in the making."""

    def __init__(self, image: Image.Image, previous: Image.Image | None):
        self.view = see(image)
        self.before = see(previous, ()) if previous is not None else None
        self.unit = self.view.unit
        self.reasons, self.scores, self.stayed = [], {}, True
        self.clean()

    def need(self, ok, reason: str) -> bool:
        if not ok:
            self.reasons.append(reason)
        return bool(ok)

    def stay(self, ok, reason: str) -> None:
        """A need of what was there before: that it is still so."""
        self.stayed &= self.need(ok, reason)

    def clean(self) -> None:
        """The page has one colour, and nothing on it but things and what was on it before."""
        self.need(self.view.tint <= TINT, f"the page is not {self.view.background} all over")
        marks = self.view.marks
        if self.before:
            marks = marks & ~grow(self.before.marks, round(self.unit))
        specks = components(marks, SPECK * self.unit ** 2)
        self.need(not specks, f"{len(specks)} speck(s) on the page")
        self.need(marks.mean() <= SCATTERED, f"{marks.mean():.0%} of the page is dirty")

    def unblotted(self, thing: Seen, before: Sequence[str] = ()) -> None:
        """No part of a thing has a blot, but those that had one before."""
        parts = [name for name in blotted(self.view, thing) if name not in before]
        self.need(not parts, f"blots on the {' and '.join(parts)} of the {thing.subject}")

    def find(self, view: View, subject: str | None, colour: str | None = None, part: str | None = None) -> Seen | None:
        """The thing of a view that fits a subject (or has a part) and a main colour best; None if there is none."""
        names = [s for s in SUBJECTS if s == subject or (subject is None and part in [p.name for p in SUBJECTS[s].parts])]
        stages = [(s, k) for s, k in EVERY if s in names]
        fits = [recognise(view.labels, Seen(thing.mask, thing.box), stages) for thing in view.things]
        fits = [one for one in fits if one.score >= STAGE_MATCH and (colour is None or one.colour in (colour, None))]
        if len(fits) < 2:
            return fits[0] if fits else None

        def lead(one: Seen) -> float:
            # A circle looks like the head of a cat, but it looks like a circle, too; a cat looks like nothing else.
            others = [(s, k) for s, k in WHOLE if s not in names]
            return one.score - recognise(view.labels, Seen(one.mask, one.box), others).score

        return max(fits, key=lead)

    def changed(self, where: np.ndarray, name: str | None) -> None:
        """The core of a region has the colour (None: the background)."""
        inner = core(where, round(self.unit))
        inner = inner if inner.sum() >= 4 else where
        fits = self.view.labels == (NAMES.index(name) + 1 if name else 0)
        right = float(fits[inner].mean()) if inner.any() else 0.0
        self.scores["changed"] = right
        self.need(right >= CHANGED, f"the region to change is only {right:.0%} {name or 'background'}")
        blot = int(solid(inner & ~fits).sum())
        most = max(BLOT * self.unit ** 2, BLOT_SHARE * inner.sum())
        self.need(blot <= most, f"the region to change has a blot of {blot} pixels")

    def sized(self, where: np.ndarray, name: str) -> None:
        """A new part, wherever it came to lie, is not larger than the region due."""
        colour = NAMES.index(name) + 1
        new = (self.view.labels == colour) & (self.before.labels != colour)
        # Its own enlargement is within reach of the region, other news are not.
        area = float((new & grow(where, round(5 * self.unit))).sum() / max(1, where.sum()))
        self.scores["area"] = area
        self.need(area <= LARGER, f"the new part is {area:.1f} times as large as it should be")

    def kept(self, apart: np.ndarray, margin: float = 2.0) -> None:
        """Everything but the region `apart` and a margin about it is as before; edges do not count."""
        before, after = self.before.labels, self.view.labels
        fixed = uniform(before) & ~grow(apart, round(margin * self.unit))
        same = before == after
        for key, where, least in (("kept", fixed, KEPT), ("kept foreground", fixed & (before > 0), KEPT_FOREGROUND)):
            score = float(same[where].mean()) if where.any() else 1.0
            self.scores[key] = score
            self.stay(score >= least, f"{key}: only {score:.0%}")
        spot = int(solid(fixed & ~same).sum())                  # a small solid change hides in a percentage
        self.scores["spot"] = spot
        self.stay(spot <= BLOT * self.unit ** 2, f"something else changed ({spot} pixels)")

    def page(self, check: dict) -> None:
        wanted = check.get("background")
        self.need(wanted in (None, self.view.background), f"the background is {self.view.background}, not {wanted}")

    def same_page(self) -> None:
        self.stay(self.view.background == self.before.background,
                  f"the background became {self.view.background} from {self.before.background}")

    def verdict(self) -> Verdict:
        return Verdict(not self.reasons, self.reasons, self.scores, self.stayed if "kept" in self.scores else None)

    # -- one method for each op

    def scene(self, check: dict) -> None:
        self.scenes([check])

    def scenes(self, checks: list[dict]) -> None:
        """Every check holds, and there is nothing that none of them names."""
        named = []
        for check in checks:
            things, reasons = self.shown(self.view, check)
            named += things
            self.reasons += reasons
        left = [t for t in self.view.things if all(t.mask is not n.mask for n in named)]
        self.need(not left, f"{len(left)} thing(s) too many: " + ", ".join(f"{t.colour} {t.subject}" for t in left))
        self.scores["match"] = min((t.score for t in self.view.things), default=0.0)

    def remark(self, check: dict, previous: Image.Image | None) -> None:
        """A scene told beside a step or an edit is there, among other things, or was there before."""
        reasons = self.shown(self.view, check)[1]
        if reasons and previous is not None:
            reasons = self.shown(see(previous), check)[1] and reasons
        self.reasons += reasons

    def shown(self, view: View, check: dict) -> tuple[list[Seen], list[str]]:
        """The things of a view that a scene names, and what is wrong with them."""
        reasons = []

        def need(ok, reason: str) -> None:
            if not ok:
                reasons.append(reason)

        wanted = check.get("background")
        need(wanted in (None, view.background), f"the background is {view.background}, not {wanted}")
        objects = check.get("objects") or []
        left, named, first = list(view.things), [], {}
        for k, o in sorted(enumerate(objects), key=lambda item: item[1].get("colour") is None):
            if "drawn" in o:                                    # a stage of a drawing that need not be a whole thing
                left = [self.at_stage(t, o["subject"], o["drawn"]) for t in left]
            fits = [t for t in left if t.subject == o["subject"] and t.score >= MATCH and o.get("colour") in (None, t.colour)]
            count = o.get("count", 1)
            need(len(fits) >= count, f"{count} {o.get('colour') or ''} {o['subject']} expected, {len(fits)} found")
            fits = fits[:count]
            for t in fits:
                names = [p.name for p in SUBJECTS[t.subject].parts]
                for name, colour in (o.get("parts") or {}).items():
                    i = names.index(name) if name in names else len(names)
                    need(i < t.drawn and t.colours[i] == colour, f"the {name} is not {colour}")
                dirty = blotted(view, t)
                need(not dirty, f"blots on the {' and '.join(dirty)} of the {t.subject}")
            left = [t for t in left if all(t is not f for f in fits)]
            named += fits
            if fits:
                first[k] = fits[0]
        for i, word, j in check.get("relations") or []:
            if i in first and j in first:
                a, b = first[i], first[j]
                need(stands(a, word, b, self.unit), f"the {a.subject} is not {word} of the {b.subject}")
        return named, reasons

    def at_stage(self, thing: Seen, subject: str, drawn: int) -> Seen:
        """The thing read as a stage of a drawing, where that explains it about as well as anything."""
        other = recognise(self.view.labels, Seen(thing.mask, thing.box), [(subject, drawn)])
        return other if other.score >= max(MATCH, thing.score - 0.05) else thing

    def start(self, check: dict) -> None:
        subject = check["subject"]
        self.page(check)
        if not self.need(len(self.view.things) == 1, f"{len(self.view.things)} things instead of one"):
            return
        thing = recognise(self.view.labels, Seen(self.view.things[0].mask, self.view.things[0].box), [(subject, 1)])
        self.scores["match"] = thing.score
        if self.need(thing.score >= 0.82, f"it does not look like the {check['part']} of a {subject} ({thing.score:.2f})"):
            self.need(thing.colours[0] == check["colour"], f"the {check['part']} is {thing.colours[0]}, not {check['colour']}")
            self.unblotted(thing)
            x, y, size = frame(thing, subject, 1)
            x0, y0, x1, y1 = (v * size for v in extent(subject, len(SUBJECTS[subject].parts)))
            side, slack = self.view.labels.shape[0], 3 * self.unit
            self.need(x + x0 > -slack and y + y0 > -slack and x + x1 < side + slack and y + y1 < side + slack,
                      "the rest of the drawing has no room")
            self.need(size > 30 * self.unit, "too small to go on")

    def part(self, check: dict) -> None:
        part, subject = check["part"], check.get("subject")
        self.same_page()
        thing = self.find(self.before, subject, None, part)
        if not self.need(thing is not None, f"no {subject or 'fitting subject'} in the picture before"):
            return
        subject = thing.subject
        names = [p.name for p in SUBJECTS[subject].parts]
        if not self.need(part in names, f"a {subject} has no {part}"):
            return
        index = names.index(part)
        if index and thing.drawn != index:                      # the picture before is read as it must have been
            again = recognise(self.before.labels, Seen(thing.mask, thing.box), [(subject, index)])
            if not self.need(again.score >= STAGE_MATCH, f"the picture before is not a {subject} that waits for its {part}"):
                return
            thing = again
        where = region(thing, subject, thing.drawn, index, self.view.labels.shape)
        self.changed(where, check["colour"])
        self.sized(where, check["colour"])
        self.kept(where)
        self.need(len(self.view.things) == len(self.before.things), "the new part does not belong to the drawing")

    def recolour(self, check: dict) -> None:
        self.same_page()
        thing = self.find(self.before, check.get("subject"), check.get("was"), check.get("part"))
        if not self.need(thing is not None, f"no {check.get('subject') or check.get('part')} in the picture before"):
            return
        names = [p.name for p in SUBJECTS[thing.subject].parts]
        index = names.index(check["part"]) if check.get("part") in names else main_part(thing.subject)
        if not self.need(index < thing.drawn, f"the {thing.subject} has no {check['part']}"):
            return
        # the part is what has its colour near where it belongs, so that no margin is wanted
        near = grow(region(thing, thing.subject, thing.drawn, index, self.view.labels.shape), round(2 * self.unit))
        where = near & thing.mask & (self.before.labels == NAMES.index(thing.colours[index]) + 1)
        self.changed(where, check["colour"])
        self.kept(where, 1.0)
        # a small part weighs little among the pixels kept, so each of the others is looked at
        for i in set(range(thing.drawn)) - {index}:
            area = region(thing, thing.subject, thing.drawn, i, self.view.labels.shape)
            area &= self.before.labels == NAMES.index(thing.colours[i]) + 1
            same = float((self.view.labels[area] == self.before.labels[area]).mean()) if area.any() else 1.0
            self.stay(same >= 0.6, f"the {names[i]} changed as well")

    def remove(self, check: dict) -> None:
        self.same_page()
        thing = self.find(self.before, check.get("subject"), check.get("colour"))
        if self.need(thing is not None, f"no {check.get('subject')} in the picture before"):
            self.changed(thing.mask, None)
            self.kept(thing.mask)
            self.need(len(self.view.things) == len(self.before.things) - 1, "not one thing fewer")

    def add(self, check: dict) -> None:
        self.same_page()
        new = [t for t in self.view.things if not (t.mask & (self.before.labels > 0)).sum() > 0.3 * t.mask.sum()]
        if not self.need(len(new) == 1, f"{len(new)} new things instead of one"):
            return
        thing = new[0]
        self.need(thing.score >= MATCH and thing.subject == check["subject"], f"the new thing is a {thing.subject}")
        self.need(thing.colour == check["colour"], f"the new thing is {thing.colour}, not {check['colour']}")
        self.unblotted(thing)
        self.kept(thing.mask)
        anchor = self.find(self.before, check.get("anchor"))
        if check.get("relation") and self.need(anchor is not None, f"no {check.get('anchor')} in the picture before"):
            self.need(stands(thing, check["relation"], anchor, self.unit), f"it is not {check['relation']} of the other")

    def move(self, check: dict) -> None:
        self.same_page()
        old = self.find(self.before, check.get("subject"), check.get("colour"))
        new = self.find(self.view, check.get("subject"), check.get("colour"))
        if not (self.need(old is not None, f"no {check.get('subject')} in the picture before")
                and self.need(new is not None, f"no {check.get('subject')} any more")):
            return
        self.stay(new.colours == old.colours, "its colours changed")
        self.unblotted(new, blotted(self.before, old))
        self.stay(len(self.view.things) == len(self.before.things), "the number of things changed")
        x0, y0, x1, y1 = new.box
        ox0, oy0, ox1, oy1 = old.box
        side = self.view.labels.shape[0]
        gap, drift = {"left": (x0, y0 - oy0), "right": (side - x1, y0 - oy0), "top": (y0, x0 - ox0),
                      "bottom": (side - y1, x0 - ox0)}[check["to"]]
        self.scores.update(gap=gap / self.unit, drift=drift / self.unit)
        self.need(gap <= 8 * self.unit, f"it is not at the {check['to']}")
        self.stay(abs(drift) <= 4 * self.unit, "it drifted sideways")
        self.stay(abs(np.log((x1 - x0) * (y1 - y0) / ((ox1 - ox0) * (oy1 - oy0)))) < 0.25, "its size changed")
        self.kept(old.mask | new.mask)

    def background(self, check: dict) -> None:
        self.page(check)
        self.kept(np.zeros_like(self.view.labels, dtype=bool))  # no object may change


def stands(a: Seen, word: str, b: Seen, unit: float = 1.0) -> bool:
    """Whether a lies wholly left of, right of, above or below b (two pixels of 64 may overlap)."""
    if word in ("right", "below"):
        return stands(b, OPPOSITE[word], a, unit)
    return a.box[2] <= b.box[0] + 2 * unit if word == "left" else a.box[3] <= b.box[1] + 2 * unit


def whole_scene(scene: Scene) -> dict:
    """The check that demands everything of a scene but places and sizes."""
    groups = {}
    for t in scene.things:
        parts = {p.name: c for p, c in zip(SUBJECTS[t.subject].parts[:t.drawn], t.colours[:t.drawn], strict=True)}
        colour = t.main if main_part(t.subject) < t.drawn else None
        one = {"subject": t.subject, "colour": colour, "count": 0, "parts": parts, "drawn": t.drawn}
        groups.setdefault((t.subject, t.drawn, t.colours), one)["count"] += 1
    return {"op": "scene", "objects": list(groups.values()), "background": scene.background}


def judge(image: Image.Image, check: dict, previous: Image.Image | None = None) -> Verdict:
    """Whether a picture shows what a check, or an entry of truth["images"], demands of it.

    An entry without a check (a picture of the user) demands its whole scene, places and sizes apart. previous: the picture
    really shown before it; steps and edits need it. Raises InputError without it or on an unknown op.
    """
    if "op" not in check and "scene" in check:
        check = check.get("check") or whole_scene(Scene.from_json(check["scene"]))
    if not check or check.get("op") not in ("scene", "start", "part", "recolour", "remove", "add", "move", "background"):
        raise InputError(f"nothing to check a picture against: {check!r}")
    if previous is None and check["op"] not in ("scene", "start"):
        raise InputError(f"a {check['op']} is judged against the picture before it; pass previous=")
    court = Judge(image, previous if check["op"] not in ("scene", "start") else None)
    getattr(court, check["op"])(check)
    return court.verdict()


# ---------------------------------------------------------------------------------------------------------------------------
# Reading


COLOUR = "|".join(NAMES)
PAGE = "|".join(BACKGROUNDS)
SUBJECT_WORDS = {w: s for s in SUBJECTS for w in (s, plural(s))}
PART_WORDS = sorted({p.name for s in SUBJECTS.values() for p in s.parts if p.name not in SUBJECTS}, key=len, reverse=True)
SUBJECT = "|".join(sorted(SUBJECT_WORDS, key=len, reverse=True))
PART = "|".join(PART_WORDS)
NUMBER = "|".join(NUMBERS[1:])
RELATION = {phrase: word for word, phrases in RELATION_WORDS.items() for phrase in phrases}
SUBJECTS_WITH = {p: [s for s in SUBJECTS if p in [q.name for q in SUBJECTS[s].parts]] for p in PART_WORDS}

# "three red cats", "a blue door", "the cup in green"
MENTION = re.compile(
    rf"\b(?:(?P<number>an?|the|{NUMBER}) )?"
    rf"(?:(?P<colour>{COLOUR}) )?"
    rf"(?:(?P<subject>{SUBJECT})|(?P<part>{PART}))\b"
    rf"(?: in (?P<paint>{COLOUR})\b)?"
)
# "the red car is now blue", "the roof of the house green"; not "the car red roof": that colour is the roof's
TURNED = re.compile(
    rf"\bthe (?:(?P<was>{COLOUR}) )?"
    rf"(?:(?P<subject>{SUBJECT})|(?P<part>{PART})(?: of the (?P<owner>{SUBJECT}))?) "
    rf"(?:(?:is|are) )?(?:now )?"
    rf"(?P<colour>{COLOUR})\b(?! (?:{SUBJECT}|{PART})\b)"
)
ON_PAGE = re.compile(rf"\b({PAGE}) (?:background|paper|page)\b|\bbackground (?:is )?(?:now )?({PAGE})\b")
ANY_COLOUR = re.compile(rf"\b({COLOUR})\b")
ANY_SUBJECT = re.compile(rf"\b({SUBJECT})\b")
# "This is how you draw a red house", "let's draw a red house", "I will draw a red house": not yet, and maybe not here.
ANNOUNCED = re.compile(r"\b(?:how|let us|lets?|ll|will|shall|want|can|going to|like to|step)\b")
STEP = re.compile(rf"\b(?:draw|start|paint|put|add|place)\b.*\b(?:for|as) the ({PART})\b")
REMOVED = re.compile(r"\b(?:removed|gone|took|without|erased)\b")
ADDED = re.compile(r"\b(?:added|put|now there is)\b")
RELATED = re.compile("|".join(sorted(RELATION, key=len, reverse=True)))
# "to the left", but not "to the left of the house"
MOVED = {side: re.compile(rf"\b(?:{'|'.join([*ways, at])})\b(?! of)") for side, (ways, at) in MOVES.items()}


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[^a-z ]", " ", text.lower())).strip()


def subject_of(context: str, part: str) -> str | None:
    """The subject last named in the context that has the part, or the only one there is."""
    named = [SUBJECT_WORDS[word] for word in ANY_SUBJECT.findall(plain(context))]
    owners = SUBJECTS_WITH[part]
    return next((s for s in reversed(named) if s in owners), owners[0] if len(owners) == 1 else None)


def claims(text: str, context: str = "") -> list[dict]:
    """The checks that an answer's sentences state, in order; context: the words said before (for "the roof": of what?)."""
    found = []
    for one in re.split(r"(?<=[.!?])\s+|\n", text):
        claim = claim_of(plain(re.sub(r"^step \w+:?", "step", one.strip(), flags=re.IGNORECASE)), context)
        if claim:
            found.append(claim)
    return found


class Mention(NamedTuple):
    """A thing or a part that a sentence names."""
    number: str | None      # "a", "the" or a number
    colour: str | None      # said before it: "a red house"
    subject: str | None     # this
    part: str | None        # or that
    paint: str | None       # a colour said after it: "the house in red"


@dataclass
class Said:
    """A plain sentence and what it names."""
    words: str              # without those for the page
    context: str            # everything said before
    background: str | None
    mentions: list[Mention]

    @property
    def things(self) -> list[Mention]:
        return [m for m in self.mentions if m.subject]


def understood(words: str, context: str) -> Said:
    """The page first: its colour is no colour of a thing, so that its words are taken out before things are looked for."""
    background = None
    page = ON_PAGE.search(words)
    if page:
        background = page[1] or page[2]
    for name, place in PLACES.items():
        if place in words:
            background = name
    if page:
        words = words[:page.start()] + words[page.end():]

    mentions = [Mention(**match.groupdict()) for match in MENTION.finditer(words)]
    mentions = [m._replace(subject=SUBJECT_WORDS[m.subject]) if m.subject else m for m in mentions]
    return Said(words, context, background, mentions)


def claim_of(words: str, context: str) -> dict | None:
    """The check that one plain sentence states; the first reading that makes sense of it counts."""
    said = understood(words, context)
    for reading in (
        claim_step, claim_background, claim_removed, claim_moved, claim_recoloured, claim_new_part, claim_added, claim_scene,
    ):
        claim = reading(said)
        if claim:
            return claim
    return None


def claim_step(said: Said) -> dict | None:
    """A step of a lesson: "draw a red square in the middle for the walls"."""
    step = STEP.search(said.words)
    colour = ANY_COLOUR.search(said.words)
    # "I put a red cat ..." tells of an edit.
    if not step or not colour or said.words.startswith("i "):
        return None
    part = step[1]
    subject = subject_of(said.context, part)
    claim = {"op": "part", "subject": subject, "part": part, "colour": colour[1]}
    # With its first part a drawing begins, and so does its page.
    if subject and SUBJECTS[subject].parts[0].name == part:
        claim |= {"op": "start", "background": said.background}
    return claim


def claim_background(said: Said) -> dict | None:
    """A page and nothing on it: "now the background is grey"."""
    if not said.background or said.mentions:
        return None
    return {"op": "background", "background": said.background}


def claim_removed(said: Said) -> dict | None:
    """"The red car is gone"."""
    if not said.things or not REMOVED.search(said.words):
        return None
    thing = said.things[0]
    return {"op": "remove", "subject": thing.subject, "colour": thing.colour}


def claim_moved(said: Said) -> dict | None:
    """"The car is at the top now"; with a page it is a scene in which the thing merely stands there."""
    if not said.things or said.background:
        return None
    to = next((side for side, phrases in MOVED.items() if phrases.search(said.words)), None)
    if not to:
        return None
    thing = said.things[0]
    return {"op": "move", "subject": thing.subject, "to": to, "colour": thing.colour}


def claim_recoloured(said: Said) -> dict | None:
    """"The roof is green now"."""
    turned = TURNED.search(said.words)
    if not turned:
        return None
    part = turned["part"]
    if turned["subject"]:
        # A thing that turns red is one whose main part does.
        subject = SUBJECT_WORDS[turned["subject"]]
        part = SUBJECTS[subject].parts[main_part(subject)].name
    elif turned["owner"]:
        subject = SUBJECT_WORDS[turned["owner"]]
    else:
        subject = subject_of(said.context, part)
    return {"op": "recolour", "subject": subject, "was": turned["was"], "part": part, "colour": turned["colour"]}


def claim_new_part(said: Said) -> dict | None:
    """A coloured part of the one thing named, which was there before: "now the house has a blue door"."""
    parts = [m for m in said.mentions if m.part and m.colour]
    if len(parts) != 1 or len(said.things) != 1:
        return None
    thing, part = said.things[0], parts[0]
    # "A house with a blue door" and "the red house with a blue door" are whole scenes.
    if thing.number != "the" or thing.colour or thing.paint:
        return None
    return {"op": "part", "subject": thing.subject, "part": part.part, "colour": part.colour}


def claim_added(said: Said) -> dict | None:
    """"Now there is a red car left of the house"."""
    relation = RELATED.search(said.words)
    if not relation or len(said.things) != 2 or not ADDED.search(said.words):
        return None
    new, anchor = said.things
    return {"op": "add", "subject": new.subject, "colour": new.colour, "relation": RELATION[relation[0]],
            "anchor": anchor.subject}


def claim_scene(said: Said) -> dict | None:
    """A whole picture: "here is a red car with black wheels above two yellow fish on blue paper"."""
    # A thing without a colour is one that is spoken of, not shown.
    if not said.things or not (said.things[0].colour or said.things[0].paint):
        return None
    if ANNOUNCED.search(said.words):
        return None
    objects = []
    for m in said.mentions:
        if m.subject:
            count = NUMBERS.index(m.number) if m.number in NUMBERS else 1
            objects.append({"subject": m.subject, "colour": m.colour or m.paint, "count": count, "parts": {}})
        elif objects and m.colour:
            # A part belongs to the thing named last.
            objects[-1]["parts"][m.part] = m.colour
    relation = RELATED.search(said.words)
    relations = [[0, RELATION[relation[0]], 1]] if relation and len(objects) == 2 else []
    return {"op": "scene", "objects": objects, "relations": relations, "background": said.background}


def judge_text(image: Image.Image, text: str, previous: Image.Image | None = None, context: str = "") -> Verdict:
    """Whether a picture shows all that the text just before it claims; context: everything said before that text."""
    stated = claims(text, context)
    if not stated:
        return Verdict(False, [f"the text states nothing about the picture: {text!r}"])
    if previous is None and any(claim["op"] == "scene" for claim in stated):
        # "Here is a red house. The background is grey." tells of one picture: there is none to change.
        stated = [claim | {"op": "scene"} if claim["op"] == "background" else claim for claim in stated]
    scenes = [claim for claim in stated if claim["op"] == "scene"]
    changes = [claim for claim in stated if claim["op"] != "scene"]
    builds = [claim for claim in changes if claim["op"] != "start"]
    if builds and previous is None:
        return Verdict(False, [f"a {builds[0]['op']} without a picture before it"])
    court = Judge(image, previous if builds else None)
    for claim in changes:
        getattr(court, claim["op"])(claim)
    if changes:
        for claim in scenes:
            court.remark(claim, previous)
    else:
        court.scenes(scenes)
    return court.verdict()


def states(claim: dict, need: dict) -> bool:
    """Whether a claim contains everything that is needed."""
    if need["op"] == "scene":
        return claim["op"] == "scene" and states_scene(claim, need)
    # "The car" will do for the red one.
    vague = {"subject", "was", "anchor"}
    if need["op"] == "remove":
        vague.add("colour")
    return all(claim.get(key) == value or (key in vague and claim.get(key) is None) for key, value in need.items())


def states_scene(claim: dict, need: dict) -> bool:
    # Each object needed takes the first of the claim that fits and is not taken yet.
    chosen = []
    for wanted in need["objects"]:
        free = (i for i in range(len(claim["objects"])) if i not in chosen)
        i = next((i for i in free if states_object(claim["objects"][i], wanted)), None)
        if i is None:
            return False
        chosen.append(i)
    # "A left of B" is also said by "B right of A".
    stated = {tuple(relation) for relation in claim["relations"]}
    for i, word, j in need.get("relations") or []:
        first, second = chosen[i], chosen[j]
        if not {(first, word, second), (second, OPPOSITE[word], first)} & stated:
            return False
    return need.get("background") in (None, claim["background"])


def states_object(stated: dict, wanted: dict) -> bool:
    if (stated["subject"], stated["count"]) != (wanted["subject"], wanted["count"]):
        return False
    if wanted["colour"] not in (None, stated["colour"]):
        return False
    return wanted["parts"].items() <= stated["parts"].items()


def text_complete(turn: dict, texts: list[str], context: str = "") -> bool:
    """Whether the texts of an answer (split at its pictures) say everything that the request of truth["turns"] asks for."""
    for need in turn["need"]:
        if need["op"] == "lesson":
            stated = lesson_told(need, texts, context)
        else:
            stated = any(states(claim, need) for text in texts for claim in claims(text, context))
        if not stated:
            return False
    words = f" {plain(' '.join(texts))} "
    has_all = all(has_any(words, wanted) for wanted in turn["words"])
    return has_all and not any(has_any(words, unwanted) for unwanted in turn.get("avoid", ()))


def lesson_told(need: dict, texts: list[str], context: str) -> bool:
    """Whether the steps name the parts of the subject in their order, as many as asked for, in the colours and on the page
    that the request gave."""
    subject = need["subject"]
    stated = [claim for text in texts for claim in claims(text, f"{context} {subject}")]
    steps = [claim for claim in stated if claim["op"] in ("start", "part")]
    if [step["part"] for step in steps] != [part.name for part in SUBJECTS[subject].parts[:need["steps"]]]:
        return False
    if need["background"] not in (None, steps[0].get("background")):
        return False
    return need["colours"].items() <= {step["part"]: step["colour"] for step in steps}.items()


def has_any(words: str, wanted: str | list[str]) -> bool:
    """Whether a plain text with spaces about it has a word, or any one of several."""
    options = [wanted] if isinstance(wanted, str) else wanted
    return any(f" {option} " in words for option in options)


def expected_images(turn: dict) -> tuple[int, int]:
    """(least, most) pictures due in an answer."""
    return tuple(turn["images"])


# ---------------------------------------------------------------------------------------------------------------------------
# The checker checked


def spoilt(scene: Scene, check: dict, before: Scene | None, rng: random.Random) -> list[tuple[str, Scene]]:
    """(what is wrong, scene): pictures that differ from what the check demands in one attribute."""
    spoiler = Spoiler(scene, check, before, rng)
    return spoiler.whole() if check["op"] == "scene" else getattr(spoiler, check["op"])()


class Spoiler:
    """Makes wrong pictures out of a right one: helpers that change one attribute, then a method for each op."""

    def __init__(self, scene: Scene, check: dict, before: Scene | None, rng: random.Random):
        self.scene, self.check, self.before, self.rng = scene, check, before, rng
        self.last = len(scene.things) - 1
        # Parts of the thing drawn last; a page that was emptied has none.
        self.names = [part.name for part in SUBJECTS[scene.things[-1].subject].parts] if scene.things else []

    def swap(self, i: int, thing: Thing | None) -> Scene:
        """Another thing in place of the i-th, or none."""
        things = (*self.scene.things[:i], thing, *self.scene.things[i + 1:])
        return replace(self.scene, things=tuple(t for t in things if t))

    def painted(self, i: int, part: int) -> Scene:
        """A part in another colour, one that no part beside it has."""
        thing = self.scene.things[i]
        taken = {thing.colours[part]} | {thing.colours[j] for j in touching(thing.subject)[part]}
        colour = self.rng.choice([c for c in COLOURS if c not in taken])
        return self.swap(i, replace(thing, colours=(*thing.colours[:part], colour, *thing.colours[part + 1:])))

    def painted_whole(self, i: int) -> Scene:
        return self.painted(i, main_part(self.scene.things[i].subject))

    def other(self, i: int) -> Scene:
        """Another subject, of the same colour, size and place."""
        thing = self.scene.things[i]
        x0, y0, x1, y1 = thing.box
        length = max(x1 - x0, y1 - y0)
        subject = self.rng.choice([s for s in SUBJECTS if s != thing.subject])
        drawn = SUBJECTS[subject].small if length < 32 else len(SUBJECTS[subject].parts)
        return self.swap(i, fit(subject, drawn, usual_colours(subject, thing.main), length, *thing.centre))

    def other_page(self) -> Scene:
        pages = {self.scene.background} | ({self.before.background} if self.before else set())
        return replace(self.scene, background=self.rng.choice([b for b in BACKGROUNDS if b not in pages]))

    def shifted(self) -> Scene:
        """The first thing five units away, towards the middle."""
        thing = self.scene.things[0]
        dx = 5 if thing.centre[0] < 32 else -5
        return self.swap(0, replace(thing, x=thing.x + dx))

    def exchanged(self) -> Scene:
        """Two things, each at the other's place."""
        things = []
        for thing, there in zip(self.scene.things, reversed(self.scene.things), strict=True):
            x = round(thing.x + there.centre[0] - thing.centre[0], 2)
            y = round(thing.y + there.centre[1] - thing.centre[1], 2)
            things.append(replace(thing, x=x, y=y))
        return replace(self.scene, things=tuple(things))

    # -- one method for each op

    def whole(self) -> list[tuple[str, Scene]]:
        i = self.rng.randrange(len(self.scene.things))
        wrong = [("colour", self.painted_whole(i)), ("subject", self.other(i))]
        parts = sorted(self.check["objects"][-1]["parts"])
        if parts:
            wrong.append(("part colour", self.painted(self.last, self.names.index(self.rng.choice(parts)))))
        if self.last:
            wrong.append(("count", self.swap(i, None)))
        if self.check["relations"]:
            wrong.append(("relation", self.exchanged()))
        if self.check.get("background"):
            wrong.append(("background", self.other_page()))
        return wrong

    def start(self) -> list[tuple[str, Scene]]:
        new = self.names.index(self.check["part"])
        return [("colour", self.painted(self.last, new)), ("subject", self.other(self.last))]

    def part(self) -> list[tuple[str, Scene]]:
        thing = self.scene.things[-1]
        new = self.names.index(self.check["part"])
        wrong = [("colour", self.painted(self.last, new))]
        # One part too many; a finished drawing loses its last two instead.
        drawn = thing.drawn + 1 if thing.drawn < len(self.names) else max(1, thing.drawn - 2)
        wrong.append(("too much", self.swap(self.last, replace(thing, drawn=drawn))))
        old = self.rng.choice([i for i in range(thing.drawn) if i != new])
        wrong.append(("other part", self.painted(self.last, old)))
        wrong.append(("shifted", self.shifted()))
        return wrong

    def recolour(self) -> list[tuple[str, Scene]]:
        # Which part of which thing has changed is read off the scene before.
        i = next(k for k, thing in enumerate(self.scene.things) if thing != self.before.things[k])
        thing, old = self.scene.things[i], self.before.things[i]
        part = next(k for k, colour in enumerate(thing.colours) if colour != old.colours[k])
        wrong = [("colour", self.painted(i, part))]
        if thing.drawn > 1:
            rest = [k for k in range(thing.drawn) if k != part]
            wrong.append(("other part", self.painted(i, self.rng.choice(rest))))
        if self.last:
            rest = [k for k in range(self.last + 1) if k != i]
            wrong.append(("other thing", self.painted_whole(self.rng.choice(rest))))
        wrong.append(("shifted", self.shifted()))
        return wrong

    def remove(self) -> list[tuple[str, Scene]]:
        gone = next(thing for thing in self.before.things if thing not in self.scene.things)
        things = self.before.things
        rest = things[1:] if things[0] != gone else things[:-1]
        return [("wrong one", replace(self.before, things=rest)), ("kept colour", self.painted_whole(0))]

    def add(self) -> list[tuple[str, Scene]]:
        return [
            ("colour", self.painted_whole(self.last)),
            ("subject", self.other(self.last)),
            ("kept colour", self.painted_whole(0)),
            ("shifted", self.shifted()),
        ]

    def background(self) -> list[tuple[str, Scene]]:
        return [
            ("background", self.other_page()),
            ("kept colour", self.painted_whole(self.last)),
            ("shifted", self.shifted()),
        ]

    def move(self) -> list[tuple[str, Scene]]:
        thing, old = self.scene.things[-1], self.before.things[0]
        halfway = replace(thing, x=(thing.x + old.x) / 2, y=(thing.y + old.y) / 2)
        return [("kept colour", self.painted_whole(self.last)), ("place", replace(self.scene, things=(halfway,)))]


# Figures whose first part, drawn alone, looks like a shape.
LOOKALIKES = (("cat", "circle"), ("castle", "square"), ("cup", "square"), ("flower", "circle"))


class Forger:
    """Makes wrong pictures out of a right one that are wrong in their pixels; None where a kind makes no sense."""

    def __init__(self, scene: Scene, image: Image.Image, check: dict, previous: Image.Image | None, rng: random.Random):
        self.scene, self.image, self.check, self.previous, self.rng = scene, image, check, previous, rng
        self.size = image.width
        self.unit = self.size / 64

    def every(self) -> Iterator[tuple[str, Image.Image | None]]:
        yield "border only right", self.border_only()
        yield "one speck", self.specks(1)
        yield "eight specks", self.specks(8)
        yield "main part 15 % blot", self.blot(0.15)
        yield "main part 30 % blot", self.blot(0.30)
        yield "main part 30 % edge", self.blot(0.30, edge=True)
        yield "new part 1.3x", self.larger(1.3)
        yield "blank picture", render(Scene(self.scene.background), self.size)

    def border_only(self) -> Image.Image | None:
        """Another page, but for the outermost pixels."""
        if not self.previous and not self.check.get("background"):
            return None
        other = self.rng.choice([b for b in BACKGROUNDS if b != self.scene.background])
        wrong = render(replace(self.scene, background=other), self.size)
        framed = self.image.copy()
        framed.paste(wrong.crop((1, 1, self.size - 1, self.size - 1)), (1, 1))
        return framed

    def specks(self, number: int) -> Image.Image | None:
        """Squares of 3 x 3, well away from things and from each other."""
        pixels = np.asarray(self.image).copy()
        side = round(3 * self.unit)
        taken = grow((pixels != BACKGROUNDS[self.scene.background]).any(-1), round(4 * self.unit))
        for _ in range(number):
            room = np.argwhere(core(~taken, side)[side:-side, side:-side]) + side
            if not len(room):
                return None
            y, x = self.rng.choice(room.tolist())
            pixels[y:y + side, x:x + side] = COLOURS[self.rng.choice(NAMES)]
            taken[y - side:y + 2 * side, x - side:x + 2 * side] = True
        return Image.fromarray(pixels)

    def blot(self, share: float, edge: bool = False) -> Image.Image | None:
        """So much of a main part in another colour, about a point of it or along an edge."""
        painted = [i for i, t in enumerate(self.scene.things) if main_part(t.subject) < t.drawn]
        if not painted:
            return None
        spoiler = Spoiler(self.scene, self.check, None, self.rng)
        wrong = np.asarray(render(spoiler.painted_whole(self.rng.choice(painted)), self.size))
        pixels = np.asarray(self.image).copy()
        ys, xs = np.nonzero((pixels != wrong).any(-1))
        k = self.rng.randrange(len(ys))
        distance = self.rng.choice((xs, ys, -xs, -ys)) if edge else (xs - xs[k]) ** 2 + (ys - ys[k]) ** 2
        some = np.argsort(distance, kind="stable")[:round(share * len(ys))]
        pixels[ys[some], xs[some]] = wrong[ys[some], xs[some]]
        return Image.fromarray(pixels)

    def larger(self, factor: float) -> Image.Image | None:
        """The part drawn last, so many times as long and as wide about its middle."""
        if self.check["op"] != "part":
            return None
        thing = self.scene.things[-1]
        new = thing.drawn - 1
        without = replace(self.scene, things=(*self.scene.things[:-1], replace(thing, drawn=new)))
        image = render(without, 4 * self.size)
        pen = ImageDraw.Draw(image)
        shapes = outlines(thing.subject)[new]
        points = np.concatenate(shapes)
        middle = (points.min(0) + points.max(0)) / 2
        for shape in shapes:
            at = (middle + factor * (shape - middle)) * thing.size + (thing.x, thing.y)
            pen.polygon((4 * self.unit * at - 0.5).ravel().tolist(), fill=COLOURS[thing.colours[new]])
        return image.reduce(4)


def worn(image: Image.Image, rng: np.random.Generator, sigma: float = 8.0) -> Image.Image:
    """The picture as an autoencoder may give it back: slightly blurred, with Gaussian noise."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.5)), dtype=np.float32)
    return Image.fromarray((pixels + rng.normal(0, sigma, pixels.shape)).clip(0, 255).astype(np.uint8))


class Trial(NamedTuple):
    """A picture and what it is held against."""
    what: str                   # "truth", "worn", ...
    image: Image.Image
    check: dict
    previous: Image.Image | None
    text: str | None = None     # held against these words instead of the check
    context: str = ""

    def accepted(self) -> bool:
        if self.text is None:
            return judge(self.image, self.check, self.previous).ok
        return judge_text(self.image, self.text, self.previous, self.context).ok


def error_rates(n: int = 150, seed: int = 0, size: int = 64, progress=None, forged=False, decode=None) -> dict[str, dict]:
    """{kind: {test: (accepted, tried)}} over n pictures a kind: truth, worn truth, the frame before, one wrong attribute.

    forged: also pictures wrong in their pixels, other pictures, other words, and lookalikes as a kind of its own. decode: also
    the truth through this function, an autoencoder's.
    """
    kinds = {kind: trials_of(kind, seed, size, forged, decode) for kind in KINDS if kind not in ("question", "text")}
    if forged:
        kinds["lookalikes"] = lookalikes(seed, size)
    table = {}
    for kind, trials in kinds.items():
        row: dict[str, list[int]] = {}
        for tests in itertools.islice(trials, n):
            for trial in tests:
                cell = row.setdefault(trial.what, [0, 0])
                cell[0] += trial.accepted()
                cell[1] += 1
        if progress:
            progress(kind, row)
        table[kind] = {what: tuple(cell) for what, cell in row.items()}
    return table


def trials_of(kind: str, seed: int, size: int, forged: bool = False, decode=None) -> Iterator[list[Trial]]:
    """The trials of every picture of the assistant, without end."""
    stranger = None             # the last picture of another dialogue, as (scene, picture)
    for at in itertools.count(seed):
        record = dialogue(at, "seen", {kind: 1.0}, size)
        rng, noise = random.Random(at + 1), np.random.default_rng(at + 1)
        previous = before = None
        for item, image, text, context in pictures_of(record):
            scene, check = Scene.from_json(item["scene"]), item["check"]
            if check:
                tests = [Trial("truth", image, check, previous)]
                tests.append(Trial("worn", worn(image, noise), check, previous and worn(previous, noise)))
                if decode:
                    tests.append(Trial("VAE", decode(image), check, previous and decode(previous)))
                # Where nothing was done, an edit must fail; a whole scene may look like the one before.
                if previous and check["op"] != "scene":
                    tests.append(Trial("before", previous, check, previous))
                for what, wrong in spoilt(scene, check, before, rng):
                    tests.append(Trial(f"wrong {what}", render(wrong, size), check, previous))
                if forged:
                    pictures = Forger(scene, image, check, previous, rng).every()
                    tests += [Trial(what, wrong, check, previous) for what, wrong in pictures if wrong]
                    if stranger and kept_names(stranger[0]) != kept_names(scene):
                        tests.append(Trial("another prompt's picture", stranger[1], check, previous))
                    tests += tricks(scene, check, previous, text, context, size)
                yield tests
            previous, before = image, scene
        stranger = (before, previous)


def pictures_of(record: dict) -> Iterator[tuple[dict, Image.Image, str, str]]:
    """(entry of truth["images"], picture, text just before it, everything said before that)."""
    context, entries = "", iter(record["truth"]["images"])
    for message in record["messages"]:
        text = ""
        for item in message["content"]:
            if item["type"] == "text":
                text = item["text"]
                continue
            yield next(entries), item["image"], text, context
            context, text = f"{context} {text}", ""
        # The user's words may stand before or after a picture.
        words = [item["text"] for item in message["content"] if item["type"] == "text"]
        context += f" {' '.join(words)}" if message["role"] == "user" else f" {text}"


def kept_names(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.subject, thing.main) for thing in scene.things}


def tricks(scene: Scene, check: dict, previous: Image.Image | None, text: str, context: str, size: int) -> list[Trial]:
    """The right words, then true words about another picture, and that picture."""
    if ("circle", "blue") in kept_names(scene):
        return []
    circle = fit("circle", 1, usual_colours("circle", "blue"), 30, 32, 32)
    picture = render(Scene(scene.background, (circle,)), size)
    return [Trial("sentence trick", picture, check, previous, f"{text} Here is a blue circle.", context)]


def lookalikes(seed: int, size: int) -> Iterator[list[Trial]]:
    """Edits of pictures in which a shape stands beside a figure that once looked like it: of the right one, of the other."""
    for at in itertools.count(seed):
        rng = random.Random(f"lookalikes {at}")
        names = rng.choice(LOOKALIKES)
        page = rng.choice(list(BACKGROUNDS))
        first, second, new = rng.sample(list(COLOURS), 3)
        places = relation_cells(rng, rng.choice(RELATIONS))
        things = [small(rng, s, usual_colours(s, c), cell) for s, c, cell in zip(names, (first, second), places, strict=True)]
        previous = render(Scene(page, tuple(things)), size)
        i = rng.randrange(2)
        if rng.random() < 0.5:
            text = f"I removed the {names[i]}."
            removed = [Scene(page, (things[1 - k],)) for k in (i, 1 - i)]
            right, wrong = (render(scene, size) for scene in removed)
        else:
            text = f"The {names[i]} is {new} now."
            spoilers = [painted_in(things[k], new) for k in range(2)]
            scenes = [Scene(page, tuple(spoilers[k] if k == j else things[k] for k in range(2))) for j in (i, 1 - i)]
            right, wrong = (render(scene, size) for scene in scenes)
        yield [Trial("early stage, right", right, {}, previous, text), Trial("early stage, other", wrong, {}, previous, text)]


def painted_in(thing: Thing, colour: str) -> Thing:
    main = main_part(thing.subject)
    return replace(thing, colours=(*thing.colours[:main], colour, *thing.colours[main + 1:]))


# What `report` sums up: the name of the line, and how the tests in it begin.
LINES = {
    "truth": "truth", "worn truth": "worn", "truth through the VAE": "VAE",
    "early stage beside, right one": "early stage, right",
    "frame before": "before", "wrong attribute": "wrong", "border only right": "border", "one speck": "one speck",
    "eight specks": "eight specks", "main part 15 % blot": "main part 15", "main part 30 % blot": "main part 30 % blot",
    "main part 30 % along an edge": "main part 30 % edge", "new part 1.3 times as long": "new part", "blank picture": "blank",
    "another prompt's picture": "another", "sentence trick": "sentence", "early stage beside, wrong one": "early stage, other",
}


def report(n: int = 150, size: int = 64, decode=None) -> None:
    """Prints the checker's own error rates, kind by kind and in all. decode: a function of pictures, or None."""
    def line(kind, row):
        print(f"{kind:11s} " + "  ".join(f"{what} {ok}/{tried}" for what, (ok, tried) in row.items()), flush=True)

    table = error_rates(n, size=size, progress=line, forged=True, decode=decode)
    print(f"\n{'':32s} accepted     tried")
    for name, beginning in LINES.items():
        cells = [cell for row in table.values() for what, cell in row.items() if what.startswith(beginning)]
        accepted, tried = sum(c[0] for c in cells), sum(c[1] for c in cells)
        if tried:
            print(f"{name:32s} {accepted:8d}  {tried:8d}  {100 * accepted / tried:6.2f} %")
