"""Cleaning by rules, and a model's rewrite: what it may not do is refused, and the page then stays as it was."""

import re

import pytest

pytest.importorskip("py3langid", reason="curate/requirements.txt is not installed")
import realpages
from scripted import Scripted, picture

from curate.models import Model
from curate.page import Page
from curate.rewrite import Clean, Rewrite, cleaned, numbers_of, with_marks
from curate.text import Language
from evaluate.judges import Unanswered

FIRST = picture("1.png")
SECOND = picture("2.png")
TEXT = """# Paper boat

Share this page! You need 1 sheet of paper and about 10 minutes.

1. Fold the sheet of paper in half, from top to bottom.
2. Fold both upper corners to the middle, 12.5 cm deep.

[[picture 1]]

3. Turn the lower edges up on both sides.

[[picture 2]]

4. Pull the sides apart, and the boat is ready."""
PARTS = tuple(
    FIRST if part == "1" else SECOND if part == "2" else part.strip() for part in re.split(r"\[\[picture (\d)\]\]", TEXT)
)
PAGE = Page("a", title="Paper boat", language="en", parts=PARTS)
GOOD = TEXT.replace("Share this page! ", "").replace("in half, from top to bottom", "in half from the top to the bottom")


def rewritten(answer: str | Unanswered, **fields) -> Page:
    return Rewrite(Scripted(lambda asked: answer), **fields)(PAGE)


def test_a_cleaning_is_taken():
    page = rewritten(GOOD)
    assert page.notes == {"Rewrite": "rewritten"}
    assert with_marks(page) == GOOD
    assert page.pictures == [FIRST, SECOND]


def test_the_model_sees_the_page_with_marks():
    model = Scripted(GOOD)
    Rewrite(model)(PAGE)
    assert model.asked[0][0].endswith(TEXT)


@pytest.mark.parametrize(
    "answer, why",
    [
        (GOOD.replace("[[picture 2]]", ""), "pictures: 2 became 1"),
        (GOOD.replace("[[picture 2]]", "[[picture 1]]"), "pictures: 2 became 2, or changed places"),
        (GOOD.replace("[[picture 2]]", "[[picture 2]]\n\n[[picture 3]]"), "pictures: 2 became 3"),
        (
            GOOD.replace("picture 1]", "picture 0]").replace("picture 2]", "picture 1]").replace("picture 0]", "picture 2]"),
            "pictures",
        ),
        (f"{GOOD}\n\n![A boat](boat.png)", "pictures: one is invented"),
        (GOOD.replace("10 minutes", "15 minutes"), "numbers: lost 10; new 15"),
        (GOOD.replace("12.5 cm", "some cm"), "numbers: lost 12.5; new none"),
        (GOOD.replace("ready.", "ready. It carries 3 passengers."), "numbers: lost none; new 3"),
        (GOOD.replace("3. Turn the lower edges up on both sides.", ""), "steps: 4 became 3"),
        (GOOD.replace("Turn the lower edges up on both sides.", "Go on as before."), "steps: lost '3. Turn the lower edges up"),
        ("[[picture 1]] [[picture 2]] 1 10 12.5", "length: "),
        (GOOD + " It is a very nice boat indeed." * 30, "length: "),
        (GOOD.replace("ready.", "ready: https://boats.example.com"), "address: https://boats.example.com"),
        (GOOD.replace("3. Turn", "## One\n\n## Two\n\n## Three\n\n3. Turn"), "headings: invented"),
        ("", "pictures: 2 became 0"),
    ],
)
def test_what_a_rewrite_may_not_do(answer, why):
    page = rewritten(answer)
    assert page.notes["Rewrite"].startswith(f"refused: {why}")
    assert page.parts == PAGE.parts


def test_a_translation_is_refused():
    german = """# Papierboot

Man braucht 1 Blatt Papier und ungefähr 10 Minuten.

1. Das Blatt Papier in der Hälfte falten, von oben nach unten.
2. Die beiden oberen Ecken zur Mitte falten, 12.5 cm tief.

[[picture 1]]

3. Die unteren Kanten auf beiden Seiten nach oben klappen.

[[picture 2]]

4. Die Seiten auseinanderziehen, und das Boot ist fertig."""
    assert rewritten(german).notes == {"Rewrite": "refused: language: en became de"}


def test_without_an_answer_the_page_stays():
    assert rewritten(Unanswered("the server is gone")).notes == {"Rewrite": "unanswered: the server is gone"}
    assert rewritten(GOOD, most=10).notes == {"Rewrite": "left: too long"}
    assert Rewrite()(PAGE) is PAGE
    assert Rewrite(Model())(PAGE) is PAGE


def test_numbers():
    assert numbers_of("1. Take 1,000 g\n2. or ½ of 3/4, at 12:30") == numbers_of("- Take 1000 g\n- or ½ of 3/4, at 12:30")
    assert numbers_of("加 200 毫升") == {"200": 1}


def test_cleaning_by_rules():
    code = "```html\n<b>x</b> [y](https://a.org)\n```"
    text = f'A <b class="x">bold</b> [link](https://a.org/b) &amp; <!-- note --> https://c.org/d\n\n\n\nend   \n\n{code}'
    assert cleaned(text) == f"A bold link &\n\nend\n\n{code}"
    assert Clean()(Page("a", parts=("1 < 2 and 3 > 2",))).texts == ["1 < 2 and 3 > 2"]


# --------------------------------------------------------------------------------------------------------------- real pages


def mutations(text: str) -> dict[str, str]:
    """Rewrites of a page of which none may pass; those that a page has no place for are left out."""
    steps = list(re.finditer(r"^\d+\. .{30,}$", text, re.M))
    numbers = list(re.finditer(r"(?<=[a-z] )\d{2,}(?= [a-z])|(?<=\d)0(?=\s?(?:g|ml|克|毫升|分钟))", text))
    marks = re.findall(r"\[\[picture \d+\]\]", text)
    found = {"a mark lost": text.replace(marks[0], "")}
    if steps:
        middle = steps[len(steps) // 2]
        found["a step lost"] = text[: middle.start()] + text[middle.end() :]
    if numbers:
        found["a number changed"] = text[: numbers[0].start()] + "77" + text[numbers[0].end() :]
    if len(marks) > 1:
        swapped = text.replace(marks[0], "@@").replace(marks[1], marks[0]).replace("@@", marks[1])
        found["pictures swapped"] = swapped
    found["half of it"] = text[: len(text) // 3] + "\n\n" + "\n\n".join(m for m in marks if m not in text[: len(text) // 3])
    found["an address"] = f"{text}\n\nSee https://spam.example.com/x"
    return found


def test_real_pages(shared):
    """On every eighth page: the page itself and its cleaning by rules pass, and every mutation is refused."""
    pages = realpages.read(shared, pictures=False)[::8]
    tried = dict.fromkeys(("a mark lost", "a step lost", "a number changed", "pictures swapped", "half of it", "an address"), 0)
    for page in pages:
        page = Language("en,zh,ja")(page)
        text = with_marks(page)
        assert Rewrite(Scripted(text))(page).notes["Rewrite"] in ("rewritten", "left: too long")
        for name, answer in mutations(text).items():
            note = Rewrite(Scripted(answer))(page).notes["Rewrite"]
            assert note != "rewritten", (page.id, name)
            tried[name] += 1
    assert all(count >= 10 for count in tried.values()), tried
