"""Systems compared pair by pair: ratings against hand-computed ones, what a judge is asked, and what its answers come to."""

import json
import math
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoint import InputError
from evaluate import figures, pairs
from evaluate.bradley_terry import MEAN, Outcome, meet, rank, ratings
from evaluate.comparison import share_of
from evaluate.contest import IN_ORDER, TURNED
from unruly import Unruly

pytest.importorskip("choix", reason="choix is not installed: evaluate/requirements.txt")

TOY = str(Path(__file__).parent / "toy.py")
COLOURS = ("red", "blue", "green", "yellow")


def points(odds: float) -> float:
    return 400 * math.log10(odds)


# ----------------------------------------------------------------------------------------------------------------- ratings


def test_two_systems_are_apart_by_their_odds():
    """The tie that nobody gave adds half a win to each."""
    found = ratings(np.array([[0, 30.0], [10.0, 0]]))
    assert found[0] - found[1] == pytest.approx(points(30.5 / 10.5)) and found.mean() == pytest.approx(MEAN)


def test_three_systems_by_hand():
    """Odds of 2 and 2 make 4: with counts that agree with one another each pair has its own odds exactly."""
    found = ratings(np.array([[0, 19.5, 19.5], [9.5, 0, 19.5], [4.5, 9.5, 0]]))
    assert found - found[2] == pytest.approx([points(4), points(2), 0.0], abs=1e-4)


def test_where_counts_disagree_the_ratings_are_the_most_likely_ones():
    """There every system has won as often as its ratings say."""
    wins = np.random.default_rng(0).integers(0, 30, (5, 5)).astype(float)
    np.fill_diagonal(wins, 0)
    found = ratings(wins)
    chance = 1 / (1 + 10 ** ((found[None, :] - found[:, None]) / 400))
    told = wins + 0.5 * (1 - np.eye(5))
    expected = ((told + told.T) * chance).sum(1) - 0.5 * np.diag(told + told.T)
    assert told.sum(1) == pytest.approx(expected, abs=1e-4)


def outcomes(wins: int, ties: int, losses: int, a: str = "a", b: str = "b") -> list[Outcome]:
    shares = [1.0] * wins + [0.5] * ties + [0.0] * losses
    return [Outcome(str(n), a, b, share) for n, share in enumerate(shares)]


def test_a_tie_is_half_a_win():
    best, other = rank(["a", "b"], outcomes(8, 4, 2), 200, 0)
    assert best.rating - other.rating == pytest.approx(points(10.5 / 4.5))
    assert (best.system, best.wins, best.ties, best.losses) == ("a", 8, 4, 2)
    assert (other.system, other.wins, other.ties, other.losses) == ("b", 2, 4, 8)
    assert best.low < best.rating < best.high


def test_who_never_loses_has_a_finite_rating_and_no_interval():
    best, other = rank(["a", "b"], outcomes(10, 0, 0), 200, 0)
    assert best.rating - other.rating == pytest.approx(points(10.5 / 0.5))
    assert math.isnan(best.low) and math.isnan(best.high)
    met = meet("a", "b", outcomes(10, 0, 0), 200, 0)
    # Ten of ten by chance: twice 1 in 1024.
    assert met.share == 1 and math.isnan(met.low) and met.p == pytest.approx(2 / 1024)


def test_a_pair_by_hand():
    met = meet("a", "b", outcomes(6, 2, 2) + outcomes(0, 0, 5, "a", "c"), 500, 0)
    assert (met.wins, met.ties, met.losses, met.share) == (6, 2, 2, 0.7)
    # 0, 1, 2, 6, 7 or 8 of 8: (1 + 8 + 28) twice.
    assert met.p == pytest.approx(74 / 256)
    assert 0.4 < met.low < 0.6 and 0.85 < met.high <= 1.0
    assert math.isnan(meet("a", "b", outcomes(0, 3, 0), 50, 0).p)


def test_intervals_hold_the_truth():
    truth = {"a": 1090.0, "b": 1000.0, "c": 910.0}
    chance = random.Random(1)
    held = []
    widths = []
    for _ in range(40):
        said = []
        for item in range(100):
            for a, b in (("a", "b"), ("a", "c"), ("b", "c")):
                better = 1 / (1 + 10 ** ((truth[b] - truth[a]) / 400))
                said.append(Outcome(str(item), a, b, float(chance.random() < better)))
        for r in rank(list(truth), said, 80, 0):
            held.append(r.low <= truth[r.system] <= r.high)
            widths.append(r.high - r.low)
    # Of 120 intervals, three by three dependent, 95 % should.
    assert 0.88 <= sum(held) / len(held) <= 0.99
    assert 60 < sum(widths) / len(widths) < 100


def test_ten_who_say_the_same_are_not_ten_times_as_many_requests():
    said = outcomes(30, 10, 20)
    one = rank(["a", "b"], said, 500, 0)[0]
    ten = rank(["a", "b"], said * 10, 500, 0)[0]
    assert ten.high - ten.low == pytest.approx(one.high - one.low, rel=0.05)


def test_systems_that_have_not_met_stand_at_the_mean():
    found = {r.system: r.rating for r in rank(["a", "b", "c"], outcomes(5, 0, 5), 50, 0)}
    assert found == pytest.approx({"a": MEAN, "b": MEAN, "c": MEAN})


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "choix", None)
    with pytest.raises(InputError, match="choix is missing: .*evaluate/requirements.txt"):
        ratings(np.zeros((2, 2)))


# ----------------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("in_order, turned, share", [
    (1, 3, 1.0), (3, 1, 0.0), (2, 2, 0.5),
    (1, 1, 0.5), (3, 3, 0.5),  # what stands first, or last, is always better: no verdict on the systems
    (1, 2, 1.0), (2, 3, 1.0), (2, 1, 0.0),  # sure in one order, undecided in the other
    (1.40, 1.55, 0.5), (1.40, 1.65, 1.0), (1.65, 1.40, 0.0),  # by probabilities: a liking for the first cancels
    (None, 3, None), (1, None, None),
])  # fmt: skip
def test_two_orders_make_one_verdict(in_order, turned, share):
    assert share_of({"scores": {IN_ORDER: {"value": in_order}, TURNED: {"value": turned}}}) == share


def system(folder: Path, words: str, colours: tuple = COLOURS) -> Path:
    """Answers of somebody: a text and a picture for each request."""
    for colour in colours:
        (folder / colour).mkdir(parents=True)
        Image.new("RGB", (24, 16), colour).save(folder / colour / "a.png")
        parts = [{"type": "text", "text": f"{words} {colour}"}, {"type": "image", "image": "a.png"}]
        (folder / colour / "answer.json").write_text(json.dumps({"parts": parts}))
    return folder


@pytest.fixture
def two(tmp_path) -> list[str]:
    """Two systems on the command line; the name of neither says anything about the other."""
    return ["--a", f"zebra={system(tmp_path / 'x', 'good')}", "--b", f"okapi={system(tmp_path / 'y', 'poor')}"]


def compare(out: Path, url: str, systems: list[str], *more: str) -> dict:
    options = ["--judge", url, "--judge-model", "judge-1", "--timeout", "5", "--tries", "2"]
    pairs.main([TOY, "--out", str(out), *systems, *options, *more])
    figures.main(["--out", str(out), "--draws", "50"])
    return json.loads((out / "report.json").read_text())


def order_of(body: dict) -> list[str]:
    """What stands first and second in a question: the first words of each answer."""
    texts = [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]
    return [texts[texts.index(head) + 1].split()[0] for head in ("First answer:", "Second answer:")]


def prefers(word: str):
    def answer(body, n):
        return json.dumps({"reason": f"{word} it is", "score": 1 if order_of(body)[0] == word else 3})

    return answer


def test_both_orders_are_asked_and_a_consistent_judge_is_believed(two, tmp_path, capsys):
    with Unruly(prefers("good")) as unruly:
        found = compare(tmp_path / "p", unruly.url, two)
        asked = [order_of(body) for body in unruly.asked]
    assert sorted(asked) == [["good", "poor"]] * 4 + [["poor", "good"]] * 4
    # The request is shown, and the pictures of both with the answers they belong to.
    content = unruly.asked[0]["messages"][0]["content"]
    assert sum(part["type"] == "image_url" for part in content) == 2
    assert any("Draw a" in part.get("text", "") for part in content)
    assert not any("zebra" in json.dumps(body) or "okapi" in json.dumps(body) for body in unruly.asked)

    (jury,) = found["juries"]
    first, second = jury["ratings"]
    assert (first["system"], first["wins"], first["ties"], first["losses"]) == ("zebra", 4, 0, 0)
    assert second["system"] == "okapi" and first["rating"] - second["rating"] == pytest.approx(points(4.5 / 0.5))
    assert jury["counts"] == {"zebra against okapi": {"judged": 8, "refused": 0, "unparsable": 0, "missing": 0}}
    assert jury["notes"]["order"].startswith("50%")
    assert "| zebra against okapi | 4    | 0    | 0      | 100%  |" in capsys.readouterr().out
    page = (tmp_path / "p/report.html").read_text()
    assert "good it is" in page and "poor yellow" in page and page.count("<article") == 4


def test_a_judge_that_always_says_first_finds_all_equal(two, tmp_path):
    with Unruly(lambda body, n: '{"reason": "so", "score": 1}') as unruly:
        (jury,) = compare(tmp_path / "p", unruly.url, two)["juries"]
    assert [(r["wins"], r["ties"], r["losses"]) for r in jury["ratings"]] == [(0, 4, 0)] * 2
    assert [r["rating"] for r in jury["ratings"]] == pytest.approx([MEAN, MEAN])
    assert jury["notes"]["order"].startswith("100%")


def test_the_second_time_costs_nothing_and_a_new_answer_is_judged_anew(two, tmp_path):
    out = tmp_path / "p"
    with Unruly(prefers("good")) as unruly:
        first = compare(out, unruly.url, two)
        assert len(unruly.asked) == 8
        assert compare(out, unruly.url, two) == first and len(unruly.asked) == 8
        # The verdicts gone, the judge's words are still there.
        shutil.rmtree(out / "judged")
        assert compare(out, unruly.url, two) == first and len(unruly.asked) == 8
        shutil.rmtree(tmp_path / "x/red")
        system(tmp_path / "x", "better", ("red",))
        compare(out, unruly.url, two)
        assert len(unruly.asked) == 10


def test_an_interrupted_comparison_goes_on(two, tmp_path):
    out = tmp_path / "p"
    with Unruly(lambda body, n: 500 if "green" in json.dumps(body) else prefers("good")(body, n)) as unruly:
        with pytest.raises(InputError, match="not judged: green: .*500.*same command again"):
            compare(out, unruly.url, two)
        unruly.answer = prefers("good")
        before = len(unruly.asked)
        assert compare(out, unruly.url, two)["juries"][0]["pairs"][0]["wins"] == 4
        assert len(unruly.asked) == before + 2


def test_two_shards_make_the_same_report(two, tmp_path):
    with Unruly(prefers("poor")) as unruly:
        whole = compare(tmp_path / "whole", unruly.url, two)
        assert compare(tmp_path / "p", unruly.url, two, "--shard", "1/2")["juries"][0]["pairs"][0]["losses"] == 2
        assert compare(tmp_path / "p", unruly.url, two, "--shard", "0/2") == whole


def test_a_pair_counts_only_if_both_orders_could_be_read(two, tmp_path):
    def answer(body, n):
        first = order_of(body)[0]
        if "Draw a red" in json.dumps(body):
            return "I'm sorry, but I can't compare these." if first == "good" else '{"score": 3}'
        return '{"score": 7}' if "blue" in json.dumps(body) and first == "poor" else prefers("good")(body, n)

    with Unruly(answer) as unruly:
        (jury,) = compare(tmp_path / "p", unruly.url, two)["juries"]
    assert jury["counts"]["zebra against okapi"] == {"judged": 6, "refused": 1, "unparsable": 1, "missing": 0}
    assert (jury["pairs"][0]["wins"], jury["pairs"][0]["ties"], jury["pairs"][0]["losses"]) == (2, 0, 0)


def test_a_judge_that_refuses_all_is_reported_as_such(two, tmp_path):
    with Unruly(lambda body, n: "I'm sorry, but I can't compare these.") as unruly:
        (jury,) = compare(tmp_path / "p", unruly.url, two)["juries"]
    assert jury["counts"]["zebra against okapi"]["refused"] == 8 and jury["ratings"] == jury["pairs"] == []


def test_what_is_not_there_is_left_out_or_loses(tmp_path):
    systems = ["--a", str(system(tmp_path / "x", "good")), "--b", str(system(tmp_path / "y", "poor", ("red", "blue")))]
    # An answer of nothing is an answer, and loses to any other without a question.
    (tmp_path / "y/blue/answer.json").write_text('{"parts": []}')
    with Unruly(prefers("good")) as unruly:
        (jury,) = compare(tmp_path / "p", unruly.url, systems)["juries"]
        assert len(unruly.asked) == 2
        assert jury["counts"]["x against y"] == {"judged": 2, "refused": 0, "unparsable": 0, "missing": 2}
        assert jury["pairs"][0]["wins"] == 2
        (jury,) = compare(tmp_path / "p", unruly.url, systems, "--absent")["juries"]
        assert len(unruly.asked) == 2
    assert jury["counts"]["x against y"]["missing"] == 6 and jury["pairs"][0]["wins"] == 4
    # One system alone does not decide which requests count: nothing is said where both are silent.
    (tmp_path / "x/blue/answer.json").write_text('{"parts": []}')
    with Unruly(prefers("good")) as unruly:
        (jury,) = compare(tmp_path / "p", unruly.url, systems, "--absent")["juries"]
    assert (jury["pairs"][0]["wins"], jury["pairs"][0]["ties"]) == (3, 1)


def test_three_systems(two, tmp_path):
    rank_of = {"good": 0, "fair": 1, "poor": 2}

    def answer(body, n):
        first, second = (rank_of[word] for word in order_of(body))
        return json.dumps({"score": 1 if first < second else 3})

    with Unruly(answer) as unruly:
        (jury,) = compare(tmp_path / "p", unruly.url, [*two, "--c", str(system(tmp_path / "z", "fair"))])["juries"]
        assert len(unruly.asked) == 3 * 4 * 2
    assert [(r["system"], r["wins"], r["losses"]) for r in jury["ratings"]] == [("zebra", 8, 0), ("z", 4, 4), ("okapi", 0, 8)]
    assert sum(r["rating"] for r in jury["ratings"]) == pytest.approx(3 * MEAN)


def test_the_own_model_compares(two, tmp_path):
    out = tmp_path / "p"
    pairs.main([TOY, "--out", str(out), *two, "--judge", "self", "--device", "cpu"])
    figures.main(["--out", str(out), "--draws", "50"])
    (jury,) = json.loads((out / "report.json").read_text())["juries"]
    assert jury["judge"].startswith("self") and jury["counts"]["zebra against okapi"]["judged"] == 8


def test_bad_input_is_one_line(two, tmp_path):
    out = ["--out", str(tmp_path / "p")]
    judge = ["--judge", "self"]
    with pytest.raises(InputError, match="two systems at least"):
        pairs.main([TOY, *out, *judge, *two[:2]])
    with pytest.raises(InputError, match="--n 0: must be 1 or more"):
        pairs.main([TOY, *out, *judge, *two, "--n", "0"])
    with pytest.raises(InputError, match="there is a system zebra already"):
        pairs.main([TOY, *out, *judge, *two[:2], "--b", f"zebra={tmp_path / 'y'}"])
    with pytest.raises(InputError, match="is no name for a system"):
        pairs.main([TOY, *out, *judge, *two[:2], "--b", f"../up={tmp_path / 'y'}"])
    with pytest.raises(InputError, match="no answers there"):
        pairs.main([TOY, *out, *judge, *two[:2], "--b", str(tmp_path / "none")])
    run = tmp_path / "other"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"benchmark": "geneval", "items": "0", "n": 3}))
    with pytest.raises(InputError, match="holds answers to geneval, not to"):
        pairs.main([TOY, *out, *judge, *two[:2], "--b", str(run)])
    (run / "run.json").write_text(json.dumps({"benchmark": TOY, "items": "0", "n": 3}))
    with pytest.raises(InputError, match="its items were others"):
        pairs.main([TOY, *out, *judge, *two[:2], "--b", str(run)])
    with pytest.raises(InputError, match="no run in it"):
        figures.main([*out])
    with Unruly(prefers("good")) as unruly:
        compare(tmp_path / "p", unruly.url, two)
        with pytest.raises(InputError, match="holds another run"):
            compare(tmp_path / "p", unruly.url, [*two, "--c", f"more={tmp_path / 'x'}"])
        (tmp_path / "x/green/a.png").write_bytes(b"nothing")
        with pytest.raises(InputError, match=r"not judged: green: .*a.png"):
            compare(tmp_path / "q", unruly.url, two)
        assert len(list((tmp_path / "q/judged").rglob("*.json"))) == 3 + 1
    with pytest.raises(InputError, match="nothing is compared"):
        shutil.rmtree(tmp_path / "p/judged")
        figures.main([*out])
