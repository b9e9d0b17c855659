"""Public sets in their published forms: what is read, what is refused and why, and that nothing costs more than its own row."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="curate/requirements.txt is not installed")

import public_sets as published

import data
from checkpoint import InputError
from curate.engine import Valid, kind_of
from curate.importing import Complete, Published, main, rows
from curate.page import Dropped, Page
from curate.places import Places
from curate.sets import SETS
from records.validate import load_image

GOOD = 4  # rows of a fixture with nothing wrong
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "sets.md"


def outcome(name: str, folder: Path) -> tuple[list[Page], Counter, dict]:
    """(pages, what was dropped by kind, what should have been)."""
    folder.mkdir(parents=True)
    files, places, refused = published.WRITERS[name](folder, GOOD)
    pages = []
    dropped = Counter()
    for file in files:
        for page in Published(name, tuple(map(str, places))).read(str(file)):
            result = completed(name, page)
            if isinstance(result, Page):
                pages.append(result)
            else:
                assert "\n" not in result.reason
                dropped[kind_of(result.reason)] += 1
    return pages, dropped, refused


def completed(name: str, page: Page | Dropped) -> Page | Dropped:
    """What the steps of the command make of it."""
    for step in (Complete(SETS[name].partial), Valid()):
        page = page if isinstance(page, Dropped) else step(page)
    return page


@pytest.mark.parametrize("name", SETS)
def test_good_rows_become_records_and_broken_ones_are_counted(name, tmp_path):
    pages, dropped, refused = outcome(name, tmp_path / "set")
    assert len(pages) == GOOD + published.MORE.get(name, 0)
    assert dropped == Counter(refused)
    for page in pages:
        assert [m["role"] for m in page.messages] == ["user", "assistant"] * (len(page.messages) // 2)
        shown = [part["image"] for m in page.messages for part in m["content"] if part["type"] == "image"]
        assert shown == list(range(len(page.pictures))) != []
        assert all(load_image(picture.data).size == (picture.width, picture.height) for picture in page.pictures)
    # The same rows give the same pages.
    assert outcome(name, tmp_path / "again")[0] == pages


def test_every_set_has_a_fixture_and_a_source():
    assert SETS.keys() == published.WRITERS.keys()
    assert all(each.fields and each.licence and each.source for each in SETS.values())


def flat(page: Page) -> list[tuple]:
    """(role, "text" or number of the picture) of all parts."""
    return [(m["role"], p.get("image", p["type"])) for m in page.messages for p in m["content"]]


def test_an_edit_shows_the_user_picture_then_asks_then_paints(tmp_path):
    pages = outcome("sharegpt-4o-image", tmp_path / "set")[0]
    assert flat(pages[0]) == [("user", "text"), ("assistant", 0)]
    assert flat(pages[1]) == [("user", 0), ("user", "text"), ("assistant", 1)]
    assert pages[1].pictures[0].address == "image/in_1.png"


def test_marks_say_where_pictures_stand(tmp_path):
    pages = outcome("x2i", tmp_path / "set")[0]
    assert flat(pages[0]) == [("user", 0), ("user", "text"), ("assistant", 1)]
    # The second of two is named within the sentence, the first nowhere: it stands first.
    page = pages[2]
    assert flat(page) == [("user", 0), ("user", "text"), ("user", 1), ("user", "text"), ("assistant", 2)]
    assert [p.address for p in page.pictures] == ["images/2_target.png", "images/2_source.png", "images/2_target.png"]


def test_mmc4_places_pictures_behind_their_sentences(tmp_path):
    pages = outcome("mmc4", tmp_path / "set")[0]
    written = list(published.web(GOOD))
    assert [r.reason.partition(":")[0] for r in pages[-1].refused] == ["no such picture", "unlike its sentence"]
    for page, (_, parts) in zip(pages, written, strict=False):
        numbers = [int(p.address[4:8], 16) for p in page.pictures]
        assert numbers == sorted(numbers) and len(numbers) == len(published.pictures_in(parts))
        assert set(page.notes["similarity"].values()) == {0.3}
        assert page.url.startswith("http://example.org/")


def test_a_page_goes_on_without_a_missing_picture(tmp_path):
    whole, *_, short = outcome("obelics", tmp_path / "set")[0]
    assert short.messages == whole.messages
    assert [r.address for r in short.refused] == ["https://example.org/gone.png"]


def test_texts_around_a_missing_picture_are_one():
    row = {"texts": ["One.", None, "Two.", None], "images": [None, "gone", None, b""]}
    row["images"][3] = published.png(published.dialogues("one", 1).__next__()[1][1][-1])
    page = completed("obelics", Published("obelics").page("a", row, Places([])))
    assert [p.get("text") for p in page.messages[1]["content"]] == ["One.\n\nTwo.", None]


def test_pictures_are_found_or_refused(tmp_path):
    folder = tmp_path / "a"
    published.store(folder, "b/1.png", b"one")
    published.store(folder, "2.png", b"two")
    assert Places([folder]).read("/Set/images/b/1.png") == b"one"
    places = Places([folder])
    assert places.read("x/2.png") == b"two"
    # Another picture of the same last name is not this file.
    for other in ("y/2.png", "z/2.png", "x/../2.png", "../a/2.png", "/"):
        with pytest.raises(InputError):
            places.read(other)
    published.store(tmp_path / "c", "2.png", b"another")
    with pytest.raises(InputError, match="several places"):
        Places([folder, tmp_path / "c"]).read("2.png")
    # Addresses that end alike are not the same picture.
    places = Places([folder])
    assert places.read("https://a.org/2.png?size=9") == b"two"
    with pytest.raises(InputError, match="another name"):
        places.read("https://b.org/2.png")


def test_links_out_of_a_name_are_no_way_out(tmp_path):
    published.store(tmp_path, "secret.png", b"secret")
    published.store(tmp_path, "set/1.png", b"one")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "..\\secret.png"):
        with pytest.raises(InputError):
            Places([tmp_path / "set"]).read(name)


@pytest.mark.parametrize("name", SETS)
def test_garbage_in_any_field_is_survived(name, tmp_path):
    """Each value of a good row replaced by others: a page or a reason, never an exception."""
    files, places, _ = published.WRITERS[name](tmp_path, 2)
    found = Places(places or [tmp_path, tmp_path / "images"][: 1 + (tmp_path / "images").is_dir()])
    junk = [None, "", "x", 0, -1, 1.5, True, [], [None], [[]], {}, {"bytes": b"x"}, {"type": "text"}, b"x", [{"type": "image"}]]
    rng = random.Random(0)
    good = [row for _, row in rows(str(files[0])) if isinstance(row, dict)][:2]
    for _ in range(300):
        row = json.loads(json.dumps(rng.choice(good)))
        at = row
        while True:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7:
                at = at[key]
                continue
            at[key] = rng.choice(junk)
            break
        result = completed(name, Published(name).page("a", row, found))
        assert isinstance(result, Page) or (isinstance(result, Dropped) and result.reason)


def test_a_file_that_cannot_be_read_costs_no_other(tmp_path):
    files, _, _ = published.x2i(tmp_path, 2)
    (tmp_path / "cut.json").write_text('[{"instruction": "a"}, {"instr')
    (tmp_path / "packed.jsonl").write_bytes(b"PK\x03\x04 and so on")
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    names = ["cut.json", "packed.jsonl", "bad.pth"]
    for name in [*names, "none.jsonl"]:
        [lost] = Published("x2i").read(str(tmp_path / name))
        assert kind_of(lost.reason) == "file that cannot be read"
    everything = [*(str(tmp_path / name) for name in names), str(files[0])]
    main(["x2i", *everything, "--out", str(tmp_path / "out")])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["records"] == 2
    assert manifest["import"]["licence"] == "Apache-2.0"


def test_parquet_is_read_with_its_pictures(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet is optional")
    from pyarrow import parquet

    [(asked, parts)] = published.dialogues("one", 1)
    data = published.png(published.pictures_in(parts[1])[0])
    row = {"id": "a", "human": asked, "gpt": "Here it is.", "image": {"bytes": data, "path": "a.png"}}
    file = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row] * 70 + [row | {"image": None}]), file)
    found = list(Published("intersyn").read(str(file)))
    assert [page.pictures[0].data for page in found[:70]] == [data] * 70
    assert found[70] == Dropped("image: no picture")
    file.write_bytes(file.read_bytes()[:-20])
    [lost] = Published("intersyn").read(str(file))
    assert "no parquet file" in lost.reason


def test_parquet_without_pyarrow_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    [lost] = Published("zebra-cot").read(str(tmp_path / "a.parquet"))
    assert "pip install pyarrow" in lost.reason


def test_the_table_of_the_sets_is_what_the_fixtures_give(tmp_path):
    """docs/sets.md: fields, counts, what is refused. When it fails, the table below is the right one."""
    lines = ["| set | fields read | rows | records | pictures | refused | licence |", "| --- " * 7 + "|"]
    for name, each in SETS.items():
        pages, dropped, _ = outcome(name, tmp_path / name)
        refused = ", ".join(f"{n} x {reason}" for reason, n in sorted(dropped.items()))
        pictures = sum(len(page.pictures) for page in pages)
        refused += "".join(f"; pictures left out: {n}" for n in [sum(len(page.refused) for page in pages)] if n)
        row = [f"{each.title} `{name}`", each.fields, len(pages) + dropped.total(), len(pages), pictures, refused, each.licence]
        lines.append(f"| {' | '.join(map(str, row))} |")
    table = "\n".join(lines)
    assert table in DOCUMENT.read_text(encoding="utf-8"), f"\n{table}\n"


@pytest.mark.parametrize("name", ["obelics", "comm"])
def test_what_the_command_writes_can_be_trained_on(name, tmp_path, capsys):
    files, places, _ = published.WRITERS[name](tmp_path, GOOD)
    out = tmp_path / "out"
    images = ["--images", *map(str, places)] if places else []
    main([name, *map(str, files), "--out", str(out), *images])
    assert data.main(["check", str(out / "records.jsonl")]) == 0
    assert data.main(["check", str(out / "shards" / "import-000000.tar")]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["records"] == GOOD + published.MORE.get(name, 0)
    assert f"{manifest['records']} records" in (said := capsys.readouterr().out)
    assert "1 dropped: no picture left" in said


def test_mistakes_are_one_line(tmp_path):
    for wrong in (["none.jsonl"], [__file__, "--images", "nowhere"], [__file__, "--n", "0"]):
        with pytest.raises(InputError):
            main(["x2i", *wrong, "--out", str(tmp_path / "out")])
