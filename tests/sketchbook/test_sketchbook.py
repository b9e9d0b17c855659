"""The corpus and its checker: what training is told is true, what is held out stays out, what is wrong is seen."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from checkpoint import InputError
from sketchbook import checker
from sketchbook import words as phrases
from sketchbook import dialogues, looking
from sketchbook.dialogues import HELD_OUT_COLOURS, HELD_OUT_RELATIONS, KINDS, arrangement, dialogue
from sketchbook.scenes import (
    BACKGROUNDS,
    COLOURS,
    SUBJECTS,
    Scene,
    fit,
    large,
    least,
    outlines,
    part_map,
    render,
    small,
    touching,
    usual_colours,
)
from sketchbook.words import ASK, TALK_ITEMS

RECORDS = {kind: [dialogue(seed, "seen", {kind: 1.0}) for seed in range(12)] for kind in KINDS}
EVERY = [record for records in RECORDS.values() for record in records]


def turns(record):
    """(context, image before, truth of the picture or None, picture, text before it) along a record, answers only."""
    context, before, entries = "", None, iter(record["truth"]["images"])
    for message in record["messages"]:
        said = ""
        for item in message["content"]:
            if item["type"] == "text":
                said = item["text"]
                if message["role"] == "user":
                    context += " " + said
                continue
            entry = next(entries)
            if message["role"] == "assistant":
                yield context, before, entry, item["image"], said
                context += " " + said
            before = item["image"]


def answers(record):
    """(truth of the turn, texts of the answer, number of its pictures, everything said before)."""
    context, entries = "", iter(record["truth"]["turns"])
    for message in record["messages"]:
        texts = [item["text"] for item in message["content"] if item["type"] == "text"]
        if message["role"] == "assistant":
            yield next(entries), texts, sum(item["type"] == "image" for item in message["content"]), context
        context += " " + " ".join(texts)


def same(a, b) -> bool:
    one, other = ([[i["text"] if i["type"] == "text" else i["image"].tobytes() for i in m["content"]] for m in r["messages"]]
                  for r in (a, b))
    return one == other


# ---------------------------------------------------------------------------------------------------------------------------
# The world


def test_colours_lie_far_apart():
    colours = [np.array(c, float) for c in COLOURS.values()]
    pages = [np.array(c, float) for c in BACKGROUNDS.values()]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(colours) for b in colours[:i]) > 95
    assert min(np.linalg.norm(a - b) for a in colours for b in pages) > 80
    assert min(np.linalg.norm(a - b) for i, a in enumerate(pages) for b in pages[:i]) > 45


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_part_is_at_least_eight_pixels_and_none_leaves_the_page(subject):
    rng, colours = random.Random(1), usual_colours(subject, "red")
    for _ in range(20):
        for thing in (large(rng, subject, colours), small(rng, subject, colours, (0, 0, 32, 32))):
            x0, y0, x1, y1 = thing.box
            assert x0 >= 0 and y0 >= 0 and x1 <= 64 and y1 <= 64
            for part in outlines(subject)[:thing.drawn]:
                for outline in part:
                    assert (np.ptp(outline, axis=0) * thing.size >= 7.9).all()
            visible = part_map(subject, thing.drawn)
            point = max(x1 - x0, y1 - y0) / max(visible.shape)                  # pixels
            for i in range(thing.drawn):
                ys, xs = np.nonzero(visible == i)
                assert (min(np.ptp(ys), np.ptp(xs)) + 1) * point >= 7.5
    assert least(subject, SUBJECTS[subject].small) <= 28.8


def test_parts_that_touch_differ_in_colour_everywhere():
    for record in EVERY:
        for entry in record["truth"]["images"]:
            for thing in Scene.from_json(entry["scene"]).things:
                for i in range(thing.drawn):
                    assert all(thing.colours[i] != thing.colours[j] for j in touching(thing.subject)[i] if j < thing.drawn)


def test_things_do_not_touch():
    for record in EVERY:
        for entry in record["truth"]["images"]:
            boxes = [t.box for t in Scene.from_json(entry["scene"]).things]
            for i, (ax0, ay0, ax1, ay1) in enumerate(boxes):
                for bx0, by0, bx1, by1 in boxes[:i]:
                    assert max(bx0 - ax1, ax0 - bx1, by0 - ay1, ay0 - by1) >= 3


def test_twice_as_large_is_the_same_picture():
    scene = Scene.from_json(RECORDS["lesson"][0]["truth"]["images"][-1]["scene"])
    big, little = render(scene, 128), render(scene, 64)
    assert big.size == (128, 128)
    assert np.abs(np.asarray(big.reduce(2), float) - np.asarray(little, float)).mean() < 3


# ---------------------------------------------------------------------------------------------------------------------------
# The dialogues


def test_a_seed_determines_everything():
    for seed in (0, 7, 10**12):
        random.seed(seed)
        assert same(dialogue(seed), dialogue(seed)) and dialogue(seed)["truth"] == dialogue(seed)["truth"]
        assert same(looking.record(seed), looking.record(seed))
        caption, frames = dialogues.clip(seed)
        assert caption == dialogues.clip(seed)[0] and len(frames) == 4
    assert not same(dialogue(3), dialogue(3, "seen"))
    assert [p.tobytes() for p in dialogues.pictures(5, 3)] == [p.tobytes() for p in dialogues.pictures(5, 3)]


def test_the_known_answer():
    """One dialogue by hand: the colour asked for is the colour drawn, at the part asked for."""
    records = (dialogue(seed, kinds={"lesson": 1.0}) for seed in range(3000))
    record = next(r for r in records if "with a blue door" in r["messages"][0]["content"][0].get("text", "").lower())
    last = [e for e in record["truth"]["images"] if e["check"]["op"] in ("start", "part")][-1]
    assert Scene.from_json(last["scene"]).things[0].colours[2] == "blue"


@pytest.mark.parametrize("kind", KINDS)
def test_records_have_the_form_of_the_file(kind):
    for record in RECORDS[kind]:
        assert record["kind"] == kind and record["held_out"] is False
        roles = [m["role"] for m in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        pictures = [i["image"] for m in record["messages"] for i in m["content"] if i["type"] == "image"]
        assert all(p.size == (64, 64) and p.mode == "RGB" for p in pictures)
        assert len(pictures) == len(record["truth"]["images"])
        assert len(roles) // 2 == len(record["truth"]["turns"])
        words = 0
        for message in record["messages"]:
            assert message["content"]
            for item in message["content"]:
                assert item["type"] == "image" or item["text"].strip()
                if item["type"] == "text":
                    words += len(re.findall(r"\w+|[^\w\s]", item["text"]))
                    assert "{" not in item["text"] and "~" not in item["text"]
                    assert not re.search(r"\ba (orange|ice|oval)", item["text"].lower())
                    # Users say much in one breath; the assistant does not.
                    most = 25 if message["role"] == "assistant" else 60
                    assert max(len(s.split()) for s in re.split(r"(?<=[.!?:])\s", item["text"])) < most
        assert words < 260
        json.dumps(record["truth"])


@pytest.mark.parametrize("kind", ["question", "text"])
def test_talk_brings_no_picture(kind):
    for record in RECORDS[kind]:
        first = record["messages"][1]["content"]
        assert all(item["type"] == "text" for item in first)
        assert checker.expected_images(record["truth"]["turns"][0]) == (0, 0)


def test_lessons_accumulate():
    for record in RECORDS["lesson"]:
        steps = [e for e in record["truth"]["images"] if e["check"]["op"] in ("start", "part")]
        scenes = [Scene.from_json(e["scene"]) for e in steps]
        assert 2 <= len(scenes) <= 6
        assert [s.things[0].drawn for s in scenes] == list(range(1, len(scenes) + 1))
        assert len({(s.background, s.things[0].x, s.things[0].y, s.things[0].size, s.things[0].colours) for s in scenes}) == 1


def test_pictures_are_due_where_they_are():
    for record in EVERY:
        for turn, _, pictures, _ in answers(record):
            low, high = checker.expected_images(turn)
            assert low <= pictures <= high


def test_what_is_held_out_is_never_trained():
    assert len(HELD_OUT_RELATIONS) == 4 * len(SUBJECTS) and set(HELD_OUT_COLOURS) == set(SUBJECTS)
    templates = [t for ts in ASK.values() for t in ts] + [t for asks, _, _ in TALK_ITEMS for t in asks]
    blanks = {r"\{c\}": f"({'|'.join(COLOURS)})", r"\{b\}": f"({'|'.join(BACKGROUNDS)})"}
    new = []
    for template in (t[1:].lower().rstrip(".?!") for t in templates if t[0] == "~"):
        pattern = re.escape(template)
        for blank, words in blanks.items():
            pattern = pattern.replace(blank, words)
        new.append(re.compile(re.sub(r"\\\{\w+\\\}", "(.+)", pattern) + "[.?!]?"))
    assert len(new) > 15
    for seed in range(2000):
        for split in ("train", "seen") if seed % 10 == 0 else ("train",):
            record = dialogue(seed, split)
            assert record["held_out"] is False
            for entry in record["truth"]["images"]:
                things = Scene.from_json(entry["scene"]).things
                assert all(HELD_OUT_COLOURS[t.subject] != t.main for t in things)
                for i, one in enumerate(things):
                    assert all(arrangement(one, other) not in HELD_OUT_RELATIONS for other in things[:i])
            for message in record["messages"][::2]:
                for text in (item.get("text", "").lower() for item in message["content"]):
                    assert not any(pattern.fullmatch(text) for pattern in new), text


@pytest.mark.parametrize(("file", "path", "value", "message"), [
    ("requests.json", ["haiku"], {"train": ["A haiku"], "held_out": []}, "unknown kinds: haiku"),
    ("requests.json", ["one"], {"train": ["{x}"]}, "one: a kind has the lists train and held_out"),
    ("requests.json", ["lesson"], None, "missing or unknown kinds: lesson"),
    ("requests.json", ["recolour", "train"], ["Paint the {p}."], "'Paint the {p}.' does not have the placeholders p c"),
    ("requests.json", ["remove", "held_out"], ["Away with {x} and {z}!"], "'Away with {x} and {z}!'"),
    ("requests.json", ["one", "train"], ["~Draw {x}."], "stands in its own list"),
    ("requests.json", ["story", "held_out"], ["draw {x}"], "in training and held out: 'draw {x}'"),
    ("grammar.json", ["attach", "train"], [" with {p}"], "' with {p}' does not have the placeholders p c be?"),
    ("replies.json", ["say", "a_no"], ["No."], "replies.json: a_no: 'No.'"),
    ("replies.json", ["talk", "hello", "say"], ["Hello, {x}!"], "replies.json: hello: 'Hello, {x}!'"),
])
def test_a_sentence_out_of_place_is_named(file, path, value, message):
    files = {name: phrases.load(name) for name in ("requests.json", "replies.json", "grammar.json")}
    place = files[file]
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        phrases.check(files["requests.json"], files["replies.json"], files["grammar.json"])


def test_every_held_out_dialogue_holds_something_new():
    reasons = set()
    for seed in range(60):
        record = dialogue(seed, "held_out")
        assert record["held_out"] and record["held_out_by"]
        reasons |= set(record["held_out_by"])
    assert reasons == {"colour", "relation", "phrasing", "attached"}


def test_mistakes_are_named():
    with pytest.raises(InputError, match="no split called 'test'"):
        dialogue(0, "test")
    with pytest.raises(InputError, match="no kind called 'poem'"):
        dialogue(0, kinds={"poem": 1.0})
    with pytest.raises(InputError, match="against the picture before it"):
        checker.judge(Image.new("RGB", (64, 64)), {"op": "remove", "subject": "car", "colour": "red"})


def test_files_are_written_and_read_back(tmp_path):
    path = dialogues.write(tmp_path, 5, seed=20)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for seed, line in enumerate(lines, 20):
        for message in line["messages"]:
            for item in message["content"]:
                if item["type"] == "image":
                    item["image"] = Image.open(tmp_path / item["image"]).convert("RGB")
        assert same(line, dialogue(seed))
    dialogues.show(tmp_path / "sheet.png", 3)
    assert Image.open(tmp_path / "sheet.png").width > 128


# ---------------------------------------------------------------------------------------------------------------------------
# The checker


def test_the_checker_knows_right_from_wrong():
    total = {"truth": [0, 0], "worn": [0, 0], "before": [0, 0], "wrong": [0, 0]}
    for row in checker.error_rates(n=8, seed=10**6).values():
        for what, (accepted, tried) in row.items():
            cell = total[what.split()[0]]
            cell[0], cell[1] = cell[0] + accepted, cell[1] + tried
    rate = {what: accepted / tried for what, (accepted, tried) in total.items()}
    assert rate["truth"] >= 0.994 and rate["worn"] >= 0.97
    assert rate["before"] == 0 and rate["wrong"] <= 0.01


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("question", "text")])
def test_sentences_say_what_the_pictures_show(kind):
    """Reading the own sentences gives back the check, and the picture passes what its text claims."""
    for record in RECORDS[kind]:
        for context, before, entry, picture, said in turns(record):
            check = entry["check"]
            claim = checker.claims(said, context)[-1]
            assert claim["op"] == check["op"], said
            for key, value in check.items():
                vague = key in ("was", "colour", "subject") and check["op"] in ("recolour", "remove", "move")
                assert claim.get(key) == value or (vague and claim.get(key) is None), (said, key)
            verdict = checker.judge_text(picture, said, before, context)
            assert verdict, (said, verdict.reasons)


def test_claims_survive_lower_case_and_refuse_empty_words():
    for record in RECORDS["lesson"] + RECORDS["two"]:
        for context, _, _, _, said in turns(record):
            assert checker.claims(said.lower(), context.lower()) == checker.claims(said, context)
    assert checker.claims("Let us begin. Well done! The end.") == []


def test_a_picture_fails_the_text_of_another():
    items = [(picture, said, [(o["subject"], o["colour"], o["count"]) for o in entry["check"]["objects"]])
             for r in RECORDS["one"] + RECORDS["position"] + RECORDS["count"]
             for _, _, entry, picture, said in turns(r) if entry["check"]["op"] == "scene"]
    # Two pictures of a purple butterfly may pass each other's text.
    others = [(a, b) for a, b in zip(items, items[1:], strict=False) if a[2] != b[2]]
    assert len(others) > 30
    assert not any(checker.judge_text(a[0], b[1]) for a, b in others)


def test_answers_are_complete_and_others_are_not():
    for kind, records in RECORDS.items():
        found = [(turn, texts, context) for r in records for turn, texts, _, context in answers(r)]
        found = [one for one in found if one[0]["kind"] == kind]
        assert all(checker.text_complete(*one) for one in found)
        pairs = [(a, b) for a, b in zip(found, found[1:], strict=False) if a[1] != b[1]]
        swapped = sum(checker.text_complete(a[0], b[1], a[2]) for a, b in pairs)
        assert swapped <= 0.35 * len(pairs) + 1, kind                           # some say the same in other words
    lesson = next(answers(RECORDS["lesson"][0]))
    assert not checker.text_complete(lesson[0], lesson[1][1:], lesson[3])


def test_a_lesson_is_judged_against_the_model_s_own_drawing():
    """Size and place are the painter's: the next part is expected where the drawing before wants it, within two pixels."""
    rng = np.random.default_rng(0)
    colours = usual_colours("house", "red")
    first = {"op": "start", "subject": "house", "part": "walls", "colour": "red", "background": "cream"}
    for length, cx, cy in ((40, 30, 36), (47.3, 35.6, 33.2), (54, 32, 32)):
        whole = fit("house", 5, colours, length, cx, cy)
        stage = [checker.worn(render(Scene("cream", (replace(whole, drawn=n),))), rng) for n in range(1, 6)]
        assert checker.judge(stage[0], first)
        for n in range(1, 5):
            check = {"op": "part", "subject": "house", "part": SUBJECTS["house"].parts[n].name, "colour": colours[n]}
            assert checker.judge(stage[n], check, stage[n - 1])
            assert not checker.judge(stage[n], {**check, "colour": "pink"}, stage[n - 1])
            assert not checker.judge(stage[n - 1], check, stage[n - 1])
        moved = replace(whole, x=whole.x + 6, drawn=2)
        check = {"op": "part", "subject": "house", "part": "roof", "colour": colours[1]}
        assert not checker.judge(render(Scene("cream", (moved,))), check, stage[0])


def test_it_sees_every_whole_subject_at_both_sizes():
    rng = random.Random(4)
    for subject in SUBJECTS:
        for size in (64, 128):
            thing = large(rng, subject, usual_colours(subject, "green"))
            view = checker.see(render(Scene("grey", (thing,)), size))
            assert view.background == "grey" and [t.subject for t in view.things] == [subject]
            assert view.things[0].colours == thing.colours
