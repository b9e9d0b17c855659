"""A video file as frames, shots and clips, by PyAV and PySceneDetect.

    watched = shots("film.mp4")                           Watched(shots=[Shot(0.0, 7.28), ...], cuts=[7.28, ...], ...)
    wanted = windows(watched.shots[0], seconds=5.0)       [(0.1, 5.1)]
    for clip in clips("film.mp4", wanted, side=1024):     first frame, last frame, and small ones between them

A file is decoded twice, once for its shots and once for its clips, and one clip at a time is in memory.

Time is that of the frames' own stamps, in seconds from the first one: frames need not come at a steady rate. A frame is turned
upright as the file says, and pixels that are not square become so. A file is nobody's program: playlists and other formats
that make FFmpeg open further files or addresses are not read.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from scenedetect.common import FrameTimecode, Timecode
from scenedetect.detectors import AdaptiveDetector, ThresholdDetector

from records.validate import MAX_PIXELS, one_line

Array = np.ndarray

# What FFmpeg may take a file for. None of these names other files (as hls, dash, concat and image2 do).
FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,h264,hevc,ivf,mp3,wav,flac,aac"
# Pixels of the long side on which cuts are looked for. At the 256 that is usual, fine patterns under a quick pan change as much
# from frame to frame as a cut changes; smaller, they are grey, and a cut is not.
SMALL = 64
MIDDLE = 320  # ... on which motion is measured
RATE = 8  # frames a second on which motion is measured
EDGE = 0.1  # seconds at both ends of a shot that no clip has: a cut of interlaced or mixed frames is not sharp
FADE = 2.0  # seconds at the ends of a shot in which a fade is looked for
DIMMED = 0.85  # of the shot's usual brightness: what is darker there is the fade


# ------------------------------------------------------------------------------------------------------------------- frames


class Unreadable(Exception):
    """A file that gives no frames. Its text is a reason as page.Dropped has it."""


@dataclass
class Frame:
    """A frame as it was decoded."""

    seconds: float  # since the first one
    picture: av.VideoFrame
    damaged: bool  # it, or one that it builds on, could not be decoded whole


class Film:
    """A file whose frames are decoded in order, once.

    Errors: Unreadable.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.is_file():
            raise Unreadable("no file")
        if not path.stat().st_size:
            raise Unreadable("empty file")
        try:
            # With its protocol, so that a name with a colon is not taken for an address.
            self.container = av.open(f"file:{path}", options={"format_whitelist": FORMATS})
        except av.error.ArgumentError:
            raise Unreadable("format: none that is read") from None
        except (av.error.FFmpegError, ValueError, UnicodeError) as e:
            raise Unreadable(f"broken: {reason(e)}") from None
        try:
            self.stream = self._moving_pictures()
        except BaseException:
            self.close()
            raise
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        self.bad = 0  # packets that could not be decoded
        self.frames_read = 0
        self.end = 0.0  # seconds: where the last frame that was read ends

    def _moving_pictures(self) -> av.video.stream.VideoStream:
        # The cover of a song is a stream of pictures, too.
        streams = [s for s in self.container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise Unreadable("no moving pictures")
        stream = streams[0]
        # A stream whose codec nobody knows has no context at all.
        context = stream.codec_context
        if context is None:
            raise Unreadable("broken: unknown codec")
        if context.width * context.height > MAX_PIXELS:
            raise Unreadable(f"too large: {context.width} x {context.height}")
        # One task, one core: several files are read at a time instead.
        context.thread_count = 1
        return stream

    def __iter__(self) -> Iterator[Frame]:
        first = None
        last = -1.0
        damaged = False
        try:
            for packet in self.container.demux(self.stream):
                try:
                    pictures = packet.decode()
                except av.error.FFmpegError:
                    self.bad += 1
                    damaged = True
                    continue
                for picture in pictures:
                    if picture.width * picture.height > MAX_PIXELS:  # it may be another than the header's
                        raise Unreadable(f"too large: {picture.width} x {picture.height}")
                    # Some streams carry no times; then the rate is all there is.
                    seconds = picture.time if picture.pts is not None else (first or 0.0) + last + 1 / self.rate
                    if first is None:
                        first = seconds
                    seconds -= first
                    # Time never runs backwards, whatever is stamped on a frame.
                    if self.frames_read and seconds <= last:
                        continue
                    damaged = (damaged and not picture.key_frame) or picture.is_corrupt
                    last = seconds
                    self.frames_read += 1
                    self.end = seconds + self._length(picture)
                    yield Frame(seconds, picture, damaged)
        except av.error.FFmpegError:  # of the container: there is nothing after it
            self.bad += 1

    def _length(self, picture: av.VideoFrame) -> float:
        if picture.duration and picture.time_base:
            return float(picture.duration * picture.time_base)
        return 1 / self.rate

    @property
    def stated(self) -> float:
        """Seconds that the file says it lasts; 0 if it says nothing."""
        if self.stream.duration and self.stream.time_base:
            return float(self.stream.duration * self.stream.time_base)
        return (self.container.duration or 0) / 1e6

    def close(self) -> None:
        self.container.close()


def reason(error: BaseException) -> str:
    """FFmpeg's words without the path, which the report has anyway."""
    return one_line(getattr(error, "strerror", None) or error)


class Scaler:
    """Frames as pictures of a size, upright, with square pixels."""

    def __init__(self, side: int):
        self.side = side  # pixels, at most, of the long side
        self.reformatter = VideoReformatter()  # keeps what swscale has prepared for this size

    def __call__(self, picture: av.VideoFrame, aspect: Fraction | None) -> Array:
        """(h, w, 3) bytes, RGB. aspect: width of a pixel over its height."""
        width = picture.width * float(aspect or 1)
        height = picture.height
        scale = min(1.0, self.side / max(width, height))
        width = max(1, round(width * scale))
        height = max(1, round(height * scale))
        rgb = self.reformatter.reformat(picture, width, height, "rgb24", interpolation="AREA").to_ndarray()
        # FFmpeg counts against the clock, as numpy does.
        return np.ascontiguousarray(np.rot90(rgb, round(picture.rotation / 90)))


# -------------------------------------------------------------------------------------------------------------------- shots


@dataclass(frozen=True)
class Shot:
    """A part of a film between two cuts, its fades left out. Seconds; the frame at `end` belongs to the next one."""

    start: float
    end: float


@dataclass(frozen=True)
class Watched:
    """What is known of a film after it was watched once."""

    shots: list[Shot]
    cuts: list[float]  # seconds: of the first frame after each; in the middle of the black between two fades
    seconds: float  # up to the end of the last frame
    frames: int
    bad: int  # packets that could not be decoded
    missing: float  # seconds that the file states and does not have


def shots(path: str | Path, least: float = 0.6, adaptive: float = 2.2, content: float = 15.0, black: float = 12.0) -> Watched:
    """The shots of a film.

    least: seconds of the shortest shot; of two cuts that are closer the first one counts.
    adaptive: how many times the mean change around it a cut's change must be; content: and at least so much, levels of 255.
    black: mean level of a frame between a fade out and a fade in.
    Errors: Unreadable.
    """
    # The library's own minimum is 15 frames, which is another time at each rate. Seconds are told as a float.
    detectors = [
        AdaptiveDetector(adaptive_threshold=adaptive, min_content_val=content, min_scene_len=float(least)),
        ThresholdDetector(threshold=black, min_scene_len=float(least)),
    ]
    found: list[float] = []
    times = array("d")
    levels = array("f")
    with closing(Film(path)) as film:
        scaler = Scaler(SMALL)
        aspect = film.stream.sample_aspect_ratio
        rate = Fraction(film.rate).limit_denominator(1001)
        for frame in film:
            small = scaler(frame.picture, aspect)
            times.append(frame.seconds)
            levels.append(small.mean())
            code = FrameTimecode(Timecode(round(frame.seconds * 1e6), Fraction(1, 1_000_000)), fps=rate)
            bgr = np.ascontiguousarray(small[..., ::-1])
            for detector in detectors:
                found += [cut.seconds for cut in detector.process_frame(code, bgr)]
        if not times:
            raise Unreadable("broken: no frame can be decoded")
        missing = max(0.0, film.stated - film.end)
        cuts = thinned([on_a_frame(cut, times) for cut in found], least)
        bounds = [0.0, *cuts, film.end]
        parts = [without_fades(Shot(a, b), times, levels) for a, b in pairwise(bounds)]
        return Watched(parts, cuts, film.end, film.frames_read, film.bad, missing)


def on_a_frame(seconds: float, times: array) -> float:
    """The time of the first frame that is not before it; a microsecond of rounding aside."""
    return times[min(bisect_left(times, seconds - 2e-6), len(times) - 1)]


def thinned(cuts: list[float], least: float) -> list[float]:
    """In order, none closer to the one before (or to the beginning) than the shortest shot."""
    kept: list[float] = []
    for cut in sorted(cuts):
        if cut - (kept[-1] if kept else 0.0) >= least - 1e-6:
            kept.append(cut)
    return kept


def without_fades(shot: Shot, times: array, levels: array) -> Shot:
    """Its ends moved inwards over frames that are darker than it usually is: fades, and the black between them."""
    begin = bisect_left(times, shot.start)
    end = bisect_left(times, shot.end)
    if end - begin < 3:
        return shot
    dim = DIMMED * float(np.median(np.frombuffer(levels, np.float32)[begin:end]))
    first = begin
    while first < end - 1 and levels[first] < dim and times[first] < shot.start + FADE:
        first += 1
    last = end
    while last > first + 1 and levels[last - 1] < dim and times[last - 1] > shot.end - FADE:
        last -= 1
    # A shot that is dark for longer than a fade lasts is a dark shot.
    start = times[first] if levels[first] >= dim else shot.start
    if last == end or levels[last - 1] < dim:
        return Shot(start, shot.end)
    return Shot(start, times[last])


# -------------------------------------------------------------------------------------------------------------------- clips


@dataclass
class Clip:
    """Some seconds of a shot, as they were decoded."""

    start: float  # seconds, of its first frame
    end: float  # ... of its last one
    first: Array  # (h, w, 3) bytes, RGB
    last: Array
    frames: list[Array] = field(default_factory=list)  # a few a second, small, the first and the last among them
    damaged: bool = False


def windows(shot: Shot, seconds: float) -> list[tuple[float, float]]:
    """The clips of a shot, one behind the other: where each begins and ends."""
    start = shot.start + EDGE
    room = shot.end - EDGE - start
    return [(start + k * seconds, start + (k + 1) * seconds) for k in range(int(room / seconds + 1e-6))]


def clips(path: str | Path, wanted: list[tuple[float, float]], side: int) -> Iterator[Clip]:
    """The clips of a film in these windows, which are in order; one at a time is in memory.

    side: pixels, at most, of the long side of a clip's first and last frame. Errors: Unreadable.
    """
    queue = iter(wanted)
    window = next(queue, None)
    whole = Scaler(side)
    small = Scaler(MIDDLE)
    clip = None
    held = None  # the newest frame of the clip
    with closing(Film(path)) as film:
        aspect = film.stream.sample_aspect_ratio
        for frame in film:
            if window and clip and frame.seconds > window[1] + 1e-6:
                yield ended(clip, held, whole, small, aspect)
                clip = None
                window = next(queue, None)
            if window is None:
                return
            if frame.seconds < window[0] - 1e-6:
                continue
            if clip is None:
                first = whole(frame.picture, aspect)
                clip = Clip(frame.seconds, frame.seconds, first, first)
                due = frame.seconds
            clip.damaged |= frame.damaged
            if frame.seconds >= due - 1e-6:
                clip.frames.append(small(frame.picture, aspect))
                clip.end = frame.seconds
                due += 1 / RATE
                # After a gap in the times there is no hurry to make up for it.
                due = max(due, frame.seconds)
            held = frame
        if clip:
            yield ended(clip, held, whole, small, aspect)


def ended(clip: Clip, held: Frame, whole: Scaler, small: Scaler, aspect: Fraction | None) -> Clip:
    """With its last frame."""
    clip.last = whole(held.picture, aspect)
    if held.seconds > clip.end:
        clip.frames.append(small(held.picture, aspect))
    clip.end = held.seconds
    return clip
