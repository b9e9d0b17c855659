"""What remains of an answer: a folder with one page to look at, the same as Markdown, and a JSON file for programs.

    index.html      everything in one file: pictures inlined, no scripts, light and dark, for a phone or a desk
    answer.md       the same as Markdown, with image_01.png, image_02.png, ...; the user's pictures are input_01.png, ...
    answer.json     the parts in order, every setting, seed and model source, timings

    folder = save(Path("out"), "a-house", answer, {"load_seconds": 1.2, "total_seconds": 9.8, "dtype": "float32"})

Text, whoever wrote it, stays text: in HTML, in Markdown and in a file's name. What is shown is free of control characters; the
JSON file has all of them, spelt as \\u001b.
"""

import base64
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count, groupby, takewhile
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import torch
from markupsafe import Markup
from PIL import Image

from checkpoint import InputError, read_json
from pages.template import printable, render
from records.validate import one_line


class Answer(Protocol):
    """What is read of an answer here, whoever wrote it: pipeline.Answer has all of it."""

    duo: Any  # what wrote it: .sources, {part: where it came from}, and .device
    settings: Any  # a dataclass
    messages: list[dict]  # the dialogue before it
    images: list[Image.Image]  # the pictures in there
    parts: list  # text, or a picture: .image, .seed, .context, .seconds
    pictures: list  # the latter
    size: tuple[int, int]  # (H, W) in pixels
    stop: str  # why it ends there, "end" where it is complete
    stop_meaning: str  # the same in words
    prompt_tokens: int
    tokens: int
    text_seconds: float
    paint_seconds: float


def fresh(out: Path, name: str) -> Path:
    """out/name, or the first of out/name-2, out/name-3, ... that does not exist."""
    return next(f for n in count(1) for f in [out / (name if n == 1 else f"{name}-{n}")] if not f.exists())


@contextlib.contextmanager
def saving(out: Path) -> Iterator[None]:
    """A full disk and the like, told in one line."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or one_line(e)
        raise InputError(f"{out}: it cannot be saved there ({reason}): make room, or choose another folder") from None


def write_text(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(out: Path, name: str, answer: Answer, about: dict, instead: Path | None = None, film: bytes = b"") -> Path:
    """Write an answer's folder aside, then give it its name: it is there as a whole or not at all.

    instead: the folder of an earlier try at the same answer, which goes. film: an animated WebP of how it was painted.
    """
    aside = out / f".{name}-{os.getpid()}"
    try:
        with saving(out):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for kind, images in (("input", answer.images), ("image", [p.image for p in answer.pictures])):
                for i, image in enumerate(images, 1):
                    image.save(aside / f"{kind}_{i:02d}.png")
            write_text(aside / "answer.md", markdown(answer))
            if film:
                (aside / "film.webp").write_bytes(film)
            write_text(aside / "index.html", page(answer, film))
            write_text(aside / "answer.json", harmless_json(record(answer, about)))  # last: where it is, all is
            if instead is not None:
                shutil.rmtree(instead)
            while True:
                folder = fresh(out, name)
                try:
                    os.rename(aside, folder)
                    return folder
                except OSError:
                    if not folder.exists():  # otherwise another run took the name in between
                        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def asked_for(answer: Answer, name: str, dtype: str) -> str:
    """All that an answer depends on, as one number: whoever asks the same of the same model gets the same answer."""
    pictures = [(image.size, hashlib.sha256(image.tobytes()).hexdigest()) for image in answer.images]
    texts = [[m["role"], *(p.get("text") for p in m["content"])] for m in answer.messages]
    # A folder keeps its name when its weights are trained on; a name on the Hub has its commit.
    files = sorted(f for source in answer.duo.sources.values() for f in Path(source).glob("*.safetensors"))
    weights = [(f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    everything = [name, texts, pictures, asdict(answer.settings), answer.size, answer.duo.sources, weights, dtype]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def saved(folder: Path) -> tuple[dict[str, list[dict]], dict[str, list[Path]]]:
    """What a run over many prompts has in its folder, by `asked_for`: cards of whole answers, folders of interrupted ones."""
    whole, interrupted = {}, {}
    for file in sorted(folder.glob("[!.]*/answer.json")):
        # Else it is not one of ours, or somebody has been at it.
        with contextlib.suppress(InputError, OSError, KeyError, TypeError, AttributeError):
            answer = read_json(file)
            files = ["index.html", "answer.md", *answer["user_images"]]
            files += [p["image"] for p in answer["parts"] if p["type"] == "image"]
            if answer["asked"] is None or not all((file.parent / f).is_file() for f in files):
                continue
            if answer["stop"] == "interrupted":
                interrupted.setdefault(answer["asked"], []).append(file.parent)
            else:
                whole.setdefault(answer["asked"], []).append(card(file.parent))
    return whole, interrupted


def run_folder(out: Path, name: str, wanted: set[str], anew: bool = False) -> Path:
    """Where the answers of a run go: to those of an earlier run that has some of the `wanted` ones, or to a new folder."""
    names = (out / (name if n == 1 else f"{name}-{n}") for n in count(1))
    for folder in [] if anew else [*takewhile(Path.is_dir, names)][::-1]:
        if any(found.keys() & wanted for found in saved(folder)):
            return folder
    return fresh(out, name)


def dialogue_of(folder: Path) -> list[dict]:
    """The dialogue of a saved answer, that answer included, as messages whose pictures are paths: a question may follow."""
    if not (folder / "answer.json").is_file():
        raise InputError(f"{folder}: holds no answer.json: name the folder of an answer")
    answer = read_json(folder / "answer.json")
    try:
        turns = [*answer["messages"], {"role": "assistant", "content": answer["parts"]}]
        messages = []
        for turn in turns:
            parts = []
            for part in turn["content"]:
                if part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                else:
                    # A name alone: a file that somebody sent must not make us read another one of this disk.
                    parts.append({"type": "image", "image": folder / Path(part["image"]).name})
            messages.append({"role": turn["role"], "content": parts})
    except (KeyError, TypeError):
        raise InputError(f"{folder / 'answer.json'}: not as sample.py writes it: ask anew") from None
    return messages


def harmless_json(value: dict) -> str:
    """JSON in which the characters that `printable` drops are spelt out: in JSON they can only be in strings."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return "".join(c if printable(c) else f"\\u{ord(c):04x}" for c in text)


def prompt_of(messages: list[dict]) -> str:
    """The text of the message that is answered."""
    content = messages[-1]["content"]
    return " ".join(p["text"] for p in content if p["type"] == "text").strip() or "(pictures)"


def turns(answer: Answer) -> Iterator[tuple[str, str | tuple[int, Image.Image]]]:
    """(role, text or (number, picture)) of the dialogue before the answer, without a system message."""
    number = count(1)
    for message in answer.messages:
        for part in message["content"]:
            picture = (next(number), part["image"]) if part["type"] == "image" else None
            if message["role"] != "system":
                yield message["role"], picture or part["text"]


def record(answer: Answer, about: dict) -> dict:
    """answer.json: all that is needed to read the answer by program, and to make it again."""
    duo, number, given = answer.duo, count(1), count(1)
    parts = []
    for part in answer.parts:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            size = {"width": part.image.width, "height": part.image.height}
            tokens = dict(zip(("positive", "negative"), part.context, strict=True))
            file = {"type": "image", "image": f"image_{next(number):02d}.png"}
            parts.append(file | size | {"seed": part.seed, "context_tokens": tokens, "seconds": round(part.seconds, 3)})
    messages = [
        {"role": m["role"], "content": [
            {"type": "image", "image": f"input_{next(given):02d}.png"} if p["type"] == "image" else p for p in m["content"]
        ]} for m in answer.messages
    ]  # fmt: skip
    cuda = duo.device.type == "cuda"
    return {
        "format": 1,
        "asked": about.get("asked"),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "prompt": prompt_of(answer.messages),
        "messages": messages,
        "user_images": [f"input_{i:02d}.png" for i in range(1, len(answer.images) + 1)],
        "parts": parts,
        "stop": answer.stop,
        "stop_meaning": answer.stop_meaning,
        "seed": answer.settings.seed,
        "settings": asdict(answer.settings) | {"height": answer.size[0], "width": answer.size[1]},
        "sources": duo.sources,
        "tokens": {"prompt": answer.prompt_tokens, "written": answer.tokens},
        "seconds": {
            "load": about["load_seconds"],
            "text": round(answer.text_seconds, 3),
            "paint": round(answer.paint_seconds, 3),
            "total": about["total_seconds"],
        },
        "device": torch.cuda.get_device_name(duo.device) if cuda else str(duo.device),
        "dtype": about["dtype"],
        "peak_memory_gb": round(torch.cuda.max_memory_allocated(duo.device) / 1e9, 3) if cuda else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is; a line break stays one."""
    text = re.sub(r"([\\`*_\[\]<>~|$&])", r"\\\1", printable(text))
    text = re.sub(r"(?m)^(\s*)([#+=-]|\d+[.)])(?=\s|$)", lambda m: m[1] + re.sub(r"([^\d])", r"\\\1", m[2]), text)
    return re.sub(r"(?<!\n)\n(?!\n)", "\\\\\n", text)


def markdown(answer: Answer) -> str:
    """answer.md: the dialogue as a quotation, then the answer."""
    blocks, number = [], count(1)
    for role, part in turns(answer):
        text = escape_markdown(part.strip()) if isinstance(part, str) else f"![](input_{part[0]:02d}.png)"
        blocks.append("\n".join(f"> {line}" for line in (f"**{role}:** {text}").split("\n")) if text else "")
    for part in answer.parts:
        if isinstance(part, str):
            blocks.append(escape_markdown(part.strip()))
        else:
            k = next(number)
            blocks.append(f"![picture {k}](image_{k:02d}.png)")
    if answer.stop != "end":
        blocks.append(f"*It ends here: {escape_markdown(answer.stop_meaning)}.*")
    return "\n\n".join(b for b in blocks if b) + "\n"


def page(answer: Answer, film: bytes = b"") -> str:
    """index.html: the question as a quiet header, then text and pictures in order, then how it was made."""
    asked = [(role, [part for _, part in group]) for role, group in groupby(turns(answer), key=lambda turn: turn[0])]
    # A picture belongs to the text before it; either may be missing.
    sections, text = [], ""
    for part in answer.parts:
        if isinstance(part, str):
            text = part
        else:
            sections.append((text, part.image))
            text = ""
    if text.strip():
        sections.append((text, None))
    stop = answer.stop_meaning
    height, width = answer.size
    facts = {"ends because": stop} | asdict(answer.settings) | {"height": height, "width": width} | answer.duo.sources
    title = prompt_of(answer.messages)[:80]
    moving = Markup("data:image/webp;base64," + base64.b64encode(film).decode()) if film else ""
    return render(
        "answer.html", title=title, answer=answer, turns=asked, sections=sections, stop=stop, facts=facts, film=moving
    )


def card(folder: Path) -> dict:
    """What the overview beside its folder shows of a saved answer, and where its page and pictures are."""
    answer, link = read_json(folder / "answer.json"), quote(folder.name)
    images = [f"{link}/{quote(p['image'])}" for p in answer["parts"] if p["type"] == "image"]
    text = "\n".join(p["text"].strip() for p in answer["parts"] if p["type"] == "text")
    return {
        "link": f"{link}/index.html",
        "prompt": printable(answer["prompt"]),
        "images": images,
        "lead": "" if images else text[:160],
        "end": "" if answer["stop"] == "end" else printable(answer["stop_meaning"]),
    }


def overview(title: str, cards: list[dict], problems: list[str], of: int) -> str:
    """The index of a run over many prompts: a card for each answer, and why the others have none."""
    return render("overview.html", title=title, cards=cards, problems=problems, of=of)
