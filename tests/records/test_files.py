"""Records in files: an index instead of memory, tar shards of every kind, and archives that are damaged or hostile."""

import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import data
from checkpoint import InputError
from model import ImageProcessor
from records import files
from records.files import Files, LineFile, Shard, pack_shards
from records.stream import Stream
from records.validate import BadRecord, load_image
from sketchbook import dialogues
from tokenizer import train_bpe

ROOT = Path(__file__).parent.parent.parent


def chat(question, answer) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def picture(colour: str = "red", format: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(out, format)
    return out.getvalue()


def drawn(*names: str) -> bytes:
    return json.dumps(chat("Draw", [{"type": "image", "image": name} for name in names])).encode()


def tar(path: Path, members: list, format: int = tarfile.PAX_FORMAT) -> str:
    """members: (name, bytes), or a TarInfo for what has none."""
    with tarfile.open(path, "w", format=format) as out:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                out.addfile(member)
                continue
            entry = tarfile.TarInfo(member[0])
            entry.size = len(member[1])
            out.addfile(entry, io.BytesIO(member[1]))
    return str(path)


def said(record: dict) -> str:
    return record["messages"][1]["content"][0]["text"]


# -------------------------------------------------------------------------------------------------------------- index

MILLION = """
import json, os, random, sys, time
from records.stream import Stream
from records.files import Files

def own_memory():  # what is not a page of a mapped file: those the system takes back when it likes
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

path, n = sys.argv[1], int(sys.argv[2])
before, seconds, peak = own_memory(), [], 0
for _ in range(2):
    started = time.perf_counter()
    lines = Files([path])
    seconds.append(time.perf_counter() - started)
assert len(lines) == n
stream = Stream(lines, seed=3)
stream.resume([{"next": 7 * n + n // 3, "open": []}])  # in the middle of epoch 7
items, started = iter(stream), time.perf_counter()
for _ in range(3000):
    next(items)
    peak = max(peak, own_memory() - before)
print(json.dumps({"opened": seconds, "memory": peak, "each": (time.perf_counter() - started) / 3000}))
"""


def test_a_million_records_need_no_memory(tmp_path: Path):
    """Opening, shuffling and resuming: less than 6 MiB of memory (the numbers of a stored permutation alone are 8), and the
    second time nothing of the file is read but its first bytes."""
    path, n = tmp_path / "million.jsonl", 1_000_000
    with open(path, "w") as out:
        for i in range(0, n, 10_000):
            out.write("".join(f'{{"messages":[{{"role":"assistant","content":"{k}"}}]}}\n' for k in range(i, i + 10_000)))
    command = [sys.executable, "-c", MILLION, str(path), str(n)]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    assert found["memory"] < 6 and found["opened"][1] < 0.1 < found["opened"][0] and found["each"] < 0.002, found
    lines = Files([path])
    for i in random.Random(0).sample(range(n), 200):
        assert lines[i]["messages"][0]["content"][0]["text"] == str(i) and lines.where(i) == (str(path), i + 1)
    with pytest.raises(IndexError):
        lines[n]


def test_the_index_follows_its_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(chat("q", "one")) + "\n")
    assert said(Files([path])[0]) == "one" and Path(f"{path}.index").is_file()

    def not_again(*_):
        raise AssertionError("the file was read again")

    with monkeypatch.context() as patch:
        patch.setattr(LineFile, "_rows", not_again)
        assert said(Files([path])[0]) == "one"
    path.write_text("\n" + json.dumps(chat("q", "two")) + "\n")
    assert len(Files([path])) == 1 and said(Files([path])[0]) == "two"
    Path(f"{path}.index").write_bytes(Path(f"{path}.index").read_bytes()[:-8])  # cut short: made anew
    assert said(Files([path])[0]) == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.index"]


def test_an_index_that_cannot_lie_beside_its_file_goes_to_the_cache(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(chat("q", "one")) + "\n")
    Path(f"{path}.index").mkdir()  # what even root cannot write over
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert said(Files([path])[0]) == "one"
    assert len(list((tmp_path / "cache" / "duogen").glob("*.index"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    with pytest.raises(InputError, match="its index can be written nowhere: .*a.jsonl.index .*XDG_CACHE_HOME") as e:
        Files([path])
    assert "\n" not in str(e.value)


def count(path: Path) -> int:
    return len(Files([path]))


def test_processes_that_open_a_file_at_once_make_one_index(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(chat("q", str(i))) + "\n" for i in range(20_000)))
    with multiprocessing.get_context("fork").Pool(3) as ranks:
        assert ranks.map(count, [path] * 3, chunksize=1) == [20_000] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.index"]


# ------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_records_and_captions_of_a_shard(tmp_path: Path, format: int):
    long = "very/long/" * (9 if format == tarfile.USTAR_FORMAT else 40) + "path"
    path = tar(tmp_path / "s-000000.tar", [
        ("a/0.json", drawn("0.0.png", "sub/../0.1.jpg", "b.png")),
        ("a/0.0.png", picture()), ("a/0.1.jpg", picture("blue", "JPEG")),
        ("./1.json", json.dumps(chat("q", "no picture")).encode()),
        ("2.txt", " ein Bär \n".encode()), ("2.webp", picture("green", "WEBP")),
        ("3.jpg", picture("blue", "JPEG")), ("3.txt", b"a caption wins over other metadata"), ("3.json", b'{"width": 16}'),
        (f"{long}/4.json", drawn("4.image.png")), (f"{long}/4.image.png", picture("white")),
        ("notes.md", b"no record"), ("a/b.png", picture("black")),
    ], format)  # fmt: skip
    shard = Files([path])
    assert len(shard) == 5
    pixels = [[load_image(p["image"]).getpixel((3, 3)) for m in r["messages"] for p in m["content"] if p["type"] == "image"]
              for r in shard]  # fmt: skip
    assert [len(p) for p in pixels] == [3, 0, 1, 1, 1]
    assert pixels[0][0] == (255, 0, 0) and pixels[0][2] == (0, 0, 0) and pixels[4] == [(255, 255, 255)]
    assert shard[2]["messages"][0]["content"] == [{"type": "text", "text": "ein Bär"}]
    assert shard[3]["messages"][0]["content"][0]["text"] == "a caption wins over other metadata"
    assert [shard.where(i)[1] for i in range(5)] == ["a/0.json", "1.json", "2.txt", "3.json", f"{long}/4.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s-000000.tar", "s-000000.tar.index"]  # nothing is unpacked


BAD = {
    "not JSON": ([("0.json", b"{")], "0.json: not valid JSON"),
    "a list": ([("0.json", b"[]")], "0.json: not an object"),
    "no record": ([("0.json", b"{}")], "0.json: messages: not a list"),
    "no such member": ([("0.json", drawn("0.png"))], "content[0].image: no such picture: '0.png' is no member"),
    "beside another": ([("a/0.json", drawn("1.png")), ("1.png", b"")], "no such picture"),
    "on the disk": ([("0.json", drawn("/etc/passwd"))], "no such picture"),
    "outside": ([("0.json", drawn("../0.png")), ("../0.png", picture())], "no such picture"),
    "absolute": ([("0.json", drawn("/0.png")), ("/0.png", picture())], "no such picture"),
    "URL": ([("0.json", drawn("https://a.b/0.png"))], "a URL"),
    "no picture": ([("0.txt", b"a bear"), ("1.png", picture())], "0.txt: no picture beside the caption"),
    "caption not UTF-8": ([("0.txt", b"\xff"), ("0.png", picture())], "0.txt: not UTF-8"),
    "empty caption": ([("0.txt", b" "), ("0.png", picture())], "empty message"),
}


@pytest.mark.parametrize("members, reason", BAD.values(), ids=BAD)
def test_a_bad_record_of_a_shard_is_named(tmp_path: Path, members: list, reason: str, capsys):
    good = [("9.json", json.dumps(chat("q", "fine")).encode())]
    path = tar(tmp_path / "bad.tar", members + good)
    shard = Files([path])
    with pytest.raises(BadRecord) as e:
        shard[0]
    assert str(e.value).startswith(f"{path}:{members[0][0]}: ") and reason in str(e.value) and "\n" not in str(e.value)
    assert said(shard[1]) == "fine"
    assert [said(r) for r in Stream(shard, epochs=1)] == ["fine"]
    assert data.main(["check", path]) == 1
    out = capsys.readouterr().out
    assert reason in out and out.endswith("2 records, 1 ok, 1 bad; 0 pictures, 0 of them in answers\n")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_no_members(tmp_path: Path, kind: bytes):
    (tmp_path / "secret.png").write_bytes(picture())
    entry = tarfile.TarInfo("0.png")
    entry.type, entry.linkname = kind, str(tmp_path / "secret.png")
    path = tar(tmp_path / "links.tar", [("0.json", drawn("0.png")), entry, ("1.json", drawn("1.png")), ("1.png", picture())])
    shard = Files([path])
    with pytest.raises(BadRecord, match="no such picture"):
        shard[0]
    assert load_image(shard[1]["messages"][1]["content"][0]["image"]).size == (16, 16)


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"0" * 11 + b"\0"
    block += b" " * 8 + kind
    block = block.ljust(257, b"\0") + b"ustar\00000"
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def test_damaged_and_hostile_archives_are_one_line(tmp_path: Path):
    whole = Path(tar(tmp_path / "whole.tar", [(f"{i}.json", json.dumps(chat("q", str(i))).encode()) for i in range(5)]))
    content = whole.read_bytes()
    assert len(Files([whole])) == 5
    broken = bytearray(content)
    broken[2 * 1024 + 20] ^= 1  # in the header of the third member
    cases = {
        "flipped": (bytes(broken), "damaged at byte 2,048"),
        "cut in a header": (content[:1224], "damaged at byte 1,024"),
        "cut in a member": (content[: 4 * 1024 + 520], "ends in the middle of 4.json"),
        "two": (content + content, "goes on behind its end"),
        "gzip": (b"\x1f\x8b\x08\0", "a gzip file: unpack it first"),
        "text": (b"hello\n" * 1000, "no tar archive"),
        "twice": (content[:2048] + content, "two members are called 0.json"),
        "claims much": (header(b"0.json", b"77777777777") + b"{}", "ends in the middle of 0.json"),
        "claims more": (header(b"0.json", b"\x80" + b"\xff" * 11) + b"{}", "ends in the middle of 0.json"),
        "negative": (header(b"0.json", b"\xff" * 12), "damaged at byte 0"),
        "no number": (header(b"0.json", b"12x"), "damaged at byte 0"),
        "endless name": (header(b"././@LongLink", b"7777777777", b"L"), "a name of 1,073,741,823 bytes"),
        "endless chain": (header(b"././@LongLink", b"0", b"L") * 3000, "damaged at byte 0"),
        "end of a chain": (header(b"././@LongLink", b"0", b"L"), "damaged at byte 0"),
        "back": (header(b"0.json", b"\xff" * 10 + b"\xfe\x00", b"S") * 2, "damaged at byte 0"),
        "back, extended": (header(b"x", b"13", b"x") + b"13 size=-512\n".ljust(512, b"\0") + header(b"a", b""), "damaged"),
        "sparse without an end": (header(b"0.json", b"9", b"S")[:482] + b"\1" + bytes(29), "damaged at byte 0"),
        "empty": (b"", "no record in it"),
        "nothing": (bytes(10240), "no record in it"),
        "only pictures": (header(b"0.png", b"4") + b"abcd".ljust(512, b"\0"), "no record in it"),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        with pytest.raises(InputError) as e:
            Files([path])
        assert reason in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value), (name, str(e.value))
    chance = random.Random(0)
    for n in range(300):  # whatever bytes are wrong: records, or one line
        noisy = bytearray(whole.read_bytes())
        for _ in range(3):
            noisy[chance.randrange(5 * 1024)] = chance.randrange(256)
        path = tmp_path / "noisy.tar"
        path.write_bytes(noisy)
        os.utime(path, ns=(n, n))
        try:
            list(Stream(Files([path]), epochs=1))
        except InputError as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize("key", ["GNU.sparse.realsize", "GNU.sparse.name"])
def test_sparse_files_are_no_members(tmp_path: Path, key: str):
    """Their bytes in the archive are not those of the file."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as out:
        for name, extension in (("0.json", {}), ("0.png", {key: "1.json"} if key.endswith("name") else {key: "600"})):
            entry = tarfile.TarInfo(name)
            content = drawn("0.png") if name == "0.json" else picture()
            entry.size, entry.pax_headers = len(content), extension
            out.addfile(entry, io.BytesIO(content))
    with pytest.raises(BadRecord, match="no such picture"):
        Files([tmp_path / "a.tar"])[0]


def test_sizes_are_limited(tmp_path: Path, monkeypatch):
    path = tar(tmp_path / "a.tar", [("0.json", drawn("0.png")), ("0.png", picture()), ("1.json", b" " * 500 + drawn("0.png"))])
    monkeypatch.setattr(files, "MAX_RECORD", 400)
    monkeypatch.setattr(files, "MAX_FILE", 50)
    shard = Files([path])
    with pytest.raises(BadRecord, match=r"0.json: .*\.image: too large: 0.png has \d+ bytes, the limit is 50"):
        shard[0]
    with pytest.raises(BadRecord, match="1.json: too large: 1.json has"):
        shard[1]


def test_packing_a_file_and_reading_it_as_shards(tmp_path: Path, capsys):
    """The documents of the shards are those of the file, in the same order, whatever the size of a shard."""
    path = dialogues.write(tmp_path / "corpus", 12, size=32)
    lines = path.read_text().splitlines()
    bad = json.dumps(chat("q", [{"type": "image", "image": "gone.png"}]))
    path.write_text("\n".join([*lines[:6], bad, *lines[6:], json.dumps(chat("q", "only text"))]))
    assert data.main(["pack", str(path), str(tmp_path / "out" / "s"), "--megabytes", "0.01"]) == 1
    out = capsys.readouterr().out
    assert "records.jsonl:7: " in out and "13 records" in out and out.endswith("1 skipped\n")
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert len(shards) > 2 and not list((tmp_path / "out").glob("*.part"))
    tokenizer = train_bpe(["Draw a red house with a blue roof, please."], 300)
    processor = ImageProcessor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=1024)
    a, b = Files([path]), Files(shards)
    assert len(b) == 13
    for i, j in zip([*range(6), *range(7, 14)], range(13), strict=True):
        x, y = (data.tokenize(record, tokenizer, processor) for record in (a[i], b[j]))
        assert x.rendered == y.rendered and x.grids == y.grids and len(x.pictures) == len(y.pictures)
        assert all(np.array_equal(p, q) for p, q in zip(x.pictures, y.pictures, strict=True))
    assert data.main(["check", *map(str, shards)]) == 0
    with pytest.raises(InputError, match="no record in it that could be packed"):
        path.write_text(bad)
        pack_shards(str(path), str(tmp_path / "none"))
    assert not list(tmp_path.glob("none*"))


def test_unusable_shards_are_status_2(tmp_path: Path, capsys):
    (tmp_path / "a.tar").write_bytes(b"hello")
    for argv in (["check", str(tmp_path / "a.tar")], ["check", str(tmp_path / "none.tar")], ["pack", str(tmp_path), "x"],
                 ["pack", str(tmp_path / "none.jsonl"), str(tmp_path / "x")]):  # fmt: skip
        assert data.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
    with pytest.raises(InputError, match="no such file"):
        Shard(tmp_path / "none.tar")
