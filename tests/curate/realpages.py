"""The real how-to pages beside the repository, as the pages that curate/ works on."""

import hashlib
import json
from pathlib import Path

from curate.page import Page, Picture, joined


def read(shared: Path, pictures: bool = True) -> list[Page]:
    """shared: the folder of real data. pictures: with their bytes."""
    folder = shared / "howto"
    pages = []
    for line in (folder / "docs.jsonl").read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        parts = []
        for segment in document["segments"]:
            if segment["type"] == "text":
                parts.append(segment["text"])
                continue
            if not segment.get("image"):
                continue
            data = (folder / segment["image"]).read_bytes() if pictures else b""
            digest = hashlib.sha256(data).hexdigest() if pictures else segment["image"]
            size = segment["width"], segment["height"]
            parts.append(Picture(segment["src"], data, digest, *size, alt=segment["alt"]))
        source = document["source"]["url"]
        pages.append(Page(document["id"], source, document["title"], parts=joined(parts)))
    return pages
