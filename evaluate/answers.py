"""A folder of answers: who gave them, to what, and how they are read.

    run.json                 the benchmark, its items, who answered: whatever of it differs, it is another run
    answers/ID/answer.json   as sample.py writes it, with its pictures
    calls/                   every question to a judge, and what it said (judges.py)
    judged/JUDGE/ID.json     the scores of an answer

Answers of other systems are judged as well: a folder with ID/answer.json, of which only "parts" is read, or which holds
lmms-eval's {"text": ..., "images": [FILE]} instead; or one file of lines {"id": ID, "response": that as a string}. In its text
<image> marks the place of a picture.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

from checkpoint import InputError, make_out, read_json, read_text
from distributed import take_lock
from evaluate import hub
from evaluate.benchmark import Answer, Request, content_of, requests_of
from pages.answer import harmless_json, write_text
from records.validate import load_image

MARK = "<image>"


# --------------------------------------------------------------------------------------------------------------------- run


def items_of(module: ModuleType, items: str | None, n: int | None) -> tuple[list[Request], str]:
    """The requests, and a hash of what they are: ids, words, what score needs; pictures in memory by their pixels.

    items: a folder or file at hand, a repository of the Hub as hub.py names it, or None for the benchmark's own.
    """
    place = None
    if items is not None:
        place = hub.folder(items) if items.startswith(hub.MARK) else Path(items)
    requests = list(requests_of(module, place, n))
    if not requests:
        raise InputError(f"{module.NAME}: no item in {items or 'it'}")
    digest = hashlib.sha256()
    for request in requests:
        content = []
        for message in request.messages:
            for part in content_of(message):
                if part["type"] == "text":
                    content.append([message["role"], part["text"]])
                elif hasattr(part["image"], "tobytes"):
                    content.append([message["role"], hashlib.sha256(part["image"].tobytes()).hexdigest()])
                else:
                    # The same file in another folder is the same item.
                    content.append([message["role"], Path(part["image"]).name])
        digest.update(json.dumps([request.id, request.meta, content], sort_keys=True).encode())
    return requests, digest.hexdigest()[:16]


def claim(out: Path, about: dict) -> dict:
    """Write run.json, or hold what is there against it: InputError where it differs. -> all that stands there now."""
    make_out(out)
    file = out / "run.json"
    if file.is_file():
        there = read_json(file)
        for key, value in about.items():
            if key in there and there[key] != value:
                differs = f"{key} {there[key]!r:.60}, not {value!r:.60}"
                raise InputError(f"{out}: holds another run ({differs}): choose another --out")
        if there.keys() >= about.keys():
            return there
        about = there | about
    write_text(file, harmless_json(about))
    return about


def read_run(out: Path) -> dict:
    """run.json of a folder; InputError where there is none."""
    if not (out / "run.json").is_file():
        raise InputError(f"{out}: no run in it: `python -m evaluate generate` begins one, or `judge --answers`")
    run = read_json(out / "run.json")
    if not isinstance(run.get("benchmark"), str):
        raise InputError(f"{out / 'run.json'}: names no benchmark")
    return run


@contextmanager
def alone(out: Path, what: str, shard: tuple[int, int]) -> Iterator[None]:
    """No second process does the same work in this folder at the same time."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f".{what}-{shard[0]}-of-{shard[1]}", "w") as file:
        if not take_lock(file, 0):
            raise InputError(f"{out}: another process is at it; wait for it, or give each a part by --shard")
        yield


def parse_shard(text: str | None) -> tuple[int, int]:
    """"i/n" with i from 0; by default what torchrun says, else the whole."""
    if text is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise InputError(f"--shard {text}: must be i/n with i from 0 to n - 1")
    return int(number), int(of)


def first_of(problems: list[str]) -> str:
    """The first of many problems, and how many more there are: one line."""
    rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0]}{rest}"


# ----------------------------------------------------------------------------------------------------------------- reading


class Answers:
    """The answers of a run, of this repository's or of another's making."""

    def __init__(self, place: Path, requests: list[Request]):
        self.place = place
        self.lines = {}  # of a file
        if place.is_file():
            self.lines = read_responses(place, [r.id for r in requests])
        elif not place.is_dir():
            raise InputError(f"{place}: no answers there: a folder with ID/answer.json, or a file of lines, is expected")

    def has(self, id: str) -> bool:
        return id in self.lines or (not self.place.is_file() and (self.place / id / "answer.json").is_file())

    def raw(self, id: str) -> tuple[dict, Path]:
        """The answer as it is written, and the folder from which its pictures are counted."""
        if id in self.lines:
            return self.lines[id], self.place.parent
        return read_json(self.place / id / "answer.json"), self.place / id

    def files(self, id: str) -> tuple[list[str], list[Path]]:
        """Texts, before each picture and after the last, and where the pictures are."""
        value, folder = self.raw(id)
        where = self.place if id in self.lines else self.place / id / "answer.json"
        if "parts" in value:
            return split_parts(value["parts"], folder, where)
        return split_marks(value, folder, where)

    def given(self, id: str) -> list[Path]:
        """The request's own pictures, as an answer of this repository keeps them."""
        if not self.has(id) or id in self.lines:
            return []
        value, folder = self.raw(id)
        return [folder / name for name in value.get("user_images", []) if isinstance(name, str)]

    def read(self, id: str) -> Answer:
        texts, files = self.files(id)
        return Answer(texts, [load_image(file) for file in files])

    def fingerprint(self, id: str) -> str:
        """Changes when the answer does."""
        texts, files = self.files(id)
        digest = hashlib.sha256(json.dumps(texts).encode())
        for file in files:
            digest.update(file.read_bytes() if file.is_file() else b"")
        return digest.hexdigest()[:16]


def address(file: Path, out: Path) -> str:
    """Of a picture, for a page that lies in `out`."""
    return quote(Path(os.path.relpath(file.absolute(), out.absolute())).as_posix())


def split_parts(parts: object, folder: Path, where: Path) -> tuple[list[str], list[Path]]:
    texts = [""]
    files = []
    for part in parts if isinstance(parts, list) else [None]:
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts[-1] += part["text"]
        elif isinstance(part, dict) and part.get("type") == "image" and isinstance(part.get("image"), str):
            files.append(folder / part["image"])
            texts.append("")
        else:
            raise InputError(f"{where}: parts must be texts and images as sample.py writes them, not {part!r:.60}")
    return texts, files


def split_marks(value: dict, folder: Path, where: Path) -> tuple[list[str], list[Path]]:
    """lmms-eval's form. Without a mark for each, pictures come behind the text."""
    text = value.get("text", "")
    images = value.get("images", [])
    if not isinstance(text, str) or not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        raise InputError(f'{where}: must hold "parts", or "text" and "images" as lmms-eval has them')
    texts = text.split(MARK)
    if len(texts) != len(images) + 1:
        texts = [text.replace(MARK, ""), *[""] * len(images)]
    return texts, [folder / image for image in images]


def read_responses(file: Path, ids: list[str]) -> dict[str, dict]:
    """{id: lmms-eval's object} of a file of lines; without an id, doc_id counts the items."""
    found = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            response = next(row[key] for key in ("response", "filtered_resps", "resps") if key in row)
            # lmms-eval's own log has it in lists, one for each filter and try.
            while isinstance(response, list):
                response = response[0]
            id = row["id"] if "id" in row else ids[row["doc_id"]]
            found[id] = json.loads(response) if isinstance(response, str) else response
            if not isinstance(found[id], dict):
                raise ValueError("no object")
        except (ValueError, LookupError, TypeError, StopIteration) as e:
            form = '{"id": ..., "response": "{\\"text\\": ..., \\"images\\": [...]}"}'
            raise InputError(f"{file}:{number}: not a line {form} ({type(e).__name__}: {e})") from None
    return found


def lmms_line(id: str, number: int, texts: list[str], files: list[Path], base: Path) -> str:
    """A line that lmms-eval's tasks read: the string with text and pictures is its `response`."""
    images = [str(Path(os.path.relpath(file, base)).as_posix()) for file in files]
    response = json.dumps({"text": MARK.join(texts), "images": images}, ensure_ascii=False)
    return json.dumps({"id": id, "doc_id": number, "response": response}, ensure_ascii=False)
