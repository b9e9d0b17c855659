"""The page of a training run says what its curves and samples are, and cuts nothing off."""

import html.parser
import json
import re

import pytest
from PIL import Image

from pages.run import HEIGHT, LEFT, NAMES, TENTHS, curve, number, sample, write_page
from pages.template import data_url
from tokenizer import Rendered, render, train_bpe
from training import COUNTS, DECILES, KINDS, asked_and_told, sheet

ABOUT = {"step": 500, "seconds": 840.0, "versions": {"torch": "2"}, "config": {"steps": 1000, "lr": 1e-3}}


class Reader(html.parser.HTMLParser):
    """The texts of a page in their order, each with the class of the element around it."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.texts, self.sources = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.sources.append(attrs["src"])
        elif tag not in ("meta", "line", "circle", "polyline"):
            self.open.append((tag, attrs.get("class", "")))

    def handle_endtag(self, tag):
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((*self.open[-1], data.strip()))


def page(folder, rows: list[dict]) -> Reader:
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_page(folder, ABOUT)
    return Reader((folder / "index.html").read_text())


def at(reader: Reader, text: str) -> int:
    return next(i for i, (*_, found) in enumerate(reader.texts) if found.startswith(text))


def row(step: int) -> dict:
    """A line of the log with everything that stage 2 writes on a device whose peak is known."""
    values = {"loss": 0.5, "t<.6": 0.2, "t<.85": 0.3, "t<1": 0.4, **dict.fromkeys(DECILES, 0.3)}
    values |= {"images_per_s": 2500.0, "flops_per_s": 4.5e13, "mfu": 0.31, "fill": 0.97, "grad": 1.5, "memory_gb": 64.0}
    return {"step": step, "seconds": 10.0, "lr": 3e-5, **values, "skipped": 0, "eta_s": 60.0}


def test_every_curve_says_what_it_shows_and_in_which_unit(tmp_path):
    reader = page(tmp_path, [row(1), row(500)])
    titles = [text for tag, _, text in reader.texts if tag == "figcaption"]
    for wanted in ("loss at noise 0 to 0.6: near data", "loss at noise 0.85 to 1: near noise", "computing, TFLOP/s",
                   "noise 0.0 to 0.1: near data", "noise 0.9 to 1.0: near noise", "share of the device's peak (MFU), %"):
        assert wanted in titles
    assert not any(re.search(r"t<|^t\d|_|flops", title) for title in titles)
    tenths = [title for title in titles if re.match(r"noise \d", title)]
    assert len(tenths) == 10 == len(TENTHS) and tenths == sorted(tenths)
    values = dict(zip(titles, (text for tag, _, text in reader.texts if tag == "b"), strict=False))
    assert values["computing, TFLOP/s"] == "45" and values["share of the device's peak (MFU), %"] == "31"
    assert {*KINDS, *(f"{c}_per_s" for c in COUNTS)} <= set(NAMES) and set(DECILES) == set(TENTHS)


def test_an_unknown_statistic_gets_a_curve_under_its_own_name(tmp_path):
    reader = page(tmp_path, [row(1) | {"beauty_of_it": 1.0}])
    assert at(reader, "beauty of it") > at(reader, "memory held at most")


@pytest.mark.parametrize("value", [0.0, 1.2345e-7, 0.00123456, 0.999999, 12345.678, 99999.9, 3.456e13, 9.99e-10])
def test_no_number_at_an_axis_is_longer_than_its_room(value):
    assert len(number(value)) <= 7
    assert float(number(value)) == pytest.approx(value, rel=0.05)
    drawn = curve("loss", [(1, value), (1_000_000, 2 * value + 1e-12)])
    width = int(re.search(rf'viewBox="0 0 (\d+) {HEIGHT}"', drawn)[1])
    labels = re.findall(r'<text x="(\d+)" y="(\d+)" text-anchor="(\w+)">([^<]+)', drawn)
    assert len(labels) == 4 and ("1,000,000" in {text for *_, text in labels})
    for x, y, anchor, text in labels:  # a digit at 13 units is some 8 wide
        left = int(x) - (8 * len(text) if anchor == "end" else 0)
        assert left >= 0 and left + 8 * len(text) <= width and 10 <= int(y) <= HEIGHT - 3
    assert LEFT - 6 >= 7 * 8


def test_a_curve_of_one_value_shows_a_point_and_its_step_once():
    drawn = curve("t0", [(10, 0.4)])
    assert "<circle" in drawn and drawn.count("<text") == 2 and "step 10" in drawn
    assert curve("loss", [(1, float("nan"))]) is None


def two_rows(path, evil: str = "") -> None:
    red, blue, green = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green"))
    rows = [("Draw a cat." + evil, "Here is a cat.", [None, red, blue]), ("Make it green.", "Now it is.", [blue, red, green])]
    sheet(rows, ["picture before", "painted", "true one"], path)


def test_samples_stand_before_the_other_curves_and_name_their_columns(tmp_path):
    (tmp_path / "samples").mkdir()
    evil = " <script>alert(1)</script>"
    two_rows(tmp_path / "samples/step_000250.png")
    two_rows(tmp_path / "samples/step_000500.png", evil)
    reader = page(tmp_path, [row(1), row(500)])
    order = [at(reader, text) for text in ("step 500 of", "Loss", "Samples after step 500", "after step 250", "Other curves",
                                           "Loss by tenths", "Settings")]  # fmt: skip
    assert order == sorted(order)
    newest = reader.texts[order[2] : order[3]]
    assert [text for tag, kind, text in newest if tag == "p" and kind == "asked"] == [f"Draw a cat.{evil}", "Make it green."]
    assert [text for tag, kind, text in newest if kind == "told"] == ["Here is a cat.", "Now it is."]
    assert [text for tag, _, text in newest if tag == "figcaption"] == ["picture before", "painted", "true one"] * 2
    assert [text for _, kind, text in newest if kind == "none"] == ["none"]  # a first picture has none before it
    assert len(reader.sources) == 2 * 5 and all(s.startswith("data:image/png;base64,") for s in reader.sources)


def test_the_painted_picture_is_marked_and_is_the_painted_one(tmp_path):
    two_rows(tmp_path / "step_000001.png")
    cards = sample(tmp_path / "step_000001.png")
    with Image.open(tmp_path / "step_000001.png") as image:
        boxes = [r["boxes"] for r in json.loads(image.text["sheet"])["rows"]]
        colours = [[b and image.getpixel((b[0] + 48, b[1] + 48)) for b in r] for r in boxes]
        painted = [data_url(image.crop(r[1])) for r in boxes]
    red, blue, green = (255, 0, 0), (0, 0, 255), (0, 128, 0)
    assert colours == [[None, red, blue], [blue, red, green]]
    marked = re.findall(r'<figure class="painted"><figcaption>painted</figcaption><img src="([^"]+)"', cards)
    assert marked == painted and cards.count('class="painted"') == 2


def test_a_sheet_has_labels_above_its_columns(tmp_path):
    """There is ink above the first row, over each column, in the colours that tell the asked from the told."""
    two_rows(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        boxes = json.loads(image.text["sheet"])["rows"][1]["boxes"]
        image = image.convert("RGB")
        for x0, _, x1, _ in boxes:
            assert image.crop((x0, 0, x1, 22)).convert("L").getextrema()[0] < 100
        heading = [colour for _, colour in image.crop((0, 0, boxes[0][0], 22)).getcolors(10_000)]
        assert any(b - r > 150 for r, _, b in heading) and any(r == b < 120 for r, _, b in heading)
        wide = image.width
    sheet([("", "", [Image.new("RGB", (64, 64), "red")] * 3)], ["a", "b", "c"], tmp_path / "b.png")
    assert Image.open(tmp_path / "b.png").width < wide - 300  # without words there is no room for them


def test_the_lists_of_stage_1_become_cards(tmp_path):
    lists = "# Step 2\n\n* asked: Draw <b>.\n* wrote: Here. [picture]\n\n* asked: Hi\n* wrote: Ho\n"
    (tmp_path / "step_000002.md").write_text(lists)
    found = Reader(sample(tmp_path / "step_000002.md")).texts
    assert [text for tag, kind, text in found if kind == "asked"] == ["Draw <b>.", "Hi"]
    assert [text for tag, kind, text in found if kind == "told"] == ["Here. [picture]", "Ho"]


def test_a_sheet_of_an_older_run_is_shown_as_it_is(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "step_000001.png")
    assert sample(tmp_path / "step_000001.png").startswith('<img src="data:image/png;base64,')


def rendered() -> tuple[Rendered, object]:
    picture = {"type": "image"}
    words = ["Draw a boat.", "First the hull.", "Then the sail.", "Thanks. Make it red.", "Here it is red."]
    first, second, third = ([{"type": "text", "text": words[k]}, picture] for k in (1, 2, 4))
    messages = [{"role": "user", "content": words[0]}, {"role": "assistant", "content": first + second},
                {"role": "user", "content": words[3]}, {"role": "assistant", "content": third}]  # fmt: skip
    tokenizer = train_bpe(["system user assistant " + " ".join(words)] * 4, 330)
    return render(tokenizer, messages, [(1, 2)] * 3), tokenizer


def test_a_sample_is_shown_with_the_users_last_words_and_not_the_roles():
    document, tokenizer = rendered()
    assert [asked_and_told(document, j, tokenizer) for j in range(3)] == [
        ("Draw a boat.", "First the hull."),
        ("Draw a boat.", "Then the sail."),
        ("Thanks. Make it red.", "Here it is red."),
    ]
