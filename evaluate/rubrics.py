"""What benchmarks share: rubrics read from files, answers laid out for a judge, several numbers split into several scores.

Rubrics are Markdown files in evaluate/benchmarks/prompts/, one a benchmark; each of their sections is one question.
"""

import csv
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from PIL import Image

from checkpoint import InputError, read_text
from evaluate import hub
from evaluate.benchmark import Answer, Judge, Request, Verdict, content_of
from records.validate import load_image

PROMPTS = Path(__file__).parent / "benchmarks" / "prompts"
MARK = re.compile(r"<image>", re.I)  # where a picture stands in the text of foreign items


@cache
def sections(name: str) -> dict[str, str]:
    """{heading: text} of a prompt file; what stands before its first heading tells people about it and is not asked."""
    _, *parts = re.split(r"^## (.+)$", read_text(PROMPTS / f"{name}.md"), flags=re.M)
    return {heading.strip(): text.strip() for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def rubric(name: str, section: str, **words: str) -> str:
    """One question; {word} in it is replaced, and braces of what is put in stay as they are."""
    text = sections(name)[section]
    return re.sub(r"\{(\w+)\}", lambda m: words[m[1]], text)


def asked(request: Request) -> list[str | Image.Image]:
    """All that the user said and showed, in order."""
    parts = [part for message in request.messages if message["role"] == "user" for part in content_of(message)]
    return [part["text"] if part["type"] == "text" else load_image(part["image"]) for part in parts]


def words_of(parts: Iterable[str | Image.Image]) -> list[str]:
    """The texts alone: what a call gets that must not see a picture."""
    return [part for part in parts if isinstance(part, str)]


def document(answer: Answer) -> list[str | Image.Image]:
    """The answer in the order in which it was written; empty texts are nothing to show. Pictures keep their aspect."""
    parts: list[str | Image.Image] = []
    for k, text in enumerate(answer.texts):
        if text.strip():
            parts.append(text)
        if k < len(answer.pictures):
            parts += [f"[picture {k + 1}]", answer.pictures[k]]
    return parts


def has_text(answer: Answer) -> bool:
    return any(text.strip() for text in answer.texts)


def split(judge: Judge, prompt: str, *content, keys: dict[str, tuple[float, float]]) -> dict[str, Verdict]:
    """One call for several numbers, as one score each. If the judge gave none, all of them are without a value."""
    verdict = judge.fields(prompt, *content, keys=keys)
    values = verdict.value or dict.fromkeys(keys)
    return {key: verdict._replace(value=values[key]) for key in keys}


# -------------------------------------------------------------------------------------------------------------------- items


def message(*parts: str | Path | Image.Image) -> list[dict]:
    """A dialogue of one user's turn: texts, and paths of pictures."""
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image", "image": part if isinstance(part, Image.Image) else str(part)})
    return [{"role": "user", "content": content}]


def woven(text: str, pictures: list[Path]) -> list[str | Path]:
    """Text with marks, and the pictures in their places; those without a mark come first."""
    texts = MARK.split(text)
    marks = len(texts) - 1
    if marks > len(pictures):
        raise InputError(f"{marks} marks for pictures, but {len(pictures)} pictures: {text[:60]!r}")
    before = len(pictures) - marks
    parts: list[str | Path] = list(pictures[:before])
    for k, piece in enumerate(texts):
        if piece.strip():
            parts.append(piece.strip())
        if k < marks:
            parts.append(pictures[before + k])
    return parts


def at_hand(items: Path | None, source: dict) -> Path:
    """The file of the items: as given, in the folder given, or from the Hub where the source names a Hub's file."""
    name = source["file"]
    if items is None and "hub" in source:
        items = hub.folder(f"hub:{source['hub']}{source['id']}@{source['revision']}")
    if items is None:
        where = f"{source['id']} at {source['revision']}"
        raise InputError(f"--items: {name} is needed, see {where} ({source['licence']}); name the file or its folder")
    file = items
    if items.is_dir():
        # As its authors' repository has it, or by itself.
        file = items / name if (items / name).is_file() else items / Path(name).name
    if not file.is_file():
        raise InputError(f"{file}: no such file; it comes from {source['id']} at {source['revision']}")
    return file


def read(file: Path) -> list | dict:
    """JSON, JSON lines or a table with headings, by the file's name; InputError with the line where it is none."""
    text = read_text(file)
    if file.suffix == ".csv":
        return list(csv.DictReader(text.splitlines(keepends=True)))
    if file.suffix != ".jsonl":
        return _parsed(text, file, "")
    lines = enumerate(text.splitlines(), 1)
    return [_parsed(line, file, f" line {n}") for n, line in lines if line.strip()]


def _parsed(text: str, file: Path, where: str) -> list | dict:
    try:
        return json.loads(text)
    except ValueError as e:
        raise InputError(f"{file}{where}: not valid JSON ({e})") from None
