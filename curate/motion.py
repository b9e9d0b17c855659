"""What happens in a clip, measured: how the camera moved, what moved against the background, what came and went.

    motion = measure(frames)          Motion(camera=Camera(x=-0.21, ...), movers=(Mover(...),), changes=())

frames are a few pictures a second of one shot, all of one size, (h, w, 3) bytes, RGB; 320 pixels on the long side are enough.

The camera: corners of one frame are looked up in the next (Lucas and Kanade's flow, there and back again), and RANSAC finds
the similarity (shift, zoom, turn) that most of them obey. Of two such groups the one that spans more of the picture is the
background, even if it has fewer corners: a striped bus in front of a wall moves, and not the wall. The product of these maps
from the first frame to the last is what the camera did.

What moves: a frame is laid on the next one by that map, and dense flow (DIS) finds what is left. Places that move are linked
from look to look. What came and went: the first frame is laid on the last one; where they differ and nothing has moved,
something has appeared or disappeared, and it is in the picture in which that place has an outline.

Limits: near things that shift against far ones (parallax) count as moving; a thing that fills most of the picture is taken for
the background. Where too few corners are found again (smoke, blur, darkness) the camera is `unclear`.
"""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import cv2
import numpy as np

Array = np.ndarray

ROWS = 8  # of the grid in each cell of which corners are looked for
COLUMNS = 12
CORNERS = 4  # at most in a cell
FAINT = 1e-5  # the least eigenvalue of a corner's gradients: less is the noise of a plain wall
FEWEST = 12  # corners found again, below which a pair of frames says nothing
RETURN = 0.7  # pixels between a corner and where the way there and back again ends
NEAR = 1.5  # pixels: so close a corner obeys a map
UNCLEAR = 0.2  # share of the pairs of frames that say nothing, above which the whole does not
SPAN = 0.15  # share of the picture: corners of a smaller part belong to a thing and say nothing of the camera
APART = 16  # frames, two seconds
STIRRED = 0.3  # share of the cells: in more of them a moving camera changes something, however plain the picture
STRIDE = 2  # frames from one look for what moves to the next
FLOW = 0.5  # pixels a look: less is noise
PLACE = 0.002  # share of the picture: a smaller place that moves is noise
LINKS = 3  # looks through which a place must be followed
PATH = 0.04  # of the long side: a shorter way is no movement
DIFFERENT = 26  # levels of 255 between the first and the last frame
NEW = 0.004  # share of the picture: a smaller place that differs is noise
NEARBY = 24  # pixels around it in which it is looked for in the other frame
ALIKE = 0.8  # correlation from which on it is found there
COMMON = 0.35  # share of the last picture that the first one shows too, below which nothing can be said to be new


@dataclass(frozen=True)
class Camera:
    """How the picture of the background changed from the first frame to the last: the camera went the other way."""

    x: float = 0.0  # to the right, share of the width; of the middle of the picture
    y: float = 0.0  # down, share of the height
    zoom: float = 1.0  # things look larger by this factor
    turn: float = 0.0  # degrees, clockwise
    followed: float = 1.0  # share of the corners that obey the camera, in the worst pair of frames
    unclear: float = 0.0  # share of the pairs of frames that said nothing


@dataclass(frozen=True)
class Mover:
    """Something that moved against the background. Places and ways are shares of the width and height of the picture."""

    start: tuple[float, float]  # its middle as it was first seen
    end: tuple[float, float]
    way: tuple[float, float]  # against the background
    path: float  # the length of the way with all its turns, share of the long side
    area: float  # share of the picture
    colour: str = ""  # empty if it has no single one
    enters: bool = False  # through the edge of the picture
    leaves: bool = False


@dataclass(frozen=True)
class Change:
    """Something that came or went without moving."""

    kind: str  # "appears", "disappears" or "changes"
    at: tuple[float, float]
    area: float
    colour: str = ""


@dataclass(frozen=True)
class Motion:
    camera: Camera
    movers: tuple[Mover, ...] = ()  # that which moved most first
    changes: tuple[Change, ...] = ()  # the largest first
    light: float = 0.0  # how much brighter the background became, in levels of 255
    changed: float = 0.0  # share of the pixels that differ between the first and the last frame, as they are
    alike: float = 1.0  # correlation of frames two seconds apart, laid on each other, where it is least

    def as_json(self) -> dict[str, Any]:
        """For a page's notes: numbers rounded, so that the last bits of another machine's arithmetic do not show."""
        return _rounded(asdict(self))


def motion_of(values: dict[str, Any]) -> Motion:
    """The inverse of `as_json`."""
    movers = tuple(Mover(**{k: tuple(v) if isinstance(v, list) else v for k, v in each.items()}) for each in values["movers"])
    changes = tuple(Change(**(each | {"at": tuple(each["at"])})) for each in values["changes"])
    return Motion(Camera(**values["camera"]), movers, changes, values["light"], values["changed"], values["alike"])


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return round(value, 4)
    return value


def measure(frames: list[Array]) -> Motion:
    """The motion from the first of the frames to the last; two frames at least."""
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    steps = [camera_step(before, after) for before, after in pairwise(greys)]
    maps = [step.map for step in steps]
    whole = product(maps)
    camera = camera_of(whole, steps, greys[0].shape)
    changed = float(np.mean(difference(frames[0], frames[-1]) > DIFFERENT))
    alike = likeness(greys, maps)
    if camera.unclear > UNCLEAR:
        return Motion(camera, changed=changed, alike=alike)
    tracks = follow(greys, maps)
    movers = [mover_of(track, frames) for track in tracks]
    movers = [mover for mover in movers if mover.path >= PATH]
    movers.sort(key=lambda mover: -mover.area * mover.path)
    changes, light = changes_of(frames, whole, tracks)
    return Motion(camera, tuple(movers), tuple(changes), light, changed, alike)


# ------------------------------------------------------------------------------------------------------------------- camera


@dataclass(frozen=True)
class CameraStep:
    """From one frame to the next."""

    map: Array  # (3, 3), of pixels of the one to pixels of the next
    followed: float  # share of the corners that obey it; 0 if nothing can be said


def camera_step(before: Array, after: Array) -> CameraStep:
    """The camera from one grey frame (h, w) to the next."""
    nothing = CameraStep(np.eye(3), 0.0)
    starts, ends = corners(before, after)
    if len(starts) < FEWEST:
        # A picture without corners that stays as it is has a camera that stays as it is.
        still = float(np.mean(cv2.absdiff(before, after))) < 2.0
        return CameraStep(np.eye(3), 1.0) if still else nothing
    best = None
    best_span = 0.0
    left = np.ones(len(starts), bool)
    for _ in range(3):
        if left.sum() < max(FEWEST, 0.12 * len(starts)):
            break
        found, obeys = similarity(starts[left], ends[left])
        if found is None:
            break
        group = np.flatnonzero(left)[obeys]
        span = spanned(starts[group], before.shape)
        if best is None or span > 1.1 * best_span:
            best = CameraStep(found, len(group) / len(starts))
            best_span = span
        left[group] = False
    if best is None:
        return nothing
    # The few corners of a thing in front of a plain wall follow the thing, and elsewhere the picture stays as it is.
    if best_span < SPAN and stirred(before, after) < STIRRED:
        return CameraStep(np.eye(3), best.followed)
    return best


def stirred(before: Array, after: Array) -> float:
    """The share of the cells of the grid in which something is not as it was."""
    ys, xs = np.nonzero(cv2.absdiff(before, after) > DIFFERENT)
    return len(np.unique(cells_of(xs, ys, before.shape))) / (ROWS * COLUMNS)


def corners(before: Array, after: Array) -> tuple[Array, Array]:
    """Corners of the one frame and where they are in the other, (n, 2) each, those alone whose way back ends at its start."""
    found = spread_corners(before)
    if not len(found):
        return found, found
    there, seen, _ = cv2.calcOpticalFlowPyrLK(before, after, found, None, winSize=(17, 17), maxLevel=4)
    back, seen_back, _ = cv2.calcOpticalFlowPyrLK(after, before, there, None, winSize=(17, 17), maxLevel=4)
    off = np.abs(found - back).max(axis=1)
    good = (seen.ravel() == 1) & (seen_back.ravel() == 1) & (off < RETURN)
    return found[good], there[good]


def spread_corners(grey: Array) -> Array:
    """(n, 2) floats. As many from each cell of a grid: of the whole picture's best ones, most would lie on one bright thing."""
    strength = cv2.cornerMinEigenVal(grey, 3)
    peaks = (strength == cv2.dilate(strength, np.ones((9, 9), np.uint8))) & (strength > FAINT)
    ys, xs = np.nonzero(peaks)
    values = strength[ys, xs]
    cells = cells_of(xs, ys, grey.shape)
    # The strongest of each cell first, then their ranks within the cell.
    order = np.lexsort((-values, cells))
    cells = cells[order]
    ranks = np.arange(len(cells)) - np.searchsorted(cells, cells)
    chosen = order[ranks < CORNERS]
    return np.column_stack([xs[chosen], ys[chosen]]).astype(np.float32)


def cells_of(xs: Array, ys: Array, shape: tuple[int, int]) -> Array:
    """The numbers of the cells of the grid that these points are in."""
    height, width = shape
    rows = (ys * ROWS / height).astype(int)
    columns = (xs * COLUMNS / width).astype(int)
    return rows * COLUMNS + columns


def similarity(starts: Array, ends: Array) -> tuple[Array | None, Array]:
    """The shift, zoom and turn (3, 3) that most of the corners obey, and which ones do."""
    cv2.setRNGSeed(0)
    found, obeys = cv2.estimateAffinePartial2D(starts, ends, method=cv2.RANSAC, ransacReprojThreshold=NEAR, maxIters=500)
    if found is None:
        return None, np.zeros(len(starts), bool)
    obeys = obeys.ravel() == 1
    # A thing that moves by less than the tolerance is among them; the median of the errors does not mind.
    finer, _ = cv2.estimateAffinePartial2D(starts[obeys], ends[obeys], method=cv2.LMEDS)
    if finer is not None:
        found = finer
    return np.vstack([found, [0.0, 0.0, 1.0]]), obeys


def spanned(points: Array, shape: tuple[int, int]) -> float:
    """The share of the cells of the grid that have one of the points at least."""
    return len(np.unique(cells_of(points[:, 0], points[:, 1], shape))) / (ROWS * COLUMNS)


def likeness(greys: list[Array], maps: list[Array]) -> float:
    """The least correlation of frames APART from each other, in what both show: a dissolve is slow."""
    height, width = greys[0].shape
    least = 1.0
    for before in range(0, max(1, len(greys) - APART), 4):
        after = min(before + APART, len(greys) - 1)
        step = product(maps[before:after])
        there = cv2.warpAffine(greys[before], step[:2], (width, height))
        known = laid(np.ones((height, width), bool), step)
        if known.mean() >= COMMON and there[known].std() > 1 and greys[after][known].std() > 1:
            least = min(least, float(np.corrcoef(there[known], greys[after][known])[0, 1]))
    return least


def product(maps: list[Array]) -> Array:
    """One map after the other."""
    whole = np.eye(3)
    for each in maps:
        whole = each @ whole
    return whole


def camera_of(whole: Array, steps: list[CameraStep], shape: tuple[int, int]) -> Camera:
    height, width = shape
    middle = np.array([width / 2, height / 2, 1.0])
    # Where the middle of the first picture is in the last one; if it left long ago, that place is far away.
    x, y, _ = whole @ middle - middle
    followed = [step.followed for step in steps]
    return Camera(
        x=float(x / width),
        y=float(y / height),
        zoom=float(np.hypot(whole[0, 0], whole[1, 0])),
        turn=float(np.degrees(np.arctan2(whole[1, 0], whole[0, 0]))),
        followed=float(min(followed)),
        unclear=float(np.mean([each == 0 for each in followed])),
    )


# -------------------------------------------------------------------------------------------------------------------- movers


class Place(NamedTuple):
    """A place that moves, in one look."""

    mask: Array  # (h, w) booleans
    core: Array  # the same without its rim
    way: Array  # (2,), how far it moved against the background, pixels


@dataclass
class Track:
    """A place that moves, followed through several looks."""

    looks: list[int]  # numbers of the frames that it was seen to move towards
    centres: list[Array]  # (2,), its middle in each of these frames, pixels
    ways: list[Array]  # (2,), how far it moved against the background
    areas: list[int]  # pixels, of its core
    last: Place  # its last look
    best: Array  # (h, w) booleans, its core as it was at its largest ...
    best_look: int  # ... in this frame
    swept: Array  # everywhere that it has been, in pixels of the newest frame


def follow(greys: list[Array], maps: list[Array]) -> list[Track]:
    """What moves against the background, linked from look to look; those followed long enough."""
    # The fast preset looks at a quarter of the size and finds a third of the way of a thing of 20 pixels, this one 85 %.
    dense = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    height, width = greys[0].shape
    alive: list[Track] = []
    done: list[Track] = []
    before = 0
    while before + 1 < len(greys):
        now = min(before + STRIDE, len(greys) - 1)
        step = product(maps[before:now])
        for track in [*alive, *done]:
            track.swept = laid(track.swept, step)
        for found in moving_places(dense, greys[before], greys[now], step):
            track = link(alive, found, now, step)
            if track is None:
                track = Track([], [], [], [], found, found.core, now, np.zeros((height, width), bool))
                alive.append(track)
            ys, xs = np.nonzero(found.core)
            if not track.areas or len(xs) >= max(track.areas):
                track.best = found.core
                track.best_look = now
            track.looks.append(now)
            track.centres.append(np.array([xs.mean(), ys.mean()]))
            track.ways.append(found.way)
            track.areas.append(len(xs))
            track.last = found
            track.swept = track.swept | found.mask
        # One look without it may be chance, two are not.
        done += [track for track in alive if track.looks[-1] < now - STRIDE]
        alive = [track for track in alive if track.looks[-1] >= now - STRIDE]
        before = now
    return [track for track in [*done, *alive] if len(track.looks) >= LINKS]


def moving_places(dense: Any, before: Array, after: Array, step: Array) -> list[Place]:
    """Connected places that move against the background, the largest first."""
    height, width = after.shape
    there = cv2.warpAffine(before, step[:2], (width, height))
    known = laid(np.ones(before.shape, bool), step)
    # At the edge of what both frames show, and at that of the picture, flow is invented.
    known = cv2.erode(known.astype(np.uint8), np.ones((7, 7), np.uint8), borderValue=0) > 0
    flow = dense.calc(there, after, None)
    size = np.hypot(flow[..., 0], flow[..., 1])
    noise = float(np.median(size[known])) if known.any() else 0.0
    moves = (size > max(FLOW, 4 * noise)) & known
    # Flow without a difference in the picture is flow across a plain surface.
    seen = cv2.dilate((cv2.absdiff(there, after) > 8).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    moves = cv2.morphologyEx((moves & seen).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    moves = cv2.morphologyEx(moves, cv2.MORPH_CLOSE, np.ones((7, 7), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(moves)
    found = []
    for k in range(1, count):
        if stats[k, cv2.CC_STAT_AREA] >= PLACE * height * width:
            mask = labels == k
            # Smoothness spreads flow around a thing, and thins it out there.
            core = mask & (size >= 0.6 * np.percentile(size[mask], 90))
            way = np.median(flow[core], axis=0)
            # Flow stands where a thing was before.
            shift = np.array([[1.0, 0.0, way[0]], [0.0, 1.0, way[1]]])
            found.append(Place(laid(mask, shift), laid(core, shift), way))
    found.sort(key=lambda each: -each.mask.sum())
    return [each for each in found[:6] if each.core.any()]


def link(alive: list[Track], found: Place, now: int, step: Array) -> Track | None:
    """The track of which this place is the next, if there is one that has no newer look: that which it overlaps most."""
    best = None
    most = 0.0
    for track in alive:
        if track.looks[-1] >= now:
            continue
        reach = 5 + 2 * int(np.abs(track.last.way).max())
        expected = cv2.dilate(laid(track.last.mask, step).astype(np.uint8), np.ones((reach, reach), np.uint8)) > 0
        overlap = float((expected & found.mask).sum()) / min(found.mask.sum(), expected.sum() + 1)
        if overlap > max(most, 0.15):
            best = track
            most = overlap
    return best


def laid(mask: Array, step: Array) -> Array:
    """Where the places of one frame are in another."""
    height, width = mask.shape
    return cv2.warpAffine(mask.astype(np.uint8), step[:2], (width, height), flags=cv2.INTER_NEAREST) > 0


def mover_of(track: Track, frames: list[Array]) -> Mover:
    height, width = frames[0].shape[:2]
    size = np.array([width, height])
    way = np.sum(track.ways, axis=0)
    path = float(sum(np.hypot(*each) for each in track.ways)) / max(width, height)
    last = len(frames) - 1
    return Mover(
        start=_pair(track.centres[0] / size),
        end=_pair(track.centres[-1] / size),
        way=_pair(way / size),
        path=path,
        area=float(np.median(track.areas)) / (width * height),
        colour=colour_of(frames[track.best_look], track.best),
        enters=track.looks[0] > 2 * STRIDE and at_edge(track.centres[0] / size),
        leaves=track.looks[-1] < last - STRIDE and at_edge(track.centres[-1] / size),
    )


def at_edge(place: Array) -> bool:
    return bool(np.min([place, 1 - place]) < 0.1)


def _pair(values: Array) -> tuple[float, float]:
    return float(values[0]), float(values[1])


# ------------------------------------------------------------------------------------------------------------------- changes


def difference(one: Array, other: Array) -> Array:
    """(h, w): by how many levels the colours of two pictures differ, noise smoothed away."""
    apart = cv2.absdiff(cv2.blur(one, (3, 3)), cv2.blur(other, (3, 3)))
    return apart.max(axis=2)


def changes_of(frames: list[Array], whole: Array, tracks: list[Track]) -> tuple[list[Change], float]:
    """What came and went without moving, and by how much the background became brighter."""
    first = frames[0]
    last = frames[-1]
    height, width = last.shape[:2]
    whole = refined(first, last, whole)
    there = cv2.warpAffine(first, whole[:2], (width, height))
    known = laid(np.ones((height, width), bool), whole)
    known = cv2.erode(known.astype(np.uint8), np.ones((9, 9), np.uint8), borderValue=0) > 0
    if known.mean() < COMMON:
        return [], 0.0
    brighter = np.median(last[known].astype(int) - there[known], axis=0)
    light = float(brighter.mean())
    evened = np.clip(there.astype(int) + brighter.astype(int), 0, 255).astype(np.uint8)
    differs = (difference(evened, last) > DIFFERENT) & known
    for track in tracks:
        differs &= cv2.dilate(track.swept.astype(np.uint8), np.ones((15, 15), np.uint8)) == 0
    # Edges that do not lie on each other by a pixel are thin.
    solid = cv2.morphologyEx(differs.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    count, labels, stats, middles = cv2.connectedComponentsWithStats(solid)
    found = []
    for k in range(1, count):
        area = stats[k, cv2.CC_STAT_AREA] / (height * width)
        if area < NEW:
            continue
        mask = labels == k
        kind = kind_of(mask, evened, last)
        owner = evened if kind == "disappears" else last
        if elsewhere(stats[k], owner, last if kind == "disappears" else evened):
            continue
        at = _pair(middles[k] / np.array([width, height]))
        found.append(Change(kind, at, float(area), colour_of(owner, mask)))
    found.sort(key=lambda change: -change.area)
    return found, light


def refined(first: Array, last: Array, whole: Array) -> Array:
    """The map of the first frame to the last, without what the errors of many small steps have summed up to."""
    height, width = last.shape[:2]
    there = cv2.warpAffine(cv2.cvtColor(first, cv2.COLOR_RGB2GRAY), whole[:2], (width, height))
    rest = camera_step(there, cv2.cvtColor(last, cv2.COLOR_RGB2GRAY))
    if rest.followed < 0.3 or np.abs(rest.map[:2, 2]).max() > 0.05 * width:
        return whole
    return rest.map @ whole


def elsewhere(box: Array, owner: Array, other: Array) -> bool:
    """Whether what is in the box of one picture stands near it in the other one: then it has only moved a little."""
    x, y, width, height = box[:4].tolist()
    patch = owner[y : y + height, x : x + width]
    top = max(0, y - NEARBY)
    left = max(0, x - NEARBY)
    around = other[top : y + height + NEARBY, left : x + width + NEARBY]
    return float(cv2.matchTemplate(around, patch, cv2.TM_CCOEFF_NORMED).max()) > ALIKE


def kind_of(mask: Array, first: Array, last: Array) -> str:
    """A thing has an outline, and the background that it covers has none there."""
    outer = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8))
    inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8))
    ring = outer > inner
    before = outline(first)[ring].mean()
    after = outline(last)[ring].mean()
    if after > 1.15 * before:
        return "appears"
    if before > 1.15 * after:
        return "disappears"
    return "changes"


def outline(frame: Array) -> Array:
    """(h, w): how steep the colours are, the steepest of the three channels."""
    across = cv2.Sobel(frame, cv2.CV_32F, 1, 0)
    down = cv2.Sobel(frame, cv2.CV_32F, 0, 1)
    return np.hypot(across, down).max(axis=2)


# -------------------------------------------------------------------------------------------------------------------- colours

# Hue in degrees up to which a colour has this name.
HUES = (
    (15, "red"), (42, "orange"), (68, "yellow"), (165, "green"), (200, "cyan"), (258, "blue"), (292, "purple"), (335, "pink"),
    (360, "red"),
)  # fmt: skip


def colour_of(frame: Array, mask: Array) -> str:
    """The name of a colour that sets what is in the mask apart from what is around it; empty if there is none.

    A mask is wider than its thing, so the background's own colours are in it too.
    """
    around = cv2.dilate(mask.astype(np.uint8), np.ones((25, 25), np.uint8)) > 0
    around &= cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) == 0
    inside = colour_shares(frame[mask])
    outside = colour_shares(frame[around])
    excess = {name: inside[name] - outside[name] for name in inside}
    name = max(excess, key=excess.get)
    return name if excess[name] >= 0.3 else ""


def colour_shares(pixels: Array) -> dict[str, float]:
    """Of each name the share of the pixels (n, 3), RGB, that have this colour."""
    if not len(pixels):
        pixels = np.zeros((1, 3), np.uint8)
    hue, saturation, value = cv2.cvtColor(pixels.reshape(1, -1, 3), cv2.COLOR_RGB2HSV)[0].T.astype(int)
    # OpenCV counts hue in steps of two degrees.
    sector = np.searchsorted([end for end, _ in HUES], 2 * hue)
    vivid = (saturation >= 90) & (value >= 70)
    pale = saturation < 50
    shares = dict.fromkeys((name for _, name in HUES), 0.0)
    for k, (_, name) in enumerate(HUES):
        shares[name] += float(np.mean(vivid & (sector == k)))
    shares["white"] = float(np.mean(pale & (value >= 190)))
    shares["grey"] = float(np.mean(pale & (value >= 70) & (value < 190)))
    shares["black"] = float(np.mean(value < 70))
    return shares
