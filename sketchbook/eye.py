"""The vision tower of the miniature learns to see, before a language model has to read from it.

    python -m sketchbook.pretrain eye --mllm runs/tiny/mllm --out runs/tiny/eye

At full size the tower comes with the language model, trained on captions and text in pictures. A small one that learns through
the decoder alone sees little for hundreds of thousands of dialogues: an answer has one or two words that depend on the
picture, and they reach the tower through every layer of the decoder. So it is told what lies under each of its tokens, which
the procedural world knows: for every merge unit (16 x 16 pixels) which subject fills most of it, which parts are in it and in
which colour each, and the colour of the page. Four linear heads read that from the token; they are thrown away, and what they
could read the decoder can.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from data import byte_patches
from model import ImageProcessor
from sketchbook.dialogues import held_out_in
from sketchbook.scenes import BACKGROUNDS, COLOURS, SUBJECTS, Scene, outlines, random_scene, render

NAMES, PAGES, KNOWN = list(COLOURS), list(BACKGROUNDS), list(SUBJECTS)
PARTS = [(subject, i) for subject in KNOWN for i in range(len(SUBJECTS[subject].parts))]
PART_ID = {part: n for n, part in enumerate(PARTS)}
OWNER = torch.tensor([KNOWN.index(subject) for subject, _ in PARTS])
LEAST_PART = 0.03     # share of a unit that a part must fill to count as present
LEAST_SUBJECT = 0.1   # and a subject


class Seen(NamedTuple):
    """What lies under the units of a picture, row by row."""
    counts: np.ndarray    # (units, 1 + parts) int16, pixels: of nothing, then of each of PARTS
    coloured: np.ndarray  # (k, 3) int16, unit, part, colour of every part that shows in a unit
    page: int


def seen(scene: Scene, side: int, size: int = 64) -> Seen:
    """The truth for a picture of size x size, in units of side x side pixels."""
    parts = Image.new("I", (size, size), 0)
    colours = Image.new("L", (size, size), 0)
    pens = ImageDraw.Draw(parts), ImageDraw.Draw(colours)
    for thing in scene.things:
        drawn = zip(outlines(thing.subject)[: thing.drawn], thing.colours, strict=False)
        for i, (polygons, colour) in enumerate(drawn):
            for polygon in polygons:
                points = ((polygon * thing.size + np.array((thing.x, thing.y))) * size / 64 - 0.5).ravel().tolist()
                pens[0].polygon(points, fill=PART_ID[thing.subject, i] + 1)
                pens[1].polygon(points, fill=NAMES.index(colour))
    part, colour = (units(np.asarray(image, dtype=np.int64), side) for image in (parts, colours))

    # One number for each (unit, part), counted by one bincount; then one for each (unit, part, colour) that occurs.
    wide = len(PARTS) + 1
    cell = part + wide * np.arange(len(part))[:, None]
    counts = np.bincount(cell.ravel(), minlength=wide * len(part)).reshape(-1, wide)
    found = np.unique((cell * len(NAMES) + colour)[part > 0])
    cell, colour = np.divmod(found, len(NAMES))
    unit, part = np.divmod(cell, wide)
    shows = counts[unit, part] >= LEAST_PART * side**2
    coloured = np.stack((unit, part - 1, colour), 1)[shows]
    # Short numbers, for they travel between processes.
    return Seen(counts.astype(np.int16), coloured.astype(np.int16), PAGES.index(scene.background))


def units(labels: np.ndarray, side: int) -> np.ndarray:
    """(H, W) labels -> (units, pixels of a unit)."""
    h, w = (n // side for n in labels.shape)
    return labels.reshape(h, side, w, side).swapaxes(1, 2).reshape(h * w, side * side)


def lesson(processor: ImageProcessor, size: int, seed: int) -> tuple[str, tuple[Tensor, tuple[int, int], Seen]]:
    """A random scene with nothing held out: its name, patches in bytes, grid and truth."""
    rng = random.Random(f"eye {seed}")
    while held_out_in(scene := random_scene(rng)):
        pass
    pixels, grid = byte_patches(render(scene, size), processor)
    return f"seed:{seed}", (pixels, grid, seen(scene, processor.patch_size * processor.merge_size, size))


class SeeingLoss(nn.Module):
    """A tower and four linear heads on its tokens. forward -> loss, {what: share right}."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower
        width = tower.config.out_hidden_size
        self.subject = nn.Linear(width, len(KNOWN) + 1)
        self.part = nn.Linear(width, len(PARTS))
        self.colour = nn.Linear(width, len(PARTS) * len(NAMES))
        self.page = nn.Linear(width, len(PAGES))

    def forward(self, pixels: Tensor, grids: list[tuple[int, int]], truth: list[Seen]) -> tuple[Tensor, dict[str, Tensor]]:
        """pixels (P, C T p p), grids and truth of each picture."""
        x = self.tower(pixels, grids).float()                                              # (U, width)
        device = x.device
        counts = torch.from_numpy(np.concatenate([t.counts for t in truth])).to(device).long()  # (U, 1 + parts)
        area = counts[0].sum()
        each = len(x) // len(truth)

        # The subject that fills most of a unit; one class more for an empty one.
        filled = counts.new_zeros(len(x), len(KNOWN)).index_add(1, OWNER.to(device), counts[:, 1:])
        most, subject = filled.max(1)
        subject = torch.where(most >= LEAST_SUBJECT * area, subject, len(KNOWN))
        guessed = self.subject(x)
        loss = F.cross_entropy(guessed, subject)
        some = subject < len(KNOWN)
        right = {"subject": (guessed.argmax(1) == subject)[some].float().mean()}

        # Which parts show: about one of a hundred does, so that a hit weighs more than a miss.
        present = (counts[:, 1:] >= LEAST_PART * area).float()
        loss = loss + 20 * F.binary_cross_entropy_with_logits(self.part(x), present)

        # The colour of each part that shows. A unit's number counts from the first unit of the whole batch.
        coloured = np.concatenate([t.coloured + np.array((i * each, 0, 0)) for i, t in enumerate(truth)])
        unit, part, colour = torch.from_numpy(coloured).to(device).unbind(1)                # (k,) each
        logits = self.colour(x[unit]).view(len(unit), len(PARTS), len(NAMES))
        logits = logits[torch.arange(len(unit), device=device), part]                       # (k, colours)
        loss = loss + F.cross_entropy(logits, colour)
        right["colour"] = (logits.argmax(1) == colour).float().mean()

        page = torch.tensor([t.page for t in truth], device=device).repeat_interleave(each)
        guessed = self.page(x)
        loss = loss + F.cross_entropy(guessed, page)
        right["page"] = (guessed.argmax(1) == page).float().mean()
        return loss, {name: share.detach() for name, share in right.items()}
