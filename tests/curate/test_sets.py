"""Public sets in their published forms: what is read, what is refused and why, and that nothing costs more than its own row."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="curate/requirements.txt is not installed")

import published

from checkpoint import InputError
from curate.importing import imported, page_of_row, rows, with_pictures
from curate.page import Dropped, Page, Picture
from curate.places import Places
from curate.sets import SETS
from records.validate import load_image, validate

GOOD = 4  # rows of a fixture with nothing wrong
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "sets.md"


def outcome(name: str, folder: Path) -> tuple[list[Page], Counter, dict]:
    """(pages, what was dropped by kind, what should have been)."""
    folder.mkdir(parents=True)
    files, places, refused = published.WRITERS[name](folder, GOOD)
    pages = []
    dropped = Counter()
    for where, result in imported(name, SETS[name], list(map(str, files)), list(map(str, places))):
        if isinstance(result, Page):
            pages.append(result)
        else:
            assert where and "\n" not in result.reason
            dropped[kind(result.reason)] += 1
    return pages, dropped, refused


def kind(reason: str) -> str:
    return re.sub(r"\d+", "#", reason.split(":")[0])


@pytest.mark.parametrize("name", SETS)
def test_good_rows_become_records_and_broken_ones_are_counted(name, tmp_path):
    pages, dropped, refused = outcome(name, tmp_path / "set")
    assert len(pages) == GOOD + published.MORE.get(name, 0)
    assert dropped == Counter(refused)
    for page in pages:
        messages = with_pictures(list(page.messages), list(page.parts))
        assert [p for p in validate({"messages": messages}) if not p.warning] == []
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
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
    page = page_of_row("a", SETS["obelics"], row, Places([]))
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
        result = page_of_row("a", SETS[name], row, found)
        assert isinstance(result, Page) or (isinstance(result, Dropped) and result.reason)


def test_a_file_that_cannot_be_read_costs_no_other(tmp_path):
    files, _, _ = published.x2i(tmp_path, 2)
    (tmp_path / "cut.json").write_text('[{"instruction": "a"}, {"instr')
    (tmp_path / "packed.jsonl").write_bytes(b"PK\x03\x04 and so on")
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    names = ["cut.json", "packed.jsonl", "bad.pth", "none.jsonl"]
    found = list(imported("x2i", SETS["x2i"], [*(str(tmp_path / name) for name in names), str(files[0])], []))
    lost = [result.reason for _, result in found[:4]]
    assert all(reason.startswith("file that cannot be read: ") for reason in lost)
    assert "zip" in lost[1]
    assert sum(isinstance(result, Page) for _, result in found) == 2


def test_parquet_is_read_with_its_pictures(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet is optional")
    from pyarrow import parquet

    [(asked, parts)] = published.dialogues("one", 1)
    data = published.png(published.pictures_in(parts[1])[0])
    row = {"id": "a", "human": asked, "gpt": "Here it is.", "image": {"bytes": data, "path": "a.png"}}
    file = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row] * 70 + [row | {"image": None}]), file)
    found = [result for _, result in imported("intersyn", SETS["intersyn"], [str(file)], [])]
    assert [page.pictures[0].data for page in found[:70]] == [data] * 70
    assert found[70] == Dropped("image of turn 1: no picture")
    file.write_bytes(file.read_bytes()[:-20])
    [(_, lost)] = imported("intersyn", SETS["intersyn"], [str(file)], [])
    assert "no parquet file" in lost.reason


def test_parquet_without_pyarrow_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    [(_, lost)] = imported("zebra-cot", SETS["zebra-cot"], [str(tmp_path / "a.parquet")], [])
    assert "pip install pyarrow" in lost.reason


def test_the_table_of_the_sets_is_what_the_fixtures_give(tmp_path):
    """docs/sets.md: fields, counts, what is refused. When it fails, the table below is the right one."""
    lines = ["| set | fields read | rows | records | pictures | refused | licence |", "| --- " * 7 + "|"]
    for name, each in SETS.items():
        pages, dropped, _ = outcome(name, tmp_path / name)
        refused = ", ".join(f"{n} x {reason}" for reason, n in sorted(dropped.items()))
        pictures = sum(len(page.pictures) for page in pages)
        refused += "".join(f"; {n} picture left out" for n in [sum(len(page.refused) for page in pages)] if n)
        row = [f"{each.title} `{name}`", each.fields, len(pages) + dropped.total(), len(pages), pictures, refused, each.licence]
        lines.append(f"| {' | '.join(map(str, row))} |")
    table = "\n".join(lines)
    assert table in DOCUMENT.read_text(encoding="utf-8"), f"\n{table}\n"


def test_pictures_are_never_in_memory_twice(tmp_path):
    """Rows are worked one at a time: the first page is there before the last row has been read."""
    files, _, _ = published.zebra(tmp_path, 3)
    first = next(imported("zebra-cot", SETS["zebra-cot"], [str(files[0])], []))[1]
    assert isinstance(first.pictures[0], Picture)
