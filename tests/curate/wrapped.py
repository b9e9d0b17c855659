"""The real pages of ../shared as they would stand on the web, and how well extraction finds them again.

    python tests/curate/wrapped.py      the table: pictures kept, their order, wrong ones, and segments, against docs.jsonl

Each page is put into one of several made-up sites, with menu, adverts (between its paragraphs as well), side bar, comments and
footer, all with pictures; and its own pictures are loaded late, in one of the forms that sites use.
"""

import json
import operator
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from curate.extract import Extract  # noqa: E402
from curate.page import Dropped, Page, Picture  # noqa: E402
from curate.pictures import Adverts  # noqa: E402

HOWTO = ROOT.parent / "shared" / "data" / "howto"
GREY = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"

# How a picture's element is written. {0}: its address, {1}: its other attributes.
FORMS = {
    "plain": '<img src="{0}" {1}>',
    "data-src": f'<img class="lazy" src="{GREY}" data-src="{{0}}" {{1}}>',
    "data-original": '<img src="/static/blank.gif" data-original="{0}" {1}>',
    "data-lazy-src": f'<img src="{GREY}" data-lazy-src="{{0}}" {{1}}>',
    "srcset": '<img srcset="/small/x.jpg 320w, {0} 1280w, /middle/x.jpg 640w" {1}>',
    "data-srcset": f'<img src="{GREY}" data-srcset="/small/x.jpg 1x, {{0}} 2x" {{1}}>',
    "picture": '<picture><source srcset="{0}" type="image/webp"><img src="" {1}></picture>',
    "noscript": f'<img src="{GREY}"><noscript><img src="{{0}}" {{1}}></noscript>',
    "twice": '<img data-src="{0}" {1}><noscript><img src="{0}" {1}></noscript>',
    "figure": '<figure><img src="{0}" {1}></figure>',
    "link": '<a href="{0}"><img src="{0}" {1}></a>',
}

WORDS = ("Ten easy dinners", "Our favourite knives", "What to do on a rainy day", "Win a weekend", "The best pans of the year")


def strangers(rng: random.Random, n: int, where: str) -> list[str]:
    return [f'<img src="https://cdn.example.com/{where}/{rng.randrange(10**6)}.jpg" alt="{where}">' for _ in range(n)]


def advert(rng: random.Random) -> str:
    address = f"https://ads.example.net/banner/{rng.randrange(10**6)}.jpg"
    kind = rng.choice(("ad", "advert-slot", "sponsored", "banner-ad"))
    return (
        f'<div class="{kind}"><a href="https://ads.example.net/click"><img src="{address}" width="300" height="250"></a></div>'
    )


def menu(rng: random.Random) -> str:
    links = "".join(f'<li><a href="/{k}">{word}</a></li>' for k, word in enumerate(WORDS))
    logo = '<a href="/"><img src="/logo.png" alt="logo"></a>'
    return f'<header class="site-header">{logo}<nav><ul>{links}</ul>{"".join(strangers(rng, 2, "icons"))}</nav></header>'


def aside(rng: random.Random) -> str:
    cards = "".join(f'<li><a href="/r/{k}">{picture}<span>{rng.choice(WORDS)}</span></a></li>'
                    for k, picture in enumerate(strangers(rng, 4, "related")))  # fmt: skip
    return f'<aside class="sidebar widget"><h3>You may also like</h3><ul>{cards}</ul>{advert(rng)}</aside>'


def comments(rng: random.Random) -> str:
    said = "".join(
        f'<li class="comment"><div class="comment-author">{avatar} Reader {k}</div>'
        f'<div class="comment-body"><p>I made this last week and my family liked it very much, thank you for sharing it.</p>'
        f"{picture}</div></li>"
        for k, (avatar, picture) in enumerate(zip(strangers(rng, 3, "avatars"), strangers(rng, 3, "comments"), strict=True))
    )
    return f'<section id="comments" class="comments-area"><h2>3 comments</h2><ol class="comment-list">{said}</ol></section>'


def footer(rng: random.Random) -> str:
    pictures = "".join(strangers(rng, 3, "badges"))
    return f'<footer class="site-footer"><p>Copyright 2026. All rights reserved.</p>{pictures}</footer>'


def wrap(html: str, seed: str) -> str:
    """A page of the collection on a made-up site; the same for the same seed."""
    rng = random.Random(seed)
    title = re.search(r"<title>(.*?)</title>", html, re.S)[1]
    article = re.search(r"<article>(.*)</article>", html, re.S)[1]
    form = rng.choice(list(FORMS.values()))

    def late(found: re.Match) -> str:
        address = re.search(r'src="([^"]*)"', found[0])[1]
        alt = re.search(r'alt="[^"]*"', found[0])
        return form.format(address, alt[0] if alt else "")

    article = re.sub(r"<img\b[^>]*>", late, article)
    # An advert after every sixth paragraph, as sites have them.
    pieces = article.split("</p>\n")
    for k in range(5, len(pieces) - 1, 6):
        pieces[k] += f"</p>\n{advert(rng)}<p>"
    article = "</p>\n".join(pieces).replace("<p></p>", "")
    frame = rng.choice((
        '<div class="page"><div class="content"><article class="post">{}</article></div>{}</div>',
        '<main id="main"><article><div class="entry-content">{}</div></article></main>{}',
        '<div id="wrapper"><div class="post-content">{}</div>{}</div>',
        '<main>{}</main>{}',
    ))  # fmt: skip
    body = menu(rng) + advert(rng) + frame.format(article, aside(rng)) + comments(rng) + footer(rng)
    return f"<!doctype html><html><head><meta charset='utf-8'><title>{title}</title></head><body>{body}</body></html>"


# ----------------------------------------------------------------------------------------------------------------- measure


def words(text: str) -> list[str]:
    """The words of a Markdown text, or its Chinese characters: what is written, not how."""
    text = re.sub(r"<!--.*?-->|<[^<>\n]{1,200}>", " ", text, flags=re.S)
    # A link's words without its address, also where a picture has stood in the link and cut it in two.
    text = re.sub(r"\]\([^()\s]*(?:\([^()]*\))?[^()]*\)", " ", text)
    return re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u4e00-\u9fff]+", text)


def segments(parts: list) -> list[tuple[str, ...]]:
    """What a page consists of, in order: a picture, or the words between two."""
    out = [("picture", Path(p.address).name) if isinstance(p, Picture) else tuple(words(p)) for p in parts]
    return [segment for segment in out if segment]


def file_of(segment: dict, there: set[str]) -> str:
    """The name of a picture's file in the HTML, where names are those of the collection or, of a few, the page's own."""
    if segment["type"] != "image":
        return ""
    names = [Path(unquote(address)).name for address in (segment["image"], segment["src"]) if address]
    return next((name for name in names if name in there), "")


def wanted(doc: dict, there: set[str]) -> list[tuple[str, ...]]:
    """The same of a line of docs.jsonl, with those pictures that its HTML has."""
    out: list[str | Picture] = []
    for segment in doc["segments"]:
        if segment["type"] == "image":
            if name := file_of(segment, there):
                out.append(Picture(name))
        elif out and isinstance(out[-1], str):
            out[-1] += f"\n\n{segment['text']}"
        else:
            out.append(segment["text"])
    return segments(out)


def same(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Texts are the same where at most one word of twenty differs."""
    if a == b or "picture" in (a[0], b[0]):
        return a == b
    return SequenceMatcher(None, a, b, autojunk=False).ratio() >= 0.95


def common(a: list, b: list, equal: Callable = operator.eq) -> int:
    """How many stand in both in the same order."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for k, y in enumerate(b):
            row[k + 1] = before[k] + 1 if equal(x, y) else max(before[k + 1], row[k])
    return row[-1]


def measure_one(doc: dict, read: Callable[[dict], Page]) -> dict[str, int]:
    """What is counted of one page. read: a document of docs.jsonl -> the page as it comes in, with its source as text."""
    page = read(doc)
    there = len(re.findall(r"<img\b", page.text))
    page = Extract()(page)
    page = page if isinstance(page, Dropped) else Adverts()(page)
    if isinstance(page, Dropped):
        print(f"{doc['id']}: {page.reason}")
        page = Page(doc["id"])
    html = names_in(doc_html(doc))
    mine = [Path(unquote(picture.address)).name for picture in page.pictures]
    theirs = [name for segment in doc["segments"] if (name := file_of(segment, html))]
    inside = [name for name in mine if name in theirs]
    a = segments(list(page.parts))
    b = wanted(doc, html)
    return {
        "pictures": len(theirs),
        "kept": common(sorted(mine), sorted(theirs)),
        "wrong": sum(name not in theirs for name in mine),
        "ordered": common(inside, theirs) == len(inside),
        "unaccounted": there - len(page.pictures) - len(page.refused),
        "matched": common(a, b, same),
        "found": len(a),
        "true": len(b),
    }


def measure(read: Callable[[dict], Page]) -> dict[str, float]:
    """The shares over all pages."""
    total: Counter[str] = Counter()
    pages = 0
    for line in open(HOWTO / "docs.jsonl", encoding="utf-8"):
        total.update(measure_one(json.loads(line), read))
        pages += 1
    return {
        "pages": pages,
        "pictures": total["pictures"],
        "kept": total["kept"] / total["pictures"],
        "in order": total["ordered"] / pages,
        "wrong": total["wrong"],
        "unaccounted": total["unaccounted"],
        "segment F1": 2 * total["matched"] / (total["found"] + total["true"]),
    }


def doc_html(doc: dict) -> str:
    return (HOWTO / "html" / f"{doc['id']}.html").read_text(encoding="utf-8")


def names_in(html: str) -> set[str]:
    """Of the files of its pictures."""
    return {Path(unquote(address)).name for address in re.findall(r'<img[^>]* src="([^"]*)"', html)}


def as_it_is(doc: dict) -> Page:
    return Page(doc["id"], parts=(doc_html(doc),), notes={"format": "html", "file": f"html/{doc['id']}.html"})


def in_a_site(doc: dict) -> Page:
    html = wrap(doc_html(doc), doc["id"])
    return Page(doc["id"], parts=(html,), notes={"format": "html", "file": f"html/{doc['id']}.html"})


if __name__ == "__main__":
    for name, way in {"as they are": as_it_is, "in a site": in_a_site}.items():
        print(name, {key: round(value, 4) for key, value in measure(way).items()})
