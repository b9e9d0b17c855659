"""Main text with its pictures in place: each form in which pictures are loaded late, what is refused, hostile pages."""

import json
import time

import pytest

pytest.importorskip("trafilatura", reason="curate/requirements.txt is not installed")
from wrapped import FORMS, GREY, HOWTO, as_it_is, common, doc_html, in_a_site, measure_one, same, segments, wanted

from curate.extract import Extract, largest, resolved
from curate.page import Dropped, Page, Picture

WORDS = "Cut the paper along the line and fold it twice, so that the corners meet in the middle of the sheet."


def extracted(html: str, **values) -> Page | Dropped:
    return Extract()(
        Page("1", parts=(html,), **{"url": "https://site.org/how/paper.html", "notes": {"format": "html"}} | values)
    )


def article(*pieces: str, head: str = "") -> str:
    body = "".join(piece if piece.startswith("<") else f"<p>{piece}</p>" for piece in pieces)
    return f"<html><head><title>Paper</title>{head}</head><body><article><h1>A boat</h1>{body}</article></body></html>"


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_is_found_however_it_is_loaded(form):
    html = article(WORDS, FORMS[form].format("/pix/boat", 'alt="the boat"'), f"Then: {WORDS}")
    page = extracted(html)
    assert [type(part) for part in page.parts] == [str, Picture, str]
    assert page.pictures[0].address == "https://site.org/pix/boat", "an address without an ending is one, too"
    assert page.pictures[0].alt in ("the boat", "")
    assert len(page.pictures) + len(page.refused) == html.count("<img")
    assert page.parts[0] == f"# A boat\n\n{WORDS}" and page.parts[2] == f"Then: {WORDS}"


@pytest.mark.parametrize(
    ("srcset", "best"),
    [
        ("a.jpg 320w, b.jpg 1280w, c.jpg 640w", "b.jpg"),
        ("a.jpg, b.jpg 2x", "b.jpg"),
        ("a.jpg", "a.jpg"),
        ("https://i.org/w_3,h_4/a.jpg 1x, https://i.org/w_6,h_8/a.jpg 2x", "https://i.org/w_6,h_8/a.jpg"),
        ("", ""),
        (" , ,", ""),
    ],
)
def test_the_largest_of_a_srcset(srcset, best):
    assert largest(srcset) == best


@pytest.mark.parametrize(
    ("address", "found", "reason"),
    [
        ("a.jpg", "https://site.org/how/a.jpg", ""),
        ("//cdn.org/a b.jpg?x=1", "https://cdn.org/a b.jpg?x=1", ""),
        (GREY, GREY[:40], "placeholder: a data: address"),
        ("/static/blank.gif", "/static/blank.gif", "placeholder: by its name"),
        ("google-pixel-8.jpg", "https://site.org/how/google-pixel-8.jpg", ""),
        ("clear-soup.jpg", "https://site.org/how/clear-soup.jpg", ""),
        ("placeholder-300.png", "placeholder-300.png", "placeholder: by its name"),
        ("/x/1x1.gif?id=7", "/x/1x1.gif?id=7", "placeholder: by its name"),
        ("file:///etc/passwd", "file:///etc/passwd", "address: file is neither http nor https"),
        ("javascript:alert(1)", "javascript:alert(1)", "address: javascript is neither http nor https"),
        ("http://[::1", "http://[::1", "address: malformed"),
        ("", "", "no address"),
    ],
)
def test_addresses_of_a_page_from_the_web(address, found, reason):
    assert resolved(address, Page("1", "https://site.org/how/paper.html"), "") == (found, reason)


@pytest.mark.parametrize(
    ("address", "found", "reason"),
    [
        ("../images/a.jpg", "images/a.jpg", ""),
        ("b%20c.jpg?v=2#x", "html/b c.jpg", ""),
        ("/images/a.jpg", "images/a.jpg", ""),
        ("../../../etc/passwd", "../../etc/passwd", "address: leads out of the folder"),
        ("/../../etc/passwd", "../../etc/passwd", "address: leads out of the folder"),
        ("%2e%2e/%2e%2e/etc/passwd", "../etc/passwd", "address: leads out of the folder"),
        ("file:///etc/passwd", "file:///etc/passwd", "address: file is neither http nor https"),
        ("https://site.org/a.jpg", "https://site.org/a.jpg", ""),
    ],
)
def test_addresses_of_a_page_from_a_folder(address, found, reason):
    assert resolved(address, Page("1", notes={"file": "html/a.html"}), "") == (found, reason)


def test_a_base_of_the_page_counts():
    page = extracted(article(WORDS, '<img src="a.jpg">', WORDS, head='<base href="//cdn.org/x/">'))
    assert page.pictures[0].address == "https://cdn.org/x/a.jpg"


def test_what_is_not_in_the_main_text_is_refused_as_such():
    nav = '<nav><a href="/"><img src="/home.jpg"></a><ul><li><a href="/x">All pages</a></li></ul></nav>'
    page = extracted(article(WORDS, '<img src="a.jpg">', WORDS).replace("<article>", f"{nav}<article>"))
    assert [p.address for p in page.pictures] == ["https://site.org/how/a.jpg"]
    assert page.refused == (("https://site.org/home.jpg", "not in the main text"),)


def test_counters_and_bullets_are_no_pictures():
    page = extracted(article(WORDS, '<img src="a.jpg" width="1" height="1">', '<img src="b.jpg" width="400px">', WORDS))
    assert [p.address for p in page.pictures] == ["https://site.org/how/b.jpg"]
    assert page.refused[0].reason == "placeholder: by its size on the page"


def test_lists_tables_and_code_are_markdown():
    page = extracted(article(
        WORDS,
        '<ol start="4"><li>Fold <b>it</b><img src="a.jpg"></li><li>Cut it</li></ol>',
        "<ol><li>One</li><li>Two<ul><li>inner</li></ul></li></ol>",
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>",
        '<pre><code class="language-py">if x:\n    y()</code></pre>',
        '<figure><img src="b.jpg"><figcaption>The boat, finished.</figcaption></figure>',
        '<blockquote><p><img src="c.jpg"></p></blockquote>',
        WORDS,
    ))  # fmt: skip
    assert [p.address[-5:] for p in page.pictures] == ["a.jpg", "b.jpg", "c.jpg"]
    assert "4. Fold **it**" in page.text and "5. Cut it" in page.text
    assert "1. One\n2. Two\n   - inner" in page.text
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |" in page.text
    assert "```py\nif x:\n    y()\n```" in page.text
    assert "The boat, finished." in page.text


def test_markdown_keeps_its_text_and_gives_its_pictures():
    source = f"""---
title: "A boat"
---
# Boat

{WORDS} See [the site](https://x.org/a_(b)).
![one](a.jpg "title") and ![two][ref]
<img src="c.jpg" alt="three">

```md
![no picture](d.jpg)
```
<!-- ![hidden](e.jpg) -->
![four](../../f.jpg)

[ref]: b.jpg
"""
    page = Extract()(Page("1", parts=(source,), notes={"format": "markdown", "file": "x/boat.md"}))
    assert page.title == "A boat"
    assert [(p.address, p.alt) for p in page.pictures] == [("x/a.jpg", "one"), ("x/b.jpg", "two"), ("x/c.jpg", "three")]
    assert page.refused == (("../f.jpg", "address: leads out of the folder"),)
    assert page.parts[0].endswith("See the site.") and "![no picture](d.jpg)" in page.text
    assert "hidden" not in page.text and "[ref]" not in page.text


@pytest.mark.parametrize(
    ("html", "reason"),
    [
        ("<div>" * 5000 + WORDS, "bomb"),
        ("<p>x</p>" * 60_000, "bomb"),
        ("x" * 5_000_001, "bomb"),
        ("<b><i>" * 2000 + WORDS + "<table>" * 2000, "bomb"),
        ("", "no page"),
        ("\0\0\0", "no page"),
        ("<html><body></body></html>", "no main text"),
        ("<!-- nothing -->", "no page"),
    ],
    ids=["deep", "many", "long", "tangled", "empty", "zeros", "bare", "comment"],
)
def test_bombs_and_wrecks_are_dropped_by_name(html, reason):
    began = time.perf_counter()
    page = extracted(html)
    assert isinstance(page, Dropped) and page.reason.startswith(reason), page
    assert time.perf_counter() - began < 10


def test_real_pages_are_found_again(shared):
    """A part of what `python tests/curate/wrapped.py` measures on all."""
    docs = [json.loads(line) for line in open(HOWTO / "docs.jsonl", encoding="utf-8")][::9]
    for way in (as_it_is, in_a_site):
        total = {}
        for doc in docs:
            for key, value in measure_one(doc, way).items():
                total[key] = total.get(key, 0) + value
        assert total["kept"] >= 0.995 * total["pictures"] and total["ordered"] == len(docs)
        assert total["wrong"] == total["unaccounted"] == 0
        assert 2 * total["matched"] / (total["found"] + total["true"]) >= 0.98


def test_the_measure_notices_what_is_wrong(shared):
    """Pictures out of order, a lost step, another's picture: each is seen."""
    doc = json.loads(open(HOWTO / "docs.jsonl", encoding="utf-8").readline())
    true = wanted(doc, {Path.rpartition("/")[2] for Path in doc_html(doc).split('"')})
    assert common(true, true, same) == len(true) > 2
    assert common(true[::-1], true, same) < len(true)
    assert common(true[1:], true, same) == len(true) - 1
    assert segments(["a b", Picture("x/y.jpg")]) == [("a", "b"), ("picture", "y.jpg")]
    assert not same(("a", "b", "c"), ("a", "b", "d")) and not same(("picture", "a"), ("picture", "b"))
