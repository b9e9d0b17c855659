"""The world of sketchbook: subjects made of flat coloured parts, scenes of them, and their renderer.

A `Scene` is a background and some `Thing`s; `render` turns it into a picture at 0.3 ms. `dialogues.py` tells dialogues about
scenes, `checker.py` reads them back out of pictures. Geometry is a table, so that the checker can derive from the parts already
drawn where the next one belongs. Every part is at least 8 pixels wide and high in a picture of 64: smaller ones die in a VAE.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

# ---------------------------------------------------------------------------------------------------------------------------
# The palette. Colours of parts lie at least 100 apart in RGB, and as far from every background.

COLOURS = {
    "red": (218, 28, 42), "orange": (246, 128, 12), "yellow": (255, 224, 36), "green": (32, 152, 64), "blue": (30, 88, 222),
    "purple": (146, 44, 176), "pink": (252, 128, 196), "brown": (130, 76, 34), "black": (28, 28, 34),
}
BACKGROUNDS = {"white": (255, 255, 255), "cream": (250, 234, 196), "light blue": (190, 226, 252),
               "light green": (196, 236, 188), "grey": (184, 184, 186)}
PLACES = {"white": "in the snow", "cream": "on the beach", "light blue": "in the sky", "light green": "in the meadow",
          "grey": "in the fog"}

# ---------------------------------------------------------------------------------------------------------------------------
# Geometry: every part is a list of polygons on a grid of 0..100 or so; a subject is normalised to a longest side of one.


def rect(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def oval(x0, y0, x1, y1, start=0.0, stop=360.0):
    """Ellipse in a box, or the arc of it from `start` to `stop` degrees (clockwise from the right), closed by its chord."""
    n = max(8, round(36 * (stop - start) / 360))
    angles = [math.radians(start + (stop - start) * i / n) for i in range(n + (stop - start < 360))]
    cx, cy, rx, ry = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def poly(*numbers):
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def mirror(outline):
    """The outline and its reflection about the line x = 50."""
    return [outline, [(100 - x, y) for x, y in outline]]


def spikes(n, outer, inner, cx=50.0, cy=50.0):
    radii = [outer if i % 2 == 0 else inner for i in range(2 * n)]
    return [(cx + r * math.sin(math.pi * i / n), cy - r * math.cos(math.pi * i / n)) for i, r in enumerate(radii)]


def heart():
    t = [2 * math.pi * i / 40 for i in range(40)]
    return [(16 * math.sin(a) ** 3, -13 * math.cos(a) + 5 * math.cos(2 * a) + 2 * math.cos(3 * a) + math.cos(4 * a)) for a in t]


class Part(NamedTuple):
    name: str            # "roof"; a name that ends in s is a plural (or grass) and takes no article
    look: str            # how a lesson says it, with {} for the colour
    where: str           # where a lesson puts it
    outlines: list       # polygons
    usual: str           # colours it has unless somebody says otherwise, best first


class Subject(NamedTuple):
    main: str            # the part that "a red house" speaks of
    small: int           # how many of the first parts make the small form used in scenes of several things
    parts: list          # in the order of drawing, which is also the order of painting


SUBJECTS = {
    "house": Subject("walls", 2, [
        Part("walls", "a {} square", "in the middle", [rect(10, 44, 90, 100)], "red yellow"),
        Part("roof", "a {} triangle", "on top", [poly(0, 45, 50, 0, 100, 45)], "brown purple"),
        Part("door", "a {} rectangle", "on the left side", [rect(20, 60, 45, 100)], "blue green"),
        Part("window", "a {} square", "on the right side", [rect(55, 57, 80, 82)], "yellow orange pink"),
        Part("chimney", "a {} rectangle", "on the right of the roof", [rect(67, 0, 91, 32)], "black red"),
    ]),
    "tree": Subject("crown", 2, [
        Part("trunk", "a {} rectangle", "at the bottom", [rect(33, 54, 67, 102)], "brown black"),
        Part("crown", "a big {} circle", "on top", [oval(9, -8, 91, 64)], "green orange"),
        Part("apples", "two {} circles", "on the crown", [oval(21, 12, 46, 37), oval(55, 20, 80, 45)], "red yellow"),
        Part("grass", "a {} rectangle", "under the trunk", [rect(8, 94, 92, 118)], "yellow green"),
    ]),
    "boat": Subject("hull", 2, [
        Part("hull", "a {} bowl", "at the bottom", [poly(0, 62, 100, 62, 78, 100, 22, 100)], "red brown"),
        Part("sail", "a tall {} triangle", "on top", [poly(44, 0, 44, 63, 96, 63)], "yellow orange"),
        Part("jib", "a small {} triangle", "on the left", [poly(40, 14, 40, 63, 4, 63)], "pink blue"),
        Part("window", "a {} circle", "on the hull", [oval(38, 68, 63, 93)], "blue yellow"),
    ]),
    "car": Subject("body", 3, [
        Part("body", "a long {} rectangle", "in the middle", [rect(0, 36, 100, 68)], "red blue"),
        Part("wheels", "two {} circles", "at the bottom", mirror(oval(8, 54, 40, 86)), "black brown"),
        Part("cabin", "a {} block", "on top", [poly(26, 2, 74, 2, 88, 37, 14, 37)], "blue yellow"),
        Part("window", "a {} square", "on the cabin", [rect(37, 9, 63, 34)], "yellow pink"),
    ]),
    "snowman": Subject("body", 3, [
        Part("body", "a big {} oval", "at the bottom", [oval(15, 46, 85, 98)], "blue pink"),
        Part("head", "a {} circle", "on top", [oval(26, 2, 74, 52)], "pink yellow"),
        Part("hat", "a {} block", "on the head",
             [poly(33, -16, 67, -16, 67, 7, 80, 7, 80, 16, 20, 16, 20, 7, 33, 7)], "black purple"),
        Part("button", "a small {} circle", "on the body", [oval(37, 60, 63, 86)], "red orange"),
    ]),
    "robot": Subject("body", 2, [
        Part("body", "a {} block with arms", "in the middle",
             [poly(0, 40, 100, 40, 100, 72, 82, 72, 82, 58, 76, 58, 76, 86, 24, 86, 24, 58, 18, 58, 18, 72, 0, 72)],
             "blue purple"),
        Part("head", "a {} square", "on top", [rect(29, 4, 71, 41)], "orange pink"),
        Part("legs", "two {} squares", "at the bottom", mirror(rect(22, 85, 46, 112)), "black brown"),
        Part("screen", "a {} square", "on the body", [rect(37, 50, 63, 76)], "yellow red"),
        Part("antenna", "a {} triangle", "on the head", [poly(50, -22, 65, 6, 35, 6)], "red purple"),
    ]),
    "flower": Subject("petals", 2, [
        Part("petals", "five {} circles", "in a ring",
             [oval(x - 21, y - 21, x + 21, y + 21) for x, y in spikes(5, 20, 20, 50, 30)[::2]], "pink red"),
        Part("centre", "a {} circle", "inside the ring", [oval(36, 16, 64, 44)], "yellow orange"),
        Part("stem", "a {} rectangle", "below", [rect(39, 62, 61, 112)], "green brown"),
        Part("leaves", "two {} ovals", "beside the stem", mirror(oval(6, 78, 42, 103)), "blue green"),
    ]),
    "rocket": Subject("body", 3, [
        Part("body", "a tall {} rectangle", "in the middle", [rect(32, 26, 68, 84)], "blue red"),
        Part("nose", "a {} triangle", "on top", [poly(32, 27, 50, -4, 68, 27)], "red yellow"),
        Part("fins", "two {} triangles", "at the sides", mirror(poly(33, 48, 33, 86, 4, 86)), "purple green"),
        Part("window", "a {} circle", "on the body", [oval(37, 38, 63, 64)], "yellow pink"),
        Part("flame", "a {} triangle", "at the bottom", [poly(34, 83, 66, 83, 50, 112)], "orange red"),
    ]),
    "fish": Subject("body", 2, [
        Part("body", "a {} oval", "in the middle", [oval(0, 20, 78, 80)], "orange blue"),
        Part("tail", "a {} triangle", "on the right", [poly(66, 50, 104, 18, 104, 82)], "purple red"),
        Part("eye", "a small {} circle", "on the left", [oval(11, 34, 36, 59)], "black yellow"),
        Part("fin", "a {} triangle", "on top", [poly(34, 26, 62, 1, 66, 32)], "green pink"),
    ]),
    "mushroom": Subject("cap", 2, [
        Part("stem", "a {} rectangle", "at the bottom", [rect(31, 50, 69, 98)], "orange yellow"),
        Part("cap", "a {} half circle", "on top", [oval(0, 0, 100, 108, 180, 360)], "red brown"),
        Part("dots", "two {} circles", "on the cap", [oval(22, 22, 47, 47), oval(57, 16, 82, 41)], "yellow pink"),
        Part("grass", "a {} rectangle", "under the stem", [rect(8, 88, 92, 112)], "green blue"),
    ]),
    "cake": Subject("base", 3, [
        Part("base", "a long {} rectangle", "at the bottom", [rect(0, 64, 100, 100)], "pink brown"),
        Part("layer", "a {} rectangle", "on the base", [rect(16, 34, 84, 65)], "yellow orange"),
        Part("candle", "a small {} rectangle", "on the layer", [rect(35, 2, 65, 35)], "blue green"),
        Part("flame", "a {} triangle", "on the candle", [poly(50, -24, 64, 4, 36, 4)], "red orange"),
    ]),
    "lamp": Subject("shade", 3, [
        Part("shade", "a {} bucket", "on top", [poly(26, 0, 74, 0, 98, 40, 2, 40)], "yellow orange"),
        Part("pole", "a {} rectangle", "in the middle", [rect(34, 39, 66, 80)], "black brown"),
        Part("base", "a {} half circle", "at the bottom", [oval(10, 72, 90, 140, 180, 360)], "purple blue"),
    ]),
    "cat": Subject("head", 2, [
        Part("head", "a big {} oval", "in the middle", [oval(4, 18, 96, 100)], "orange black"),
        Part("ears", "two {} triangles", "on top", mirror(poly(6, 0, 10, 48, 44, 26)), "brown pink"),
        Part("eyes", "two {} circles", "on the head", mirror(oval(18, 38, 43, 63)), "green blue yellow"),
        Part("nose", "a {} triangle", "below the eyes", [poly(36, 66, 64, 66, 50, 90)], "pink red"),
    ]),
    "train": Subject("engine", 3, [
        Part("engine", "a {} rectangle", "on the left", [rect(0, 40, 64, 76)], "green red"),
        Part("wheels", "two {} circles", "under the engine", mirror(oval(10, 62, 42, 94)), "black brown"),
        Part("cab", "a tall {} rectangle", "on the right", [rect(60, 8, 102, 76)], "red blue"),
        Part("window", "a {} square", "on the cab", [rect(69, 18, 94, 43)], "yellow pink"),
        Part("chimney", "a {} rectangle", "on the engine", [rect(9, 8, 35, 41)], "brown purple"),
        Part("plow", "a {} triangle", "in front", [poly(2, 52, 2, 84, -26, 84)], "orange blue"),
    ]),
    "castle": Subject("wall", 3, [
        Part("wall", "a {} square", "in the middle", [rect(26, 46, 74, 100)], "brown pink"),
        Part("towers", "two tall {} rectangles", "at the sides", mirror(rect(-2, 28, 30, 100)), "blue purple"),
        Part("roofs", "two {} triangles", "on the towers", mirror(poly(-6, 29, 14, -4, 34, 29)), "red orange"),
        Part("gate", "a {} door", "at the bottom", [[*oval(37, 64, 63, 90, 180, 360), (63, 100), (37, 100)]], "black yellow"),
    ]),
    "butterfly": Subject("wings", 2, [
        Part("wings", "four {} ovals", "at the sides",
             [*mirror(oval(0, 4, 54, 56)), *mirror(oval(8, 44, 52, 94))], "purple pink"),
        Part("body", "a long {} oval", "in the middle", [oval(35, 10, 65, 92)], "black brown"),
        Part("dots", "two {} circles", "on the wings", mirror(oval(7, 18, 32, 43)), "yellow orange"),
    ]),
    "cup": Subject("mug", 2, [
        Part("mug", "a {} square", "in the middle", [poly(6, 20, 72, 20, 66, 86, 12, 86)], "blue green"),
        Part("handle", "a {} half ring", "on the right",
             [[*oval(24, 24, 108, 80, 270, 450), *oval(46, 42, 86, 62, 270, 450)[::-1]]], "purple black"),
        Part("saucer", "a long {} rectangle", "at the bottom", [poly(-14, 84, 98, 84, 82, 108, 2, 108)], "pink orange"),
        Part("spot", "a {} circle", "on the mug", [oval(26, 38, 54, 66)], "yellow red"),
    ]),
    "duck": Subject("body", 3, [
        Part("body", "a {} half circle", "at the bottom", [oval(10, 8, 96, 108, 0, 180)], "yellow green"),
        Part("head", "a {} circle", "on the left", [oval(6, 14, 54, 62)], "green pink"),
        Part("beak", "a {} triangle", "in front of the head", [poly(10, 20, 10, 56, -24, 39)], "orange red"),
        Part("wing", "a {} half circle", "on the body", [oval(48, 44, 90, 100, 0, 180)], "brown purple"),
    ]),
    "sun": Subject("disc", 2, [
        Part("rays", "a big {} star", "in the middle", [spikes(10, 50, 34)], "orange red"),
        Part("disc", "a {} circle", "on top", [oval(24, 24, 76, 76)], "yellow pink"),
    ]),
    "ice cream": Subject("scoop", 2, [
        Part("cone", "a {} triangle", "at the bottom", [poly(16, 46, 84, 46, 50, 108)], "brown orange"),
        Part("scoop", "a {} ball", "on top", [oval(10, 0, 90, 62)], "pink purple"),
        Part("cherry", "a small {} circle", "on the scoop", [oval(36, -20, 64, 8)], "red yellow"),
    ]),
    **{name: Subject(name, 1, [Part(name, "a {} " + name, "in the middle", [outline], colour)]) for name, outline, colour in [
        ("circle", oval(0, 0, 100, 100), "red"), ("square", rect(0, 0, 100, 100), "blue"),
        ("triangle", poly(50, 0, 100, 90, 0, 90), "green"), ("star", spikes(5, 54, 27), "yellow"),
        ("heart", heart(), "pink"), ("diamond", poly(50, 0, 88, 55, 50, 110, 12, 55), "purple")]},
}
SHAPES = [name for name, subject in SUBJECTS.items() if len(subject.parts) == 1]
FIGURES = [name for name, subject in SUBJECTS.items() if len(subject.parts) > 1]


@lru_cache(None)
def outlines(subject: str) -> list[list[np.ndarray]]:
    """Polygons of every part, (points, 2), in the frame of the whole subject: from 0, with a longest side of 1."""
    parts = [[np.array(o, dtype=np.float64) for o in part.outlines] for part in SUBJECTS[subject].parts]
    every = np.concatenate([o for part in parts for o in part])
    low, side = every.min(0), (every.max(0) - every.min(0)).max()
    return [[(o - low) / side for o in part] for part in parts]


@lru_cache(None)
def extent(subject: str, drawn: int) -> tuple[float, float, float, float]:
    """Box (x0, y0, x1, y1) of the first `drawn` parts in the frame of the subject."""
    every = np.concatenate([o for part in outlines(subject)[:drawn] for o in part])
    return (*every.min(0).tolist(), *every.max(0).tolist())


@lru_cache(None)
def thinnest(subject: str, drawn: int) -> float:
    """Smallest width or height of any polygon or visible part among the first `drawn`, in the frame of the subject."""
    x0, y0, x1, y1 = extent(subject, drawn)
    m = part_map(subject, drawn)
    seen = [min(np.ptp(ys), np.ptp(xs)) + 1 for ys, xs in (np.nonzero(m == i) for i in range(drawn))]
    return min(min(seen) / max(m.shape) * max(x1 - x0, y1 - y0),
               min(float((o.max(0) - o.min(0)).min()) for part in outlines(subject)[:drawn] for o in part))


@lru_cache(None)
def part_map(subject: str, drawn: int, side: int = 96) -> np.ndarray:
    """(h, w) index of the visible part at each point of the box of the drawn parts, -1 outside; longest side `side` points."""
    x0, y0, x1, y1 = extent(subject, drawn)
    scale = side / max(x1 - x0, y1 - y0)
    image = Image.new("L", (max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale))), 0)
    pen = ImageDraw.Draw(image)
    for i, part in enumerate(outlines(subject)[:drawn]):
        for o in part:
            pen.polygon([tuple(p) for p in ((o - (x0, y0)) * scale - 0.5)], fill=i + 1)
    return np.asarray(image).astype(np.int64) - 1


@lru_cache(None)
def touching(subject: str) -> list[frozenset[int]]:
    """For every part the indices of the parts whose visible areas meet it at any stage of the drawing."""
    n = len(SUBJECTS[subject].parts)
    near = [set() for _ in range(n)]
    for drawn in range(2, n + 1):
        m = np.pad(part_map(subject, drawn), 3, constant_values=-1)
        for dy, dx in ((0, 1), (1, 0), (0, 3), (3, 0), (3, 3), (3, -3)):
            a, b = m, np.roll(m, (dy, dx), (0, 1))
            for i, j in np.unique(np.stack([a, b], -1)[(a != b) & (a >= 0) & (b >= 0)], axis=0).tolist():
                near[i].add(j)
                near[j].add(i)
    return [frozenset(s) for s in near]


# ---------------------------------------------------------------------------------------------------------------------------
# Scenes


@dataclass(frozen=True)
class Thing:
    """One object. x, y, size place the frame of the whole subject (top left corner, longest side) in units of 1/64 picture."""
    subject: str
    x: float
    y: float
    size: float
    colours: tuple       # of every part of the subject, drawn or not
    drawn: int           # the first so many parts are there

    @property
    def box(self) -> tuple[float, float, float, float]:
        x0, y0, x1, y1 = extent(self.subject, self.drawn)
        return self.x + x0 * self.size, self.y + y0 * self.size, self.x + x1 * self.size, self.y + y1 * self.size

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def main(self) -> str:
        return self.colours[main_part(self.subject)]


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple = ()

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(d: dict) -> Scene:
        return Scene(d["background"], tuple(Thing(**{**t, "colours": tuple(t["colours"])}) for t in d["things"]))


def main_part(subject: str) -> int:
    return [p.name for p in SUBJECTS[subject].parts].index(SUBJECTS[subject].main)


def render(scene: Scene, size: int = 64) -> Image.Image:
    """RGB picture of size x size, drawn four times as large and averaged down."""
    image = Image.new("RGB", (4 * size, 4 * size), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    scale = 4 * size / 64
    for thing in scene.things:
        corner = np.array((thing.x, thing.y)) * scale - 0.5
        for part, colour in zip(outlines(thing.subject)[:thing.drawn], thing.colours, strict=False):
            for o in part:
                pen.polygon((o * (thing.size * scale) + corner).ravel().tolist(), fill=COLOURS[colour])
    return image.reduce(4)


def colours_for(rng, subject: str, main: str | None = None, fixed: dict | None = None, usual: float = 0.4) -> tuple:
    """Colours of all parts: the main part's, the `fixed` {index: colour}, the rest usual or random; parts that touch differ."""
    parts, near = SUBJECTS[subject].parts, touching(subject)
    chosen = dict(fixed or {})
    if main is not None:
        chosen[main_part(subject)] = main
    order = sorted(range(len(parts)), key=lambda i: (i not in chosen, i != main_part(subject)))
    for i in order:
        if i not in chosen:
            free = [c for c in COLOURS if all(chosen.get(j) != c for j in near[i])]
            wanted = [c for c in parts[i].usual.split() if c in free]
            chosen[i] = wanted[0] if wanted and rng.random() < usual else rng.choice(free)
    return tuple(chosen[i] for i in range(len(parts)))


def usual_colours(subject: str, main: str, fixed: dict | None = None) -> tuple:
    """The colours of a subject of which only the main colour, and those of the `fixed` parts, were said."""
    return colours_for(random.Random(f"{subject} {main} {fixed}"), subject, main, fixed, usual=1.0)


def fit(subject: str, drawn: int, colours: tuple, length: float, cx: float, cy: float) -> Thing:
    """A thing whose drawn parts have a longest side of `length` around the centre (cx, cy)."""
    x0, y0, x1, y1 = extent(subject, drawn)
    size = length / max(x1 - x0, y1 - y0)
    x, y = cx - (x0 + x1) / 2 * size, cy - (y0 + y1) / 2 * size
    return Thing(subject, round(x, 2), round(y, 2), round(size, 2), colours, drawn)


def least(subject: str, drawn: int, pixels: float = 8.0) -> float:
    """Smallest longest side at which no polygon of the first `drawn` parts is thinner than `pixels`."""
    x0, y0, x1, y1 = extent(subject, drawn)
    return pixels / thinnest(subject, drawn) * max(x1 - x0, y1 - y0)


def large(rng, subject: str, colours: tuple) -> Thing:
    """A whole subject that fills most of the picture."""
    n = len(SUBJECTS[subject].parts)
    low, high = (26, 50) if n == 1 else (max(42.0, least(subject, n, 9.0)), 56)
    length = rng.uniform(min(low, high - 1), high)
    x0, y0, x1, y1 = extent(subject, n)
    w, h = ((x1 - x0) * length / max(x1 - x0, y1 - y0), (y1 - y0) * length / max(x1 - x0, y1 - y0))
    return fit(subject, n, colours, length, rng.uniform(3 + w / 2, 61 - w / 2), rng.uniform(3 + h / 2, 61 - h / 2))


def small(rng, subject: str, colours: tuple, cell: tuple[float, float, float, float], size: float | None = None) -> Thing:
    """The small form somewhere in a cell (x0, y0, x1, y1) of the picture, 1.6 away from its edges."""
    k = SUBJECTS[subject].small
    low = max(24.0, least(subject, k)) if len(SUBJECTS[subject].parts) > 1 else 17.0
    high = max(low, min(cell[2] - cell[0], cell[3] - cell[1]) - 3.2)
    length = size or rng.uniform(low, high)
    thing = fit(subject, k, colours, length, 0, 0)
    x0, y0, x1, y1 = thing.box
    cx = rng.uniform(cell[0] + 1.6 - x0, max(cell[0] + 1.6 - x0, cell[2] - 1.6 - x1))
    cy = rng.uniform(cell[1] + 1.6 - y0, max(cell[1] + 1.6 - y0, cell[3] - 1.6 - y1))
    return replace(thing, x=round(thing.x + cx, 2), y=round(thing.y + cy, 2))


QUARTERS = [(0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)]
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def relation_cells(rng, relation: str):
    """Two cells such that a thing in the first stands in `relation` to a thing in the second."""
    shift = rng.uniform(0, 18)
    a, b = ((0, shift, 32, shift + 46), (32, shift, 64, shift + 46)) if relation in ("left", "right") else \
           ((shift, 0, shift + 46, 32), (shift, 32, shift + 46, 64))
    return (a, b) if relation in ("left", "above") else (b, a)


def cells(rng, n: int) -> list[tuple]:
    """Places for one to four small things that do not touch."""
    if n == 1:
        return [(0, 0, 64, 64)]
    return rng.sample(QUARTERS, n) if n > 2 else list(relation_cells(rng, rng.choice(RELATIONS)))


def random_scene(rng) -> Scene:
    """Any scene of the world: a whole or half-finished subject, one to four small things."""
    def any_colours(subject: str) -> tuple:
        return colours_for(rng, subject, rng.choice(list(COLOURS)), usual=0.25)

    background = rng.choice(list(BACKGROUNDS))
    if rng.random() < 0.55:
        subject = rng.choice(FIGURES if rng.random() < 0.85 else SHAPES)
        thing = large(rng, subject, any_colours(subject))
        return Scene(background, (replace(thing, drawn=rng.randint(1, thing.drawn)),))
    same = rng.random() < 0.4
    subject = rng.choice(list(SUBJECTS))
    colours = any_colours(subject)
    things = []
    for cell in cells(rng, rng.randint(1, 4)):
        if not same:
            subject = rng.choice(list(SUBJECTS))
            colours = any_colours(subject)
        things.append(small(rng, subject, colours, cell))
    return Scene(background, tuple(things))
