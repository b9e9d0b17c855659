"""Named details: the corpus keeps all of them, and a single wrong word or picture loses its own, and no other."""

from random import Random
from types import SimpleNamespace

import pytest

from evaluate.details import SORTS, kept
from evaluate.exam import Corpus, draw_records, evaluate, free_requests
from sketchbook.scenes import BACKGROUNDS, COLOURS, SUBJECTS, Scene, Thing, large, render, small, usual_colours
from sketchbook.words import NUMBERS

DRAWN = ("lesson", "one", "colour", "count", "two", "position", "binding", "story", "multi")
KINDS = (*DRAWN, "recolour", "add", "move", "question")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return [r for kind in KINDS for split in ("seen", "held_out") for r in draw_records(kind, split, 4, 11 * 10**9, 64)]


def test_the_corpus_keeps_every_detail(records):
    found = evaluate(Corpus(records), records, quiet=True)
    assert found.share("named").share == 1 and found.share("named").n > 200
    sorts = {sort: found.details(sort).n for sort in SORTS}
    assert all(sorts.values()), sorts
    assert found.followed().share == 1


def things(subject: str, colour: str, n: int = 1, page: str = "white") -> Scene:
    quarters = [(0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)]
    colours = usual_colours(subject, colour)
    return Scene(page, tuple(small(Random(3), subject, colours, cell, 28) for cell in quarters[:n]))


def lost(turn: dict, texts: list[str], *scenes: Scene) -> set[tuple[str, str]]:
    """{(sort, "told" or "shown")} of what is not kept."""
    rows = kept(turn, texts, [render(scene) for scene in scenes], None, "")
    return {(row["of"], side) for row in rows for side in ("told", "shown") if not row[side]}


COUNT = {"kind": "count", "need": [], "named": [
    {"of": "thing", "subject": "cup"}, {"of": "colour", "subject": "cup", "colour": "red"},
    {"of": "count", "subject": "cup", "count": 3}, {"of": "page", "background": "grey"}]}  # fmt: skip


def test_number_colour_thing_and_page():
    said = "Here are three red cups on a grey background."
    assert lost(COUNT, [said, ""], things("cup", "red", 3, "grey")) == set()
    assert lost(COUNT, [said, ""], things("cup", "red", 2, "grey")) == {("count", "shown")}
    assert lost(COUNT, [said.replace("three", "four"), ""], things("cup", "red", 3, "grey")) == {("count", "told")}
    assert lost(COUNT, [said, ""], things("cup", "purple", 3, "grey")) == {("colour", "shown")}
    assert lost(COUNT, [said.replace("red", "purple"), ""], things("cup", "red", 3, "grey")) == {("colour", "told")}
    assert lost(COUNT, [said, ""], things("cup", "red", 3, "cream")) == {("page", "shown")}
    assert lost(COUNT, ["Here are three red cups.", ""], things("cup", "red", 3, "grey")) == {("page", "told")}
    all_shown = {(sort, "shown") for sort in ("thing", "colour", "count")}
    assert lost(COUNT, [said, ""], things("fish", "red", 3, "grey")) == all_shown


def test_a_picture_that_is_missing_loses_what_it_had_to_show():
    assert lost(COUNT, ["Here are three red cups on a grey background."]) == {
        (sort, "shown") for sort in ("thing", "colour", "count", "page")}  # fmt: skip
    assert {side for _, side in lost(COUNT, ["Hello."])} == {"told", "shown"}


def test_a_place_is_kept_from_either_side():
    scene = Scene("white", (small(Random(1), "cat", usual_colours("cat", "black"), (0, 0, 32, 64), 28),
                            small(Random(1), "cup", usual_colours("cup", "red"), (32, 0, 64, 64), 28)))
    turn = {"kind": "position", "need": [], "named": [{"of": "place", "subject": "cat", "relation": "left", "other": "cup"}]}
    assert lost(turn, ["Here is a black cat to the left of a red cup.", ""], scene) == set()
    assert lost(turn, ["Here is a red cup to the right of a black cat.", ""], scene) == set()
    assert lost(turn, ["Here is a red cup to the left of a black cat.", ""], scene) == {("place", "told")}


def test_a_lesson_by_its_steps_and_its_last_picture():
    colours = ("pink", "brown", "black", "yellow", "red")
    house = large(Random(2), "house", colours)
    stages = [Scene("white", (Thing(house.subject, house.x, house.y, house.size, colours, n),)) for n in (1, 2, 3)]
    steps = ["Step 1: draw a pink square in the middle for the walls.", "Step 2: put a brown triangle on top for the roof.",
             "Step 3: add a black rectangle on the left side for the door.", ""]  # fmt: skip
    turn = {"kind": "lesson", "need": [{"subject": "house"}], "named": [
        {"of": "thing", "subject": "house"}, {"of": "colour", "subject": "house", "colour": "pink"},
        {"of": "part", "subject": "house", "part": "door", "colour": "black"}, {"of": "pictures", "count": 3}]}  # fmt: skip
    assert lost(turn, steps, *stages) == set()
    blue = [*steps[:2], steps[2].replace("black", "blue"), ""]
    assert lost(turn, blue, *stages) == {("part", "told")}
    # Without its door the last picture is not what the third step must have made of it: no house at that stage.
    assert ("part", "shown") in lost(turn, steps, *stages[:2], stages[1])
    short = {(sort, side) for sort in ("part", "pictures") for side in ("told", "shown")}
    assert lost(turn, [*steps[:2], ""], *stages[:2]) == short


def test_the_hero_of_a_story_must_not_change():
    turn = {"kind": "story", "need": [], "named": [
        {"of": "thing", "subject": "duck"}, {"of": "colour", "subject": "duck", "colour": "yellow"},
        {"of": "thing", "subject": "heart"}]}  # fmt: skip
    texts = ["A yellow duck was in the snow.", "The yellow duck met a red heart on the beach.", ""]
    first, both = things("duck", "yellow"), Scene("cream", (*things("duck", "yellow").things, small(
        Random(4), "heart", ("red",), (32, 32, 64, 64))))  # fmt: skip
    assert lost(turn, texts, first, both) == set()
    assert lost(turn, texts, first, first) == {("thing", "shown")}
    green = Scene("cream", (*things("duck", "green").things, both.things[1]))
    assert lost(turn, texts, first, green) == {("colour", "shown")}


def test_free_requests_name_what_the_world_has():
    records = free_requests()
    assert [r["list"] for r in records] == [1] * 60 + [2] * 60 and len(free_requests(7)) == 7
    assert len({r["messages"][0]["content"][0]["text"] for r in records}) == 120
    for record in records:
        (turn,) = record["truth"]["turns"]
        assert turn["need"] and turn["named"] and turn["images"][0] >= 1
        for detail in turn["named"]:
            assert detail["of"] in SORTS
            assert detail.get("subject", "cat") in SUBJECTS and detail.get("colour", "red") in COLOURS
            assert detail.get("background", "white") in BACKGROUNDS and 0 < detail.get("count", 1) < len(NUMBERS)
            if detail["of"] == "part":
                assert detail["part"] in [part.name for part in SUBJECTS[detail["subject"]].parts]


def test_free_requests_go_through_the_exam():
    class Silent:
        """Says hello, and draws nothing."""

        def generate_many(self, dialogues, settings=None, *, batch=64, first=0, done=None):
            message = {"role": "assistant", "content": "Hello."}
            return [SimpleNamespace(parts=["Hello."], stop="end", message=message) for _ in dialogues]

    found = evaluate(Silent(), free_requests(), quiet=True)
    assert found.followed().n == 120 and found.followed().right == 0
    assert found.share("named").right == 0 and found.share("drawn").right == 0
