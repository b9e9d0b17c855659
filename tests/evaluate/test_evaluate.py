"""The evaluation on answerers whose faults are known: each fault must lower its own metric, and no other."""

import html.parser
import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import training
from checkpoint import InputError
from dit import DiT, DiTConfig
from evaluate import report as ev
from evaluate import exam
from evaluate.exam import Case, Corpus, Report, Share, dialogues, draw_records, evaluate, redefine, wilson
from model import MLLM, ImageProcessor, MLLMConfig, VisionConfig
from pages.template import render as render_page
from pipeline import DuoGen, Settings
from sketchbook.checker import judge, spoilt
from sketchbook.dialogues import KINDS, SUBJECTS
from sketchbook.scenes import COLOURS, Scene, fit, main_part, render, touching, usual_colours
from tokenizer import train_bpe
from vae import VAE, VAEConfig

EDITS = ("recolour", "remove", "move", "background", "add_part")


def single(kind: str, n: int, split: str = "seen") -> list[dict]:
    """Dialogues of one exchange."""
    return draw_records(kind, split, n, 7, 64, lambda r: len(r["truth"]["turns"]) == 1)


@pytest.fixture(scope="module")
def drawn() -> list[dict]:
    """Dialogues of one exchange in which something is drawn, on what is there or on an empty page."""
    return [r for kind in ("lesson", "one", "story", *EDITS) for r in single(kind, 2)]


@pytest.fixture(scope="module")
def mixed() -> list[dict]:
    return dialogues(34)


def report(answerer: Corpus) -> Report:
    return evaluate(answerer, list(answerer.records.values()), quiet=True)


def failing(found: Report) -> set[str]:
    """The metrics that are below 100 %; every metric must have been measured."""
    shares = {m: found.share(m) for m in exam.METRICS}
    assert all(s.n for s in shares.values()), shares
    return {m for m, s in shares.items() if s.right < s.n}


def scene_at(record: dict, k: int = -1) -> Scene:
    return Scene.from_json(record["truth"]["images"][k]["scene"])


def shown(scene: Scene) -> SimpleNamespace:
    return SimpleNamespace(image=render(scene))


def painted(scene: Scene, part: str | None = None, seed: int = 0) -> Scene:
    """The last thing of a scene with one part (None: the main one) in a wrong colour."""
    thing = scene.things[-1]
    i = [p.name for p in SUBJECTS[thing.subject].parts].index(part) if part else main_part(thing.subject)
    taken = {thing.colours[j] for j in (i, *touching(thing.subject)[i])}
    new = random.Random(seed).choice([c for c in COLOURS if c not in taken])
    thing = replace(thing, colours=(*thing.colours[:i], new, *thing.colours[i + 1 :]))
    return replace(scene, things=(*scene.things[:-1], thing))


def said(parts: list, stop: str = "end") -> SimpleNamespace:
    """What generate_many returns for it."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p.image} for p in parts]
    return SimpleNamespace(parts=parts, stop=stop, message={"role": "assistant", "content": content})


class Faulty(Corpus):
    """The corpus' answers after `spoil(record, parts) -> parts`."""

    def __init__(self, records, spoil, stop="end"):
        super().__init__(records)
        self.spoil, self.stop = spoil, stop

    def answer(self, record, k):
        answer = super().answer(record, k)
        return said(self.spoil(record, list(answer.parts)), self.stop)


def last_picture(parts: list, new) -> list:
    """The parts with another last picture; None: without it."""
    at = max(i for i, p in enumerate(parts) if not isinstance(p, str))
    return parts[:at] + ([new] if new else []) + parts[at + 1 :]


# ------------------------------------------------------------------------------------------------------- what the truth gets


def test_the_corpus_itself_is_perfect_and_every_later_request_makes_sense(mixed):
    for first, then in (("one", "question"), ("lesson", "recolour"), ("two", "remove"), ("move", "background")):
        mixed = mixed + draw_records(first, "seen", 2, 99, 64, lambda r, k=then: r["truth"]["turns"][1:2] and
                                     r["truth"]["turns"][1]["kind"] == k)  # fmt: skip
    found = report(Corpus(mixed))
    assert failing(found) == set()
    assert not any(c.left_out for c in found.cases)
    assert [len(c.turns) for c in found.cases] == [len(r["truth"]["turns"]) for r in mixed]
    assert found.drawn == sum(i["role"] == "assistant" for r in mixed for i in r["truth"]["images"])
    assert found.stops == {"end": sum(len(r["truth"]["turns"]) for r in mixed)}


def test_a_later_request_is_judged_in_the_light_of_what_was_really_drawn():
    """The corpus drew a red house where the colour was left open, and asks for it; this model drew a blue one."""
    house = {"subject": "house", "colour": None, "count": 1, "parts": {}}
    one = {"kind": "one", "images": [1, 1], "need": [{"op": "scene", "objects": [house]}], "words": []}
    question = {"kind": "question", "images": [0, 0], "need": [], "words": ["red"], "avoid": ["blue"]}
    told = [("user", "Draw a house."), ("assistant", "Here is a red house."), ("user", "What colour is the house?")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in told]
    record = {"split": "seen", "kind": "one", "seed": 0, "held_out_by": [], "messages": messages,
              "truth": {"turns": [one, question], "images": []}}  # fmt: skip
    messages[1]["content"].append({"type": "image", "image": None})
    blue = Scene("white", (fit("house", 5, usual_colours("house", "blue"), 50, 32, 32),))
    for reply, right in (("The house is blue.", True), ("The house is red.", False)):
        case = Case(record)
        case.ask()
        case.take(said(["Here is a blue house.", shown(blue)]))
        case.ask()
        case.take(said([reply]))
        assert [t["text"] for t in case.turns] == [True, right] and case.marks()["whole"] == [right]


# ------------------------------------------------------------------------------------------------ every fault in its metric


def test_a_wrong_colour_lowers_image_text_alone():
    records = [r for kind in ("lesson", "one", "recolour") for r in single(kind, 3)]
    records = [r for r in records if len(scene_at(r).things) == 1]

    def spoil(record, parts):
        return last_picture(parts, shown(painted(scene_at(record), record["truth"]["images"][-1]["check"].get("part"))))

    found = report(Faulty(records, spoil))
    assert failing(found) == {"named", "shows", "whole"}  # what the user named was said, and is not shown
    missed = found.share("shows").n - found.share("shows").right
    assert missed == len(records) and found.share("whole").right == 0  # the last picture of each, and no other


def test_an_omitted_picture_is_missing_and_misplaced(drawn):
    found = report(Faulty(drawn, lambda record, parts: last_picture(parts, None)))
    assert failing(found) == {"named", "drawn", "placed", "whole"}
    spare = [c for c in found.cases if c.turns[0]["drawn"] >= c.turns[0]["due"][0]]  # a story may have more than it owes
    assert found.share("drawn").right == len(spare) <= 2 and {c.record["kind"] for c in spare} <= {"story"}


def test_a_picture_where_none_is_due_is_misplaced(drawn):
    talk = [*single("text", 3), *single("question", 3)]
    picture = shown(scene_at(drawn[0]))

    def more(record, parts):
        return [*parts, picture] if record["kind"] in ("text", "question", "one") else parts

    found = report(Faulty(drawn + talk, more))
    assert failing(found) == {"placed", "whole"}
    misplaced = [c.record["kind"] for c in found.cases if not c.marks()["placed"][0]]
    assert misplaced == ["one"] * 2 + ["text"] * 3 + ["question"] * 3


def test_pictures_that_do_not_follow_their_own_step_are_misplaced():
    records = [r for r in single("lesson", 4)]

    def late(record, parts):  # two steps told, then both drawn
        texts, pictures = [p for p in parts if isinstance(p, str)], [p for p in parts if not isinstance(p, str)]
        rest = [x for pair in zip(texts[2:], pictures[2:], strict=False) for x in pair]
        return [f"{texts[0]} {texts[1]}", *pictures[:2], *rest]

    found = report(Faulty(records, late))
    assert found.share("placed").right == 0 and found.share("drawn").right == 4


def test_handing_the_picture_before_back_lowers_image_text_alone(drawn):
    def spoil(record, parts):
        told = [p["image"] for m in record["messages"] for p in m["content"] if p["type"] == "image"]
        return last_picture(parts, SimpleNamespace(image=told[-2])) if record["kind"] in ("lesson", *EDITS) else parts

    found = report(Faulty(drawn, spoil))
    assert failing(found) == {"named", "shows", "whole"}
    assert found.share("shows").n - found.share("shows").right == sum(r["kind"] in ("lesson", *EDITS) for r in drawn)


def test_a_change_of_what_had_to_stay_lowers_image_consistency():
    """It lowers image-text too: the text speaks of one change."""
    records = [r for kind in ("recolour", "remove", "lesson") for r in single(kind, 3)]

    def spoil(record, parts):
        scene = scene_at(record)
        return last_picture(parts, shown(replace(scene, background="cream" if scene.background != "cream" else "white")))

    found = report(Faulty(records, spoil))
    assert failing(found) == {"named", "stays", "shows", "whole"}
    assert found.share("stays").n - found.share("stays").right == len(records)


def test_a_hero_that_changes_its_looks_lowers_image_consistency_alone():

    def alone_at_last(record):
        return len(record["truth"]["turns"]) == len(scene_at(record).things) == 1 < scene_at(record).things[0].drawn

    records = draw_records("story", "seen", 4, 7, 64, alone_at_last)

    def spoil(record, parts):
        hero = scene_at(record).things[0].subject
        other = next(p.name for i, p in enumerate(SUBJECTS[hero].parts) if i != main_part(hero))
        return last_picture(parts, shown(painted(scene_at(record), other)))

    found = report(Faulty(records, spoil))
    assert failing(found) == {"stays", "whole"} and found.share("whole").right == 0


def test_an_answer_to_another_request_lowers_text_completeness_alone():
    """Well drawn and well told, but not what was asked for."""
    records = single("colour", 3) + single("recolour", 1)
    subjects = ["house", "tree", "car"]

    def spoil(record, parts):
        if record["kind"] == "recolour":
            return parts
        subject = next(s for s in subjects if s != scene_at(record).things[0].subject)
        thing = fit(subject, len(SUBJECTS[subject].parts), usual_colours(subject, "red"), 48, 32, 32)
        return [f"Here is a red {subject}.", shown(Scene("white", (thing,)))]

    found = report(Faulty(records, spoil))
    assert failing(found) == {"text", "named", "whole"}
    assert found.share("text", kind="colour") == Share(0, 3) and found.share("text", kind="recolour") == Share(1, 1)


def test_wrong_or_no_words_without_pictures_lower_text_completeness_alone(drawn):
    talk = single("text", 3) + single("question", 3)
    for words in ("I do not know.", ""):
        found = report(Faulty(drawn + talk, lambda record, parts, words=words: [words] if record in talk else parts))
        assert failing(found) == {"text", "named", "whole"}
        assert found.share("text").n - found.share("text").right == 6


def test_what_the_checker_calls_a_change_of_the_rest_is_an_inconsistency():
    """`Verdict.stayed` held against the corpus' own pictures with one thing wrong."""
    stays = {"colour": True, "subject": True, "place": True, "kept colour": False, "other part": False, "other thing": False}
    tried = set()
    for kind in ("recolour", "add", "move", "background", "add_part"):
        for record in single(kind, 2):
            before, image, check = scene_at(record, 0), scene_at(record, 1), record["truth"]["images"][1]["check"]
            assert judge(render(image), check, render(before)).stayed is True
            for what, scene in spoilt(image, check, before, random.Random(1)):
                if what in stays:
                    assert judge(render(scene), check, render(before)).stayed is stays[what], (kind, what)
                    tried.add(what)
    assert tried == set(stays)


def test_a_picture_that_cannot_be_read_has_kept_nothing():
    edits = [r for kind in EDITS for r in single(kind, 2)]
    for words in ("Mine.", "Here is a red house."):
        found = report(Faulty(edits, lambda record, parts, words=words: [words, *parts[1:]]))
        assert found.share("stays") == Share(0, len(edits))
    records = draw_records("story", "seen", 4, 7, 64, lambda r: r["truth"]["turns"][0]["images"][0] > 2 and
                           len(r["truth"]["turns"]) == 1)  # fmt: skip
    blank = SimpleNamespace(image=Image.new("RGB", (64, 64), "white"))
    right = report(Corpus(records)).share("stays")
    assert right.right == right.n
    hidden = report(Faulty(records, lambda record, parts: [*parts[:1], blank, *parts[2:]]))  # none saw the hero at first
    assert hidden.share("stays").n == right.n and hidden.share("stays").right == right.n - len(records)


def test_neither_blank_pictures_nor_those_of_others_nor_more_words_pass():
    """Each would do if a checker looked at one sentence, or at a border, alone."""
    records = [r for split in ("held_out", "seen") for kind in KINDS if kind not in exam.IDLE for r in single(kind, 2, split)]
    others = {id(r): o for r, o in zip(records, records[1:] + records[:1], strict=True)}
    circle = shown(Scene("white", (fit("circle", 1, usual_colours("circle", "blue"), 30, 32, 32),)))

    def each_picture(parts, new):
        return [p if isinstance(p, str) else new(k) for k, p in enumerate(parts)]

    def blank(record, parts):
        return each_picture(parts, lambda k: shown(Scene(scene_at(record).background)))

    def strange(record, parts):
        pictures = [p["image"] for m in others[id(record)]["messages"] for p in m["content"] if p["type"] == "image"]
        return each_picture(parts, lambda k: SimpleNamespace(image=pictures[k % len(pictures)]))

    def twice(record, parts):
        told = [f"{p} Here is a blue circle." if isinstance(p, str) else p for p in parts]
        return each_picture(told, lambda k: circle)

    def afterwards(record, parts):
        told = [p for p in parts if isinstance(p, str)]
        return [p for _ in told for p in ("Here is a blue circle.", circle)] + told

    assert report(Corpus(records)).share("whole").share == 1
    for spoil in (blank, strange, twice, afterwards):
        found = report(Faulty(records, spoil))
        assert found.share("whole").right == 0, spoil
        if spoil is not afterwards:
            assert found.share("shows").share < 0.01, (spoil, found.share("shows"))
        else:
            assert found.share("text").share < 0.01, found.share("text")


# ---------------------------------------------------------------------------------------------------------------- free running


def test_a_dialogue_is_over_where_an_answer_did_not_end_by_itself():
    records = draw_records("one", "seen", 3, 7, 64, lambda r: len(r["truth"]["turns"]) > 1)
    found = report(Faulty(records, lambda record, parts: parts, stop="max_tokens"))
    assert all(len(c.turns) == 1 and "did not end" in c.left_out for c in found.cases)
    assert found.share("whole").right == 0 and found.share("shows").right == 3 and found.stops == {"max_tokens": 3}


def test_the_dialogue_goes_on_with_the_models_own_words_and_pictures():

    def edited_twice(record):
        return [t["kind"] for t in record["truth"]["turns"]] == ["recolour", "background"]

    record = draw_records("recolour", "seen", 1, 7, 64, edited_twice)[0]
    case, blank = Case(record), Image.new("RGB", (64, 64), "white")
    assert case.ask() == record["messages"][:1]
    mine = said(["Mine.", SimpleNamespace(image=blank)])
    case.take(mine)
    assert case.ask() == [record["messages"][0], mine.message, record["messages"][2]]
    assert case.shown[-1] == ("assistant", blank) and "Mine." in case.said
    assert case.turns[0]["pictures"][0]["shows"] is False and case.turns[0]["placed"] is False
    words = record["messages"][3]["content"][0]["text"]
    case.take(said([words, shown(Scene(record["truth"]["turns"][1]["need"][0]["background"]))]))
    assert case.turns[1]["text"] and case.turns[1]["pictures"][0]["shows"]  # held against the blank page, not the truth
    assert case.ask() is None and case.left_out is None and case.marks()["whole"] == [False]


def test_which_later_requests_make_sense():
    house = fit("house", 5, usual_colours("house", "red", {1: "brown"}), 50, 32, 32)
    cats = tuple(fit("cat", 2, usual_colours("cat", c), 26, x, 32) for c, x in (("black", 16), ("green", 48)))
    one, two = render(Scene("white", (house,))), render(Scene("cream", cats))
    recolour = {"op": "recolour", "subject": "house", "was": "blue", "part": "roof", "colour": "green"}

    def turn(kind, *need):
        return {"kind": kind, "images": [1, 1], "need": list(need), "words": [], "avoid": []}

    assert redefine(turn("recolour", recolour), "make the roof green", one)["need"] == [recolour | {"was": "red"}]
    assert redefine(turn("recolour", recolour | {"colour": "brown"}), "make the roof brown", one) is None  # it is brown already
    assert redefine(turn("recolour", recolour | {"colour": "red"}), "make the roof red", one) is None  # as the walls are
    assert redefine(turn("recolour", recolour), "make the roof of the blue house green", one) is None  # there is none
    assert redefine(turn("recolour", recolour), "make the roof green", two) is None  # no house at all
    cat = {"op": "recolour", "subject": "cat", "was": "black", "part": "head", "colour": "red"}
    assert redefine(turn("recolour", cat), "make the cat red", two) is None  # which one?
    assert redefine(turn("recolour", cat), "Make the black cat red.", two)["need"] == [cat]
    remove = {"op": "remove", "subject": "cat", "colour": "green"}
    assert redefine(turn("remove", remove), "take the green cat away", two)["need"] == [remove]
    only = remove | {"subject": "house", "colour": "red"}
    assert redefine(turn("remove", only), "remove the house", one) is None  # nothing would be left
    background = turn("background", {"op": "background", "background": "grey"})
    assert redefine(background, "make the background grey", one) is background
    assert redefine(background, "make the background grey", None) is None
    assert redefine(turn("text"), "Thanks!", None) == turn("text")
    asked = redefine(turn("question") | {"words": ["purple"]}, "what colour is the roof", one)
    assert asked["words"] == ["brown"] and "purple" in asked["avoid"]
    assert redefine(turn("question"), "How many cats are there?", two)["words"] == ["two"]
    assert redefine(turn("question"), "Is there a house?", two)["words"][0] == "no"
    assert redefine(turn("question"), "What colour is the roof?", two) is None


# ------------------------------------------------------------------------------------------------------------- counting


def test_wilson_by_hand():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_aggregation_by_hand():
    def case(split, kind, drawn, **marks):
        turn = {"drawn": drawn, "stop": "end"}
        marks = dict.fromkeys(exam.METRICS, []) | marks
        record = {"split": split, "kind": kind, "held_out_by": ["colour"] if split == "held_out" else []}
        return SimpleNamespace(record=record, turns=[turn], marks=lambda: marks)

    found = Report([case("seen", "one", 1, shows=[True], text=[True]), case("seen", "lesson", 3, shows=[True, False, False]),
                    case("held_out", "one", 2, shows=[False, True], text=[False])], 2.0)  # fmt: skip
    assert found.share("shows") == Share(3, 6) and found.share("shows", "seen") == Share(2, 4)
    assert found.share("shows", "seen", "lesson") == Share(1, 3) and found.share("text", kind="one") == Share(1, 2)
    assert found.share("shows", by="colour") == Share(1, 2) and found.share("shows", by="phrasing") == Share(0, 0)
    assert found.share("stays") == Share(0, 0) and str(Share(0, 0)) == "-" and Share(0, 0).to_json() == {"right": 0, "n": 0}
    assert list(found.shares()) == ["held_out", "seen"] and list(found.shares()["seen"]) == ["all", "lesson", "one"]
    assert found.summary() == {"held_out": {"text": 0.0, "shows": 0.5}, "seen": {"text": 1.0, "shows": 0.5}}
    assert found.drawn == 6 and found.stops == {"end": 3}
    assert str(Share(8, 10)) == "80% 49-94 /10"
    rows = [{"split": "seen", "category": c, "ok": ok} for c, ok in (("counting", 1), ("counting", 0), ("colours", 1))]
    assert exam.single_shares(rows) == {"seen": {"counting": Share(1, 2), "colours": Share(1, 1)}}
    assert exam.overall(exam.single_shares(rows)["seen"]) == 0.75  # the mean of categories, not of pictures


def test_dialogues_follow_from_the_seed_and_take_kinds_in_turn(mixed):
    assert [(r["split"], r["seed"]) for r in mixed] == [(r["split"], r["seed"]) for r in dialogues(34)]
    assert [r["kind"] for r in mixed] == list(KINDS) * 4 and [r["split"] for r in mixed] == ["held_out"] * 34 + ["seen"] * 34
    assert all(r["held_out"] == (r["split"] == "held_out") for r in mixed)
    assert all(bool(r["held_out_by"]) == r["held_out"] for r in mixed)
    assert {by for r in mixed for by in r["held_out_by"]} == {"colour", "relation", "phrasing", "attached"}


def test_what_is_held_out_must_be_in_the_request():
    """A free colour that only the corpus' own answer fills with a held-out one tests nothing."""

    def record(asked, relations=(), by=("colour",)):
        objects = [{"subject": s, "colour": c, "count": 1, "parts": {}} for s, c in asked]
        need = {"op": "scene", "objects": objects, "relations": relations}
        return {"held_out_by": list(by), "truth": {"images": [], "turns": [{"need": [need]}]}}

    word, first, second = sorted(exam.HELD_OUT_RELATIONS)[0]
    assert exam.held_out_request(record([("house", exam.HELD_OUT_COLOURS["house"])])) == {"colour"}
    assert exam.held_out_request(record([("house", None)])) == set()
    assert exam.held_out_request(record([("house", None)], by=("colour", "phrasing"))) == {"phrasing"}
    assert exam.held_out_request(record([(first, None), (second, None)], [[0, word, 1]])) == {"relation"}
    assert exam.held_out_request(record([(second, None), (first, None)], [[0, exam.OPPOSITE[word], 1]])) == {"relation"}
    assert exam.held_out_request(record([(second, None), (first, None)], [[0, word, 1]])) == set()
    assert [r["seed"] for r in dialogues(2, 1, ("seen",), ("one",))][0] >= 10**9


def test_single_requests_are_judged_by_the_request():
    asked = exam.single_requests(2)
    assert len(asked) == 2 * 2 * 6 and {r["category"] for r in asked} == set(exam.CATEGORIES)
    rows = exam.evaluate_single(Corpus(asked), asked, quiet=True)
    assert all(exam.overall(s) == 1 for s in exam.single_shares(rows).values())
    objects = [r["truth"]["turns"][0]["need"][0]["objects"] for r in asked if r["category"] == "single object"]
    assert all(o[0]["colour"] is None and not o[0]["parts"] for o in objects)

    def spoil(record, parts):  # words do not count here, nor does a colour where none was asked for
        if record["category"] == "two objects":
            return ["Something.", *parts[1:]]
        if record["category"] in ("colours", "single object"):
            return last_picture(parts, shown(painted(scene_at(record, 0), seed=1)))
        return parts[:1] if record["category"] == "position" else parts

    rows = exam.evaluate_single(Faulty(asked, spoil), asked, quiet=True)
    wrong = {r["category"] for r in rows if not r["ok"]}
    assert wrong == {"colours", "position"}
    assert [r["reasons"] for r in rows if r["category"] == "position"] == [["no picture was drawn"]] * 4


# ------------------------------------------------------------------------------------------------------------- questions


def answers(rows: list[tuple[str, str, list, bool]]) -> Report:
    """A report of single answers (split, sort, words, right)."""

    def case(split, sort, words, right):
        turn = {"drawn": 0, "stop": "end", "sort": sort, "words": words, "text": right}
        marks = dict.fromkeys(exam.METRICS, []) | {"text": [right]}
        record = {"split": split, "kind": "question", "held_out_by": ["colour"] if split == "held_out" else []}
        return SimpleNamespace(record=record, turns=[turn], marks=lambda: marks)

    return Report([case(*row) for row in rows], 1.0)


def test_every_question_of_the_corpus_has_its_sort():
    """The sort follows from the words that are right, and is that of the topic it was drawn for."""
    topics = {"background": "which colour", "part": "which colour", "colour": "which colour",
              "no": "yes or no", "yes": "yes or no", "colour no": "yes or no",
              "colour yes": "yes or no", "total": "how many", "count": "how many", "what": "what",
              "relation": "what", "which": "which part", "where": "where"}  # fmt: skip
    met = set()
    for record in draw_records("question", "seen", 60, 3, 64) + draw_records("two", "seen", 20, 3, 64):
        for topic, _, _, words, avoid in exam.questions(exam.Dialogue(random.Random(1)), scene_at(record)):
            assert exam.sort_of({"words": words, "avoid": avoid}) == topics[topic], (topic, words)
            met.add(topic)
    assert met == set(topics) and set(topics.values()) == set(exam.SORTS)


def test_answers_to_questions_are_counted_by_sort_in_whatever_dialogue_they_are():
    records = draw_records("question", "held_out", 6, 7, 64) + draw_records("one", "seen", 3, 99, 64, lambda r: [
        t["kind"] for t in r["truth"]["turns"]] == ["one", "question"])  # fmt: skip
    asked = sum(t["kind"] == "question" for r in records for t in r["truth"]["turns"])
    found = report(Corpus(records))
    assert found.answered() == Share(asked, asked) and found.answered("seen") == Share(3, 3)
    assert sum(found.answered(None, s).n for s in exam.SORTS) == asked

    def mute(record, parts):
        return [*parts[:-1], "I do not know."] if isinstance(parts[-1], str) and len(parts) == 1 else parts

    found = report(Faulty(records, mute))
    assert found.answered() == Share(0, asked) and found.share("shows").right == found.share("shows").n
    turns = [t for c in found.cases for t in c.to_json()["turns"]]
    assert sum("sort" in t for t in turns) == asked and all(t["kind"] == "question" for t in turns if "sort" in t)


def test_the_table_of_questions_shows_what_guessing_gets_and_names_the_weakest_sort():
    yes = [("seen", "yes or no", ["yes", "house"], k < 2) for k in range(3)] + [("held_out", "yes or no", ["no", "cat"], False)]
    many = [("seen", "how many", ["two"], True), ("held_out", "how many", ["three"], True)]
    found = answers(yes + many)
    assert found.guessed("yes or no") == Share(3, 4) and found.guessed() == Share(3 + 1, 6)
    table = ev.questions_table(found, answers([(*row[:3], True) for row in yes + many]))
    assert table.head == ["asked", "held-out", "seen", "truth", "guessing"]
    assert [[cell.split()[0] for cell in row] for row in table.rows] == [
        ["all", "50%", "75%", "100%", "67%"], ["yes", "0%", "67%", "100%", "75%"], ["how", "100%", "100%", "100%", "50%"]
    ]  # fmt: skip
    assert table.weak == [("weakest in answers right, splits together", f"yes or no {Share(2, 4)}")]


def test_the_weakest_kinds_are_the_lowest_three_below_the_share_of_all():
    shares = [("a", Share(1, 10)), ("b", Share(9, 10)), ("c", Share(0, 0)), ("d", Share(0, 10))]
    shares += [("e", Share(3, 10)), ("f", Share(2, 10))]
    assert [name for name, _ in exam.lowest(shares, Share(15, 50))] == ["d", "a", "f"]
    assert exam.lowest(shares, Share(0, 10)) == []


def test_a_kind_that_owes_no_picture_is_never_the_weakest_by_pictures():
    def case(kind, **marks):
        return SimpleNamespace(record={"split": "seen", "kind": kind, "held_out_by": []}, turns=[],
                               marks=lambda: dict.fromkeys(exam.METRICS, []) | marks)  # fmt: skip

    found = Report([case("question", shows=[False], text=[False]), case("one", shows=[True] * 9, text=[True] * 9),
                    case("two", shows=[False, True], text=[True])], 1.0)  # fmt: skip
    assert found.weakest("shows") == [("two", Share(1, 2))] and found.weakest("text") == [("question", Share(0, 1))]


def test_every_table_says_what_its_columns_mean_and_which_rows_are_weakest(drawn):
    talk = single("question", 3) + single("text", 2)

    def spoil(record, parts):
        if record["kind"] in ("recolour", "remove"):
            return last_picture(parts, SimpleNamespace(image=Image.new("RGB", (64, 64), "white")))
        return ["I do not know."] if record["kind"] == "question" else parts

    records = drawn + talk
    found, truth = report(Faulty(records, spoil)), report(Corpus(records))
    summary, kinds, asked = (ev.summary_table(found, truth, truth), ev.kinds_table(found, truth, truth),
                             ev.questions_table(found, truth))  # fmt: skip
    single_rows = exam.single_requests(1)
    one = ev.single_table({"truth": exam.evaluate_single(Corpus(single_rows), single_rows, quiet=True)})
    for table in (summary, kinds, asked, one):
        told, text, page = dict(table.notes), ev.markdown(table), Reader(render_page("table.html", table=table)).text
        columns = table.head if table is not summary else [row[0] for row in table.rows]
        for name in columns:
            assert name in ("", "split", "kind", "asked", *told) or name in SPLIT_NAMES, (name, told)
        assert all(f"* {name}: {meaning}" in text and meaning in page for name, meaning in table.notes + table.weak)
    assert [row[0] for row in summary.rows] == [*exam.METRICS.values(), "answers right"]
    assert summary.rows[-1][-2].startswith("100%") and summary.rows[-1][1].startswith("0%")
    told = dict(kinds.notes + kinds.weak)
    assert re.fullmatch(r"re\w+ 0% .*, re\w+ 0% .*", told["weakest in image-text, splits together"])
    assert "question" not in told["weakest in image-text, splits together"]
    assert told["weakest in text complete, splits together"].startswith("question 0% ")
    assert "pictures of later requests" in told["kind question and text"]
    assert ev.kinds_table(truth, truth, truth).weak == [] == ev.questions_table(truth, truth).weak


SPLIT_NAMES = ("held-out", "seen")

# ------------------------------------------------------------------------------------------------------------ page and files


class Reader(html.parser.HTMLParser):
    """What a browser would see."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.sources = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_escapes_text_and_needs_no_other_file(drawn):
    evil = "<script>alert(1)</script> & \"quotes\" <img src=x onerror=y>"
    found = report(Faulty(drawn, lambda record, parts: [evil, *parts[1:]] if record["kind"] == "one" else parts))
    single = [{"asked": evil, "ok": False, "reasons": [evil], "picture": None}]
    page = Reader(ev.page(evil, [ev.Table("caption <b>", ["<i>"], [[evil]], [(evil, evil)])], found, single))
    assert "script" not in page.tags and "b" not in page.tags and page.text.count(evil) >= 8
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert page.tags.count("article") == len(drawn)
    order = ("The worst", "one, seen", "Some that are right throughout", "lesson, seen")
    assert sorted(order, key=page.text.index) == list(order)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of small random parts."""
    torch.manual_seed(1)
    tokenizer = train_bpe(["Step one: draw a red wall. system user assistant helpful"] * 4, 330)
    vision = VisionConfig(32, 64, 2, 2, 48, patch_size=8, window_size=32, fullatt_block_indexes=(1,))
    config = MLLMConfig(64, 96, 2, 2, 1, 340, 1e-6, vision, mrope_section=(4, 6, 6), max_position_embeddings=2000)
    mllm = MLLM.from_config(config.for_tokenizer(tokenizer))
    dit = DiT.from_config(DiTConfig(2, 1, 32, 2.0, 8, text_embed_dim=24, crossattn_proj_in_channels=2 * 64))
    vae = VAE.from_config(VAEConfig(8, num_res_blocks=1))
    defaults = Settings(steps=1, guidance=2.0, sampler="euler", max_images=2, temperature=1.0)
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = ImageProcessor(8, min_pixels=16 * 16, max_pixels=64 * 64)
    DuoGen(mllm, tokenizer, processor, dit, vae, defaults, (64, 64)).save_pretrained(folder)
    return folder


def test_the_command_writes_what_it_says_and_repeats_itself(checkpoint, tmp_path, capsys, monkeypatch):
    choose = DuoGen.choose

    def eager(self, logits, settings, generator):  # to draw, and to come to an end
        token, chance = choose(self, logits, settings, generator), torch.rand((), generator=generator)
        return self.tokenizer.vision_start if chance < 0.2 else self.tokenizer.im_end if chance < 0.4 else token

    monkeypatch.setattr(DuoGen, "choose", eager)
    command = f"sketchbook --ckpt {checkpoint} --n 3 --kinds recolour,one,text --single 1 --max-tokens 12 --batch 4"
    command += f" --device cpu --json-line {tmp_path}/curve.jsonl --guidance 1.5 --no-condition-images --seed 5"
    results = []
    for out in ("a", "b"):
        ev.main([*command.split(), "--out", f"{tmp_path}/{out}"])
        results.append(json.loads((tmp_path / out / "results.json").read_text()))
    a, b = results
    for key in ("table", "single", "overall", "stops", "dialogues", "single requests", "settings", "sources"):
        assert a[key] == b[key], key
    assert a["settings"]["guidance"] == 1.5 and a["settings"]["use_condition_images"] is False and a["settings"]["seed"] == 5
    assert a["settings"]["steps"] == 1 and a["settings"]["max_tokens"] == 12
    assert set(a["table"]) == {"model", "truth", "VAE"} == set(a["single"]) and len(a["dialogues"]) == 6
    assert a["table"]["truth"]["held_out"]["all"]["shows"]["share"] == 1.0
    assert a["pictures"]["drawn"] > 0 and a["stops"]["end"] > 0
    assert a["sources"]["ckpt"] == str(checkpoint) and a["versions"]["torch"]
    table = (tmp_path / "a" / "table.md").read_text()
    assert table in capsys.readouterr().out and "image-text" in table and "colour attribution" in table
    page = (tmp_path / "a" / "index.html").read_text()
    assert "<article" in page and "<dt>image-text<dd>pictures that show what the words" in page
    assert "* image-text: pictures that show what the words just before them say" in table
    lines = [json.loads(x) for x in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["held_out"] == lines[1]["held_out"] and set(lines[0]["single"]) == {"held_out", "seen"}


def test_ablations_change_one_setting_at_a_time(drawn):
    seen = []

    class Recorder(Corpus):
        def generate_many(self, dialogues, settings=None, **options):
            seen.append((settings.scale, settings.negative, settings.use_condition_images))
            return super().generate_many(dialogues, settings, **options)

    runs = exam.ablations(Recorder(drawn), drawn[:4], Settings(guidance=4.0), quiet=True)
    assert seen == [(1.0, "none", True), *((float(g), n, True) for g in (2, 3, 5, 8) for n in ("chunk", "empty")),
                    (4.0, "chunk", True), (4.0, "chunk", False)]  # fmt: skip
    (_, head, grid, *_), (_, _, rows, *_) = ev.ablation_tables(runs)
    assert head == ["guidance", "chunk", "empty", "none"] and [row[0] for row in grid] == ["1", "2", "3", "5", "8"]
    assert {cell[:4] for row in grid for cell in row[1:]} == {"100%", "as 1"} and len(rows) == 2


def test_the_truth_through_a_poor_vae_is_no_longer_accepted(checkpoint, drawn):
    vae = VAE.from_pretrained(checkpoint / "vae")
    again = exam.through(vae, drawn, batch=5)
    told = [m for r in drawn for m in r["messages"] if m["role"] == "assistant"]
    pictures = [p["image"] for m in told for p in m["content"] if p["type"] == "image"]
    assert set(again) == {id(p) for p in pictures}
    alone = exam.to_image(vae.decode_latents(vae.encode_latents(exam.to_tensor(pictures[6])[None]))[0].detach())
    difference = (exam.to_tensor(alone) - exam.to_tensor(again[id(pictures[6])])).abs().max()
    assert difference <= 2 / 255 + 1e-6
    found = report(Corpus(drawn, again))
    assert found.share("shows").right == 0 and found.share("text").right == found.share("text").n


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: corpus"),
        ("geneval", "invalid choice: 'geneval'"),
        ("sketchbook --guidence 3", "unrecognized arguments: --guidence"),
        ("sketchbook --n 0", "--n 0: must be 1 or more"),
        ("sketchbook --n many", "invalid int value: 'many'"),
        ("sketchbook --batch 0", "--batch 0"),
        ("sketchbook --kinds lesson,poem", "no kind called 'poem'; there are lesson"),
        ("sketchbook --split train", "invalid choice: 'train'"),
        ("sketchbook --sampler heun", "sampler heun: must be one of unipc, euler, ancestral"),
        ("sketchbook --seed -1", "seed -1"),
        ("sketchbook --ckpt nowhere/at-all-x --device cpu", "nowhere/at-all-x"),
        ("sketchbook --ckpt CKPT --height 32 --device cpu", "give --height and --width"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, message, checkpoint, capsys):
    with pytest.raises(SystemExit) as end:
        training.run_script(lambda: ev.main(arguments.replace("CKPT", str(checkpoint)).split()))
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and message in error and re.fullmatch(r"error: .*", error)


def test_wrong_arguments_are_input_errors_for_callers():
    with pytest.raises(InputError):
        ev.arguments(["sketchbook", "--top-p", "2"])
    args, given = ev.arguments(["sketchbook", "--condition-time", "0.1", "--negative", "empty"])
    assert given == {"max_tokens": 400, "condition_time": 0.1, "negative": "empty", "seed": 0} and args.kinds == list(KINDS)
