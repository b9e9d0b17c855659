"""Videos in, transitions out: the first and the last frame of a clip, and between them the words for what happened.

    python -m curate video FILES... --out data/video     files, or folders of them
    python -m curate video FILES... --out data/video --seconds 3 --side 640
    python -m curate video FILES... --out data/video --model URL        a model puts what happened into words

A clip is some seconds of a shot. Each is a page of page.py,

    parts       first frame, words, last frame
    messages    user: first frame, "Show the same scene 5 seconds later. The camera pans to the right."   assistant: last frame

with its measures in `notes`, by which steps drop what is dark, blurred, static or cut.

How files are read: shots.py; how motion is measured and told: motion.py, wording.py.
"""

import argparse
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

from checkpoint import InputError
from curate import motion
from curate.command import add_engine_flags, add_model_flags, make_room, model_of, start, versions, with_thresholds
from curate.engine import MOST_TASKS
from curate.models import Model, asking, at_once, prompt
from curate.page import Dropped, Page, Picture, Step
from curate.shots import Clip, Unreadable, Watched, clips, shots, windows
from curate.wording import words as words_of
from evaluate.judges import Unanswered
from flags import Parser, add_flags
from records.validate import one_line

Array = np.ndarray

ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv", ".ogv", ".3gp")
SHARP = 480  # pixels of the long side on which sharpness is measured: it depends on the size
FEWEST = 4  # small frames of a clip, which are 8 a second
JPEG = 95  # quality of the frames that are kept
PACKAGES = ("datatrove", "av", "scenedetect-headless", "pillow", "numpy")


# -------------------------------------------------------------------------------------------------------------------- pages


@dataclass(frozen=True)
class Clips:
    """The source: the pages of a video file, a clip each, and what could not become one as the reason."""

    seconds: float = 5.0  # length of a clip
    side: int = 1024  # pixels, at most, of the long side of the frames that are kept
    scene: float = 0.6  # seconds of the shortest shot
    adaptive: float = 2.2  # a cut is a change so many times the mean change around it
    content: float = 15.0  # ... and at least so large, levels of 255

    def read(self, item: str) -> Iterator[Page | Dropped]:
        # The engine has a process a task; OpenCV would start threads in each of them.
        cv2.setNumThreads(1)
        try:
            film = shots(item, self.scene, self.adaptive, self.content)
            yield from self._read(item, film)
        except Unreadable as e:
            yield Dropped(str(e))

    def _read(self, item: str, film: Watched) -> Iterator[Page | Dropped]:
        if film.missing > 1.0:
            yield Dropped(f"truncated: after {film.seconds:.1f} of {film.seconds + film.missing:.1f} s")
        elif film.bad:
            yield Dropped(f"damaged file: {film.bad} packets cannot be decoded")
        wanted = []
        numbers = []
        for number, shot in enumerate(film.shots):
            found = windows(shot, self.seconds)
            if not found:
                yield Dropped(f"short shot: {shot.end - shot.start:.2f} s")
            wanted += found
            numbers += [number] * len(found)
        # Not strict: a film may end before its last windows, which then have no clip.
        for number, clip in zip(numbers, clips(item, wanted, self.side), strict=False):
            if len(clip.frames) < FEWEST:
                yield Dropped(f"few frames: {len(clip.frames)} in {clip.end - clip.start:.1f} s")
                continue
            yield page_of_clip(item, number, clip)


def page_of_clip(path: str, shot: int, clip: Clip) -> Page:
    """A clip as a page of its two frames, with what was measured of it."""
    name = f"{path}#t={clip.start:.3f},{clip.end:.3f}"  # as media fragments are written (W3C)
    frames = [(clip.first, clip.start), (clip.last, clip.end)]
    pictures = [picture_of(picture, f"{path}#t={seconds:.3f}") for picture, seconds in frames]
    notes = {
        "shot": shot,
        "seconds": round(clip.end - clip.start, 3),
        "damaged": clip.damaged,
        "brightness": round(min(float(frame.mean()) for frame, _ in frames) / 255, 4),
        "sharpness": round(min(sharpness(frame) for frame, _ in frames), 1),
        "jump": round(max(jumps(clip.frames)), 4),
        "motion": motion.measure(clip.frames).as_json(),
    }
    return Page(name, url=name, title=Path(path).name, language="en", parts=tuple(pictures), notes=notes)


def picture_of(frame: Array, address: str) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG)
    height, width = frame.shape[:2]
    return Picture(address, width=width, height=height).filled(buffer.getvalue())


def sharpness(frame: Array) -> float:
    """The variance of the Laplacian at a fixed size: about 100 and more where something is in focus."""
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    scale = SHARP / max(grey.shape)
    if scale < 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def jumps(frames: list[Array]) -> list[float]:
    """From each frame to the next: the share of the pixels that would need another colour, 512 colours, wherever they are."""
    tables = []
    for frame in frames:
        counts = cv2.calcHist([frame], [0, 1, 2], None, [8, 8, 8], [0, 256] * 3)
        tables.append(counts / counts.sum())
    return [float(np.abs(a - b).sum() / 2) for a, b in pairwise(tables)]


# -------------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Whole:
    """Drops clips with frames that could not be decoded whole."""

    def __call__(self, page: Page) -> Page | Dropped:
        return Dropped("damaged: a frame cannot be decoded") if page.notes["damaged"] else page


@dataclass(frozen=True)
class Bright:
    """Drops clips whose first or last frame is dark."""

    least: float = 0.08  # mean level, 1 is white

    def __call__(self, page: Page) -> Page | Dropped:
        value = page.notes["brightness"]
        return page if value >= self.least else Dropped(f"dark: {value:.3f} of white, below {self.least}")


@dataclass(frozen=True)
class Sharp:
    """Drops clips whose first or last frame is blurred."""

    # Variance of the Laplacian, at 480 pixels on the long side. Of 117 photos of real guides one is below it as it is, and 97
    # are once they are blurred by two pixels.
    least: float = 30.0

    def __call__(self, page: Page) -> Page | Dropped:
        value = page.notes["sharpness"]
        return page if value >= self.least else Dropped(f"blurred: {value:.1f}, below {self.least}")


@dataclass(frozen=True)
class Moving:
    """Drops clips whose last frame is their first one."""

    least: float = 0.005  # share of the pixels that differ

    def __call__(self, page: Page) -> Page | Dropped:
        value = page.notes["motion"]["changed"]
        return page if value >= self.least else Dropped(f"static: {100 * value:.2f} % of the pixels differ")


@dataclass(frozen=True)
class Uncut:
    """Drops clips that hold a cut, a flash or a dissolve that the detectors did not take for one."""

    jump: float = 0.5  # share of the pixels that get another colour from one frame to the next, an eighth of a second apart
    alike: float = 0.5  # correlation of frames two seconds apart, after the camera's movement

    def __call__(self, page: Page) -> Page | Dropped:
        value = page.notes["jump"]
        if value > self.jump:
            return Dropped(f"cut: {value:.2f} of the colours change at once, above {self.jump}")
        alike = page.notes["motion"]["alike"]
        if alike < self.alike:
            return Dropped(f"cut: frames two seconds apart correlate by {alike:.2f}, below {self.alike}")
        return page


@dataclass(frozen=True)
class Clear:
    """Drops clips in which no camera explains most of the picture: smoke, water, a face that fills it."""

    followed: float = 0.4  # share of the corners that obey the camera, where they are fewest
    pairs: float = motion.UNCLEAR  # share of the pairs of frames that said nothing at all, at most

    def __call__(self, page: Page) -> Page | Dropped:
        camera = page.notes["motion"]["camera"]
        if camera["unclear"] > self.pairs:
            return Dropped(f"unclear: no corners to follow in {camera['unclear']:.2f} of the frames")
        if camera["followed"] < self.followed:
            return Dropped(f"unclear: {camera['followed']:.2f} of the corners obey one camera, below {self.followed}")
        return page


# What the user asks for, and how the words of what happens stand in it.
REQUESTS = (
    "Show the same scene {seconds} later. {words}",
    "{words} Show what it looks like then, {seconds} on.",
    "Let {seconds} pass in this picture. {words}",
    "This is the first frame of a clip of {seconds}. {words} Show the last frame.",
)


@dataclass(frozen=True)
class Measured:
    """The words and the dialogue, from what was measured."""

    def __call__(self, page: Page) -> Page | Dropped:
        words = words_of(motion.motion_of(page.notes["motion"]))
        return with_words(page, words) if words else Dropped("unclear: no corners to follow")


@dataclass(frozen=True)
class Told:
    """The words by a model that sees both frames and is told what was measured; the dialogue.

    Words that break a rule, and answers that do not come, are refused, and what was measured is said instead if it is clear.
    """

    model: Model
    longest: int = 90  # words

    @property
    def at_once(self) -> int:
        return at_once(self.model)

    def manifest(self) -> dict:
        return asking(self.model, "transition")

    def __call__(self, page: Page) -> Page | Dropped:
        measured = words_of(motion.motion_of(page.notes["motion"]))
        first, last = page.pictures
        question = prompt("transition", seconds=spoken(page.notes["seconds"]), measured=measured or "nothing for certain")
        try:
            words = " ".join(self.model.write([first, last, question], max_tokens=256).split())
            refused = self.fault(words)
        except Unanswered as e:
            refused = f"no answer: {one_line(e)}"
        if not refused:
            return with_words(page, words)
        unclear = Clear()(page)
        if isinstance(unclear, Dropped):
            return Dropped(f"{unclear.reason}, and the model's words were refused: {refused}")
        page = with_words(page, measured)
        return replace(page, notes=page.notes | {"words refused": refused})

    def fault(self, words: str) -> str:
        """Which rule they break; empty if none."""
        count = len(words.split())
        if not 4 <= count <= self.longest:
            return f"{count} words"
        if re.search(r"[*#`<>{}|]|https?:", words):
            return "not plain text"
        if found := re.search(r"\b(first|last|second|two) (frame|image|picture|photo)s?\b|\bvideo\b", words, re.IGNORECASE):
            return f"speaks of the {found[0].lower()}"
        if found := re.search(r"\b(I|cannot|can't|sorry|unable|as an AI)\b", words):
            return f"speaks of itself: {found[0]}"
        return ""


def with_words(page: Page, words: str) -> Page:
    """The page with the words between its frames, and the dialogue."""
    first, last = page.pictures
    # Which form is used is chance, and always the same chance.
    chance = int(hashlib.sha256(page.id.encode("utf-8", "surrogatepass")).hexdigest(), 16)
    request = REQUESTS[chance % len(REQUESTS)].format(seconds=spoken(page.notes["seconds"]), words=words)
    asked = {"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": request}]}
    shown = {"role": "assistant", "content": [{"type": "image", "image": 1}]}
    return replace(page, parts=(first, words, last), messages=(asked, shown))


def spoken(seconds: float) -> str:
    whole = round(seconds)
    return "1 second" if whole == 1 else f"{whole} seconds"


# ------------------------------------------------------------------------------------------------------------------ command


def steps_of(model: Model) -> list[Step]:
    """What a clip goes through, the cheap steps first."""
    if model:
        # A model sees what no camera explains.
        return [Whole(), Bright(), Sharp(), Moving(), Uncut(), Told(model)]
    return [Whole(), Bright(), Sharp(), Moving(), Uncut(), Clear(), Measured()]


def decoder() -> dict[str, str]:
    """What decides which frames there are: another decoder finds others, where they do not come at a steady rate."""
    libraries = {name: ".".join(map(str, version)) for name, version in sorted(av.library_versions.items())}
    return {"PyAV": av.__version__, **libraries, "OpenCV": cv2.__version__}


def inputs(paths: list[str]) -> list[tuple[str, int]]:
    """(path, bytes) of files, and of what lies in folders and has the name of a video. Errors: InputError."""
    found: dict[str, int] = {}
    for path in paths:
        given = Path(path)
        if not given.exists():
            raise InputError(f"{path}: no such file or folder")
        files = [given]
        if given.is_dir():
            files = [file for file in given.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file()]
        found |= {str(file): file.stat().st_size for file in files}
    if not found:
        raise InputError(f"{', '.join(paths)}: no video in it; videos end in {', '.join(ENDINGS)}")
    return sorted(found.items())


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "python -m curate video", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", metavar="FILES", help="videos, folders of them")
    add_flags(parser, Clips, title="clips")
    add_model_flags(parser)
    add_engine_flags(parser)
    args = parser.parse_flags(argv)
    values = {field.name: getattr(args, field.name) for field in fields(Clips)}
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InputError(f"--{name} {value:g}: must be more than 0")
    source = Clips(**values)
    calls = str(Path(args.out).resolve() / "work" / "calls") if args.model != "none" else ""
    model = model_of(args, calls)
    model.check()
    found = inputs(args.files)
    make_room(args)
    # A video is hours of work, a page a fraction of a second: each is a task of its own, up to a point.
    args.tasks = args.tasks or min(len(found), MOST_TASKS)
    settings = {"versions": versions(PACKAGES), "decoder": decoder(), "source": asdict(source)}
    start(
        args,
        name="video",
        source=source,
        steps=tuple(with_thresholds(steps_of(model), args.set)),
        inputs=tuple(found),
        settings=settings,
        calls=calls,
        price=args.price,
    )
