"""Where pages come from: files of HTML or Markdown, folders of them, and WARC archives.

    names, sizes, roots = inputs(["pages/", "crawl.warc.gz"], root="")
    for page in Files(roots).read("pages/a.html"): ...

A page comes as its source, one long text, of which `extract.py` makes texts and pictures. What cannot be a page comes as the
reason. In an archive a damaged member costs what stands in it; reading goes on with the next one.
"""

import hashlib
import os
import re
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urldefrag

import brotli
import numpy as np
from charset_normalizer import from_bytes
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType
from tqdm import tqdm

from checkpoint import InputError
from curate.page import Dropped, Page
from curate.store import whole

HTML = (".html", ".htm", ".xhtml")
MARKDOWN = (".md", ".markdown")
WARC = (".warc", ".warc.gz")
LARGEST = 20_000_000  # bytes of a page's source, or of a picture in an archive; more is no page but a bomb
MEMBER = b"\x1f\x8b\x08"  # how a member of a gzip file begins
RECORDS = WarcRecordType.response | WarcRecordType.resource


# ---------------------------------------------------------------------------------------------------------------- inputs


def inputs(paths: list[str], root: str = "") -> tuple[list[tuple[str, int]], tuple[tuple[str, str], ...]]:
    """([(name, bytes)] in order, ((name of a root, its folder), ...)) of what a command line names.

    A file's name is that of its root, a slash, and the way from there. A root is the folder that was named, or the folder of
    the file; `root` is one for all. Errors: InputError.
    """
    found: list[tuple[str, int]] = []
    roots: dict[str, str] = {}
    for path in paths:
        given = Path(path)
        if not given.exists():
            raise InputError(f"{path}: no such file or folder")
        top = Path(root) if root else given if given.is_dir() else given.parent
        if not given.resolve().is_relative_to(top.resolve()):
            raise InputError(f"{path}: does not lie under --root {root}")
        name = root_name(top, roots)
        files = [given] if given.is_file() else files_under(given)
        for file in files:
            found.append((f"{name}/{os.path.relpath(file.resolve(), top.resolve())}", file.stat().st_size))
    found = sorted(set(found))
    if not found:
        raise InputError(f"{', '.join(paths)}: no page in it; pages end in {', '.join((*HTML, *MARKDOWN, *WARC))}")
    return found, tuple(roots.items())


def root_name(top: Path, roots: dict[str, str]) -> str:
    """The name of a root: its last part, with a number where another root is called so."""
    folder = str(top.resolve())
    for name, other in roots.items():
        if other == folder:
            return name
    name = base = top.resolve().name or "root"
    k = 2
    while name in roots:
        name, k = f"{base}-{k}", k + 1
    roots[name] = folder
    return name


def files_under(folder: Path) -> list[Path]:
    """All pages and archives, whatever depth they lie in."""
    out = []
    for where, _, names in os.walk(folder):
        out += [Path(where, name) for name in names if name.lower().endswith((*HTML, *MARKDOWN, *WARC))]
    return out


# --------------------------------------------------------------------------------------------------------------- archives


def next_member(path: Path, start: int) -> int:
    """Where in an archive the next record begins, at byte `start` or behind it; -1 where none does."""
    with open(path, "rb") as file:
        zipped = file.read(3) == MEMBER
        mark = MEMBER if zipped else b"WARC/1."
        file.seek(start)
        tail, at = b"", start
        while block := file.read(1 << 20):
            held = tail + block
            at_held = at - len(tail)
            k = held.find(mark)
            while k >= 0:
                if not zipped or begins_record(path, at_held + k):
                    return at_held + k
                k = held.find(mark, k + 1)
            tail, at = held[-6:], at + len(block)
    return -1


def begins_record(path: Path, at: int) -> bool:
    """Whether a member of a gzip file is one, and holds a record."""
    with open(path, "rb") as file:
        file.seek(at)
        try:
            return zlib.decompressobj(31).decompress(file.read(4096), 5) == b"WARC/"
        except zlib.error:
            return False


class Member(NamedTuple):
    """A record of an archive, or why it is none."""

    at: int  # its byte in the file
    url: str
    status: int
    kind: str  # of its content, as image/png
    charset: str
    body: bytes
    problem: str = ""


def members(path: Path, wanted: str, start: int = 0) -> Iterator[Member]:
    """All responses whose kind of content begins with one of the words in `wanted`, from byte `start` on."""
    at = next_member(path, start)
    if at < 0 and start == 0:
        yield Member(0, "", 0, "", "", b"", "broken archive: no record in it")
    while at >= 0:
        last = at
        try:
            with open(path, "rb") as file:
                file.seek(at)
                for record in ArchiveIterator(file, record_types=RECORDS, auto_decode="none", quirks_mode=True):
                    last = record.stream_pos
                    member = member_of(record, last, wanted)
                    if member:
                        yield member
                    # To pass by what is enormous it would be unpacked to its end.
                    if record.content_length > LARGEST or (member and member.problem.startswith("bomb")):
                        break
                else:
                    return
        except (OSError, ValueError, RuntimeError) as e:
            yield Member(
                last, "", 0, "", "", b"", f"broken archive: {path.name} at byte {last}: {' '.join(str(e).split())[:80]}"
            )
        at = next_member(path, last + 1)


def member_of(record: WarcRecord, at: int, wanted: str) -> Member | None:
    """What is wanted of a record; None where it is of another kind."""
    url = record.headers.get("WARC-Target-URI", "").strip("<>")
    try:
        if record.is_http:
            record.parse_http(auto_decode="none")
    except (OSError, ValueError) as e:
        return Member(at, url, 0, "", "", b"", f"broken record: {e}")
    headers = record.http_headers
    status = (headers.status_code or 0) if headers is not None else 200
    full = (headers.get("Content-Type", "") if headers is not None else record.headers.get("Content-Type", "")).lower()
    kind = full.partition(";")[0].strip()
    if not kind.startswith(tuple(wanted.split())) or status != 200:
        return None
    if record.content_length > LARGEST:
        return Member(at, url, status, kind, "", b"", f"bomb: more than {LARGEST} bytes")
    charset = re.search(r"charset=[\"']?([\w-]+)", full)
    encoding = headers.get("Content-Encoding", "").strip().lower() if headers is not None else ""
    chunked = headers is not None and "chunked" in headers.get("Transfer-Encoding", "").lower()
    try:
        raw = record.reader.read(LARGEST + 1)
        if len(raw) < record.content_length:
            raise InputError("broken record: it ends early")
        body = unpacked(unchunked(raw) if chunked else raw, encoding)
    except InputError as e:
        return Member(at, url, status, kind, "", b"", str(e))
    except (OSError, ValueError, zlib.error, brotli.error) as e:
        return Member(at, url, status, kind, "", b"", f"broken record: {' '.join(str(e).split())[:80]}")
    return Member(at, url, status, kind, charset[1] if charset else "", body)


def unchunked(data: bytes) -> bytes:
    """The body of HTTP's chunks; as it is where it is in none, which crawlers often have undone."""
    out, at = bytearray(), 0
    while found := re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,200}\r\n").match(data, at):
        size = int(found[1], 16)
        if size == 0:
            return bytes(out)
        out += data[found.end() : found.end() + size]
        at = found.end() + size + 2
    return bytes(out) if out and at >= len(data) else data


def unpacked(data: bytes, encoding: str) -> bytes:
    """A body without its compression. InputError where it grows beyond all measure."""
    if len(data) > LARGEST:
        raise InputError(f"bomb: more than {LARGEST} bytes")
    if encoding in ("gzip", "x-gzip", "deflate"):
        if encoding == "deflate":
            bits = 15 if data[:1] == b"\x78" else -15
        else:
            bits = 31 if data[:2] == MEMBER[:2] else 0
        if not bits:
            return data
        out = zlib.decompressobj(bits).decompress(data, LARGEST + 1)
    elif encoding == "br":
        # It has no limit of its own, but takes its input in pieces; one byte more of it may be a megabyte.
        reader, out = brotli.Decompressor(), bytearray()
        for k in range(0, len(data), 1024):
            out += reader.process(data[k : k + 1024], output_buffer_limit=LARGEST + 1 - len(out))
            if len(out) > LARGEST:
                break
        out = bytes(out)
    elif encoding in ("", "identity", "none"):
        return data
    else:
        raise InputError(f"broken record: content encoding {encoding[:20]}")
    if len(out) > LARGEST:
        raise InputError(f"bomb: more than {LARGEST} bytes")
    return out


@dataclass(frozen=True)
class Archives:
    """The pictures in WARC archives by their addresses, through a table of where they lie."""

    files: tuple[str, ...]
    table: str  # from `index_archives`

    def get(self, address: str, most: int) -> bytes | None:
        """The bytes; None where no archive has them. InputError where they are broken, or too many."""
        rows = open_table(self.table)
        wanted = address_hash(address)
        k = int(np.searchsorted(rows["hash"], wanted))
        if k == len(rows) or rows["hash"][k] != wanted:
            return None
        path = Path(self.files[int(rows["file"][k])])
        member = next(members(path, "image", int(rows["at"][k])), None)
        if member is None or member.problem:
            raise InputError(f"broken: {member.problem if member else 'no record'}")
        if len(member.body) > most:
            raise InputError(f"too many bytes: more than {most}")
        return member.body

    def manifest(self) -> dict:
        return {"files": [Path(file).name for file in self.files], "table": ""}


ROW = np.dtype([("hash", "<u8"), ("file", "<i4"), ("at", "<i8")])


def address_hash(address: str) -> int:
    """Of an address, whether it begins with http or https."""
    bare = urldefrag(address)[0].partition("://")[2]
    return int.from_bytes(hashlib.blake2b(bare.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def index_archives(files: tuple[str, ...], table: Path) -> None:
    """Write where each picture lies: 20 bytes for each, in the order of the hashes of their addresses."""
    if table.exists():
        return
    hashes, numbers, places = array("Q"), array("i"), array("q")
    for number, file in enumerate(tqdm(files, desc="archives", unit=" files", disable=None, leave=False)):
        for member in members(Path(file), "image"):
            if not member.problem:
                hashes.append(address_hash(member.url))
                numbers.append(number)
                places.append(member.at)
    rows = np.empty(len(hashes), ROW)
    rows["hash"], rows["file"], rows["at"] = hashes, numbers, places
    # Stable: of several pictures with one address the first is found.
    rows = rows[np.argsort(rows["hash"], kind="stable")]
    with whole(table) as out:
        np.save(out, rows)


@lru_cache(maxsize=2)
def open_table(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")


# ----------------------------------------------------------------------------------------------------------------- pages


def decoded(data: bytes, charset: str = "") -> str:
    """A page's text. charset: what its server said of it."""
    for mark, name in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    said = re.search(rb"<meta[^>]{0,200}charset=[\"']?\s*([\w-]+)", data[:4096], re.I)
    for name in (charset, said[1].decode("ascii", "replace") if said else "", "utf-8"):
        try:
            return data.decode(name or "utf-8")
        except (LookupError, UnicodeDecodeError):
            continue
    best = from_bytes(data[:50_000]).best()
    return data.decode(best.encoding if best else "utf-8", "replace")


def page_of_source(item: str, data: bytes, charset: str, kind: str, **values) -> Page | Dropped:
    if len(data) > LARGEST:
        return Dropped(f"bomb: more than {LARGEST} bytes")
    text = decoded(data, charset)
    odd = sum(text.count(c) for c in "\0\x01\x02\x03\x04\x05\ufffd")
    if odd > 0.02 * len(text) + 2:
        return Dropped("no page: binary")
    if not text.strip():
        return Dropped("no page: it is empty")
    root, _, file = item.partition("/")
    notes = {"format": kind, "root": root, "file": file}
    return Page(values.pop("id"), parts=(text,), notes=notes, **values)


def short_id(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class Files:
    """The source of `web`: pages by the names that `inputs` gave."""

    roots: tuple[tuple[str, str], ...]

    def path(self, item: str) -> Path:
        root, _, rest = item.partition("/")
        return Path(dict(self.roots)[root], rest)

    def read(self, item: str) -> Iterator[Page | Dropped]:
        path = self.path(item)
        name = item.lower()
        try:
            if name.endswith(WARC):
                yield from self._archive(item, path)
                return
            with open(path, "rb") as file:
                data = file.read(LARGEST + 1)
        except OSError as e:
            yield Dropped(f"cannot be read: {item}: {e.strerror}")
            return
        kind = "markdown" if name.endswith(MARKDOWN) else "html"
        page = page_of_source(item, data, "", kind, id=short_id(item))
        yield page if isinstance(page, Page) else Dropped(f"{page.reason}: {item}")

    def _archive(self, item: str, path: Path) -> Iterator[Page | Dropped]:
        for member in members(path, "text/html application/xhtml"):
            if member.problem:
                yield Dropped(f"{member.problem}: {item} at byte {member.at}")
                continue
            page = page_of_source(item, member.body, member.charset, "html", id=short_id(f"{item}@{member.at}"), url=member.url)
            yield page if isinstance(page, Page) else Dropped(f"{page.reason}: {item} at byte {member.at}")
