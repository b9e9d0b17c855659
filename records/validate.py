"""Records from outside: reading JSON lines and pictures, and saying precisely what is wrong with them.

The record itself and its rules stand at the top of data.py. Everything a file can get wrong is a `Problem`, with line and
field, when it concerns one record, and an InputError when it concerns the file or a picture.
"""

import base64
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from checkpoint import InputError
from model import to_rgb

MAX_PIXELS = 89_478_485  # where Pillow starts to warn: 256 MiB of RGB
MAX_ASPECT = 200  # Qwen2.5-VL's own limit
# What a training set holds. Pillow's other readers stay closed: few files need them, and one of them starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "ICO", "AVIF", "JPEG2000", "PPM", "TGA")
BLANK = b" \t\r\n\xef\xbb\xbf"  # what a line without a record may have, a byte order mark included
LFS = b"version https://git-lfs"
# First bytes of what is mistaken for JSON lines.
NOT_LINES = {
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"PK\x03\x04": "a zip file: unpack it first",
    b"PAR1": "a parquet file: write its rows as JSON lines first",
    LFS: "a Git LFS pointer: run `git lfs pull`",
    b"[": "one JSON array: write one record a line, for example with jq -c '.[]'",
}
# What picture paths are relative to: a folder, or a function that gives the bytes of a picture by its name, or an InputError.
Folder = str | Path | Callable[[str], bytes]
NOT_RECORD = 'not an object: a record is {{"messages": [...]}}, this is {}'


def load_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """A picture as RGB from a path, the bytes of a file, a data URL or an open image.

    Whatever is wrong with it is an InputError "NAME: reason". Its size is read from the header and refused before decoding.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    name, data = "picture", source
    if isinstance(source, str) and source.startswith("data:"):
        name = "data URL"
        head, _, body = source.partition(",")
        if not re.fullmatch(r"data:image/[\w.+-]+;base64", head):
            raise InputError(f"{name}: must begin with data:image/png;base64, (or another image type)")
        try:
            data = base64.b64decode(body, validate=True)
        except ValueError as e:
            raise InputError(f"{name}: not valid base64 ({one_line(e)})") from None
    elif not isinstance(source, bytes):
        name = one_line(source)
        if not os.path.isfile(source):  # a pipe or a device would block, or never end
            raise InputError(f"{name}: {'not a regular file' if os.path.exists(source) else 'no such file'}")
    Image.init()
    formats = [f for f in FORMATS if f in Image.OPEN]  # AVIF and JPEG2000 depend on how Pillow was built
    try:
        with warnings.catch_warnings(), io.BytesIO(data) if isinstance(data, bytes) else open(source, "rb") as file:
            warnings.simplefilter("ignore")  # about metadata, and about large pictures, which are refused here
            if file.read(len(LFS)) == LFS:
                raise InputError(f"{name}: is {NOT_LINES[LFS]}")
            file.seek(0)
            with Image.open(file, formats=formats) as image:
                w, h = image.size
                if min(w, h) < 1 or w * h > MAX_PIXELS or max(w, h) > MAX_ASPECT * min(w, h):
                    limits = f"{MAX_PIXELS:,} pixels, sides 1:{MAX_ASPECT}"
                    raise InputError(f"{name}: {w} x {h} is more than a picture may have ({limits}); shrink or crop it")
                image.load()
                return to_rgb(image)
    except InputError:
        raise
    except Image.UnidentifiedImageError:
        raise InputError(f"{name}: no picture of a known format, or its header is broken") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: claims far more than {MAX_PIXELS:,} pixels; shrink it") from None
    except Exception as e:  # on a broken file Pillow raises nearly anything: OSError, SyntaxError, struct.error, KeyError, ...
        raise InputError(f"{name}: broken picture ({one_line(e) or type(e).__name__})") from None


def one_line(value: object) -> str:
    """Text that may come from a file, fit for one printed line: what could steer a terminal is spelt out."""
    text = " ".join(str(value).split())[:300]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a record, and where: line from 1, or the member of a shard, field like messages[1].content[3].image.
    A warning stops nothing."""

    file: str
    line: int | str
    field: str
    message: str  # "kind" or "kind: details"
    warning: bool = False

    def __str__(self) -> str:
        return ": ".join(x for x in (f"{self.file}:{self.line}", self.field, "warning" * self.warning, self.message) if x)

    @property
    def kind(self) -> str:
        return re.sub(r"\d+", "#", self.message.split(":")[0])


class BadRecord(InputError):
    """Carries a Problem; its text is the problem's line."""


def open_lines(path: str | Path, *, arrays: bool = False) -> io.BufferedReader:
    """A file of records for reading; what cannot be one is an InputError. arrays: one JSON array is welcome too."""
    try:
        if os.path.isdir(path):
            raise InputError(f"{path}: is a folder; name the .jsonl file in it")
        if not os.path.isfile(path):
            raise InputError(f"{path}: {'not a regular file' if os.path.exists(path) else 'no such file'}")
        with open(path, "rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        for start, what in NOT_LINES.items():
            if head.startswith(start) and not (arrays and start == b"["):
                raise InputError(f"{path}: is {what}")
        if b"\0" in head:
            raise InputError(f"{path}: is binary or UTF-16; records are UTF-8 text")
        return open(path, "rb")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({one_line(e.strerror)})") from None


def decode(data: bytes, first: bool = True) -> object:
    """JSON, strictly: UTF-8 (with a byte order mark only at the start of a file) and no NaN. InputError with the reason."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON value")

    try:
        return json.loads(data.decode("utf-8-sig" if first else "utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as e:
        raise InputError(f"not UTF-8: byte {data[e.start]:#04x} at position {e.start}") from None
    except (ValueError, RecursionError) as e:
        spread = "; a record must stand on one line" if data.strip() == b"{" else ""
        raise InputError(f"not valid JSON: {one_line(e)}{spread}") from None


def parse_line(line: bytes, file: str = "record", number: int = 1) -> dict | Problem:
    """The record on a line."""
    try:
        record = decode(line, number == 1)
    except InputError as e:
        return Problem(file, number, "", str(e))
    return record if isinstance(record, dict) else Problem(file, number, "", NOT_RECORD.format(_kind(record)))


def read_records(path: str | Path) -> Iterator[tuple[int, dict | Problem]]:
    """(line number, record) of every line that is not blank; a line that is no JSON object comes as its Problem."""
    with open_lines(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip(BLANK):
                yield number, parse_line(line, str(path), number)


def validate(
    record: object, folder: Folder = ".", file: str = "record", line: int | str = 1, *, pictures: bool = True
) -> list[Problem]:
    """Everything that is wrong with a record, warnings included. Picture paths are relative to `folder`.

    pictures: decode every picture; otherwise only look whether the files are there.
    """
    if isinstance(record, Problem):
        return [record]
    folder = folder if callable(folder) else os.path.abspath(folder)
    return [Problem(file, line, *found) for found in _problems(record, folder, pictures)]


def _problems(record: object, folder: Folder, decode: bool) -> Iterator[tuple]:
    if not isinstance(record, dict):
        yield "", NOT_RECORD.format(_kind(record))
        return
    messages, foreign = record.get("messages"), hint(record)
    if foreign:
        yield "messages" if "messages" not in record else "images", f"another format: {foreign}"
        return
    yield from _unknown(record, "", "messages")
    if not isinstance(messages, list):
        yield "messages", f"not a list: it is {_kind(messages)}"
        return
    for i, message in enumerate(messages):
        yield from _message_problems(message, f"messages[{i}]", i == 0, folder, decode)
    if not any(isinstance(m, dict) and m.get("role") == "assistant" for m in messages):
        yield "messages", "no assistant message: there is nothing to learn from"


def hint(record: dict) -> str:
    """What to do with a record in another known format; empty when it is in none."""
    if "conversations" in record:
        name = "llama-factory" if "images" in record else "llava"
    elif record.get("images") and ("messages" in record or "texts" in record):
        name = "llama-factory" if "messages" in record else "obelics"
    elif "instruction" in record and "output" in record and "messages" not in record:
        name = "alpaca"
    else:
        return ""
    return f"convert the file with `python data.py convert --from {name}`"


def _message_problems(message: object, at: str, first: bool, folder: Folder, decode: bool) -> Iterator[tuple]:
    if not isinstance(message, dict):
        yield at, f'not an object: a message is {{"role": ..., "content": ...}}, this is {_kind(message)}'
        return
    yield from _unknown(message, f"{at}.", "role", "content")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        yield f"{at}.role", f"unknown role: {role!r:.40} is none of system, user, assistant"
    elif role == "system" and not first:
        yield f"{at}.role", "system message not first: put it in front or drop it"
    if isinstance(content, str):
        yield from _text_problems(content, f"{at}.content")
        content = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        for j, part in enumerate(content):
            yield from _part_problems(part, role, f"{at}.content[{j}]", folder, decode)
    else:
        yield f"{at}.content", f"not text or a list of parts: it is {_kind(content)}"
        return
    if all(isinstance(p, dict) and p.get("type") == "text" and not str(p.get("text", "?")).strip() for p in content):
        yield f"{at}.content", "empty message: write something or drop it"


def _part_problems(part: object, role: object, at: str, folder: Folder, decode: bool) -> Iterator[tuple]:
    if not isinstance(part, dict):
        yield at, f'not an object: a part is {{"type": ..., ...}}, this is {_kind(part)}'
        return
    kind = part.get("type")
    if kind not in ("text", "image", "image_url"):
        yield f"{at}.type", f"unknown part: {kind!r:.40} is none of text, image, image_url"
        return
    yield from _unknown(part, f"{at}.", "type", kind)
    at, value = f"{at}.{kind}", part.get(kind)
    if kind == "image_url" and isinstance(value, dict):
        at, value = f"{at}.url", value.get("url")
    if kind == "text":
        if not isinstance(value, str):
            yield at, f"not text: it is {_kind(value)}"
        elif not value:
            yield at, "empty text: it is ignored", True
        else:
            yield from _text_problems(value, at)
    elif role == "system":
        yield at, "picture in the system message: move it to the user's"
    elif not isinstance(value, str | Path | bytes | Image.Image):
        yield at, f"not a path: it is {_kind(value)}"
    else:
        yield from picture_problems(value, at, folder, decode)


def _unknown(values: dict, at: str, *known: str) -> Iterator[tuple]:
    for key in values:
        if key not in known:
            yield f"{at}{key if key.isidentifier() else repr(key)[:40]}", "unknown key: it is ignored", True


def _text_problems(text: str, at: str) -> Iterator[tuple]:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        yield at, f"not Unicode text: half a surrogate pair at character {e.start}"


def picture_problems(value: str | Path | bytes | Image.Image, at: str, folder: Folder, decode: bool) -> Iterator[tuple]:
    """(field, message) of what is wrong with one picture of a record. folder: an absolute one, or a function."""
    if isinstance(value, str) and not value.startswith("data:"):
        if re.match(r"[a-z][a-z0-9+.-]+://", value, re.IGNORECASE):
            yield at, f"a URL: {value!r:.80}; download the picture and give its path"
            return
        if callable(folder):
            try:
                value = folder(value)
            except InputError as e:
                yield at, str(e)
                return
            if decode:
                yield from picture_problems(value, at, folder, decode)
            return
        path = picture_path(folder, value)
        if not path.is_relative_to(folder):
            yield at, f"path leaves the file's folder: {value!r:.80}; move the picture there, or link its folder"
            return
        if not os.path.isfile(path):
            yield at, f"no such picture: {value!r:.80}"
            return
        value = path
    if decode:
        try:
            load_image(value)
        except InputError as e:
            yield at, f"picture cannot be used: {e}"


def picture_path(folder: str | Path, value: str) -> Path:
    """Absolute, and free of "..": what is checked is what is opened."""
    return Path(os.path.normpath(os.path.join(os.path.abspath(folder), value)))


def _kind(value: object) -> str:
    """A JSON value's type, as people who write JSON call it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null or missing"}
    return names.get(type(value), "a number")


def normalise(record: dict, folder: Folder = ".") -> list[dict]:
    """The messages of a valid record in one form: content is a list of text and image parts, paths are absolute `Path`s, or
    the bytes that `folder` found."""
    messages = []
    for message in record["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages.append({"role": message["role"], "content": []})
        for part in parts:
            value = part[part["type"]]
            if part["type"] == "text":
                messages[-1]["content"].append({"type": "text", "text": value})
                continue
            value = value["url"] if isinstance(value, dict) else value
            if isinstance(value, str) and not value.startswith("data:"):
                value = folder(value) if callable(folder) else picture_path(folder, value)
            messages[-1]["content"].append({"type": "image", "image": value})
    return messages
