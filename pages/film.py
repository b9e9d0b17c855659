"""How the pictures of an answer came about, as one animated WebP: each takes shape step by step.

film = Film(duo.decoded)
duo.watch = film.see  # while an answer is written
data = film.webp([p.image for p in answer.pictures])
"""

import io
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageOps

from checkpoint import InputError
from pages.template import enlarged

STEP = 80  # ms that a step is shown
FINISHED = 1200  # ms that a finished picture is
QUALITY = 85  # noise does not pack without loss: eight steps of a miniature's picture would take 320 KB


class Film:
    """Collects frames while pictures are painted. decoded: makes a picture of a latent."""

    def __init__(self, decoded: Callable[[Any], Image.Image]):
        self.decoded = decoded
        self.frames: dict[int, list[Image.Image]] = defaultdict(list)

    def see(self, request: Any, step: int, latent: Any) -> None:
        """What pipeline.DuoGen shows of a picture in the making."""
        self.frames[request.number].append(self.decoded(latent))

    def webp(self, finished: list[Image.Image]) -> bytes:
        """The file. finished: the answer's pictures, of which those without frames are only held; b"" where there is none."""
        pictures = []
        shown = []  # ms of each
        for number, image in enumerate(finished):
            # The last prediction is the picture itself up to rounding.
            growing = self.frames[number][:-1]
            pictures += [*growing, image]
            shown += [STEP] * len(growing) + [FINISHED]
        if not pictures:
            return b""
        # A film has one size. Smaller pictures lie in the middle of it.
        size = tuple(max(side) for side in zip(*(p.size for p in pictures), strict=True))
        pictures = [enlarged(ImageOps.pad(p, size, color="white") if p.size != size else p) for p in pictures]
        data = io.BytesIO()
        first, *rest = pictures
        try:
            first.save(data, "WEBP", save_all=True, append_images=rest, duration=shown, loop=0, quality=QUALITY)
        except (KeyError, OSError) as e:
            raise InputError(f"--film: this Pillow cannot write animated WebP ({e}): leave it out") from None
        return data.getvalue()
