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
import html
import io
import json
import os
import platform
import re
import shutil
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count, takewhile
from math import ceil
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image

from checkpoint import InputError, read_json
from pipeline import STOPS, Answer, Picture
from records.validate import one_line

# Overrides and isolates of direction: text that is read in another order than it is written.
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


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


def save(out: Path, name: str, answer: Answer, about: dict, instead: Path | None = None) -> Path:
    """Write an answer's folder aside, then give it its name: it is there as a whole or not at all.

    instead: the folder of an earlier try at the same answer, which goes.
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
            write_text(aside / "index.html", page(answer))
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


def saved(folder: Path) -> tuple[dict[str, list[str]], dict[str, list[Path]]]:
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


def printable(text: str) -> str:
    """Without what could steer a terminal, or make text look like other text: control characters, overrides of direction."""
    return "".join(c for c in text if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in BIDI))


def harmless_json(value: dict) -> str:
    """JSON in which the characters that `printable` drops are spelt out: in JSON they can only be in strings."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return "".join(c if printable(c) else f"\\u{ord(c):04x}" for c in text)


def escape_html(text: str) -> str:
    return html.escape(printable(text))


def prompt_of(messages: list[dict]) -> str:
    """The text of the message that is answered."""
    content = messages[-1]["content"]
    return " ".join(p["text"] for p in content if p["type"] == "text").strip() or "(pictures)"


def turns(answer: Answer) -> Iterator[tuple[str, str | tuple[str, Image.Image]]]:
    """(role, text or (file, picture)) of the dialogue before the answer, without a system message."""
    number = count(1)
    for message in answer.messages:
        for part in message["content"]:
            picture = (f"input_{next(number):02d}.png", part["image"]) if part["type"] == "image" else None
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
        "stop_meaning": STOPS[answer.stop],
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
        text = escape_markdown(part.strip()) if isinstance(part, str) else f"![]({part[0]})"
        blocks.append("\n".join(f"> {line}" for line in (f"**{role}:** {text}").split("\n")) if text else "")
    for part in answer.parts:
        if isinstance(part, Picture):
            k = next(number)
            blocks.append(f"![picture {k}](image_{k:02d}.png)")
        else:
            blocks.append(escape_markdown(part.strip()))
    if answer.stop != "end":
        blocks.append(f"*It ends here: {escape_markdown(STOPS[answer.stop])}.*")
    return "\n\n".join(b for b in blocks if b) + "\n"


# --------------------------------------------------------------------------------------------------------------- the page

SMALL = 256  # pixels; such pictures stand beside their text where there is room
CSS = """
:root { color-scheme: light dark; --paper: #fbfaf8; --ink: #1f2328; --quiet: #6b7078; --line: #e3e0da; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e4e6ea; --quiet: #9298a2; --line: #2c3038; --card: #1f2228; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 0 1.25rem; background: var(--paper); color: var(--ink); font: 1.0625rem/1.65 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; }
main, header, footer { max-width: 44rem; margin: 0 auto; }
header { padding-top: 2.5rem; padding-bottom: 1.5rem; color: var(--quiet); }
header .turn { margin: 0 0 .75rem; }
header .last { font-size: 1.35rem; line-height: 1.4; color: var(--ink); font-weight: 600; }
header small { display: block; font-size: .8rem; overflow-wrap: anywhere; }
header img { margin: 0 .5rem .75rem 0; height: 7rem; width: auto; max-width: 100%; object-fit: contain; }
p { margin: 0 0 .8em; white-space: pre-wrap; overflow-wrap: anywhere; }
p:last-child { margin-bottom: 0; }
img { border-radius: .6rem; border: 1px solid var(--line); background: #fff; }
main { border-top: 1px solid var(--line); padding: 1.75rem 0 1px; }
section { margin: 0 0 1.75rem; }
section img { display: block; width: 100%; height: auto; margin-top: .75rem; }
section.small img { max-width: 24rem; }
@media (min-width: 40rem) {
  section.small { display: grid; grid-template-columns: 1fr 16rem; gap: 2rem; align-items: center; }
  section.small img { width: 16rem; margin: 0; grid-column: 2; }
}
.note { color: var(--quiet); font-style: italic; }
p.note:last-child { margin-bottom: 1.75rem; }
footer { color: var(--quiet); font-size: .85rem; padding: 1rem 0 3rem; border-top: 1px solid var(--line); }
summary { cursor: pointer; }
table { border-collapse: collapse; margin-top: .75rem; width: 100%; }
td { padding: .2rem .75rem .2rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; width: 1%; }
.wide { max-width: 70rem; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.cards a { display: block; padding: 1rem; border: 1px solid var(--line); border-radius: .8rem; background: var(--card);
  color: inherit; text-decoration: none; }
.cards img { height: 4.5rem; max-width: 100%; margin: .5rem .4rem 0 0; }
.cards small { color: var(--quiet); display: block; }
"""


def document(title: str, body: str) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"\n<title>{escape_html(title)}</title>\n<style>{CSS}</style>"
    return f"<!doctype html>\n<html>\n<head>{head}</head>\n<body>\n{body}</body>\n</html>\n"


def paragraphs(text: str) -> str:
    blocks = (b.strip() for b in re.split(r"\n\s*\n", text))
    return "".join(f'<p dir="auto">{escape_html(b)}</p>' for b in blocks if b)


def inline(image: Image.Image, alt: str) -> str:
    """An <img> that carries its pixels with it.

    A small picture is enlarged first: bicubic keeps the edges of a flat drawing, which browsers, being bilinear, fray.
    """
    size = f'width="{image.width}" height="{image.height}"'
    if max(image.size) <= SMALL:
        k = ceil(1.5 * SMALL / max(image.size))
        image = image.resize((k * image.width, k * image.height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" {size} alt="{escape_html(alt)}">'


def page(answer: Answer) -> str:
    """index.html: the question as a quiet header, then text and pictures in order, then how it was made."""
    asked = list(turns(answer))
    first_of_last = max(i for i, (role, _) in enumerate(asked) if i == 0 or asked[i - 1][0] != role)
    header, body, number = "", "", count(1)
    for i, (role, part) in enumerate(asked):
        if first_of_last and (i == 0 or asked[i - 1][0] != role):
            header += f"<small>{escape_html(role)}</small>"
        if not isinstance(part, str):
            header += inline(part[1], f"{role}'s picture {part[0][6:8].lstrip('0')}")
        elif part.strip():
            header += f'<div class="turn{" last" if i >= first_of_last else ""}">{paragraphs(part)}</div>'
    text = ""
    for part in [*answer.parts, None]:
        if isinstance(part, str):
            text = part
            continue
        picture = "" if part is None else inline(part.image, f"picture {next(number)}")
        kind = ' class="small"' if part is not None and max(part.image.size) <= SMALL else ""
        if picture or text.strip():
            body += f"<section{kind}><div>{paragraphs(text)}</div>{picture}</section>\n"
        text = ""
    if answer.stop != "end":
        body += f'<p class="note">It ends here: {html.escape(STOPS[answer.stop])}.</p>\n'
    n = len(answer.pictures)
    how = f"{n} picture{'s' * (n != 1)}, {answer.tokens} tokens. Writing took {answer.text_seconds:.1f} s"
    how += f", painting {answer.paint_seconds:.1f} s." if n else "."
    settings = asdict(answer.settings) | {"height": answer.size[0], "width": answer.size[1]}
    rows = {"ends because": STOPS[answer.stop]} | settings | answer.duo.sources
    table = "".join(f"<tr><td>{escape_html(k)}</td><td>{escape_html(str(v))}</td></tr>" for k, v in rows.items())
    details = f"<details><summary>{how} Seed {answer.settings.seed}.</summary><table>{table}</table></details>"
    title = prompt_of(answer.messages)
    return document(title[:80], f"<header>{header}</header>\n<main>\n{body}</main>\n<footer>{details}</footer>\n")


def card(folder: Path) -> str:
    """A saved answer in the overview beside its folder; it leads to its page."""
    answer, link = read_json(folder / "answer.json"), quote(folder.name)
    thumbs = "".join(f'<img src="{link}/{quote(p["image"])}" alt="">' for p in answer["parts"] if p["type"] == "image")
    text = "\n".join(p["text"].strip() for p in answer["parts"] if p["type"] == "text")
    lead = "" if thumbs else f"<small>{escape_html(text[:160])}</small>"
    end = "" if answer["stop"] == "end" else f"<small>{escape_html(answer['stop_meaning'])}</small>"
    question = f'<div dir="auto">{escape_html(answer["prompt"])}</div>'
    return f'<a href="{link}/index.html">{question}{thumbs}{lead}{end}</a>\n'


def overview(title: str, cards: list[str], problems: list[str], of: int) -> str:
    """The index of a run over many prompts: a card for each answer, and why the others have none."""
    number = f"<small>{len(cards)} of {of} answers</small>"
    number += "".join(f'<small>{escape_html(problem)}</small>' for problem in problems)
    header = f'<header class="wide"><div class="turn last">{escape_html(title)}</div>{number}</header>'
    return document(title, f'{header}\n<main class="wide cards">\n{"".join(cards)}</main>\n')
