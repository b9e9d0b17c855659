"""Pictures for a script: each is painted under its own words and, by this project's sampler, with a look at all before it.

    painter = Painter("self", kept="data/synth/painted")
    painter.paint("How do I fold a boat?", ["A sheet of blue paper on a table ...", "The sheet, folded once ..."])   PNG files

`self` is pipeline.DuoGen: the request is read, then the words of the first picture as if the model had written them, then BOV;
the painted picture is looked at, then come the words of the second. So the painter works as in a dialogue, and what it is told
does not depend on what a language model would have said. A server gets each picture's words alone (OpenAI's images/generations,
as vLLM-Omni, SGLang and services have it); it never sees the pictures before.

What is painted lies in `kept`, a file by the hash of all that it depends on: painter, request, words so far, size, seed.
"""

import base64
import hashlib
import io
import json
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import get_session
from PIL import Image

from checkpoint import InputError, parse_dtype, part_folder, pick_device, sha256
from curate.store import whole
from curate.models import reason
from evaluate.judges import Unanswered
from evaluate.server import FIRST, LATER, PAUSE
from families.registry import PARTS
from pipeline import DuoGen, Paint, Read, Stop, derive, find_checkpoint, read_manifest
from records.validate import load_image

FORMAT = 1  # of a key: another way to paint the same words makes another one


@dataclass(frozen=True)
class Painter:
    """Who paints, and how."""

    where: str = "self"  # this project's system, or the address of a server
    name: str = ""  # what the server calls its model
    kept: str = ""  # folder of what is painted; empty: nowhere
    seed: int = 0
    height: int | None = None  # pixels; None: the checkpoint's, of a server 1024
    width: int | None = None
    steps: int | None = None  # of self: calls of the DiT; None: the checkpoint's
    guidance: float | None = None  # of self, likewise
    ckpt: str | None = None  # of self: checkpoint; None: the bundled miniature
    mllm: str | None = None  # of self: a part from elsewhere
    dit: str | None = None
    vae: str | None = None
    device: str = "auto"  # of self
    dtype: str = "auto"  # of self
    timeout: float = 300.0  # seconds until a silent server is asked again
    tries: int = 4  # how often a failing server is asked
    at_once: int = 4  # scripts that are painted at the same time by a server

    def paint(self, request: str, words: list[str]) -> list[bytes]:
        """A PNG file for each of the words. Unanswered where a server does not paint."""
        keys = self.keys(request, words)
        files = [kept_file(self.kept, key, "png") for key in keys]
        if all(file and file.is_file() for file in files):
            tally(self, os.getpid())["kept"] += len(files)
            return [file.read_bytes() for file in files]
        if self.where == "self":
            painted = [png(image) for image in scripted(system(self, os.getpid()), request, words, self.settings(request))]
        else:
            painted = [served(self, text, derive(self.seed, request, k)) for k, text in enumerate(words)]
        tally(self, os.getpid())["painted"] += len(painted)
        for file, data in zip(files, painted, strict=True):
            if file:
                with whole(file) as out:
                    out.write(data)
        return painted

    def settings(self, request: str) -> dict:
        """Of pipeline.Settings; the seed is the request's own, so that the order of requests does not matter."""
        named = {name: getattr(self, name) for name in ("height", "width", "steps", "guidance")}
        return {name: value for name, value in named.items() if value is not None} | {"seed": derive(self.seed, request)}

    def keys(self, request: str, words: list[str]) -> list[str]:
        """What each picture depends on, as a hash: words that come later are not among it."""
        everything = [FORMAT, self.identity(), request, self.settings(request)]
        hashes = []
        for text in words:
            everything.append(text)
            hashes.append(hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest())
        return hashes

    def identity(self) -> dict:
        """All that its pictures depend on beside what it is asked: the weights, not where they lie."""
        if self.where != "self":
            return {"model": self.name}
        return {"weights": weights_of(self), "dtype": self.dtype, "device": pick_device(self.device).type}

    def manifest(self) -> dict:
        """What its pictures depend on, and nothing of this machine."""
        about = {name: getattr(self, name) for name in ("seed", "height", "width")}
        if self.where != "self":
            return {"painter": self.name, **about}
        parts = {part: getattr(self, part) for part in PARTS if getattr(self, part)}
        about |= {"steps": self.steps, "guidance": self.guidance}
        return {"painter": "self", "weights": self.ckpt or "bundled", **parts, **about}

    def check(self) -> None:
        """InputError, one line, where it cannot be asked."""
        if self.where == "self":
            return
        if not self.where.startswith(("http://", "https://")):
            raise InputError(
                f"--painter {self.where}: must be self, or the address of a server, such as http://localhost:8000/v1"
            )
        if not self.name:
            raise InputError("--painter-name is missing: what the server calls its model")


@cache
def tally(painter: Painter, process: int) -> dict[str, int]:
    """Pictures of this process so far."""
    return {"painted": 0, "kept": 0}


def kept_file(folder: str, key: str, ending: str) -> Path | None:
    return Path(folder) / key[:2] / f"{key}.{ending}" if folder else None


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


# --------------------------------------------------------------------------------------------------------------------- self


@cache
def system(painter: Painter, process: int) -> DuoGen:
    """The system, loaded when a process first needs it."""
    device = pick_device(painter.device)
    parts = {part: getattr(painter, part) for part in ("mllm", "dit", "vae")}
    return DuoGen.from_pretrained(painter.ckpt, **parts, dtype=parse_dtype(painter.dtype, device), device=device)


@cache
def weights_of(painter: Painter) -> dict:
    """Of each part a hash, and the checkpoint's sampling: a folder keeps its name when its weights are trained on."""
    found = {}
    manifest = None
    for part in PARTS:
        named = getattr(painter, part)
        base = None
        if named is None:
            base = find_checkpoint(painter.ckpt, None)
            manifest = read_manifest(base / "duogen.json")
            named = manifest["parts"][part]
        digest = hashlib.sha256()
        for file in sorted(part_folder(named, part, base=base).glob("*.safetensors")):
            digest.update(f"{file.name} {sha256(file)}".encode())
        found[part] = digest.hexdigest()
    return found | {"sampling": manifest["sampling"] if manifest else {}}


@torch.no_grad()
def scripted(duo: DuoGen, request: str, words: list[str], settings: dict) -> list[Image.Image]:
    """One answer whose every token is given: the words of each picture, then BOV. The pictures alone are the system's own."""
    bov = duo.tokenizer.vision_start
    script = [token for text in words for token in [*duo.tokenizer.encode(text), bov]]
    limits = {"max_images": len(words), "max_tokens": len(script) + 1}
    answer = duo.answer(request, duo.settings(**settings | limits))
    writer = answer.write()
    tokens = iter([*script, duo.tokenizer.im_end])
    event = next(writer)
    unread = Read(answer, [], None, [])
    while not isinstance(event, Stop):
        reply = None
        if isinstance(event, Read):
            # No token has to be waited for, so all up to a picture are read at once.
            pixels = event.pixels if unread.pixels is None else unread.pixels
            unread = Read(answer, unread.ids + event.ids, pixels, unread.grids + event.grids)
            reply = next(tokens)
            if reply == bov:
                duo.read([unread])
                unread = Read(answer, [], None, [])
        elif isinstance(event, Paint):
            [reply] = duo.paint([event])
        event = writer.send(reply)
    if len(answer.pictures) != len(words):
        raise InputError(f"the script is longer than the language model's context: {answer.stop_meaning}")
    return [picture.image for picture in answer.pictures]


# ------------------------------------------------------------------------------------------------------------------- server


def served(painter: Painter, words: str, seed: int) -> bytes:
    """A picture from a server. Unanswered when all tries are used up."""
    size = f"{painter.width or 1024}x{painter.height or 1024}"
    asked = {"model": painter.name, "prompt": words, "n": 1, "size": size, "response_format": "b64_json", "seed": seed % 2**31}
    url = painter.where.rstrip("/")
    headers = {"Authorization": f"Bearer {os.environ.get('PAINTER_API_KEY', 'none')}"}
    # The Hub's client refuses all traffic under HF_HUB_OFFLINE, but a painter is not the Hub.
    session = get_session()
    session.event_hooks = {}
    pause = FIRST
    for left in reversed(range(painter.tries)):
        try:
            reply = session.post(f"{url}/images/generations", json=asked, headers=headers, timeout=painter.timeout)
        except Exception as e:  # of the HTTP library, which is the Hub's own choice
            problem = reason(e)
        else:
            if reply.status_code in (401, 403, 404):
                raise InputError(f"{url}: HTTP {reply.status_code}: correct the address, the model or PAINTER_API_KEY")
            picture = picture_of(reply) if reply.status_code < 400 else None
            if picture:
                return png(picture)
            problem = f"HTTP {reply.status_code}, no picture: {' '.join(reply.text.split())[:200]}"
            # What it will not paint now it will not paint later.
            if reply.status_code >= 400 and reply.status_code not in LATER:
                break
        if left:
            time.sleep(min(PAUSE, pause))
            pause *= 2
    raise Unanswered(f"{url}: {problem}")


def picture_of(reply) -> Image.Image | None:
    """What is in an HTTP answer of the protocol; None where there is no picture in it."""
    try:
        return load_image(base64.b64decode(reply.json()["data"][0]["b64_json"], validate=True))
    except (ValueError, LookupError, TypeError, InputError):
        return None
