"""Public sets into records: python -m curate import NAME FILES... --out DIR

    python -m curate import sharegpt-4o-image text_to_image.json --images text_to_image_part_0.tar --out data/sharegpt
    python -m curate import mmc4 docs_shard_7_v3.jsonl --images pictures/ --out data/mmc4
    python -m curate import zebra-cot train-00000-of-00005.parquet --out data/zebra
    python -m curate import comm train.pth --images comm/images --out data/comm

The sets, their fields and where their forms were read: sets.py. FILES are as published: JSON lines, parquet (with pyarrow), or,
read as a whole, one JSON array and CoMM's .pth. Pictures are looked for in --images, folders and tar archives, img2dataset's
among them; without it in the folder of each file and in its images/. Nothing is fetched from the network.

A row that cannot be used costs nothing but itself, and is counted by what is wrong. A page of the web (obelics, mmc4, comm)
goes on without a picture that is missing or broken, as long as one is left; of every other set a row without its picture is
dropped, since an edit or a proof has lost its sense. One file is one task: a run that was ended goes on with the next file.
"""

import argparse
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint import InputError
from curate.command import add_engine_flags, make_room, start, with_thresholds
from curate.page import Dropped, Page, Part, Picture
from curate.places import Places
from curate.report import in_words
from curate.sets import SETS, Row, page_address
from flags import Parser
from records.formats import elements
from records.validate import Problem, load_image, one_line

ROWS = 64  # of a parquet file that are in memory at a time: those with pictures are large


# --------------------------------------------------------------------------------------------------------------------- rows


def rows(path: str) -> Iterator[tuple[int, Row | Problem]]:
    """(number from 1, row) of a published file."""
    if path.endswith(".parquet"):
        yield from parquet_rows(path)
    elif path.endswith((".pth", ".pt")):
        yield from torch_rows(path)
    else:
        yield from elements(path)


def parquet_rows(path: str) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: parquet files are read by pyarrow, which is not installed: pip install pyarrow") from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as e:
        raise InputError(f"{path}: no parquet file, or damaged behind row {number} ({one_line(e)})") from None


def torch_rows(path: str) -> Iterator[tuple[int, Row | Problem]]:
    """A list that torch.save has written, as CoMM is published; only plain values are read, no code is run."""
    import torch

    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise InputError(f"{path}: cannot be read as a list of plain values ({one_line(e)})") from None
    if not isinstance(values, list):
        raise InputError(f"{path}: holds no list of rows")
    for number, value in enumerate(values, 1):
        yield number, value if isinstance(value, dict) else Problem(path, number, "", "not an object")


# -------------------------------------------------------------------------------------------------------------------- pages


@dataclass(frozen=True)
class Published:
    """A source of the engine: the rows of a set's files as pages with a dialogue."""

    name: str  # of the set
    images: tuple[str, ...] = ()  # where its pictures are; none: beside each file
    n: int | None = None  # rows of each file at most

    def read(self, item: str) -> Iterator[Page | Dropped]:
        """item: a file. What goes wrong with all of it is the reason of one page that does not exist."""
        folder = Path(item).parent
        beside = [folder, *(each for each in [folder / "images"] if each.is_dir())]
        try:
            places = Places(list(self.images) or beside)
            for number, row in rows(item):
                if self.n is not None and number > self.n:
                    return
                yield self.page(f"{self.name}:{Path(item).name}:{number}", row, places)
        except InputError as e:
            yield Dropped(f"file that cannot be read: {e}")

    def page(self, id: str, row: Row | Problem, places: Places) -> Page | Dropped:
        """Its pictures have their bytes; of those that cannot be had, notes["missing"] says why, for `Complete`."""
        if isinstance(row, Problem):
            return Dropped(row.message)
        try:
            record = SETS[self.name].record(row)
        except InputError as e:
            return Dropped(reason_of(e))
        parts: list[Part] = []
        missing = {}
        messages = []
        pictures = 0
        for message in record["messages"]:
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            for k, part in enumerate(content):
                if part["type"] == "text":
                    parts.append(part["text"])
                    continue
                unwanted = record.get("refused", {}).get(part["image"])
                picture = unwanted or found(part["image"], f"{id}#{pictures}", places)
                if isinstance(picture, str):
                    missing[str(pictures)] = picture
                    picture = Picture(part["image"] if isinstance(part["image"], str) else f"{id}#{pictures}")
                parts.append(picture)
                content[k] = {"type": "image", "image": pictures}
                pictures += 1
            messages.append({"role": message["role"], "content": content})
        notes = record.get("notes", {}) | ({"missing": missing} if missing else {})
        return Page(id, page_address(row), parts=tuple(parts), messages=tuple(messages), notes=notes)


def reason_of(e: InputError) -> str:
    """An error as a reason whose kind is the same for all rows: numbers in it go behind the colon."""
    kind = str(e).partition(":")[0]
    same = re.sub(r"\d+", "#", kind)
    return str(e) if kind == same else f"{same}: {e}"


def found(picture: str | bytes, own: str, places: Places) -> Picture | str:
    """A picture with its bytes, once it has been decoded, or why there is none. own: its name if the row has its bytes."""
    try:
        data = picture if isinstance(picture, bytes) else places.read(picture)
    except InputError as e:
        return str(e)
    try:
        image = load_image(data)
    except InputError as e:
        return f"picture that cannot be used: {str(e).removeprefix('picture: ')}"
    address = own if isinstance(picture, bytes) else picture
    return Picture(address, width=image.width, height=image.height).filled(data)


@dataclass(frozen=True)
class Complete:
    """Nobody learns to paint a picture that is not there: it is refused, or with it the page."""

    partial: bool  # whether a page goes on without it

    def __call__(self, page: Page) -> Page | Dropped:
        missing = {int(number): reason for number, reason in page.notes.get("missing", {}).items()}
        if not missing:
            return page
        first = missing[min(missing)]
        if not self.partial:
            return Dropped(first)
        if len(missing) == len(page.pictures):
            return Dropped(f"no picture left: {first}")
        notes = {key: value for key, value in page.notes.items() if key != "missing"}
        return replace(page.without(missing), messages=without_pictures(page.messages, missing), notes=notes)


def without_pictures(messages: tuple[dict, ...], gone: dict[int, str]) -> tuple[dict, ...]:
    """Messages whose pictures are numbers, without some of them: the others are counted anew, texts that meet are one."""
    out = []
    number = 0
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                if part["image"] not in gone:
                    content.append({"type": "image", "image": number})
                    number += 1
            elif content and content[-1]["type"] == "text":
                content[-1] = {"type": "text", "text": f"{content[-1]['text']}\n\n{part['text']}"}
            else:
                content.append(part)
        out.append(message | {"content": content})
    return tuple(out)


# ------------------------------------------------------------------------------------------------------------------ command


def main(argv: list[str] | None = None) -> None:
    p = Parser(
        "python -m curate import", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("name", choices=sorted(SETS), metavar="NAME", help=", ".join(SETS))
    p.add_argument("files", nargs="+", metavar="FILE")
    p.add_argument("--images", nargs="+", default=[], metavar="PLACE", help="folders and .tar files with the pictures")
    p.add_argument("--n", type=int, help="only the first so many rows of each file")
    add_engine_flags(p)
    args = p.parse_flags(argv)
    if args.n is not None and args.n < 1:
        raise InputError(f"--n {args.n}: must be 1 or more")
    Places(args.images)  # what is no place is told now
    inputs = []
    for file in args.files:
        if not Path(file).is_file():
            raise InputError(f"{file}: no such file")
        inputs.append((file, Path(file).stat().st_size))
    make_room(args)
    # A file is a task of its own: rows of one are not to wait for those of another.
    args.tasks = args.tasks or len(inputs)
    which = SETS[args.name]
    about = {"set": which.title, "fields": which.fields, "licence": which.licence, "source": which.source}
    about |= {"images": args.images, "n": args.n}
    source = Published(args.name, tuple(args.images), args.n)
    steps = with_thresholds([Complete(which.partial)], args.set)
    start(args, name="import", source=source, steps=tuple(steps), inputs=tuple(inputs), settings={"import": about})
    manifest = Path(args.out) / "manifest.json"
    if manifest.is_file():
        print(f"{args.out}: {in_words(json.loads(manifest.read_text(encoding='utf-8')))}")
