"""What was measured of a clip, in words.

    words(motion)       "The camera pans to the right. Something red on the left moves up."

Measures know directions, places and colours, and not what a thing is: it is "something". Motion too small to be sure of is not
told, and of many things only the two that moved most.
"""

import numpy as np

from curate.motion import PATH, UNCLEAR, Camera, Change, Motion, Mover

# From so much on there is a word for it.
PAN = 0.05  # of the width or height
ZOOM = 1.08  # a factor
TURN = 5.0  # degrees
LIGHT = 25.0  # levels of 255
SWAY = 0.01  # share of the picture: what moves to and fro and is smaller may be noise


def words(motion: Motion) -> str:
    """What happened, in a sentence or a few; empty if nothing can be said."""
    if motion.camera.unclear > UNCLEAR:
        return ""
    said = [camera_words(motion.camera)]
    told = told_movers(motion.movers)
    said += [mover_words(mover) for mover in told]
    # That something changes, and nobody knows how, helps nobody.
    said += [change_words(change) for change in motion.changes[:2] if change.kind != "changes"]
    if motion.light >= LIGHT:
        said.append("It gets brighter.")
    if motion.light <= -LIGHT:
        said.append("It gets darker.")
    return " ".join(said)


def camera_words(camera: Camera) -> str:
    """The camera goes where the picture of the background does not."""
    does = []
    pan = direction(-camera.x / PAN, -camera.y / PAN)
    if pan:
        does.append(f"pans {pan}")
    if camera.zoom >= ZOOM:
        does.append("zooms in")
    if camera.zoom <= 1 / ZOOM:
        does.append("zooms out")
    if camera.turn <= -TURN:
        does.append("turns clockwise")
    if camera.turn >= TURN:
        does.append("turns counterclockwise")
    if not does:
        return "The camera stays still."
    return f"The camera {' and '.join(does)}."


def direction(x: float, y: float) -> str:
    """Of a way to the right and down, in units of the least that counts; empty below it. Eight directions, 45 degrees each."""
    if max(abs(x), abs(y)) < 1:
        return ""
    across = "to the right" if x > 0 else "to the left"
    upright = "down" if y > 0 else "up"
    if abs(y) < 0.414 * abs(x):
        return across
    if abs(x) < 0.414 * abs(y):
        return upright
    return f"{upright} and {across}"


def told_movers(movers: tuple[Mover, ...]) -> list[Mover]:
    """Two at most: a part of a thing that was told already, going its way, is no news."""
    told: list[Mover] = []
    for mover in movers:
        if sways(mover) and mover.area < SWAY:
            continue
        news = all(apart(mover, other) for other in told)
        if news and len(told) < 2:
            told.append(mover)
    return told


def apart(one: Mover, other: Mover) -> bool:
    """Whether they are two things: far from each other, or going different ways."""
    far = np.hypot(one.start[0] - other.start[0], one.start[1] - other.start[1]) > 0.3
    along = one.way[0] * other.way[0] + one.way[1] * other.way[1]
    cosine = along / (np.hypot(*one.way) * np.hypot(*other.way) + 1e-9)
    small = one.area < 0.25 * other.area
    return bool((far or cosine < 0.5) and not small)


def sways(mover: Mover) -> bool:
    """Whether it has come back, more or less."""
    return bool(np.hypot(*mover.way) < max(PATH, 0.35 * mover.path))


def mover_words(mover: Mover) -> str:
    who = f"Something {mover.colour}".strip()
    where = place(mover.start)
    if sways(mover):
        return f"{who} {where} moves to and fro."
    way = direction(mover.way[0] / 1e-6, mover.way[1] / 1e-6)
    if mover.enters:
        return f"{who} comes in {where} and moves {way}."
    if mover.leaves:
        return f"{who} {where} moves {way} and leaves the picture."
    return f"{who} {where} moves {way}."


def change_words(change: Change) -> str:
    who = f"Something {change.colour}".strip()
    return f"{who} {change.kind} {place(change.at)}."


def place(at: tuple[float, float]) -> str:
    """A ninth of the picture."""
    x, y = at
    row = ("at the top", "", "at the bottom")[min(int(3 * y), 2)] if y >= 0 else "at the top"
    column = ("left", "middle", "right")[max(0, min(int(3 * x), 2))]
    if not row:
        return "in the middle" if column == "middle" else f"on the {column}"
    return row if column == "middle" else f"{row} {column}"
