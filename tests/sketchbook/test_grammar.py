"""Requests put together from parts: they say what they name, once, and keep what is held out apart."""

import random
import re

import pytest

from sketchbook import grammar
from sketchbook.dialogues import Dialogue, dialogue, mistyped, shortened
from sketchbook.grammar import Wanted, joined, request
from sketchbook.scenes import SUBJECTS, touching
from sketchbook.words import GRAMMAR_WAYS, NUMBERS, load, plural

KINDS = ("lesson", "one", "colour", "count", "two", "binding", "position", "story")


def drawn(kind: str, rng: random.Random) -> dict:
    """Arguments of `request` as dialogues give them."""
    if kind == "lesson":
        return {"wanted": [Wanted("house", "pink", parts={"door": "black", "roof": "green"})], "pictures": 3}
    if kind == "count":
        return {"wanted": [Wanted("duck", "brown", rng.choice((2, 3, 4)))], "page": "grey"}
    if kind == "story":
        return {"wanted": [Wanted("duck", "yellow")], "company": Wanted("heart", "red"), "pictures": 4}
    if kind in ("two", "binding", "position"):
        return {"wanted": [Wanted("cat", "blue"), Wanted("cup", "orange")], "relation": "left" if kind == "position" else None}
    return {"wanted": [Wanted("car", "purple", parts={"wheels": "green"})], "page": "light blue"}


def says(text: str, detail: dict) -> bool:
    """Whether the words of a detail are in a text."""
    if detail["of"] in ("count", "pictures"):
        number = detail["count"]
        several = rf"\b({NUMBERS[number]}|{number}x?)\b"
        if number == 2:
            several += r"|\b(pair|couple|duo|both|twins?|twosome|double)\b"
        return bool(re.search(several, text))
    if detail["of"] == "thing":
        return bool(re.search(rf"\b({detail['subject']}|{plural(detail['subject'])})\b", text))
    keys = {"colour": ["colour"], "part": ["part", "colour"], "page": ["background"], "place": ["relation"]}
    return all(re.search(rf"\b{detail[key]}\b", text) for key in keys[detail["of"]])


@pytest.mark.parametrize("want", [None, "attached", "phrasing"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_says_everything_that_it_names(kind, want):
    for seed in range(200):
        rng = random.Random(seed)
        arguments = drawn(kind, rng)
        text, named = request(Dialogue(rng, want), kind, **arguments)
        assert len(named) >= 2 and "{" not in text and "  " not in text, text
        for detail in named:
            assert says(text.lower(), detail), (text, detail)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_out_is_only_said_by_who_wants_it(kind, monkeypatch):
    marked = {category: [way + " NEW" if way[0] == "~" else way for way in ways] for category, ways in GRAMMAR_WAYS.items()}
    monkeypatch.setattr(grammar, "GRAMMAR_WAYS", marked)
    found = set()
    for seed in range(100):
        for want in (None, "colour", "attached"):
            rng = random.Random(seed)
            d = Dialogue(rng, want)
            text, _ = request(d, kind, **drawn(kind, rng))
            assert ("NEW" in text) == bool(d.held), text
            assert not d.held or want == "attached"
            found |= d.held
    assert found == {"attached"}


def test_the_lists_have_no_way_in_common():
    for category, entry in load("grammar.json").items():
        bare = {side: {re.sub(r"[^a-z{}]+", " ", way).strip() for way in entry[side]} for side in entry}
        assert not bare["train"] & bare["held_out"], category
        assert len(entry["held_out"]) >= 6 and len(entry["train"]) >= 6, category


def test_a_clause_goes_before_the_full_stop_and_a_sentence_after_it():
    assert joined("Draw a house.", ", and make the roof red") == "Draw a house, and make the roof red."
    assert joined("How do I draw a house?", ". the roof should be red") == "How do I draw a house? The roof should be red"
    assert joined("a house", ". make it red") == "a house. Make it red"


def test_a_slip_changes_one_letter_at_most_and_no_short_word():
    rng = random.Random(0)
    for _ in range(300):
        wrong = mistyped(rng, "Put a purple house for me")
        assert wrong.startswith("Put a ") and wrong.endswith(" for me")
        assert abs(len(wrong) - len("Put a purple house for me")) <= 1
    assert mistyped(rng, "a red cat") == "a red cat"


def test_on_a_telephone_words_are_short_and_only_whole_ones():
    short = {shortened(random.Random(seed), "Can you draw two towers with a hat for the cat, please?") for seed in range(200)}
    assert "Can u draw 2 towers w a hat 4 da cat, pls?" in short
    assert all("towers" in text and "draw" in text and "hat" in text for text in short)


def test_the_relation_holds_whichever_thing_is_said_first():
    """"A sun above a boat" and "a boat, and above it a sun"."""
    turned = 0
    for seed in range(300):
        rng = random.Random(seed)
        text, named = request(Dialogue(rng), "position", [Wanted("sun", "red"), Wanted("boat", "blue")], relation="above")
        assert named[-1] == {"of": "place", "subject": "sun", "relation": "above", "other": "boat"}
        assert re.search(r"\b(above|over)\b", text), text
        if re.search(r"\bboat\b", text).start() < re.search(r"\bsun\b", text).start():
            assert re.search(r"\b(above|over) (it|this|that|which)\b", text), text
            turned += 1
    assert 40 < turned < 110


def test_two_parts_of_one_colour_are_named_together_and_do_not_touch():
    together = 0
    for seed in range(400):
        record = dialogue(seed, kinds={"lesson": 0.5, "one": 0.5})
        parts = [detail for detail in record["truth"]["turns"][0]["named"] if detail["of"] == "part"]
        names = [part.name for part in SUBJECTS[parts[0]["subject"]].parts] if parts else []
        for k, one in enumerate(parts):
            for other in parts[k + 1:]:
                if one["colour"] == other["colour"]:
                    i, j = names.index(one["part"]), names.index(other["part"])
                    assert j not in touching(one["subject"])[i]
                    together += 1
    assert together > 20


def test_who_talks_of_a_kind_of_thing_asks_for_one_of_it():
    """"I love cars. Can you draw a purple one?" names a purple car."""
    asked = []
    for seed in range(400):
        rng = random.Random(seed)
        text, named = request(Dialogue(rng), "one", [Wanted("car", "purple")])
        if re.search(r"\bcars\b", text.lower()):
            assert re.search(r"\bone\b", text.lower()), text
            assert named == [{"of": "thing", "subject": "car"}, {"of": "colour", "subject": "car", "colour": "purple"}]
            asked.append(text)
    assert 20 < len(asked) < 90 and len(set(asked)) > 15


def test_steps_and_company_are_what_was_asked_for():
    steps = 0
    friends = 0
    for seed in range(120):
        for kind in ("lesson", "story"):
            record = dialogue(seed, kinds={kind: 1.0})
            turn = record["truth"]["turns"][0]
            named = {detail["of"]: detail for detail in turn["named"]}
            drawn_now = [i for i in record["messages"][1]["content"] if i["type"] == "image"]
            if "pictures" in named:
                assert len(drawn_now) == named["pictures"]["count"] == turn["images"][0] == turn["images"][1]
                steps += kind == "lesson"
            if kind == "story" and len(turn["need"]) == 2:
                friend = turn["need"][1]["objects"][0]
                shown = [o for i in record["truth"]["images"] if i["check"] and i["check"]["op"] == "scene"
                         for o in i["check"]["objects"]]
                assert any((o["subject"], o["colour"]) == (friend["subject"], friend["colour"]) for o in shown)
                friends += 1
    assert steps > 5 and friends > 20
