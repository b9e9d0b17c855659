"""The benchmarks: sums by hand, and each trap that users of the published scripts have fallen into, with a scripted judge."""

import csv
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from checkpoint import InputError
from evaluate.benchmark import JUDGED, MISSING, REFUSED, UNPARSABLE, Answer, Request, Verdict, find, names
from evaluate.benchmarks import comm, cooking200, dpg, gedit, geneval, howto500, imgedit, interleavedbench, opening
from evaluate.rubrics import document, message, sections, woven

ALL = (comm, cooking200, dpg, gedit, geneval, howto500, imgedit, interleavedbench, opening)
RED, BLUE = Image.new("RGB", (8, 4), "red"), Image.new("RGB", (4, 12), "blue")
EMPTY = Answer([""], [])
STORY = Answer(["A cat wakes up.", "It stretches.", ""], [RED, BLUE])


class Scripted:
    """A judge that answers by a function of the prompt, and remembers what it was shown."""

    def __init__(self, number=lambda prompt: 3.0, why=JUDGED, words="said"):
        self.number, self.why, self.words = number, why, words
        self.calls: list[tuple[str, str, tuple]] = []

    def verdict(self, value) -> Verdict:
        return Verdict(value if self.why == JUDGED else None, self.why, self.words)

    def yes(self, question, *content):
        self.calls.append(("yes", question, content))
        return self.verdict(self.number(question))

    def rating(self, rubric, *content, low, high):
        self.calls.append(("rating", rubric, content))
        return self.verdict(self.number(rubric))

    def fields(self, prompt, *content, keys):
        self.calls.append(("fields", prompt, content))
        return self.verdict({key: self.number(key) for key in keys})

    def pictures(self, k: int) -> list[Image.Image]:
        return [part for part in self.calls[k][2] if isinstance(part, Image.Image)]


def row(scores: dict, why=JUDGED, **meta) -> dict:
    return {
        "id": "0",
        "meta": meta,
        "scores": {k: {"value": v, "why": why if v is None else JUDGED} for k, v in scores.items()},
    }


def values(figures: dict) -> dict[str, float]:
    return {name: round(figure.value, 4) for name, figure in figures.items() if not math.isnan(figure.value)}


# ------------------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.NAME)
def test_a_benchmark_has_its_parts_and_names_its_source(module):
    assert module.NAME in names() and find(module.NAME) is module
    assert {"id", "revision", "file", "licence"} <= module.SOURCE.keys()
    for published in module.PUBLISHED:
        assert published.keys() - {"items", "n", "rule"} == {"system", "figures", "judge", "source"}


REQUESTS = {
    "comm": Request("a", message(RED, "Go on"), {"task": "task3"}),
    "dpg": Request("a", message("A dog"), {"questions": {"1": {"question": "A dog?", "category": "entity", "parents": []}}}),
    "gedit": Request("a", message(RED, "Make it blue"), {"group": "color_alter", "prompt": "Make it blue"}),
    "geneval": Request("a", message("a photo of a cow"), {"tag": "single_object", "include": [{"class": "cow", "count": 1}]}),
    "imgedit": Request("a", message(RED, "Make it blue"), {"type": "alter", "prompt": "Make it blue"}),
    "interleavedbench": Request("a", message(RED, "Go on"), {"task": "wikihow_next_step"}),
    "opening": Request("a", message("Tell a story"), {"task": "Story"}),
    "howto500": Request("a", message("How?"), {"domain": "d", "subcategory": "s"}),
    "cooking200": Request("a", message("How?"), {"domain": "d", "subcategory": "s"}),
}


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.NAME)
def test_a_missing_picture_is_the_floor_and_is_never_dropped(module):
    """Nobody is asked, and the item is in every mean."""
    judge = Scripted()
    scores = module.score(REQUESTS[module.NAME], EMPTY, judge)
    low = 1.0 if module in (howto500, cooking200, imgedit) else 0.0
    assert judge.calls == []
    assert {(v.value, v.why) for v in scores.values()} == {(low, MISSING)}
    kept = {name: {"value": v.value, "why": v.why} for name, v in scores.items()}
    figures = module.aggregate([{"id": "a", "meta": REQUESTS[module.NAME].meta, "scores": kept}])
    assert all(f.n == 1 and f.value == low for name, f in figures.items() if name not in ("refused", "nulls"))


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.NAME)
def test_what_the_judge_refuses_has_no_value_but_a_reason(module):
    scores = module.score(REQUESTS[module.NAME], STORY, Scripted(why=REFUSED))
    assert {(v.value, v.why) for v in scores.values()} == {(None, REFUSED)}
    rows = [{"id": "a", "meta": REQUESTS[module.NAME].meta, "scores": {n: {"value": None, "why": REFUSED} for n in scores}}]
    module.aggregate(rows)  # and it is no error
    module.aggregate([])


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.NAME)
def test_pictures_keep_their_aspect(module):
    judge = Scripted()
    module.score(REQUESTS[module.NAME], STORY, judge)
    sizes = {picture.size for k in range(len(judge.calls)) for picture in judge.pictures(k)}
    assert sizes and sizes <= {RED.size, BLUE.size}


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.NAME)
def test_no_mark_of_a_rubric_is_left_open(module):
    judge = Scripted(lambda prompt: 1.0)
    module.score(REQUESTS[module.NAME], STORY, judge)
    assert judge.calls and not [call[1] for call in judge.calls if re.search(r"[{}]", call[1])]


def test_items_without_a_file_say_where_they_come_from(tmp_path: Path):
    with pytest.raises(InputError, match="djghosh13/geneval"):
        next(geneval.requests(None))
    with pytest.raises(InputError, match="no such file"):
        next(geneval.requests(tmp_path))
    (tmp_path / "evaluation_metadata.jsonl").write_text('{"tag": "x"}\n{\n')
    with pytest.raises(InputError, match="line 2"):
        next(geneval.requests(tmp_path))


def test_pictures_stand_where_their_marks_are():
    assert woven("a <image> b <IMAGE>", [Path("1"), Path("2")]) == ["a", Path("1"), "b", Path("2")]
    assert woven("a", [Path("1")]) == [Path("1"), "a"]
    with pytest.raises(InputError):
        woven("<image><image>", [Path("1")])
    assert document(STORY) == ["A cat wakes up.", "[picture 1]", RED, "It stretches.", "[picture 2]", BLUE]


# ---------------------------------------------------------------------------------------------------------------- GenEval


def test_geneval_by_hand():
    rows = [
        row({"thing 1": 0.9, "colour 1": 0.4}, tag="colors"),  # one atom wrong: wrong
        row({"thing 1": 0.8, "colour 1": 0.5}, tag="colors"),
        row({"thing 1": 1.0}, tag="single_object"),
        row({"thing 1": None}, REFUSED, tag="single_object"),  # neither right nor wrong
    ]
    found = geneval.aggregate(rows)
    assert values(found) == {
        "overall": 0.75,  # the mean of the sorts, not of the prompts
        "colors": 0.5,
        "single_object": 1.0,
        "soft, atoms": 0.72,
        "soft, prompts": round((math.sqrt(0.36) + math.sqrt(0.4) + 1) / 3, 4),
    }
    assert found["overall"].n == 3


def test_geneval_asks_its_four_questions():
    include = [{"class": "bat", "count": 1}, {"class": "tie", "count": 1, "color": "red", "position": ["right of", 0]}]
    asked = geneval.questions({"tag": "position", "include": include})
    assert list(asked) == ["thing 1", "thing 2", "colour 2", "place 2"]
    assert "tie in this picture to the right of the bat" in asked["place 2"]
    assert "exactly 2" in geneval.questions({"tag": "counting", "include": [{"class": "bear", "count": 2}]})["count 1"]


def test_geneval_has_553_real_prompts(shared):
    items = list(geneval.requests(shared / "geneval"))
    assert len(items) == len({item.id for item in items}) == 553
    assert Counter(item.meta["tag"] for item in items) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100
    }  # fmt: skip
    assert all(geneval.questions(item.meta) for item in items)


# -------------------------------------------------------------------------------------------------------------------- DPG

TABLE = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
a,"A dog, in red",,1,0,entity,whole,entity - whole (dog),Is there a dog?
a,"A dog, in red",,2,1,entity,part,entity - part (collar),Has the dog a collar?
a,"A dog, in red",,3,"1,2",attribute,color,attribute - color (collar),Is the collar red?
a,"A dog, in red",,4,0,global,,global - (photo),Is it a photo?
"""


def test_dpg_a_child_counts_only_if_its_parents_do(tmp_path: Path):
    (tmp_path / "dpg_bench.csv").write_text(TABLE)
    (item,) = dpg.requests(tmp_path)
    assert len(item.meta["questions"]) == 4, "the first question counts, too"
    judge = Scripted(lambda q: 0.1 if "collar?" in q else 0.9)  # no collar, but a red one
    scores = dpg.score(item, STORY, judge)
    kept = {"id": "a", "meta": item.meta, "scores": {n: {"value": v.value, "why": v.why} for n, v in scores.items()}}
    assert dpg.counts(kept) == {"1": 1, "2": 0, "3": 0, "4": 1}
    assert values(dpg.aggregate([kept])) == {"overall": 50.0, "entity": 50.0, "attribute": 100.0, "global": 100.0}


def test_dpg_a_grandchild_of_a_no_is_denied_and_an_open_parent_denies_nobody():
    asked = {
        n: {"question": "?", "category": "c", "parents": parents} for n, parents in {"3": ["2"], "2": ["1"], "1": []}.items()
    }
    assert dpg.counts(row({"1": 0.0, "2": 1.0, "3": 1.0}, questions=asked)) == {"3": 0, "2": 0, "1": 0}
    assert dpg.counts(row({"1": None, "2": 1.0, "3": 1.0}, questions=asked)) == {"3": 1, "2": 1}


# ---------------------------------------------------------------------------------------------------------------- editing


def test_imgedit_second_and_third_score_are_no_higher_than_the_first():
    judge = Scripted({"follows": 2, "natural": 5, "intact": 1}.get)
    scores = imgedit.score(REQUESTS["imgedit"], STORY, judge)
    assert {name: v.value for name, v in scores.items()} == {"follows": 2, "natural": 2, "intact": 1}


def test_imgedit_by_hand():
    rows = [
        row({"follows": 5, "natural": 4, "intact": 3}, type="add"),
        row({"follows": 1, "natural": 1, "intact": 1}, type="add"),
        row({"follows": 3, "natural": 3, "intact": 3}, type="style"),
        row({"follows": None, "natural": None, "intact": None}, UNPARSABLE, type="style"),
    ]
    found = imgedit.aggregate(rows)
    assert values(found) == {"overall": 2.6667, "add": 2.5, "style": 3.0}
    assert found["style"].n == 1


def test_imgedit_has_a_question_for_every_type_also_for_alter(shared):
    items = list(imgedit.requests(shared / "imgedit"))
    assert len(items) == 737
    assert {item.meta["type"] for item in items} == sections("imgedit").keys() - {"edit"}
    assert Counter(item.meta["type"] for item in items)["alter"] == 94


def test_gedit_by_hand_and_filtered_people_are_counted_not_silently_0():
    rows = [
        row({"edited": 9, "kept": 4, "natural": 9, "clean": 10}, group="a", intersection=True),  # SC 4, PQ 9, O 6
        row({"edited": 8, "kept": 8, "natural": 2, "clean": 5}, group="a", intersection=False),  # SC 8, PQ 2, O 4
        row({"edited": 1, "kept": 10, "natural": 1, "clean": 1}, group="b", intersection=True),  # 1, 1, 1
        row({"edited": None, "kept": None, "natural": None, "clean": None}, REFUSED, group="ps_human", intersection=False),
    ]
    found = gedit.aggregate(rows)
    assert values(found) == {
        "SC": 4.3333, "PQ": 4.0, "O": 3.6667, "SC, intersection": 2.5, "PQ, intersection": 5.0, "O, intersection": 3.5,
        "O over groups": 3.0, "O, refused as 0": 2.75, "refused": 0.25, "a": 5.0, "b": 1.0,
    }  # fmt: skip
    assert (found["O"].n, found["refused"].n, found["ps_human"].n) == (3, 4, 0)


def test_gedit_quality_is_judged_without_the_picture_before():
    judge = Scripted()
    gedit.score(REQUESTS["gedit"], STORY, judge)
    assert [len(judge.pictures(k)) for k in range(2)] == [2, 1]
    assert judge.pictures(1) == [RED] and "Make it blue" not in judge.calls[1][1]


def test_gedit_has_604_real_items(shared):
    items = list(gedit.requests(shared / "gedit"))
    assert len(items) == 604 and len({item.meta["group"] for item in items}) == 11


# ------------------------------------------------------------------------------------------------------------------- CoMM


def test_comm_a_text_only_call_holds_no_picture_also_none_of_the_user():
    judge = Scripted()
    comm.describe([RED, "Go on"], STORY, 1, judge)
    (call,) = judge.calls
    assert judge.pictures(0) == []
    assert {"[picture 1]", "[picture 2]", "It stretches."} <= set(call[2]) and "[picture 2] must show" in call[1]


def test_comm_the_second_call_of_illustration_relevance_sees_no_hidden_picture():
    """It sees the picture in question alone, and the description without the number beside it."""
    judge = Scripted(words='{"reason": "a cat", "certain": 9}')
    comm.score(REQUESTS["comm"], STORY, judge)
    compared = [k for k, (kind, *_) in enumerate(judge.calls) if kind == "rating"]
    assert [judge.pictures(k) for k in compared] == [[RED], [BLUE]]
    assert all("a cat" in judge.calls[k][2] and "certain" not in str(judge.calls[k][2]) for k in compared)


def test_comm_a_judge_that_gives_numbers_alone_cannot_describe():
    scores = comm.score(REQUESTS["comm"], STORY, Scripted(words=""))
    assert (scores["relevance"].value, scores["relevance"].why) == (None, UNPARSABLE)


def test_comm_by_hand_with_the_scores_of_each_task(tmp_path: Path):
    for task in ("task1", "task2", "task3", "task4"):
        (tmp_path / f"x_{task}").mkdir()
        item = {"model_input": "Go on <IMAGE>", "input_image_list": ["1.png"]}
        RED.save(tmp_path / f"x_{task}" / "1.png")
        (tmp_path / f"x_{task}" / "results.json").write_text(json.dumps(item))
    names = {r.meta["task"]: set(comm.score(r, STORY, Scripted())) for r in comm.requests(tmp_path)}
    six = {"style", "entity", "trend", "quality", "completeness", "relevance"}
    assert names == {"task1": {"completeness", "fidelity"}, "task2": six - {"completeness"}, "task3": six, "task4": six}
    found = comm.aggregate([row({"style": 8, "trend": 5}), row({"style": 4, "trend": None}, REFUSED)])
    assert values(found) == {"style": 6.0, "trend": 5.0} and found["trend"].n == 1


# ------------------------------------------------------------------------------------------------------- InterleavedBench


def test_interleavedbench_text_aspects_of_edit_subsets_are_left_out():
    judge = Scripted()
    edit = Request("a", message(RED, "Make it blue"), {"task": "image_editing"})
    assert set(interleavedbench.score(edit, STORY, judge)) == {"perceptual quality", "image coherence", "helpfulness"}
    rows = [
        row(dict.fromkeys(interleavedbench.ASPECTS, 4.0), task="story"),
        row({"perceptual quality": 2.0, "image coherence": 2.0, "helpfulness": 1.0}, task="image_editing"),
    ]
    found = interleavedbench.aggregate(rows)
    assert values(found) == {"mean": 3.3, "text quality": 4.0, "perceptual quality": 3.0, "image coherence": 3.0,
                             "text-image coherence": 4.0, "helpfulness": 2.5}  # fmt: skip
    assert found["text quality"].n == 1


def test_interleavedbench_the_text_only_call_holds_no_picture():
    judge = Scripted()
    interleavedbench.score(REQUESTS["interleavedbench"], STORY, judge)
    text = [k for k, call in enumerate(judge.calls) if "text of this answer alone" in call[1]]
    assert len(text) == 1 and judge.pictures(text[0]) == []


def test_interleavedbench_leaves_the_pictures_of_the_reference_out(tmp_path: Path):
    item = {"id": "w", "image": ["a.png", "b.png"], "task_name": "wikihow", "conversations": [
        {"from": "human", "value": "Go on: <image>"}, {"from": "gpt", "value": "So: <image>"}]}  # fmt: skip
    (tmp_path / "interleaved_bench.json").write_text(json.dumps([item]))
    (request,) = interleavedbench.requests(tmp_path)
    shown = [part["image"] for part in request.messages[0]["content"] if part["type"] == "image"]
    assert shown == [str(tmp_path / "a.png")]


# ---------------------------------------------------------------------------------------------------------------- OpenING


def test_opening_nulls_are_counted_not_dropped():
    good, bad = dict.fromkeys(opening.CRITERIA, 7.0), dict.fromkeys(opening.CRITERIA, 7.0) | {"correctness": None}
    found = opening.aggregate([row(good), row(bad, UNPARSABLE)])
    assert (found["correctness"].value, found["correctness"].n) == (3.5, 2)
    assert found["overall"].value == 6.5  # (3.5 + 6 x 7) / 7
    assert (found["overall, nulls dropped"].value, found["overall, nulls dropped"].n) == (7.0, 1)
    assert found["nulls"].value == 0.5


def test_opening_reads_the_two_forms_of_published_raw_scores(tmp_path: Path):
    titles = {name.title(): {"Score": 9, "Justification": "."} for name in opening.CRITERIA}
    titles["Image-Text Coherency"] = {"Score": None}
    entry = {"model": {"name": "X"}, "score": titles}
    entries = [entry | {"data_id": "1"}, entry | {"instance_id": "2", "score": {"scores": titles}}]
    (tmp_path / "s.json").write_text(json.dumps(entries))
    rows = opening.published_rows(tmp_path / "s.json")["X"]
    found = opening.aggregate(rows)
    assert (len(rows), found["correctness"].value, found["image-text coherency"].value, found["nulls"].value) == (2, 9, 0, 1)


def test_opening_gives_the_published_summary_from_the_published_raw_scores(shared):
    folder = shared / "opening"
    if not folder.is_dir():
        pytest.skip("no Interleaved_Arena/ of OpenING in shared/data/opening: it has no licence and is not in the repository")
    with open(folder / "model_score_summaries.csv", encoding="utf-8") as file:
        lines = [{name.lower(): value for name, value in line.items()} for line in csv.DictReader(file)]
    summary = {line["model_name"]: line for line in lines}
    for system, rows in opening.published_rows(folder / "gpt-score_results.json").items():
        found = opening.aggregate(rows)
        for name in opening.CRITERIA:
            said = float(summary[system][name])
            assert abs(found[name].value - said) <= 0.0051, (system, name)
        # Theirs is the mean of means that are rounded already, and rounded again: so far, and no further, ours is from it.
        rounded = sum(round(found[name].value, 2) for name in opening.CRITERIA) / len(opening.CRITERIA)
        said = float(summary[system]["overall"])
        assert abs(rounded - said) <= 0.0051 and abs(found["overall"].value - said) <= 0.0101, system
        # Nothing is null in this file, so here the two rules agree.
        assert found["nulls"].value == 0 and found["overall"] == found["overall, nulls dropped"]


def test_opening_reads_its_conversations(tmp_path: Path):
    turns = [
        {"input": [{"text": "<BEGIN> Look <image>", "image": "a.jpg"}, {"text": "Go on <image>", "image": None}]},
        {"output": []},
    ]
    item = {"total_uid": "7", "meta_task_name": "Story", "conversations": turns}
    (tmp_path / "test_data.jsonl").write_text(json.dumps(item))
    (request,) = opening.requests(tmp_path)
    assert [part["type"] for part in request.messages[0]["content"]] == ["text", "image", "text"]


# ------------------------------------------------------------------------------------------------------- this project's own


def test_howto500_has_500_requests_in_151_subcategories_of_8_domains_without_duplicates():
    items = list(howto500.requests())
    texts = [item.messages[0]["content"][0]["text"] for item in items]
    assert len(items) == len({item.id for item in items}) == 500
    assert len({item.meta["subcategory"] for item in items}) == 151 and len({item.meta["domain"] for item in items}) == 8
    cooking = list(cooking200.requests())
    texts += [item.messages[0]["content"][0]["text"] for item in cooking]
    assert len(cooking) == 200
    assert len({re.sub(r"\W+", " ", text.lower()).strip() for text in texts}) == 700
    assert not [item.id for item in [*items, *cooking] if "/" in item.id]


def test_howto500_each_criterion_sees_what_it_judges_and_no_more():
    judge = Scripted()
    howto500.score(REQUESTS["howto500"], STORY, judge)
    assert [len(judge.pictures(k)) for k in range(5)] == [0, 2, 2, 2, 2], "text completeness is read without pictures"
    assert judge.calls[2][2] == judge.calls[3][2] == (RED, BLUE)


def test_howto500_a_missing_text_is_the_floor_too():
    scores = howto500.score(REQUESTS["howto500"], Answer(["", ""], [RED]), Scripted())
    assert {n: v.value for n, v in scores.items()} == {"T-Com": 1, "I-Com": 3, "I-Co": 3, "I-Q": 3, "IT-Co": 1}


def test_howto500_by_hand():
    one = dict(zip(howto500.CRITERIA, (5, 4, 3, 2, 1), strict=True))
    two = dict(zip(howto500.CRITERIA, (1, 1, 1, 1, None), strict=True))
    found = howto500.aggregate([row(one, domain="home"), row(two, UNPARSABLE, domain="tech")])
    assert values(found) == {"mean": 2.0, "T-Com": 3, "I-Com": 2.5, "I-Co": 2, "I-Q": 1.5, "IT-Co": 1, "home": 3, "tech": 1}
    assert (found["IT-Co"].n, found["mean"].n) == (1, 2)
