"""`python -m curate web` as it is given on a command line: from pages to records, and what may go wrong on the way."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="curate/requirements.txt is not installed")
from killed import digests, kill_often, start
from test_pictures import file_of, photo
from test_read import archive, record

from checkpoint import InputError
from curate.command import with_thresholds
from curate.pictures import Sides, Sound
from curate.web import main
from data import Files

VERBS = "fold cut turn press pull glue paint mark open close lift hold".split()
THINGS = "paper corner sheet line edge boat wheel box lid string card ribbon".split()
PLACES = "the table, the window, your hand, the other side, the middle, a ruler, the first mark, its shadow".split(", ")


def words(rng: random.Random) -> str:
    """A paragraph in English that no other page has."""

    def step() -> str:
        first, second = (f"{rng.choice(VERBS)} the {rng.choice(THINGS)}" for _ in range(2))
        return f"Now {first} and {second} near {rng.choice(PLACES)}."

    return " ".join(step() for _ in range(6))


def html(k: int, pictures: list[str]) -> str:
    rng = random.Random(k)
    steps = "".join(f'<p>{words(rng)}</p><img src="{name}" alt="step {n}">' for n, name in enumerate(pictures))
    body = f"<article>{steps}<p>{words(rng)}</p></article>"
    return f"<html><head><title>A boat, part {k}</title></head><body>{body}</body></html>"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """40 pages with two pictures each; a third of what lies beside them is garbage, and one picture is on all."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "shared.png").write_bytes(file_of(photo(999)))
    rng = random.Random(0)
    for k in range(40):
        for j in range(2):
            (folder / f"{k}-{j}.png").write_bytes(file_of(photo(2 * k + j, side=160)))
        (folder / f"{k:02d}.html").write_text(html(k, [f"{k}-0.png", f"{k}-1.png", "shared.png"]))
    for k in range(18):
        (folder / f"garbage{k}.html").write_bytes(rng.randbytes(2000) if k % 3 else b"<div>" * 3000)
    # A name that is no UTF-8, as archives from elsewhere have.
    Path(os.fsdecode(bytes(folder) + b"/odd\xff.html")).write_text(html(51, ["0-0.png"]))
    (folder / "lies.html").write_text(html(50, ["lies.png"]))
    lies = bytearray(file_of(photo(5)))
    lies[16:24] = (300_000).to_bytes(4, "big") * 2
    (folder / "lies.png").write_bytes(lies)
    return folder


@pytest.fixture(scope="module")
def whole(site, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("web") / "out"
    main([str(site), "--out", str(out), "--tasks", "6"])
    return out


def test_pages_become_records(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    counts = {name[3:]: counts for name, counts in manifest["counts"].items()}
    assert counts["Read"]["in"] == 60 and counts["Read"]["dropped: no page"] == 12
    assert counts["Extract"]["dropped: bomb"] == 6
    assert counts["Sound"]["refused: broken"] == 1
    assert counts["Repeated"]["refused: on many pages"] == 40
    records = Files([whole / "records.jsonl"])
    assert len(records) == manifest["records"] >= 40
    first = records[0]["messages"]
    assert "boat" in first[0]["content"][0]["text"]
    assert [part["type"] for part in first[1]["content"]] == ["text", "image", "text", "image", "text"]
    assert manifest["inputs"][f"{manifest['steps'][6]['roots'][0]}/00.html"] > 100
    assert manifest["versions"]["trafilatura"] == "2.3.1"


def test_no_page_and_no_picture_is_lost_without_a_reason(whole):
    for name, counts in json.loads((whole / "manifest.json").read_text())["counts"].items():
        assert "pictures lost" not in counts, name
        assert counts["in"] == counts.get("out", 0) + sum(n for key, n in counts.items() if key.startswith("dropped: ")), name


def test_killed_at_random_the_bytes_are_the_same(site, whole, tmp_path):
    command = ("web", site, "--tasks", "6", "--workers", "2")
    for _, out in kill_often(command, tmp_path, 2, 4.0, 1):
        assert digests(out) == digests(whole)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(site, whole, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "curate", "web", str(site), "--out", str(out), "--tasks", "6"]
    # Files may have 40 kB: a task has more.
    limited = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)))  # fmt: skip
    assert limited.returncode == 2, limited.stderr
    assert "make room" in limited.stderr and "Traceback" not in limited.stderr
    assert not (out / "records.jsonl").exists()
    main(command[4:])
    assert digests(out) == digests(whole)


def test_ctrl_c_leaves_nothing_behind(site, tmp_path):
    process = start("web", site, "--out", tmp_path / "out", "--workers", "2")
    for _ in range(600):
        if list(tmp_path.glob("out/work/stage-0/completions/*")):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in said, said.decode()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_pictures_come_from_the_archive_of_their_page(tmp_path, capsys):
    pictures = [record(f"https://a.org/{k}.png", file_of(photo(k)), "image/png") for k in range(2)]
    page = html(0, ["0.png", "1.png", "2.png"]).encode()
    archive(tmp_path / "x.warc.gz", record("http://a.org/boat.html", page), *pictures)
    main([str(tmp_path / "x.warc.gz"), "--out", str(tmp_path / "out")])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["records"] == 1
    assert manifest["counts"]["07 Fill"]["refused: not at hand"] == 1
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("Nothing.x=1", "no step is called 'Nothing'"),
        ("Sides.width=1", "has no 'width'"),
        ("Sides.least=much", "is no value"),
        ("Sides.least=1.5", "is 130"),
        ("Sides", "has no ''"),
    ],
)
def test_thresholds_that_there_are_not(given, words):
    with pytest.raises(InputError, match=words):
        with_thresholds([Sound(), Sides()], [given])


def test_thresholds_are_set_and_stand_in_the_manifest(site, tmp_path):
    assert with_thresholds([Sides()], ["Sides.least=200", "Sides.aspect=3"]) == [Sides(least=200, aspect=3)]
    main([str(site / "00.html"), "--out", str(tmp_path / "out"), "--set", "Sides.least=500"])
    steps = json.loads((tmp_path / "out" / "manifest.json").read_text())["steps"]
    assert {"name": "Sides", "least": 500, "most": 20000, "aspect": 4.0} in steps
    with pytest.raises(InputError, match="other steps"):
        main([str(site / "00.html"), "--out", str(tmp_path / "out")])
    main([str(site / "00.html"), "--out", str(tmp_path / "out"), "--fresh"])


def test_fresh_empties_no_folder_of_somebody_else(site, tmp_path):
    (tmp_path / "records.jsonl").write_text("mine")
    with pytest.raises(InputError, match="empties none but its own"):
        main([str(site), "--out", str(tmp_path), "--fresh"])
    assert (tmp_path / "records.jsonl").read_text() == "mine"


def test_the_report_needs_no_network_and_shows_pictures(whole):
    page = (whole / "index.html").read_text()
    assert page.count("data:image/jpeg") > 3
    for loads in ('src="http', "url(http", "<link", "<script"):
        assert loads not in page, loads
