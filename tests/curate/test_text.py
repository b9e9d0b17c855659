"""Rules on words: what each drops and keeps, and what they make of real pages."""

import json
import time

import pytest

pytest.importorskip("py3langid", reason="curate/requirements.txt is not installed")
import realpages
from scripted import picture

from curate.page import Dropped, Page
from curate.reorder import blocks_of
from curate.rewrite import Clean
from curate.text import (
    Adult,
    Boilerplate,
    Language,
    Lengths,
    Personal,
    Repetition,
    WordsPerPicture,
    character_repetition,
    count_words,
    luhn,
    plain,
    word_repetition,
)

ENGLISH = "Heat the oil in a pan and fry the onions until they are soft. Add the rice, stir well, and pour in the hot stock."
CHINESE = "锅中放油，油热后放入葱姜爆香，然后放入切好的肉片翻炒至变色，再加入生抽和盐，炒匀后即可出锅。"


def page(text: str, pictures: int = 0, url: str = "https://www.example.org/a", id: str = "a") -> Page:
    return Page(id, url, "A title", parts=(text, *(picture(f"{k}.jpg") for k in range(pictures))))


def test_words_are_counted_in_both_scripts():
    assert count_words("Don't stir 2.5 cups, please.") == 5
    assert count_words("锅中放油加三个蛋") == pytest.approx(8 / 1.5)
    assert count_words("加 200 ml 水") == pytest.approx(2 + 2 / 1.5)


def test_plain_text_has_neither_code_nor_addresses_nor_marks():
    text = "# Title\n\n1. Open [the menu](https://a.org/x) at https://b.org/y\n\n```js\nlet a = 1\n```\n\n- **bold** `code`"
    assert plain(text).split() == ["Title", "Open", "the", "menu", "at", "bold", "code"]


@pytest.mark.parametrize("text, language", [(ENGLISH, "en"), (CHINESE, "zh")])
def test_the_language_is_said(text, language):
    assert Language()(page(text)).language == language


def test_other_languages_are_dropped():
    german = "Das Öl in einer Pfanne erhitzen und die Zwiebeln darin braten, bis sie weich und goldbraun geworden sind."
    assert Language()(page(german)) == Dropped("language: de")
    assert Language("de")(page(german)).language == "de"
    assert Language(sure=1.1)(page(ENGLISH)).reason.startswith("language unsure: en")


def test_code_does_not_make_a_page_english():
    code = "```\n" + "for item in list: print the item and go on with the next one\n" * 20 + "```"
    assert Language()(page(f"{CHINESE}\n\n{code}")).language == "zh"


@pytest.mark.parametrize(
    "text, reason",
    [(ENGLISH, ""), ("Only four words here.", "too few words: 4"), (ENGLISH * 50, "too many words: 1250"),
     ("a b c d e f g h i j k l", "mean word length: 1.0"), ("锅中放油加三个蛋炒匀", "too few words: 7"), (CHINESE, "")],
)  # fmt: skip
def test_lengths(text, reason):
    result = Lengths(most=1000)(page(text))
    assert result == (Dropped(reason) if reason else page(text))


def test_a_row_of_pictures_is_dropped_and_a_guide_is_not():
    assert WordsPerPicture()(page("Two words.", pictures=2)) == page("Two words.", pictures=2)
    assert WordsPerPicture()(page("Two words.", pictures=3)) == Dropped("words per picture: 1")
    assert isinstance(WordsPerPicture()(page(ENGLISH * 2, pictures=3)), Page)


def test_repetition():
    assert Repetition()(page(ENGLISH)) == page(ENGLISH)
    assert Repetition()(page("Buy this now. " * 60)).reason.startswith("repeated characters")
    assert Repetition()(page("=== >>> 1 | 2 | 3 <<< ===" * 9)).reason.startswith("special characters")
    verses = " ".join(f"{word} and then you stir it for a while" for word in ("onions", "beans", "leeks", "rice"))
    assert Repetition(characters=1)(page(verses)).reason.startswith("repeated words")


def test_the_shares_are_between_nothing_and_all():
    for measure in (character_repetition, word_repetition):
        assert measure("") == 0
        assert measure("short") == 0
        assert measure("a b c d e f g h i j k l m n o p q r s t u v w x y z") == 0
        assert 0.5 < measure("one " * 100) <= 1


def surveyed(survey: Boilerplate, pages: list[Page]) -> list[Page]:
    """As the engine runs it: all are observed, and then each is changed."""
    seen = [(each.id, survey.observe(each)) for each in pages]
    found = survey.conclude((id, observed) for id, observed in seen if observed is not None)
    found = json.loads(json.dumps(found))
    return [survey(each, found) for each in pages]


def test_lines_that_a_site_repeats_are_taken_out():
    footer = "Sign up for our newsletter and never miss a recipe again!"
    pages = [page(f"# Ingredients\n\nRecipe {k} takes {k} minutes and a large pan.\n\n{footer}", id=str(k)) for k in range(5)]
    elsewhere = [page(footer, url=url, id="x") for url in ("https://other.org/b", "")]
    *changed, other, nowhere = surveyed(Boilerplate(), pages + elsewhere)
    assert [each.text for each in changed] == [each.text.removesuffix(f"\n\n{footer}") for each in pages]
    assert changed[0].notes == {"Boilerplate": [footer]}
    assert [other, nowhere] == elsewhere


def test_what_few_pages_of_a_large_site_say_stays():
    step = "Preheat the oven to 180 degrees before you begin."
    pages = [page(f"{step if k < 3 else ''}\n\nPage number {k} says something of its own.", id=str(k)) for k in range(40)]
    assert surveyed(Boilerplate(), pages) == pages
    assert surveyed(Boilerplate(share=0.0), pages)[0].text == "Page number 0 says something of its own."
    assert surveyed(Boilerplate(), []) == []


@pytest.mark.parametrize(
    "text, masked",
    [
        ("Write to jane.doe+x@mail.example.co.uk!", "Write to [e-mail]!"),
        ("请发邮件到me@example.com谢谢", "请发邮件到[e-mail]谢谢"),
        ("Call +49 (30) 1234-5678 now", "Call [phone number] now"),
        ("Call (415) 555-2671 or 415-555-2671.", "Call [phone number] or [phone number]."),
        ("手机13812345678或 138 1234 5678", "手机[phone number]或 [phone number]"),
        ("电话 010-12345678", "电话 [phone number]"),
        ("Card 4111 1111 1111 1111.", "Card [card number]."),
    ],
)
def test_personal_data_becomes_a_mark(text, masked):
    result = Personal()(Page("a", title=text, parts=(text, picture("a.jpg", alt=text))))
    assert [result.title, result.texts[0], result.pictures[0].alt] == [masked] * 3
    assert sum(result.notes["Personal"].values()) == 3 * masked.count("[")


@pytest.mark.parametrize(
    "text",
    ["Use the @boardname@ and 2-3 eggs.", "4111 1111 1111 1112 is no card", "加水 500-800 毫升，2023-10-15",
     "https://example.org/p/13812345678.jpg", "between -1023 and 1023", "ISBN 9783161484100 is 13 digits", "Version 1.2.3.4"],
)  # fmt: skip
def test_other_numbers_stay(text):
    assert Personal()(Page("a", parts=(text,))) == Page("a", parts=(text,))


def test_check_digits():
    assert luhn("79927398713") and not luhn("79927398710")


@pytest.mark.parametrize(
    "text",
    ["a" * 300_000, "1 " * 150_000, "a.b-" * 75_000 + "@", "+" * 100_000, "[" * 99_999, "[](" * 50_000, "(0" * 90_000,
     "\n" * 99_999, " \n#" * 50_000, "```\n" * 30_000, "- \n" * 50_000],
)  # fmt: skip
def test_hostile_lines_cost_no_time(text):
    began = time.process_time()
    Personal()(page(text))
    Adult()(page(text))
    count_words(plain(text))
    blocks_of(text)
    Clean()(page(text))
    assert time.process_time() - began < 2


def test_adult_pages_are_dropped_and_recipes_are_not():
    assert Adult()(page("Chicken breast and thighs, cocktail sauce, 鸡胸肉 and sausage. " * 5)) == page(
        "Chicken breast and thighs, cocktail sauce, 鸡胸肉 and sausage. " * 5
    )
    assert Adult()(page(f"Free porn and xxx videos. {ENGLISH}")).reason.startswith("adult: 2 words")
    assert Adult()(page(f"色情 裸聊 {CHINESE}")).reason.startswith("adult: 2 words")
    assert isinstance(Adult()(page(f"The word porn alone. {ENGLISH}")), Page)


def test_real_pages(shared):
    """351 guides: two are Japanese, one line is on all pages of a site, some quizzes repeat themselves."""
    pages = realpages.read(shared, pictures=False)
    dropped = {}
    for step in (Language(), Lengths(), WordsPerPicture(), Repetition(), Adult()):
        dropped[type(step).__name__] = sum(isinstance(step(each), Dropped) for each in pages)
    assert dropped == {"Language": 2, "Lengths": 0, "WordsPerPicture": 0, "Repetition": 9, "Adult": 0}
    changed = [each for each in surveyed(Boilerplate(), pages) if each.notes]
    assert len(changed) == 148
    assert {line for each in changed for line in each.notes["Boilerplate"]} == {
        "如果您遵循本指南的制作流程而发现有问题或可以改进的流程，请提出 Issue 或 Pull request 。"
    }
    assert [each.notes["Personal"] for each in map(Personal(), pages) if each.notes] == [{"e-mails": 1}]
