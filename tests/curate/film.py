"""Films whose cuts, camera and things are known, since they are rendered here: a textured world, a window that moves over it,
things that move in it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np


@dataclass(frozen=True)
class Thing:
    """A textured disc or box in the world."""

    at: tuple[float, float]  # its middle at the start, shares of the first picture
    way: tuple[float, float] = (0.0, 0.0)  # by the end, against the background
    size: float = 0.16  # of the picture's height
    colour: tuple[int, int, int] = (210, 40, 40)
    box: bool = False
    since: float = 0.0  # share of the scene at which it appears
    until: float = 2.0  # ... and disappears


@dataclass(frozen=True)
class Scene:
    seconds: float
    seed: int = 0
    pan: tuple[float, float] = (0.0, 0.0)  # way of the window by the end, shares of the picture
    zoom: float = 1.0  # how much larger things are at the end
    turn: float = 0.0  # degrees by the end that the picture turns clockwise
    things: tuple[Thing, ...] = ()
    fade_in: float = 0.0  # seconds from black
    fade_out: float = 0.0
    world: np.ndarray | None = None  # (H, W, 3) to look at instead of a texture


def texture(seed: int, size: tuple[int, int], base: tuple[float, float, float] | None = None) -> np.ndarray:
    """(h, w, 3) bytes: clouds of several sizes, and some boxes for corners. Another seed has other colours."""
    rng = np.random.default_rng(seed)
    height, width = size
    base = rng.uniform(70, 190, 3) if base is None else np.array(base, float)
    picture = np.zeros((height, width, 3), np.float32) + base
    for grain, strength in ((6, 45), (20, 30), (60, 20), (width // 4, 25)):
        rough = rng.normal(0, strength, (grain * height // width + 1, grain, 3)).astype(np.float32)
        picture += cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(60):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        w, h = rng.integers(width // 60, width // 15, 2).tolist()
        shift = rng.uniform(-70, 70, 3).astype(np.float32)
        picture[y : y + h, x : x + w] += shift
    return np.clip(picture, 0, 255).astype(np.uint8)


def patch_of(thing: Thing, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Its picture (64, 64, 3) and where it is solid (64, 64)."""
    rng = np.random.default_rng(seed)
    shade = cv2.resize(rng.uniform(0.75, 1.15, (8, 8)).astype(np.float32), (64, 64), interpolation=cv2.INTER_LINEAR)
    picture = np.clip(np.array(thing.colour) * shade[..., None], 0, 255).astype(np.float32)
    solid = np.ones((64, 64), np.float32)
    if not thing.box:
        solid = cv2.circle(np.zeros((64, 64), np.float32), (32, 32), 31, 1.0, -1)
    return picture, solid


def render(scene: Scene, size: tuple[int, int], times: list[float]) -> Iterator[np.ndarray]:
    """The pictures (h, w, 3) of a scene at these seconds."""
    height, width = size
    world = texture(scene.seed, (3 * height, 3 * width)) if scene.world is None else scene.world
    patches = [patch_of(thing, scene.seed + k) for k, thing in enumerate(scene.things)]
    # The window covers a third of the world; it starts so that its way lies around the middle.
    unit = world.shape[1] / 3 / width
    for second in times:
        share = second / scene.seconds
        zoom = scene.zoom**share
        angle = np.radians(scene.turn * share)
        ahead = (share - 0.5) * np.array(scene.pan) * np.array([width, height])
        rotation = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        middle = np.array([width, height]) / 2
        # From the window's coordinates at rest, the origin in the middle of the world, to pixels.
        offset = middle - rotation @ ahead
        scaled = rotation / unit
        origin = offset - scaled @ (np.array(world.shape[1::-1]) / 2)
        view = np.column_stack([scaled, origin])
        picture = cv2.warpAffine(world, view, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        for thing, (patch, solid) in zip(scene.things, patches, strict=True):
            if not thing.since <= share < thing.until:
                continue
            start = -0.5 * np.array(scene.pan) + thing.at - 0.5
            place = (start + share * np.array(thing.way)) * np.array([width, height])
            grow = rotation * thing.size * height / 64
            corner = rotation @ place + offset - grow @ np.array([32, 32])
            into = np.column_stack([grow, corner])
            over = cv2.warpAffine(patch, into, (width, height))
            alpha = cv2.warpAffine(solid, into, (width, height))
            covered = alpha > 0
            blend = alpha[covered][:, None]
            picture[covered] = picture[covered] * (1 - blend) + over[covered] * blend
        light = 1.0
        if scene.fade_in:
            light = min(light, second / scene.fade_in)
        if scene.fade_out:
            light = min(light, (scene.seconds - second) / scene.fade_out)
        yield (picture * max(0.0, light)).astype(np.uint8)


def pictures(scenes: list[Scene], size: tuple[int, int], rate: int, dissolve: float = 0.0) -> Iterator[np.ndarray]:
    """All pictures of a film. dissolve: seconds in which a scene turns into the next one."""
    soft = round(dissolve * rate)
    for k, scene in enumerate(scenes):
        times = [n / rate for n in range(round(scene.seconds * rate))]
        following = iter(())
        if soft and k + 1 < len(scenes):
            # The next scene stands still until it is there.
            following = render(replace(scenes[k + 1], seconds=1e9), size, times[:soft])
        for n, picture in enumerate(render(scene, size, times)):
            gone = n - (len(times) - soft)
            if gone >= 0:
                other = next(following, None)
                if other is not None:
                    picture = cv2.addWeighted(picture, 1 - (gone + 1) / (soft + 1), other, (gone + 1) / (soft + 1), 0)
            yield picture


def write(path: Path, frames, rate: int = 24, *, codec: str = "mpeg4", times=None, rotation: int = 0) -> Path:
    """A film of these pictures. times: milliseconds of each picture, for a rate that varies."""
    with av.open(str(path), "w") as out:
        stream = None
        for n, frame in enumerate(frames):
            if stream is None:
                stream = out.add_stream(codec, rate=rate)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
                stream.bit_rate = 4_000_000
                if times is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
                if rotation:
                    stream.set_display_rotation(rotation)
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts = n if times is None else times[n]
            picture.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
            out.mux(stream.encode(picture))
        if stream is not None:
            out.mux(stream.encode())
    return path
