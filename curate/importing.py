"""Public sets into records: python -m curate import NAME FILES... --out DIR

    python -m curate import sharegpt-4o-image text_to_image.json --images text_to_image_part_0.tar --out data/sharegpt
    python -m curate import mmc4 docs_shard_7_v3.jsonl --images pictures/ --out data/mmc4
    python -m curate import zebra-cot train-00000-of-00005.parquet --out data/zebra
    python -m curate import comm train.pth --images comm/images --out data/comm

The sets, their fields and where their forms were read: sets.py. FILES are as published: JSON lines, one JSON array, parquet
(with pyarrow), CoMM's .pth. Pictures are looked for in --images, folders and tar archives, img2dataset's among them; without
it in the folder of each file and in its images/. Nothing is fetched from the network.

A row that cannot be used costs nothing but itself: it is named with file and number, and counted by what is wrong. A page of
the web (obelics, mmc4, comm) goes on without a picture that is missing or broken, as long as one is left; of every other set a
row without its picture is refused, since an edit or a proof has lost its sense.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path

from checkpoint import InputError
from curate.page import Dropped, Page, Part, Picture, Refused
from curate.places import Places
from curate.sets import Row, Set, page_address
from records.formats import elements
from records.validate import Problem, load_image, one_line, validate

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


def imported(name: str, which: Set, files: list[str], images: list[str]) -> Iterator[tuple[str, Page | Dropped]]:
    """(FILE:NUMBER, its page or why there is none) of every row; of a file that cannot be read (FILE, why)."""
    for file in files:
        folder = Path(file).parent
        places = Places(images or [folder, *(each for each in [folder / "images"] if each.is_dir())])
        try:
            for number, row in rows(file):
                where = f"{Path(file).name}:{number}"
                if isinstance(row, Problem):
                    yield where, Dropped(row.message)
                else:
                    yield where, page_of_row(f"{name}:{where}", which, row, places)
        except InputError as e:
            yield file, Dropped(f"file that cannot be read: {e}")


def page_of_row(id: str, which: Set, row: Row, places: Places) -> Page | Dropped:
    """The dialogue of a row, and its pictures with their bytes."""
    parts: list[Part] = []
    refused: list[Refused] = []
    messages = []
    number = 0
    try:
        record = which.record(row)
        for message in record["messages"]:
            content = []
            for part in content_of(message):
                if part["type"] == "text":
                    parts.append(part["text"])
                    # Where a picture is gone, the texts around it are one.
                    if content and content[-1]["type"] == "text":
                        content[-1] = {"type": "text", "text": f"{content[-1]['text']}\n\n{part['text']}"}
                    else:
                        content.append(part)
                    continue
                picture = found(part["image"], f"{id}#{number}", places)
                if isinstance(picture, Refused):
                    if not which.partial:
                        raise InputError(picture.reason)
                    refused.append(picture)
                    continue
                parts.append(picture)
                content.append({"type": "image", "image": number})
                number += 1
            messages.append({"role": message["role"], "content": content})
        if refused and not number:
            raise InputError(f"no picture left: {refused[0].reason}")
        for problem in validate({"messages": with_pictures(messages, parts)}, pictures=False):
            if not problem.warning:
                raise InputError(problem.message)
    except InputError as e:
        return Dropped(str(e))
    notes = record.get("notes", {})
    return Page(id, page_address(row), parts=tuple(parts), refused=tuple(refused), messages=tuple(messages), notes=notes)


def content_of(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def found(picture: str | bytes, own: str, places: Places) -> Picture | Refused:
    """A picture with its bytes, once it has been decoded. own: what it is called if the row has its bytes."""
    address = own if isinstance(picture, bytes) else picture
    try:
        data = picture if isinstance(picture, bytes) else places.read(picture)
        image = load_image(data)
    except InputError as e:
        return Refused(address, str(e).removeprefix("picture: "))
    return Picture(address, width=image.width, height=image.height).filled(data)


def with_pictures(messages: list[dict], parts: list[Part]) -> list[dict]:
    """The messages of a page with bytes in place of numbers."""
    pictures = [part.data for part in parts if isinstance(part, Picture)]
    out = []
    for message in messages:
        content = [
            part if part["type"] == "text" else {"type": "image", "image": pictures[part["image"]]}
            for part in message["content"]
        ]  # fmt: skip
        out.append({"role": message["role"], "content": content})
    return out
