"""The trust card: judges with known faults must have them on their card, and figures are those computed by hand."""

import hashlib
import json
import random
import re
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from checkpoint import InputError
from evaluate import raters, trust
from evaluate.figures import bootstrap
from evaluate.judges import Question, Reply
from evaluate.oracle import Oracle, laid_out, steps_in_place
from evaluate.rankings import aggregate, goes_by_place
from evaluate.spoiled import BARE, BLANK, PADDED, SPOILINGS, STRANGE, items
from sketchbook.checker import claims
from unruly import Unruly

N = 10  # items; every second one is a lesson


@pytest.fixture(scope="module")
def few():
    return items(N)


class Fake:
    """A judges.Backend that goes by one rule: `first` of two answers, `score` of one, both from 0 to 1."""

    def __init__(self, name: str, first=lambda a, b: 0.5, score=lambda answer: 0.5):
        self.name = name
        self.identity = {"fake": name, "weights": hashlib.sha256(name.encode()).hexdigest()}
        self.first = first
        self.score = score
        self.asked: list[Question] = []

    def ask(self, question: Question) -> Reply:
        self.asked.append(question)
        said = laid_out(question.parts)
        if "Second answer:" in said:
            share = 1 - self.first(said["First answer:"], said["Second answer:"])
        else:
            share = self.score(said.get("Answer:", question.parts[1:-1]))
        return Reply("", value={key: low + share * (high - low) for key, (low, high) in question.keys.items()}, model=self.name)


def length(answer: list) -> int:
    return sum(len(part) for part in answer if isinstance(part, str))


def lot(*answers: list) -> float:
    """From 0 to 1, the same for the same answers. Of several intervals of 95 % one may miss; with these lots none does."""
    parts = [part if isinstance(part, str) else part.tobytes().hex() for answer in answers for part in [*answer, "/"]]
    return int(hashlib.sha256(json.dumps(["by lots", *parts]).encode()).hexdigest()[:8], 16) / 2**32


def make(monkeypatch, out: Path, backend, *more: str, n: int = N) -> dict:
    monkeypatch.setattr(trust, "load", lambda args: backend)
    trust.main(["--judge", "oracle", "--out", str(out), "--n", str(n), "--draws", "100", *more])
    return json.loads((out / "trust.json").read_text())


def values(card: dict) -> dict[str, float]:
    return {name: figure["value"] for name, figure in card["figures"].items()}


# ------------------------------------------------------------------------------------------------------------------- items


def test_items_follow_from_number_and_seed(few):
    for a, b in zip(items(4), few[:4], strict=True):
        assert a.id == b.id and a.copies.keys() == b.copies.keys()
        for name, copy in a.copies.items():
            assert copy.texts == b.copies[name].texts
            assert [p.tobytes() for p in copy.pictures] == [p.tobytes() for p in b.copies[name].pictures]
    assert len({item.id for item in few}) == N and {item.id for item in items(2, seed=1)}.isdisjoint(i.id for i in few)
    assert [item.kind == "lesson" for item in few] == [k % 2 == 0 for k in range(N)]


def differs(a: Image.Image, b: Image.Image) -> bool:
    return ImageChops.difference(a, b).getbbox() is not None


def test_every_copy_is_what_its_name_says(few):
    for item in few:
        clean = item.clean
        n = len(clean.pictures)
        several = {"shuffled pictures", "missing picture"} if n > 1 else set()
        steps = {"swapped step"} if item.kind == "lesson" else set()
        assert item.copies.keys() & SPOILINGS.keys() == several | steps | {"wrong colour", "strange picture"}
        for name in ("wrong colour", "strange picture"):
            copy = item.copies[name]
            assert copy.texts == clean.texts
            assert sum(differs(a, b) for a, b in zip(copy.pictures, clean.pictures, strict=True)) == 1
        if several:
            shuffled = item.copies["shuffled pictures"]
            assert shuffled.texts == clean.texts and sorted(map(id, shuffled.pictures)) == sorted(map(id, clean.pictures))
            assert any(differs(a, b) for a, b in zip(shuffled.pictures, clean.pictures, strict=True))
            missing = item.copies["missing picture"]
            assert len(missing.pictures) == n - 1 == len(missing.texts) - 1
            # Nothing stands behind the last picture of an answer that ends on one.
            assert " ".join(filter(None, missing.texts)) == " ".join(filter(None, clean.texts))
        if steps:
            swapped = item.copies["swapped step"]
            (k, _) = (k for k in range(n) if swapped.texts[k] != clean.texts[k])
            assert swapped.texts[k : k + 2] == clean.texts[k : k + 2][::-1]
            assert [id(p) for p in swapped.pictures[k : k + 2]] == [id(p) for p in clean.pictures[k : k + 2][::-1]]
        assert item.copies[BARE].pictures == [] and len(item.copies[BARE].texts) == 1
        assert {p.getcolors()[0][1] for p in item.copies[BLANK].pictures} == {(255, 255, 255)}
        assert all(differs(a, b) for a, b in zip(item.copies[STRANGE].pictures, clean.pictures, strict=True))
        # What is padded claims the same as before.
        for before, after in zip(clean.texts, item.copies[PADDED].texts, strict=True):
            assert len(after) > len(before) + 100 and claims(after) == claims(before)


# ------------------------------------------------------------------------------------------------------------------ judges


def test_the_oracle_ranks_right(tmp_path, monkeypatch):
    card = make(monkeypatch, tmp_path, Oracle())
    found = values(card)
    for name in (*SPOILINGS, "all"):
        assert found[f"{name}, by scores"] >= 0.97 and found[f"{name}, by pairs"] >= 0.97
    assert found["goes by the place"] == 0 and found["takes the first"] == 0.5
    assert found["prefers the longer, by scores"] == found["prefers the longer, by pairs"] == 0.5
    assert found["prefers blank pictures, by pairs"] == found["prefers strange pictures, by pairs"] == 0.5
    assert (found["same score"], found["score differs by"], found["same choice"]) == (1, 0, 1)
    assert "No ranking is wrong" in (tmp_path / "trust.html").read_text()
    assert "better than a coin" in card["summary"] and "no better" not in card["summary"]
    several = sum("missing picture" in row["pairs"] for row in card["rows"])
    assert card["figures"]["all, by pairs"]["n"] == 2 * N + 2 * several + N // 2


def test_the_oracle_says_nothing_of_pictures_without_words():
    picture = Image.new("RGB", (64, 64), "white")
    rating = Question("fields", ["How sharp?", picture, "JSON"], {"score": (1, 5)})
    assert Oracle().ask(rating).value == {"score": 3}
    assert Oracle().ask(Question("yes", [picture, "Is it red?"], {})).value == {"yes": 0.5}
    pair = ["Which?", "First answer:", picture, "Second answer:", picture, "JSON"]
    assert Oracle().ask(Question("fields", pair, {"score": (1, 3)})).value == {"score": 2}


def test_the_oracle_knows_the_order_of_steps():
    asked = ["How do I draw a house?"]
    walls, roof, door = ("Draw a red square for the walls.", "Put a blue triangle on top for the roof.",
                         "Add a brown rectangle for the door.")  # fmt: skip
    assert steps_in_place(asked, [walls, roof, door]) == 1
    assert steps_in_place(asked, [roof, walls, door]) == pytest.approx(1 / 3)
    assert steps_in_place(asked, ["Good morning."]) == 1


def test_who_always_takes_the_first_ranks_nothing_by_pairs(tmp_path, monkeypatch):
    found = values(make(monkeypatch, tmp_path, Fake("first", first=lambda a, b: 1.0)))
    assert found["takes the first"] == found["goes by the place"] == 1
    assert found["all, by pairs"] == 0.5 and found["all, by pairs, ties"] == 1
    # It gives all the same score as well, but where a rule decides.
    assert found["all, by scores"] == 0.5 and found["all, by scores, ties"] == 1


def test_who_prefers_long_answers_has_it_on_the_card(tmp_path, monkeypatch):
    judge = Fake("long", lambda a, b: float(length(a) > length(b)), lambda answer: min(1.0, length(answer) / 10_000))
    found = values(make(monkeypatch, tmp_path, judge))
    assert found["prefers the longer, by scores"] == found["prefers the longer, by pairs"] == 1
    # Where the copy is as long as the clean one, "longer" is no in both orders: it takes the second twice.
    assert found["wrong colour, by pairs, ties"] == found["wrong colour, by scores, ties"] == 1


def test_who_prefers_pictures_has_it_on_the_card(tmp_path, monkeypatch):
    def pictures(answer: list) -> int:
        return sum(not isinstance(part, str) for part in answer)

    found = values(make(monkeypatch, tmp_path, Fake("pictures", lambda a, b: 0.5 + 0.5 * (pictures(a) > pictures(b)))))
    assert found["prefers blank pictures, by pairs"] == found["prefers strange pictures, by pairs"] == 1
    assert found["missing picture, by pairs"] == 1 and found["wrong colour, by pairs"] == 0.5


def test_who_guesses_is_no_better_than_a_coin(tmp_path, monkeypatch):
    card = make(monkeypatch, tmp_path, Fake("lots", lot, lot), n=24)
    for name in ("all, by scores", "all, by pairs", "goes by the place", "takes the first"):
        figure = card["figures"][name]
        assert figure["low"] < 0.5 < figure["high"] and 0.05 < figure["high"] - figure["low"] < 0.4
    assert card["summary"].count("no better than a coin") == 2
    page = (tmp_path / "trust.html").read_text()
    assert page.count("<article") == 40 and page.count('src="data:image/png') > 100
    assert not re.search(r"https?:|<script", page) and "width=device-width" in page


class Fickle(Fake):
    """Every time another answer."""

    def ask(self, question: Question) -> Reply:
        reply = super().ask(question)
        share = (len(self.asked) % 7) / 7
        return Reply(
            "", value={key: low + (high - low) * share for key, (low, high) in question.keys.items()}, model=reply.model
        )


def test_a_fickle_judge_is_not_repeatable(tmp_path, monkeypatch):
    found = values(make(monkeypatch, tmp_path, Fickle("fickle"), n=4))
    assert found["same score"] < 0.5 and found["score differs by"] > 0.5


def test_the_bundled_miniature_has_a_card_of_its_own(tmp_path):
    """Its scores are probabilities, so they differ from answer to answer; and it draws no lots."""
    trust.main(["--judge", "self", "--device", "cpu", "--out", str(tmp_path), "--n", "2", "--draws", "50"])
    card = json.loads((tmp_path / "trust.json").read_text())
    assert card["judge"].startswith("self") and card["counts"]["pairs"]["judged"] == card["figures"]["takes the first"]["n"] + 2
    assert card["figures"]["same score"]["value"] == 1 and card["figures"]["all, by scores, ties"]["value"] < 1
    assert "deterministic" in (tmp_path / "trust.md").read_text()


# ----------------------------------------------------------------------------------------------------------------- figures


def row(clean, copy, pair, again) -> dict:
    criteria = ("T-Com", "I-Com", "I-Co", "I-Q", "IT-Co")
    scores = {"clean": dict(zip(criteria, clean, strict=True)), "wrong colour": dict(zip(criteria, copy, strict=True))}
    return {"scores": scores, "pairs": {"wrong colour": pair}, "again": again}


def test_figures_by_hand():
    same = {"T-Com": 3, "I-Com": 3, "I-Co": 3, "I-Q": 3, "IT-Co": 4}
    rows = [
        # Means 3.2 and 3.0; sure of the clean one in one order by more than of the spoiled one in the other.
        row([3, 3, 3, 3, 4], [3, 3, 3, 3, 3], [0.9, 0.4], {"scores": same, "pair": 0.8}),
        # Without the criterion that the judge could not tell of the copy, both have 3. It takes the first twice, as surely.
        row([3, 5, 3, 3, 3], [3, None, 3, 3, 3], [0.7, 0.7], {"scores": same | {"T-Com": 5, "I-Com": None}, "pair": 0.2}),
        # The copy is above the clean one, either way. Nothing was said when it was asked again.
        row([1, 1, 1, 1, 1], [2, 1, 1, 1, 1], [0.2, 0.6], {"scores": dict.fromkeys(same), "pair": None}),
        # Nothing can be told.
        row([None] * 5, [1] * 5, [None, 0.3], {"scores": same, "pair": 0.5}),
    ]
    found = aggregate(rows)
    assert found["wrong colour, by scores"][:2] == (0.5, 3) and found["wrong colour, by scores, ties"][:2] == (1 / 3, 3)
    assert found["wrong colour, by pairs"][:2] == (0.5, 3) and found["wrong colour, by pairs, ties"][:2] == (1 / 3, 3)
    assert found["all, by pairs"] == found["wrong colour, by pairs"]
    # Of six answers 0.9, 0.7, 0.7 and 0.6 take the first; of three pairs one goes by the place.
    assert found["takes the first"][:2] == (4 / 6, 6) and found["goes by the place"][:2] == (1 / 3, 3)
    # Nine scores were told twice. T-Com went from 3 to 5, IT-Co from 3 to 4.
    assert found["same score"][:2] == (7 / 9, 9) and found["score differs by"][:2] == (3 / 9, 9)
    assert found["same choice"][:2] == (0.5, 2)
    assert found["prefers the longer, by pairs"].n == found["swapped step, by scores"].n == 0


def test_the_interval_covers_what_is_true_on_about_95_of_100_cards():
    chance = random.Random(0)

    def guessed() -> dict:
        scores = [[chance.randint(1, 5) for _ in range(5)] for _ in range(2)]
        return row(*scores, [chance.random(), chance.random()], {"scores": {}, "pair": None})

    covered = 0
    for card in range(60):
        figure = bootstrap(aggregate, [guessed() for _ in range(40)], 100, card)["wrong colour, by pairs"]
        covered += figure.low <= 0.5 <= figure.high
    assert 52 <= covered < 60


@pytest.mark.parametrize("said, share", [((0.9, 0.8), 1), ((0.1, 0.2), 1), ((0.9, 0.2), 0), ((0.5, 0.9), 0.5), ((0.5, 0.5), 0)])
def test_who_goes_by_the_place(said, share):
    assert goes_by_place(*said) == share


# ------------------------------------------------------------------------------------------------------------------ resume


class Interrupted(Fake):
    """Ends the program at its n-th question."""

    left = 50

    def ask(self, question: Question) -> Reply:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().ask(question)


def test_an_interrupted_card_goes_on_and_asks_nothing_twice(tmp_path, monkeypatch):
    whole = Fake("lots", lot, lot)
    expected = make(monkeypatch, tmp_path / "whole", whole, n=4)
    with pytest.raises(KeyboardInterrupt):
        make(monkeypatch, tmp_path / "cut", broken := Interrupted("lots", lot, lot), n=4)
    again = Fake("lots", lot, lot)
    assert make(monkeypatch, tmp_path / "cut", again, n=4) == expected
    assert len(broken.asked) == 50 and len(again.asked) == len(whole.asked) - 50
    # With more items only those are asked about that are new.
    more = Fake("lots", lot, lot)
    assert make(monkeypatch, tmp_path / "cut", more, n=6)["rows"][:4] == expected["rows"]
    asked = {json.dumps(question.parts, default=lambda p: p.tobytes().hex()) for question in whole.asked}
    assert more.asked and all(json.dumps(q.parts, default=lambda p: p.tobytes().hex()) not in asked for q in more.asked)


# ------------------------------------------------------------------------------------------------------------------ server


def server_card(out: Path, answer, *more: str) -> dict:
    with Unruly(answer) as unruly:
        options = ["--judge", unruly.url, "--judge-model", "judge-1", "--tries", "1", "--n", "2", "--draws", "50"]
        try:
            trust.main([*options, "--out", str(out), *more])
        finally:
            server_card.asked = len(unruly.asked)
    return json.loads((out / "trust.json").read_text())


def test_a_server_has_a_card_with_its_temperature(tmp_path):
    card = server_card(tmp_path, lambda body, n: '{"score": 1}')
    assert card["figures"]["goes by the place"]["value"] == 1 and card["settings"]["size"] == 256
    assert "temperature 0, seed 0" in (tmp_path / "trust.md").read_text()


def test_what_a_server_refuses_or_garbles_is_counted(tmp_path):
    def answer(body, n):
        if "Second answer" in json.dumps(body):
            return "Perhaps."
        return "I'm sorry, I can't." if "Are they of one world" in json.dumps(body) else '{"score": 4}'

    card = server_card(tmp_path, answer)
    assert card["counts"]["pairs"]["judged"] == 0 and card["counts"]["pairs"]["unparsable"] > 20
    assert card["counts"]["scores"]["refused"] > 0 and card["counts"]["scores"]["judged"] > 0
    assert card["figures"]["all, by pairs"] == {"value": None, "n": 0, "low": None, "high": None}
    assert card["figures"]["all, by scores"]["value"] == 0.5
    assert "it ranks nothing" in card["summary"]


def test_a_server_that_fails_on_one_item_costs_that_one(tmp_path):
    texts = items(2)[1].clean.texts[0]
    with pytest.raises(InputError, match="not judged: .*same command again"):
        server_card(tmp_path, lambda body, n: 400 if texts in json.dumps(body) else '{"score": 3}')
    assert json.loads((tmp_path / "trust.json").read_text())["items"] == 1


# ------------------------------------------------------------------------------------------------------------------ people

PEOPLE = {
    # People's means of A are 1, 2, 3, 4, and of B 1, 1, 2, 3.
    "00001": {"prompt": "a red cat", "models": {"A": [1, 1, 1], "B": [1, 1, 1]}},
    "00002": {"prompt": "a blue cup", "models": {"A": [1, 2, 3], "B": [1, 1, 1]}},
    "00003": {"prompt": "two fish", "models": {"A": [3, 3, 3], "B": [2, 2, 2]}},
    "00004": {"prompt": "a boat", "models": {"A": [4, 4, 4], "B": [3, 2, 4]}},
}
SAID = {"A": [1, 2, 4, 3], "B": [1, 2, 3, 4]}


@pytest.fixture
def published(tmp_path) -> Path:
    """A file and a folder in the published layout; each picture has a colour that Seeing reads."""
    folder = tmp_path / "GenAI-Image-527"
    for model, said in SAID.items():
        (folder / model).mkdir(parents=True)
        for id, score in zip(PEOPLE, said, strict=True):
            Image.new("RGB", (16, 16), (50 * score, 0, 0)).save(folder / model / f"{id}.jpeg")
    (folder / "genai_image.json").write_text(json.dumps(PEOPLE))
    return folder


class Seeing(Fake):
    """Rates a picture of GenAI-Bench by its red."""

    def ask(self, question: Question) -> Reply:
        if "Text:" not in question.parts:
            return super().ask(question)
        self.asked.append(question)
        (picture,) = question.pictures
        return Reply("", value={"score": round(picture.getpixel((8, 8))[0] / 50)}, model=self.name)


def test_agreement_with_people_by_hand(published, tmp_path, monkeypatch):
    human = ["--human", str(published / "genai_image.json")]
    judge = Seeing("seeing")
    card = make(monkeypatch, tmp_path / "card", judge, *human, "--pictures", str(published), n=2)
    found = {name: (figure["value"], figure["n"]) for name, figure in card["people"]["figures"]["judge"].items()}
    # A: one of six pairs stands the wrong way. B: a tie of people, five pairs right of five.
    assert found["A, Spearman"] == (pytest.approx(0.8), 4) and found["A, Kendall"] == (pytest.approx(4 / 6), 4)
    assert found["B, Spearman"] == (pytest.approx(4.5 / 22.5**0.5), 4)
    assert found["B, Kendall"] == (pytest.approx(5 / 30**0.5), 4)
    # Within prompts: of the first people say the same; of the second the judge does; then right, then wrong.
    assert found["within prompts, Kendall"] == (0.0, 3)
    # The judge finds both models as good, people do not.
    assert found["models' means, Spearman"] == (0.0, 2)
    # Of the first two prompts both models have the same picture: a question less.
    assert card["people"]["counts"]["judged"] == 8 and sum("Text:" in q.parts for q in judge.asked) == 6
    for figure in card["people"]["figures"]["judge"].values():
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert "| judge, Kendall" in (tmp_path / "card" / "trust.md").read_text()

    # Without pictures the ceiling alone, and without people a sentence.
    card = make(monkeypatch, tmp_path / "card", judge, *human, n=2)
    assert card["people"]["figures"].keys() == {"a rater"} and "none were given" in (tmp_path / "card/trust.html").read_text()
    assert make(monkeypatch, tmp_path / "card", judge, n=2)["people"] is None
    assert "no ratings by people were given" in (tmp_path / "card/trust.html").read_text()


def test_agreement_of_raters_by_hand(tmp_path):
    file = tmp_path / "ratings.json"
    ratings = {"a": [1, 1, 2], "b": [2, 3, 1], "c": [3, 2, 3]}
    file.write_text(json.dumps({id: {"prompt": id, "models": {"A": three}} for id, three in ratings.items()}))
    rated, left_out = raters.read_ratings(file)
    found = raters.agreement_of_raters(raters.by_raters(rated))
    # Each rater and the mean of the others: 1 2 3 and 1.5 2 2.5; 1 3 2 and 1.5 1.5 3; 2 1 3 and 1 2.5 2.5. The first are in
    # one order. In ranks the second are 1 3 2 and 1.5 1.5 3, the third 2 1 3 and 1 2.5 2.5: no correlation in either.
    assert found["A, Spearman"][:2] == (pytest.approx(1 / 3), 3)
    # Of three pairs of pictures: all in order; one in order, one not, one a tie; the same again.
    assert found["A, Kendall"][:2] == (pytest.approx(1 / 3), 3)
    # A prompt with one picture orders nothing.
    assert found["within prompts, Spearman"].n == 0 and not left_out


def test_the_published_ratings(shared):
    rated, left_out = raters.read_ratings(shared / "genai527" / "genai_image.json")
    assert len(rated) == 527 and sum(len(one.ratings) for one in rated) == 527 * 6 - 2
    assert left_out == ["00232 of DALLE_3 (5, 41, 4)", "00253 of DeepFloyd_I_XL_v1 (3, 3, 33)"]
    found = raters.agreement_of_raters(raters.by_raters(rated[:100]))
    assert 0.5 < found["all pictures, Kendall"].value < found["all pictures, Spearman"].value < 0.95
    assert found["all pictures, Spearman"].n == 600


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("content, said", [
    ("{", "not valid JSON"), ("[]", "must be"), ("{}", "must be"), ('{"1": []}', "'1' is not as it should be"),
    ('{"1": {"prompt": "x", "models": {"A": [1, 2]}}}', "'1' is not as it should be"),
    ('{"1": {"prompt": "x", "models": {"A": [1, 2, "3"]}}}', "'1' is not as it should be"),
    ('{"1": {"prompt": "x", "models": {"A": [1, 2, true]}}}', "'1' is not as it should be"),
    ('{"1": {"prompt": "x", "models": {"A": [1, 2, NaN]}}}', "'1' is not as it should be"),
    ('{"../1": {"prompt": "x", "models": {"A": [1, 2, 3]}}}', "'../1' is not as it should be"),
    ('{"1": {"models": {"A": [1, 2, 3]}}}', "'1' is not as it should be"),
])  # fmt: skip
def test_bad_ratings_are_one_line(tmp_path, content, said):
    file = tmp_path / "ratings.json"
    file.write_text(content)
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        trust.main(["--judge", "oracle", "--out", str(tmp_path / "e"), "--human", str(file)])
    assert "\n" not in str(caught.value) and not (tmp_path / "e").exists()


def test_bad_input_is_one_line(published, tmp_path, monkeypatch):
    out = str(tmp_path / "e")
    human = ["--human", str(published / "genai_image.json")]
    for argv, said in [
        (["--judge", "gpt"], "must be self, or the address"),
        (["--judge", "oracle", "--n", "0"], "--n 0: must be 1 or more"),
        (["--judge", "oracle", "--size", "32"], "--size 32: must be 64 or more"),
        (["--judge", "oracle", "--pictures", str(published)], "give --human FILE"),
        (["--judge", "oracle", "--human", str(tmp_path / "none.json")], "none.json"),
        (["--judge", "oracle", *human, "--pictures", str(tmp_path / "none")], "no such folder"),
        (["--judge", "oracle", *human, "--pictures", str(tmp_path)], "as published they lie there as MODEL/ID.jpeg"),
    ]:
        with pytest.raises(InputError, match=re.escape(said)):
            trust.main([*argv, "--out", out])
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match=r"pip install -r evaluate/requirements.txt"):
        trust.main(["--judge", "oracle", *human, "--out", out])


def test_a_broken_picture_is_named_and_the_card_is_made(published, tmp_path, monkeypatch):
    (published / "B" / "00003.jpeg").write_bytes(b"nothing")
    out = tmp_path / "card"
    human = ["--human", str(published / "genai_image.json"), "--pictures", str(published)]
    with pytest.raises(InputError, match="not judged: 00003: .*00003.jpeg"):
        make(monkeypatch, out, Seeing("seeing"), *human, n=2)
    assert json.loads((out / "trust.json").read_text())["people"]["pictures"] == 7


def test_a_folder_belongs_to_one_judge(tmp_path, monkeypatch):
    make(monkeypatch, tmp_path, Fake("one"), n=2)
    with pytest.raises(InputError, match="judged otherwise before"):
        make(monkeypatch, tmp_path, Fake("another"), n=2)


# -------------------------------------------------------------------------------------------------------------------- page


def test_the_page_fits_a_phone_and_a_desk(tmp_path, monkeypatch, visit):
    make(monkeypatch, tmp_path, Fake("lots", lot, lot), n=8)
    for width in (360, 1280):
        page = visit(width)
        page.goto((tmp_path / "trust.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
        assert page.evaluate(broken) == 0 and page.evaluate("document.images.length") > 20
        assert not page.errors and all(url.startswith(("file:", "data:")) for url in page.requests)
