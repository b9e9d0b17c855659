"""Pages on their way from one stage to the next, on disk: a line of JSON each, and behind it the bytes of its pictures.

What a page has is all there, nothing is compressed twice, and the same pages give the same bytes. A file appears under its name
when everything is in it.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from curate.page import Page, Picture, Refused


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when everything is in it and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may be at the same task for a while, where one has outlived its parent: each has a file of its own.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any) -> bytes:
    """Names of files and texts of pages may hold what is no Unicode: it comes back as it was."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")


def from_json(data: bytes) -> Any:
    return json.loads(data.decode("utf-8", "surrogatepass"))


def write_page(file: BinaryIO, page: Page) -> None:
    """A line of JSON, and behind it the bytes of its pictures, one after the other."""
    parts = []
    for part in page.parts:
        if isinstance(part, Picture):
            part = asdict(replace(part, data=b"")) | {"data": len(part.data)}
        parts.append(part)
    line = {"id": page.id, "url": page.url, "title": page.title, "language": page.language, "parts": parts}
    line |= {"refused": page.refused, "messages": page.messages, "notes": page.notes}
    file.write(to_json(line) + b"\n")
    for picture in page.pictures:
        file.write(picture.data)


def read_pages(path: Path) -> Iterator[Page]:
    """The inverse of `write_page`, for all pages of a file."""
    with open(path, "rb") as file:
        for line in file:
            values = from_json(line)
            parts = []
            for part in values["parts"]:
                if isinstance(part, dict):
                    part = Picture(**part | {"data": file.read(part["data"])})
                parts.append(part)
            values["parts"] = tuple(parts)
            values["refused"] = tuple(Refused(*each) for each in values["refused"])
            values["messages"] = tuple(values["messages"])
            yield Page(**values)
