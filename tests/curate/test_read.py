"""Pages from files, folders and archives; archives that are damaged, or bombs."""

import gzip
import zlib
from pathlib import Path

import brotli
import pytest

pytest.importorskip("fastwarc", reason="curate/requirements.txt is not installed")
from checkpoint import InputError
from curate import read
from curate.page import Dropped, Page
from curate.read import Archives, Files, decoded, index_archives, inputs, members, unchunked, unpacked

HTML = b"<html><head><title>T</title></head><body><p>Fold the paper twice.</p><img src='a.png'></body></html>"


def record(url: str, body: bytes, kind: str = "text/html", headers: str = "", status: int = 200, length: int = -1) -> bytes:
    http = f"HTTP/1.1 {status} OK\r\nContent-Type: {kind}\r\n{headers}\r\n".encode() + body
    return (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{abs(hash(url))}>\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
        f"WARC-Target-URI: {url}\r\nContent-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(http) if length < 0 else length}\r\n\r\n"
    ).encode() + http + b"\r\n\r\n"  # fmt: skip


def archive(path: Path, *records: bytes) -> Path:
    """gz: a member for each record, as crawlers write them."""
    path.write_bytes(b"".join(gzip.compress(each) if path.suffix == ".gz" else each for each in records))
    return path


def pages_of(path: Path) -> list[Page | Dropped]:
    found, roots = inputs([str(path)])
    return [page for name, _ in found for page in Files(roots).read(name)]


def test_inputs_have_names_that_do_not_depend_on_the_machine(tmp_path):
    for name in ("a/x.html", "a/deep/y.md", "a/z.txt", "b/a/x.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found, roots = inputs([str(tmp_path / "a"), str(tmp_path / "b" / "a"), str(tmp_path / "a" / "x.html")])
    assert [name for name, _ in found] == ["a-2/x.html", "a/deep/y.md", "a/x.html"]
    assert dict(roots) == {"a": str(tmp_path / "a"), "a-2": str(tmp_path / "b" / "a")}
    found, roots = inputs([str(tmp_path / "a" / "deep")], root=str(tmp_path / "a"))
    assert found == [("a/deep/y.md", 1)]
    for wrong, words in (("nowhere", "no such file"), ("a/z.txt", None)):
        if words:
            with pytest.raises(InputError, match=words):
                inputs([str(tmp_path / wrong)])
    with pytest.raises(InputError, match="does not lie under"):
        inputs([str(tmp_path / "b")], root=str(tmp_path / "a"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no page in it"):
        inputs([str(tmp_path / "empty")])


@pytest.mark.parametrize("name", ["x.warc", "x.warc.gz"])
def test_an_archive_gives_its_pages_and_its_pictures(tmp_path, name):
    path = archive(
        tmp_path / name,
        record("http://a.org/a.html", HTML),
        record("http://a.org/a.png", b"picture", "image/png"),
        record("http://a.org/gone.html", HTML, status=404),
        record("http://a.org/b.html", gzip.compress(HTML), headers="Content-Encoding: gzip\r\n"),
        record("http://a.org/c.html", brotli.compress(HTML), headers="Content-Encoding: br\r\n"),
        record("http://a.org/d.html", b"5\r\n" + HTML[:5] + b"\r\n%x\r\n" % (len(HTML) - 5) + HTML[5:] + b"\r\n0\r\n\r\n",
               headers="Transfer-Encoding: chunked\r\n"),
        record("http://a.org/e.html", "<p>Grüße</p>".encode("latin-1"), "text/html; charset=ISO-8859-1"),
    )  # fmt: skip
    pages = pages_of(path)
    assert [page.url[-6:] for page in pages] == ["a.html", "b.html", "c.html", "d.html", "e.html"]
    assert [page.text for page in pages[:4]] == [HTML.decode()] * 4 and pages[4].text == "<p>Grüße</p>"
    assert len({page.id for page in pages}) == 5
    index_archives((str(path),), tmp_path / "table.npy")
    archives = Archives((str(path),), str(tmp_path / "table.npy"))
    assert archives.get("https://a.org/a.png#x", 100) == b"picture"
    assert archives.get("http://a.org/b.png", 100) is None
    with pytest.raises(InputError, match="too many bytes"):
        archives.get("http://a.org/a.png", 3)


def test_a_damaged_member_costs_itself_alone(tmp_path):
    good = [gzip.compress(record(f"http://a.org/{k}.html", HTML)) for k in range(4)]
    broken = bytearray(gzip.compress(record("http://a.org/x.html", HTML * 50)))
    broken[40:60] = bytes(20)
    path = tmp_path / "x.warc.gz"
    path.write_bytes(good[0] + bytes(broken) + good[1] + b"garbage between" + good[2] + good[3][:-30])
    pages = pages_of(path)
    assert [page.url[-6:] for page in pages if isinstance(page, Page)] == ["0.html", "1.html", "2.html"]
    reasons = [page.reason for page in pages if isinstance(page, Dropped)]
    assert reasons and all("broken" in reason and "x.warc.gz" in reason for reason in reasons)


def test_a_plain_archive_that_ends_early(tmp_path):
    path = tmp_path / "x.warc"
    path.write_bytes(record("http://a.org/0.html", HTML) + record("http://a.org/1.html", HTML, length=10**6))
    pages = pages_of(path)
    assert isinstance(pages[0], Page)
    assert len(pages) <= 2


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b\x08garbage" * 100, b"PK\x03\x04" + bytes(1000), b"WARC/1.0\r\n" * 50])
def test_what_is_no_archive_is_named(tmp_path, data):
    path = tmp_path / "x.warc.gz"
    path.write_bytes(data)
    pages = pages_of(path)
    assert not [page for page in pages if isinstance(page, Page)]
    assert pages == [] or pages[0].reason.startswith(("broken archive", "broken record"))


@pytest.fixture
def small(monkeypatch):
    """Bombs begin at a size that a test can make."""
    monkeypatch.setattr(read, "LARGEST", 100_000)


def test_bombs_in_an_archive_are_passed_by(tmp_path, small):
    zeros = bytes(3_000_000)
    path = archive(
        tmp_path / "x.warc.gz",
        record("http://a.org/a.html", HTML),
        record("http://a.org/bomb1.html", zeros),
        record("http://a.org/bomb2.html", gzip.compress(zeros), headers="Content-Encoding: gzip\r\n"),
        record("http://a.org/bomb3.html", brotli.compress(zeros), headers="Content-Encoding: br\r\n"),
        record("http://a.org/bomb4.html", zlib.compress(zeros), headers="Content-Encoding: deflate\r\n"),
        record("http://a.org/bomb5.html", zeros, length=2**62),
        record("http://a.org/b.html", HTML),
    )
    pages = pages_of(path)
    assert [page.url[-6:] for page in pages if isinstance(page, Page)] == ["a.html", "b.html"]
    bombs = [page.reason for page in pages if isinstance(page, Dropped)]
    assert len(bombs) == 5 and all(reason.startswith(("bomb", "broken")) for reason in bombs), bombs


def test_a_bomb_of_a_picture_is_none(tmp_path, small):
    path = archive(
        tmp_path / "x.warc.gz",
        record("http://a.org/a.png", bytes(10**6), "image/png"),
        record("http://a.org/b.png", b"b", "image/png"),
    )
    assert [member.problem[:4] for member in members(path, "image")] == ["bomb", ""]


def test_bodies_are_unpacked_or_refused():
    assert unchunked(b"3\r\nabc\r\n0\r\n\r\n") == b"abc" and unchunked(b"no chunks") == b"no chunks"
    assert unpacked(b"x", "identity") == b"x" and unpacked(zlib.compress(b"x"), "deflate") == b"x"
    assert unpacked(b"plain", "gzip") == b"plain", "crawlers unpack it and leave the header"
    with pytest.raises(InputError, match="content encoding"):
        unpacked(b"x", "rot13")


@pytest.mark.parametrize(
    ("data", "charset"),
    [
        ("<p>干煎红虾的做法，外酥里嫩。</p>".encode("gbk"), "gbk"),
        ('<meta charset="gb2312"><p>干煎红虾的做法</p>'.encode("gbk"), ""),
        ("<p>干煎红虾的做法</p>".encode(), "no-such-charset"),
        ("\ufeff<p>干煎红虾的做法</p>".encode("utf-16-le"), ""),
        ("<p>干煎红虾的做法</p>".encode("utf-8-sig"), "latin-1"),
    ],
)
def test_the_charset_of_a_page(data, charset):
    assert "干煎红虾的做法" in decoded(data, charset)


def test_files_that_are_no_pages(tmp_path, small):
    (tmp_path / "a.html").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "b.html").write_bytes(b"")
    (tmp_path / "c.html").write_bytes(b"x" * 100_001)
    (tmp_path / "d.html").write_bytes(HTML)
    reasons = [page.reason if isinstance(page, Dropped) else "" for page in pages_of(tmp_path)]
    name = tmp_path.name
    assert reasons == [f"no page: binary: {name}/a.html", f"no page: it is empty: {name}/b.html",
                       f"bomb: more than 100000 bytes: {name}/c.html", ""]  # fmt: skip
