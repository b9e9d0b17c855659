"""What a template is filled with is text: escaped by a plain {{ }}, with no filter and no care taken."""

import re
from html import unescape

import jinja2
import pytest
from markupsafe import Markup
from PIL import Image

from pages import template
from pages.template import HERE, SMALL, TEMPLATES, enlarged, render

EVIL = "<script>alert('1 & 2')</script> \"><img src=x onerror=y> </style> &lt;b&gt;"
SOURCES = {name: (HERE / name).read_text(encoding="utf-8") for name in TEMPLATES.list_templates(["html"])}


def fill(source: str, **values) -> str:
    return TEMPLATES.from_string(source).render(values)


def test_a_plain_place_escapes():
    found = fill("<p title=\"{{ text }}\" lang='{{ text }}'>{{ text }}</p>", text=EVIL)
    inside = re.fullmatch("<p title=\"(.*)\" lang='(.*)'>(.*)</p>", found).groups()
    for text in inside:
        assert not re.search("[<>\"']", text) and unescape(text) == EVIL


def test_what_a_macro_a_filter_or_a_loop_hands_on_is_escaped_too():
    macro, loop = "{% macro show(x) %}<i>{{ x }}</i>{% endmacro %}", "{% for x in texts %}{{ show(x ~ '!') }}{% endfor %}"
    found = fill(macro + loop + "{{ texts | join }}", texts=[EVIL, EVIL])
    assert found.count("<") == 2 * 2 and unescape(found) == f"<i>{EVIL}!</i>" * 2 + 2 * EVIL


def test_a_plain_place_drops_what_makes_text_look_like_other_text():
    assert fill("{{ text }}", text="a\x1b[31m\x00\x9b\u202eb\u2066c\u2069\n\td") == "a[31mbc\n\td"


def test_only_markup_stays_html_and_a_page_is_plain_text():
    assert fill("{{ a }}{{ b }}{{ 1.5 }}", a=Markup("<b>"), b="<b>") == "<b>&lt;b&gt;1.5"
    assert type(render("overview.html", title="x", cards=[], problems=[], of=0)) is str


def test_a_missing_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="problems"):
        render("overview.html", title="x", cards=[], of=0)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_no_template_goes_round_escaping_or_needs_another_file(name):
    source = SOURCES[name]
    if name in ("benchmark.html", "vote.html"):  # their scripts stand in the page itself, and nothing is filled into them
        before, script = source.split("<script>")
        script, after = script.split("</script>")
        assert "{{" not in script and "{%" not in script
        source = before + after
    assert not re.search(r"\|\s*safe|autoescape", source)
    assert not re.search(r"<script|<link|<iframe|https?:|<style(?!>\n\{\{ style \}\}</style>)", source)
    assert not re.search(r"<[^>]*=\{\{", source)  # a value without quotes around it could begin another attribute
    assert TEMPLATES.get_template(name)


def test_there_is_one_style_sheet_and_it_needs_no_other_file():
    assert [f.name for f in HERE.glob("*.css")] == ["style.css"] and sum("<style" in s for s in SOURCES.values()) == 1
    style = TEMPLATES.globals["style"]
    assert not re.search(r"<|url\(|@import|http", style) and "prefers-color-scheme: dark" in style


def test_every_class_of_a_template_is_one_of_the_style_sheet():
    style = TEMPLATES.globals["style"]
    used = {word for s in SOURCES.values() for names in re.findall(r'class="([\w ]+)', s) for word in names.split()}
    assert used and not {word for word in used if not re.search(rf"\.{word}\b", style)}


def test_pages_are_made_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TEMPLATES.cache.clear()
    assert EVIL in unescape(render("overview.html", title=EVIL, cards=[], problems=[], of=0))


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    small, large = Image.new("RGB", (64, 32), "red"), Image.new("RGB", (SMALL + 1, 32), "red")
    assert enlarged(small).size == (384, 192) and enlarged(large) is large
    assert template.data_url(small).startswith("data:image/png;base64,")
