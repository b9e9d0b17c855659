"""Records in files, by number: JSON lines and tar shards, of any size, opened again without reading them.

Shards are plain .tar files in WebDataset naming: members that share the name up to the first dot belong together.

    000017.json    a record as in data.py; its pictures are members of the same tar, named relative to this one
    000017.0.jpg   for example the picture "000017.0.jpg" of that record
    000018.txt     a caption, where there is no .json or one without "messages": it becomes a user's text that ...
    000018.jpg     ... is answered with this picture

Nothing is unpacked to the disk. Links, devices and names that lead out of the archive are no members; a damaged archive, or one
that ends early, is refused before the training starts. `python data.py pack` writes shards.

Opening a file for the first time reads it once and writes where its records start to FILE.index, or, where that cannot be
written, into the cache folder ($XDG_CACHE_HOME/duogen or ~/.cache/duogen). The index is memory-mapped and holds as long as
size and time of the file are the same, so a training needs the same memory for a thousand records as for a billion.
"""

import bisect
import fcntl
import hashlib
import io
import itertools
import json
import os
import posixpath
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from checkpoint import InputError
from records.validate import BLANK, BadRecord, Problem, decode, normalise, one_line, open_lines, parse_line
from records.validate import read_records, validate

MAX_RECORD = 64 * 2**20  # bytes of a record or caption in a shard
MAX_FILE = 512 * 2**20  # bytes of a picture file in a shard; its pixels are limited in validate.py
MAX_NAME = 64 * 2**10  # bytes of a member's long name
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)  # members that are files, and no sparse ones
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")  # beside a caption

# -------------------------------------------------------------------------------------------------------------- index


class Index(NamedTuple):
    """What `open_index` finds or makes: two tables of int64, memory-mapped."""

    records: np.ndarray  # (n, 2): lines: byte, line; shards: header of the .json and of the .txt, -1 where there is none
    names: np.ndarray  # (m, 2): shards: hash of a member's name, header; in the order of the hashes


MAGIC = int.from_bytes(b"duogen-1", "little")
HEADER = 8  # int64: MAGIC, size and mtime of the file, n, m, unused


def index_places(path: str) -> list[Path]:
    """Where the index of a file may lie, best first."""
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duogen"
    name = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return [Path(f"{path}.index"), cache_folder / f"{name}.index"]


def read_header(place: Path, path: str) -> tuple[int, int, int] | None:
    """(n, m, mtime) of an index, None where it is missing or was made of another state of the file."""
    try:
        status, header = os.stat(path), np.fromfile(place, "<i8", HEADER)
        if header.tolist()[:3] != [MAGIC, status.st_size, status.st_mtime_ns]:
            return None
        n, m = header[3:5].tolist()
        return (n, m, status.st_mtime_ns) if os.path.getsize(place) == 8 * (HEADER + 2 * n + 2 * m) else None
    except (OSError, ValueError):
        return None


def make_index(path: str, rows: Callable[[str, Callable[[array], None]], tuple[int, int]]) -> Path:
    """The place of a file's valid index. rows(path, write) makes its tables if there is none yet."""
    places = index_places(path)
    for place in places:
        if read_header(place, path):
            return place
    reasons = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(f"{place}.part")
            with open(temporary, "a+b") as out:
                fcntl.flock(out, fcntl.LOCK_EX)  # of several processes one reads the file, the others wait for its index
                if read_header(place, path):
                    return place
                status = os.stat(path)
                out.truncate(0)
                out.write(bytes(8 * HEADER))
                try:
                    n, m = rows(path, lambda numbers: out.write(numbers.tobytes()))
                    out.flush()
                    with open(temporary, "r+b") as head:
                        head.write(np.array([MAGIC, status.st_size, status.st_mtime_ns, n, m, 0, 0, 0], "<i8").tobytes())
                    os.replace(temporary, place)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
            if not read_header(place, path):
                raise InputError(f"{path}: it changed while its index was made; start again when it is finished")
            return place
        except OSError as e:
            reasons.append(f"{place} ({one_line(e.strerror)})")
    raise InputError(f"{path}: its index can be written nowhere: {', '.join(reasons)}; XDG_CACHE_HOME names another folder")


@lru_cache(maxsize=256)  # of thousands of shards only some are mapped at a time
def open_index(place: Path, n: int, m: int, mtime: int) -> Index:
    numbers = np.memmap(place, "<i8", mode="r") if n or m else np.empty(HEADER, "<i8")
    return Index(*(part.reshape(-1, 2) for part in np.split(numbers[HEADER:], [2 * n])))


@contextmanager
def reading(path: str) -> Iterator[tqdm]:
    """A bar of bytes, if it takes longer than a moment."""
    name = f"index of {os.path.basename(path)}"
    with tqdm(total=os.path.getsize(path), desc=name, unit="B", unit_scale=True, disable=None, leave=False, delay=1) as bar:
        yield bar


# ---------------------------------------------------------------------------------------------------------- one file


class LineFile:
    """A file of JSON lines: its records by number, its pictures in the folder around it."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        open_lines(path).close()  # what is no such file is told before it is read
        self.place = make_index(self.path, self._rows)
        self.header = read_header(self.place, self.path)

    @staticmethod
    def _rows(path: str, write: Callable[[array], None]) -> tuple[int, int]:
        n, start, rows = 0, 0, array("q")
        with open_lines(path) as file, reading(path) as bar:
            for number, line in enumerate(file, 1):
                if line.strip(BLANK):
                    rows.extend((start, number))
                    n += 1
                start += len(line)
                if len(rows) >= 2**16:
                    write(rows)
                    rows = array("q")
                    bar.update(start - bar.n)
        write(rows)
        return n, 0

    def __len__(self) -> int:
        return self.header[0]

    def where(self, i: int) -> tuple[str, int]:
        return self.path, int(open_index(self.place, *self.header).records[i, 1])

    def raw(self, i: int) -> tuple[object, Path]:
        """Record i unchecked (a Problem if it is none), and what its picture paths are relative to."""
        start, number = open_index(self.place, *self.header).records[i].tolist()
        with open(self.path, "rb") as file:  # opened anew: processes that share an open file share its position too
            file.seek(start)
            return parse_line(file.readline(), self.path, number), Path(self.path).parent


class Member(NamedTuple):
    """A file in an archive."""

    name: str  # normal: no leading ./, no ..; empty if it is no plain file or its name leads out of the archive
    data: int  # where its bytes start
    size: int
    next: int  # where the next header starts


class Header(tarfile.TarInfo):
    """A header as tarfile reads it, but for long names: of those it would read gigabytes."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENSIONS and header.size > MAX_NAME:
            raise InputError(f"a name of {header.size:,} bytes")
        return header


def read_member(file: BinaryIO, at: int) -> Member | None:
    """The member whose header, extensions for long names included, starts at byte `at`; None at the end of the archive."""
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE)
    if not block.strip(b"\0") and len(block) in (0, tarfile.BLOCKSIZE):
        return None
    damaged = InputError(f"no tar archive, or damaged at byte {at:,}")
    file.seek(at)
    try:
        archive = tarfile.TarFile(fileobj=file, tarinfo=Header, encoding="utf-8")
        found = archive.next()
    except InputError as e:
        raise InputError(f"{e} at byte {at:,}") from None
    except (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError, MemoryError):
        raise damaged from None
    # tarfile takes a damaged header for the end of the archive, and with a negative size it would go back
    if found is None or found.size < 0 or archive.offset <= at:
        raise damaged
    sparse = any(key.startswith("GNU.sparse") for key in found.pax_headers)
    name = posixpath.normpath(found.name)
    inside = not name.startswith(("/", "../")) and name not in (".", "..")
    member = inside and found.type in PLAIN and not sparse
    return Member(name if member else "", found.offset_data, found.size, archive.offset)


def members(file: BinaryIO, total: int) -> Iterator[tuple[int, Member]]:
    """All members, each with the byte of its header, to the end of the archive, which must be that of the `total` bytes."""
    at = 0
    while member := read_member(file, at):
        if member.next > member.data and member.data + member.size > total:
            raise InputError(f"ends in the middle of {one_line(member.name) or f'the member at byte {at:,}'}")
        yield at, member
        at = member.next
    file.seek(at)
    if file.read(2**16).strip(b"\0"):
        raise InputError(f"goes on behind its end at byte {at:,}: two archives in one?")


def record_row(headers: dict[str, int]) -> tuple[int, ...]:
    """Index.records of the members that share a key: none, if there is neither a record nor a caption."""
    return (headers.get("json", -1), headers.get("txt", -1)) if headers else ()


def name_hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Shard:
    """A tar archive in WebDataset naming: its records by number, its pictures by name."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        if not os.path.isfile(path):
            raise InputError(f"{path}: {'not a regular file' if os.path.exists(path) else 'no such file'}")
        try:
            with open(path, "rb") as file:
                if file.read(2) == b"\x1f\x8b":
                    raise InputError(f"{path}: is a gzip file: unpack it first")
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({one_line(e.strerror)})") from None
        self.place = make_index(self.path, self._rows)
        self.header = read_header(self.place, self.path)

    @staticmethod
    def _rows(path: str, write: Callable[[array], None]) -> tuple[int, int]:
        names, rows = array("q"), array("q")
        open_key, headers = None, {}
        with open(path, "rb") as file, reading(path) as bar:
            try:
                for at, member in members(file, os.path.getsize(path)):
                    bar.update(at - bar.n)
                    if not member.name:
                        continue
                    names.extend((name_hash(member.name), at))
                    key, ending = split_key(member.name)
                    if key != open_key:
                        rows.extend(record_row(headers))
                        open_key, headers = key, {}
                    if ending in ("json", "txt"):
                        headers[ending] = at
                rows.extend(record_row(headers))
                table = np.frombuffer(names, "<i8").reshape(-1, 2)
                table = table[table[:, 0].argsort(kind="stable")]
                twice = table[1:][table[1:, 0] == table[:-1, 0]]
                if len(twice):
                    raise InputError(f"two members are called {one_line(read_member(file, int(twice[0, 1])).name)}")
            except InputError as e:
                raise InputError(f"{path}: {e}") from None
        write(rows)
        write(table)
        return len(rows) // 2, len(table)

    def __len__(self) -> int:
        return self.header[0]

    def where(self, i: int) -> tuple[str, str]:
        at, text_at = open_index(self.place, *self.header).records[i].tolist()
        try:
            with open(self.path, "rb") as file:
                return self.path, read_member(file, at if at >= 0 else text_at).name
        except OSError:  # `raw` tells
            return self.path, f"record {i}"

    def raw(self, i: int) -> tuple[object, Callable[[str], bytes]]:
        """Record i unchecked (a Problem if it is none), and a function that finds its pictures' bytes by name."""
        at, text_at = open_index(self.place, *self.header).records[i].tolist()
        with open(self.path, "rb") as file:
            member = read_member(file, at if at >= 0 else text_at)
            find = cache(partial(self.find, posixpath.dirname(member.name)))
            try:
                record = decode(self._bytes(file, member, MAX_RECORD)) if at >= 0 else {}
                if text_at >= 0 and isinstance(record, dict) and "messages" not in record:
                    record = self._caption(self._bytes(file, read_member(file, text_at), MAX_RECORD), member.name)
            except InputError as e:
                return Problem(self.path, member.name, "", str(e)), find
        wrong = not isinstance(record, dict)
        return Problem(self.path, member.name, "", "not an object") if wrong else record, find

    def _caption(self, text: bytes, name: str) -> dict:
        stem = posixpath.basename(split_key(name)[0])
        folder = posixpath.dirname(name)
        for ending in PICTURES:
            if self._header(posixpath.join(folder, f"{stem}.{ending}")) is not None:
                break
        else:
            raise InputError("no picture beside the caption")
        try:
            words = text.decode("utf-8-sig").strip()
        except UnicodeDecodeError as e:
            raise InputError(f"not UTF-8: byte {text[e.start]:#04x} at position {e.start}") from None
        answer = [{"type": "image", "image": f"{stem}.{ending}"}]
        return {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": answer}]}

    def _header(self, name: str) -> int | None:
        names, wanted = open_index(self.place, *self.header).names, name_hash(name)
        k = int(np.searchsorted(names[:, 0], wanted))
        return int(names[k, 1]) if k < len(names) and names[k, 0] == wanted else None

    def find(self, folder: str, name: str) -> bytes:
        """A member's bytes, by its name relative to `folder`."""
        full = posixpath.normpath(posixpath.join(folder, name))
        at = self._header(full)
        if at is None:
            raise InputError(f"no such picture: {name!r:.80} is no member of the archive")
        with open(self.path, "rb") as file:
            return self._bytes(file, read_member(file, at), MAX_FILE)

    @staticmethod
    def _bytes(file: BinaryIO, member: Member, most: int) -> bytes:
        if member.size > most:
            raise InputError(f"too large: {one_line(member.name)} has {member.size:,} bytes, the limit is {most:,}")
        file.seek(member.data)
        return file.read(member.size)


def split_key(name: str) -> tuple[str, str]:
    """Key and ending of a member, divided at the first dot of the last part of its name."""
    folder, base = posixpath.split(name)
    stem, _, ending = base.partition(".")
    return posixpath.join(folder, stem), ending.lower()


# ---------------------------------------------------------------------------------------------------------- all files


class Files:
    """The records of JSONL files and shards by number, as one set."""

    def __init__(self, files: list[str | Path]):
        self.files = [Shard(f) if str(f).endswith(".tar") else LineFile(f) for f in files]
        self.ends = list(itertools.accumulate(map(len, self.files)))
        if not self.ends or not self.ends[-1]:
            raise InputError(f"{', '.join(map(str, files)) or 'no file given'}: no record in it")

    def __len__(self) -> int:
        return self.ends[-1]

    def _place(self, i: int) -> tuple[LineFile | Shard, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        f = bisect.bisect_right(self.ends, i)
        return self.files[f], i - (self.ends[f - 1] if f else 0)

    def where(self, i: int) -> tuple[str, int | str]:
        """File and line, or member, of record i."""
        file, k = self._place(i)
        return file.where(k)

    def __getitem__(self, i: int) -> dict:
        """A valid record, its pictures absolute paths or bytes, or BadRecord."""
        file, k = self._place(i)
        try:
            record, folder = file.raw(k)
            for problem in validate(record, folder, *file.where(k), pictures=False):
                if not problem.warning:
                    raise BadRecord(problem)
            return {"messages": normalise(record, folder)}
        except OSError as e:
            raise BadRecord(Problem(file.path, 0, "", f"cannot be read: {one_line(e.strerror)}")) from None


# ------------------------------------------------------------------------------------------------------------ writing


def pack_shards(source: str, target: str, megabytes: float = 1000) -> int:
    """Write the good records of a JSONL file, with the bytes of their pictures, as target-000000.tar, ...

    The number of records that were skipped, each with its reason. A shard is closed when it exceeds `megabytes`.
    """
    folder, bad, n, pictures, shards = Path(source).parent, 0, 0, 0, 0
    out, temporary = None, Path(f"{target}.part")
    temporary.parent.mkdir(parents=True, exist_ok=True)

    def add(name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        out.addfile(entry, io.BytesIO(content))

    def close() -> None:
        nonlocal out, shards
        out.close()
        os.replace(temporary, f"{target}-{shards:06d}.tar")
        out, shards = None, shards + 1

    try:
        for line, record in tqdm(read_records(source), unit=" records", disable=None, leave=False):
            problems = [p for p in validate(record, folder, source, line) if not p.warning]
            if problems:
                tqdm.write(f"skipped: {problems[0]}")
                bad += 1
                continue
            out = out or tarfile.open(temporary, "w")
            key, messages, k = f"{n:08d}", normalise(record, folder), 0
            for part in (p for m in messages for p in m["content"] if p["type"] == "image"):
                if isinstance(part["image"], Path):  # a data URL stays in the record
                    ending = re.sub(r"[^a-z0-9]", "", part["image"].suffix.lower()) or "image"
                    name = f"{key}.{k}.{ending}"
                    add(name, part["image"].read_bytes())
                    part["image"], k = name, k + 1
            add(f"{key}.json", json.dumps({"messages": messages}, ensure_ascii=False).encode())
            n, pictures = n + 1, pictures + k
            if out.offset > megabytes * 1e6:
                close()
        if out:
            close()
    finally:
        if out:
            out.close()
        temporary.unlink(missing_ok=True)
    if not n:
        raise InputError(f"{source}: no record in it that could be packed")
    print(f"{target}-{{000000..{shards - 1:06d}}}.tar: {n:,} records, {pictures:,} pictures; {bad:,} skipped")
    return bad
