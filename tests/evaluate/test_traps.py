"""The traps that users of the published benchmarks have fallen into, and the test that holds each; some of them stand here."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from checkpoint import InputError
from evaluate import figures, judging
from evaluate.benchmark import JUDGED, REFUSED, UNPARSABLE, Answer, Request, find, names
from evaluate.benchmarks import comm, gedit, geneval, howto500, imgedit, interleavedbench, opening
from evaluate.judges import Asker
from evaluate.rubrics import message
from evaluate.server import Server
from unruly import Unruly

HERE = Path(__file__).parent
TOY = str(HERE / "toy.py")
RED, BLUE = Image.new("RGB", (8, 4), "red"), Image.new("RGB", (4, 12), "blue")
STORY = Answer(["A cat wakes up.", "It stretches.", ""], [RED, BLUE])
# What went wrong elsewhere: the test that it does not here.
TRAPS = {
    "CoMM: the pictures that are to be hidden are sent": "test_comm_a_text_only_call_holds_no_picture_also_none_of_the_user",
    "CoMM: the comparison sees all pictures": "test_comm_the_second_call_of_illustration_relevance_sees_no_hidden_picture",
    "CoMM: what the judge left open is taken for 0": "test_comm_what_the_judge_left_open_is_counted_and_not_taken_for_0",
    "CoMM: files that cannot be read are skipped": "test_comm_an_item_that_cannot_be_read_is_told_and_not_skipped",
    "InterleavedBench: a 0 for text where no text is due": "test_interleavedbench_text_aspects_of_edit_subsets_are_left_out",
    "InterleavedBench: the reference's pictures are sent": "test_interleavedbench_leaves_the_pictures_of_the_reference_out",
    "GenEval: figures of a detector beside those of a judge": "test_geneval_published_figures_are_marked_as_a_detectors",
    "GenEval: the mean of prompts for that of the six sorts": "test_geneval_by_hand",
    "DPG: the first question is skipped": "test_dpg_a_child_counts_only_if_its_parents_do",
    "ImgEdit: the later scores higher than the first": "test_imgedit_second_and_third_score_are_no_higher_than_the_first",
    "ImgEdit: alter and adjust are one type": "test_imgedit_has_a_question_for_every_type_also_for_alter",
    "ImgEdit: figures by judges of another date": "test_imgedit_published_figures_say_which_judge_if_it_is_known",
    "GEdit: filtered people count as 0": "test_gedit_by_hand_and_filtered_people_are_counted_not_silently_0",
    "GEdit: full set and intersection are mixed up": "test_gedit_full_set_and_intersection_are_two_figures",
    "OpenING: entries with nulls are dropped": "test_opening_nulls_are_counted_not_dropped",
    "OpenING: pictures squeezed to 512 x 512": "test_pictures_keep_their_aspect",
    "who judged, when and by which words is not said": "test_every_report_says_judge_date_prompts_and_what_missing_counts",
    "a mean without saying how many were judged": "test_every_score_has_its_counts_beside_it",
    "missing pictures and texts are dropped": "test_a_missing_picture_is_the_floor_and_is_never_dropped",
    "a missing text is dropped": "test_howto500_a_missing_text_is_the_floor_too",
    "a call without pictures holds one": "test_no_text_only_call_holds_a_picture_on_its_way_to_the_server",
    "odd outputs of a judge are read somehow": "test_nothing_is_guessed",
    "figures beside the paper's that are not comparable": "test_published_figures_are_marked_unless_judge_items_and_rule_agree",
    "answers that lmms-eval cannot read": "test_what_generate_writes_for_lmms_eval_is_read_back",
}


@pytest.mark.parametrize("test", TRAPS.values(), ids=TRAPS)
def test_each_trap_has_its_test(test):
    there = [name for file in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.M)]
    assert there.count(test) == 1


def row(scores: dict, why=JUDGED, **meta) -> dict:
    kept = {name: {"value": value, "why": why if value is None else JUDGED} for name, value in scores.items()}
    return {"id": "0", "meta": meta, "scores": kept}


# ----------------------------------------------------------------------------------------------------------- one benchmark


def test_comm_what_the_judge_left_open_is_counted_and_not_taken_for_0():
    found = comm.aggregate([row({"style": 8.0}), row({"style": None}, UNPARSABLE), row({"style": None}, REFUSED)])
    assert (found["style"].value, found["style"].n) == (8.0, 1)


def test_comm_an_item_that_cannot_be_read_is_told_and_not_skipped(tmp_path):
    for name, text in (("a_task3", '{"model_input": "Go on"}'), ("b_task3", '{"model_input": ')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"b_task3/results\.json: not valid JSON"):
        list(comm.requests(tmp_path))


def test_geneval_published_figures_are_marked_as_a_detectors():
    assert geneval.PUBLISHED and all("detector" in published["rule"] for published in geneval.PUBLISHED)


def test_imgedit_published_figures_say_which_judge_if_it_is_known():
    """BAGEL's figure is that of one judge's date: with another one it is another figure."""
    judges = {published["system"]: published["judge"] for published in imgedit.PUBLISHED}
    assert judges["BAGEL"] == "gpt-4o-2024-11-20" and all(judges.values())


def test_gedit_full_set_and_intersection_are_two_figures():
    scores = dict.fromkeys(("edited", "kept", "natural", "clean"), 9.0)
    rows = [row(scores, group="a", intersection=True), row(dict.fromkeys(scores, 4.0), group="a", intersection=False)]
    found = gedit.aggregate(rows)
    assert (found["O"].value, found["O"].n) == (6.5, 2)
    assert (found["O, intersection"].value, found["O, intersection"].n) == (9.0, 1)
    # Items that do not say which they are have one figure alone.
    assert "O, intersection" not in gedit.aggregate([row(scores, group="a")])


# ----------------------------------------------------------------------------------------------------------- all of them


def obliging(body: dict, n: int) -> str:
    words = json.dumps(body)
    keys = re.findall(r'\\"([\w -]+)\\" from (\d+)', words)
    return json.dumps({"reason": "a cat"} | {key: int(low) + 1 for key, low in keys}) if keys else "yes"


REQUESTS = {
    comm: Request("a", message(RED, "Go on"), {"task": "task3"}),
    interleavedbench: Request("a", message(RED, "Go on"), {"task": "vist"}),
    howto500: Request("a", message("How?"), {"domain": "d", "subcategory": "s"}),
    opening: Request("a", message(RED, "Tell a story"), {"task": "Story"}),
}
TEXT_ONLY = {comm: 2, interleavedbench: 1, howto500: 1, opening: 0}  # CoMM hides each of two pictures


@pytest.mark.parametrize("module", REQUESTS, ids=lambda m: m.NAME)
def test_no_text_only_call_holds_a_picture_on_its_way_to_the_server(module, tmp_path):
    """Neither as a part of the message nor within its words."""
    with Unruly(obliging) as unruly:
        scores = module.score(REQUESTS[module], STORY, Asker(Server(unruly.url, "judge-1"), tmp_path))
    assert {verdict.why for verdict in scores.values()} == {JUDGED}
    texts = [body for body in unruly.asked if "image_url" not in json.dumps(body)]
    assert len(texts) == TEXT_ONLY[module] < len(unruly.asked)
    assert not [body for body in texts if "base64" in json.dumps(body) or len(json.dumps(body)) > 8000]


@pytest.fixture
def judged(tmp_path) -> Path:
    """A run of the toy: one answer without a picture, one that the judge refuses, one that it spoils, one as it should be."""
    for name in ("red", "blue", "green", "yellow"):
        folder = tmp_path / "theirs" / name
        folder.mkdir(parents=True)
        RED.save(folder / "a.png")
        parts = [{"type": "text", "text": name}, {"type": "image", "image": "a.png"}]
        (folder / "answer.json").write_text(json.dumps({"parts": parts[: 1 if name == "red" else 2]}))
    words = {"blue": {"content": "", "refusal": "No."}, "green": "Perhaps."}

    def answer(body, n):
        asked = next((word for name, word in words.items() if f"a {name} house" in json.dumps(body)), None)
        return asked or obliging(body, n)

    out = tmp_path / "e"
    with Unruly(answer) as unruly:
        options = ["--answers", str(tmp_path / "theirs"), "--judge", unruly.url, "--judge-model", "judge-1"]
        judging.main([TOY, "--out", str(out), *options])
    return out


def report(out: Path) -> tuple[dict, str]:
    figures.main(["--out", str(out), "--draws", "20"])
    return json.loads((out / "report.json").read_text()), (out / "report.md").read_text()


def test_every_report_says_judge_date_prompts_and_what_missing_counts(judged):
    found, text = report(judged)
    (judge,) = found["judges"]
    for page in (text, (judged / "report.html").read_text()):
        assert re.search(rf"judge-1, {judge['date']}, prompts {judge['prompts']}", page)
        assert "there was nothing to judge: the scale" in page and "lowest score" in page


def test_every_score_has_its_counts_beside_it(judged):
    found, text = report(judged)
    (judge,) = found["judges"]
    assert judge["counts"]["colour"] == {"judged": 1, "refused": 1, "unparsable": 1, "missing": 1}
    # The missing picture is a 0 and in the mean; what the judge left open is in neither.
    assert judge["figures"]["overall"]["value"] == 0.5 and judge["figures"]["overall"]["n"] == 2
    assert re.search(r"\| colour +\| 1 +\| 1 +\| 1 +\| 1 +\|", text)


@pytest.mark.parametrize("published, mark", [
    ({"judge": "judge-1"}, ""), ({"judge": "judge-2"}, "* judge"), ({"judge": "judge-1", "n": 5}, "* items"),
    ({"judge": "judge-1", "items": "others"}, "* items"), ({"judge": "judge-1", "rule": "maxima"}, "* rule: maxima"),
    ({"judge": "not said", "n": 3, "rule": "maxima"}, "* judge, items, rule: maxima"),
])  # fmt: skip
def test_published_figures_are_marked_unless_judge_items_and_rule_agree(judged, monkeypatch, published, mark):
    module = find(TOY)
    module.PUBLISHED = [{"system": "X", "figures": {"overall": 0.8}, "source": "a paper"} | published]
    monkeypatch.setattr(figures, "find", lambda name: module)
    _, text = report(judged)
    (line,) = [line for line in text.splitlines() if line.startswith("| X ")]
    assert line.split("|")[-2].strip() == mark


def test_no_published_figure_is_comparable_by_accident():
    """Each names its judge; an empty one would equal nothing and mark nothing."""
    for name in names():
        for published in find(name).PUBLISHED:
            assert published["judge"] and published["source"] and published["figures"]
