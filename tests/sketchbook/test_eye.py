"""What the vision tower is told: the truth of every unit, and that a tower can learn it."""

from random import Random

import numpy as np
import torch

from data import normalised
from model import PRESETS, ImageProcessor, VisionTower
from sketchbook.dialogues import held_out_in
from sketchbook.eye import KNOWN, NAMES, PAGES, PART_ID, PARTS, SeeingLoss, lesson, seen
from sketchbook.scenes import SUBJECTS, Scene, large, random_scene, render, small, usual_colours

PROCESSOR = ImageProcessor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)


def test_every_pixel_is_counted_once_and_lies_where_it_is_drawn():
    house = large(Random(0), "house", ("pink", "brown", "black", "yellow", "red"))
    truth = seen(Scene("cream", (house,)), 16)
    assert truth.counts.shape == (16, 1 + len(PARTS)) and (truth.counts.sum(1) == 256).all()
    assert PAGES[truth.page] == "cream"
    # What is not of the house is nothing, and every part shows in its own colour somewhere.
    mine = [PART_ID["house", i] for i in range(5)]
    assert truth.counts[:, [1 + i for i in mine]].sum() + truth.counts[:, 0].sum() == 16 * 256
    found = {(PARTS[part], NAMES[colour]) for _, part, colour in truth.coloured.tolist()}
    assert found == {(("house", i), colour) for i, colour in enumerate(house.colours)}


def test_units_run_row_by_row():
    cat = small(Random(1), "cat", usual_colours("cat", "black"), (32, 0, 64, 32), 26)
    truth = seen(Scene("white", (cat,)), 16)
    units = set(truth.coloured[:, 0].tolist())
    assert units <= {2, 3, 6, 7} and len(units) > 1


def test_a_part_that_is_covered_is_not_there():
    sun = large(Random(2), "sun", ("red", "yellow"))
    whole = seen(Scene("white", (sun,)), 64)
    disc = whole.counts[0, 1 + PART_ID["sun", 1]]
    rays = whole.counts[0, 1 + PART_ID["sun", 0]]
    picture = np.asarray(render(Scene("white", (sun,))).convert("RGB")).astype(int)
    yellow = (np.abs(picture - (255, 224, 36)).sum(-1) < 30).sum()
    assert abs(disc - yellow) < 0.2 * disc and rays > 0


def test_lessons_follow_from_their_seed_and_hold_nothing_held_out():
    for seed in range(40):
        name, (pixels, grid, truth) = lesson(PROCESSOR, 64, seed)
        again = lesson(PROCESSOR, 64, seed)[1]
        assert name == f"seed:{seed}" and grid == (8, 8) and torch.equal(pixels, again[0])
        assert np.array_equal(truth.coloured, again[2].coloured)
    rng = Random("eye 0")
    while held_out_in(scene := random_scene(rng)):
        pass
    assert seen(scene, 16).page == lesson(PROCESSOR, 64, 0)[1][2].page


def test_a_tower_learns_what_it_is_told():
    torch.manual_seed(0)
    pixels, grids, truth = zip(*(lesson(PROCESSOR, 64, seed)[1] for seed in range(6)), strict=True)
    loss_of = SeeingLoss(VisionTower(PRESETS["tiny"].vision))
    optimizer = torch.optim.AdamW(loss_of.parameters(), lr=2e-3)
    losses = []
    pixels = normalised(torch.cat(pixels), PROCESSOR)
    for _ in range(150):
        loss, right = loss_of(pixels, list(grids), list(truth))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0] and right["page"] == 1 and right["subject"] > 0.7
    assert len(KNOWN) == len(SUBJECTS) == 26
