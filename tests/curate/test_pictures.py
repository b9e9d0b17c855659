"""Which pictures are refused: on pictures that were labelled by looking at them, and on made ones; where bytes come from."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pdqhash", reason="curate/requirements.txt is not installed")
import zxingcpp
from labelled import LABELS
from PIL import Image, ImageDraw, ImageFilter

from curate.page import Dropped, Page, Picture
from curate.pictures import Adverts, Balance, Blurred, Codes, Fill, Plain, Repeated, Sides, Sound, look


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def page_with(*files: bytes, address: str = "https://a.org/{}.png") -> Page:
    pictures = [Picture(address.format(k)).filled(data) for k, data in enumerate(files)]
    return Page("1", parts=("Words.", *pictures))


def why(data: bytes, *steps) -> str:
    """Why a picture is refused; empty where it is not."""
    page = page_with(data)
    for step in steps:
        page = step(page)
    return page.refused[0].reason if page.refused else ""


def photo(seed: int = 0, side: int = 400) -> Image.Image:
    """Something with edges of all sizes."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), (200, 180, 160))
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, r = (int(v) for v in rng.integers((0, 0, 5), (side, side, side // 6)))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return image


STEPS = (Sound(), Sides(), Plain(), Blurred(), Codes())


@pytest.fixture(scope="module")
def verdicts(shared) -> list[tuple[str, str]]:
    """(label, why it is refused) of every third labelled picture, and of all that should be refused."""
    chosen = [row for k, row in enumerate(LABELS.values()) if k % 3 == 0 or row["label"] != "keep"]
    return [(row["label"], why((shared / row["file"]).read_bytes(), *STEPS)) for row in chosen]


def test_labels_are_many_and_some_had_no_part_in_the_thresholds():
    assert len(LABELS) >= 300
    assert sum(row["set"] == "unseen" for row in LABELS.values()) >= 250


def test_precision_and_recall_on_labelled_pictures(verdicts):
    """Of all labelled ones `python tests/curate/labelled.py` tells; here are fewer that should stay."""
    right = sum(label != "keep" and bool(reason) for label, reason in verdicts)
    assert right / sum(bool(reason) for _, reason in verdicts) >= 0.9
    assert right / sum(label != "keep" for label, _ in verdicts) >= 0.9


def test_each_is_refused_for_its_own_reason(verdicts):
    reasons = {"refuse: animated": "animated", "refuse: blurred": "blurred"}
    for label, reason in verdicts:
        if label in reasons:
            assert reason.startswith(reasons[label])


def test_a_photo_stays_until_it_is_blurred():
    image = photo()
    assert why(file_of(image), *STEPS) == ""
    assert why(file_of(image.filter(ImageFilter.GaussianBlur(8))), *STEPS).startswith("blurred")
    # The size that a picture comes in does not matter.
    large = image.resize((1600, 1600))
    assert why(file_of(large), *STEPS) == ""
    assert why(file_of(large.filter(ImageFilter.GaussianBlur(32))), *STEPS).startswith("blurred")


def test_sides_colours_and_frames():
    assert why(file_of(photo(side=129)), *STEPS).startswith("small: 129")
    assert why(file_of(photo().crop((0, 0, 400, 135)).resize((600, 140))), *STEPS).startswith("strip: 600 x 140")
    assert why(file_of(Image.new("RGB", (300, 300), (250, 250, 250))), *STEPS).startswith("near-uniform")
    frames = [photo(1), photo(2)]
    assert why(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:]), *STEPS) == "animated"
    assert why(file_of(frames[0], "GIF"), *STEPS) == ""


def test_a_picture_turned_by_its_metadata_is_measured_as_it_is_shown():
    exif = Image.Exif()
    exif[0x0112] = 6
    page = Sound()(page_with(file_of(photo().resize((400, 300)), "JPEG", exif=exif)))
    assert (page.pictures[0].width, page.pictures[0].height) == (300, 400)


def test_a_qr_code_is_refused_and_one_in_a_corner_is_not():
    code = Image.fromarray(np.array(zxingcpp.create_barcode("https://a.org", zxingcpp.BarcodeFormat.QRCode).to_image(scale=8)))
    code = code.convert("RGB")
    assert why(file_of(code.resize((300, 300))), *STEPS).startswith("QR code")
    page = photo(side=1000)
    page.paste(code.resize((190, 190)), (20, 20))
    assert why(file_of(page), *STEPS) == ""


def test_hostile_files_are_named_and_cost_nothing(shared):
    bomb = file_of(Image.new("1", (10_000, 10_000)), "PNG")
    assert why(bomb, Sound()).startswith("broken: 10000 x 10000 is more than a picture may have")
    lying = bytearray(file_of(photo()))
    lying[16:24] = (400_000).to_bytes(4, "big") * 2
    for data in (bytes(lying), b"", b"<svg onload=alert(1)>", file_of(photo(), "JPEG")[:2000], b"version https://git-lfs"):
        assert why(data, Sound()).startswith("broken: "), data[:20]
    broken = {path.name: why(path.read_bytes(), *STEPS) for path in (shared / "photos" / "broken").iterdir()}
    # Of two only the metadata is broken.
    assert sorted(name for name, reason in broken.items() if not reason) == [
        "exif_typeerror.jpg",
        "sugarshack_bad_mpo_header.jpg",
    ]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("https://ads.example.net/x.jpg", "advertising address: ads"),
        ("https://a.org/banners/x.jpg", "advertising address: banners"),
        ("https://a.org/img/logo.png", "advertising address: logo"),
        ("https://a.org/u/avatar_64.png", "advertising address: avatar"),
        ("https://ad.doubleclick.net/x", "advertising address: ad"),
        ("https://a.org/salad/bread.jpg", ""),
        ("https://loads.org/address/logon.jpg", ""),
        ("https://a.org/images/6704ad69.jpg", ""),
        ("images/banner-cake.jpg", ""),
    ],
)
def test_words_of_an_address(address, reason):
    page = Adverts()(Page("1", parts=("x", Picture(address))))
    assert [r.reason for r in page.refused] == ([reason] if reason else [])


def test_what_stands_on_many_pages_is_refused_also_in_another_size():
    step = Repeated(pages=3)
    logo, other = photo(1), photo(2)
    pages = [replace(page_with(file_of(logo.resize((300 + 20 * k,) * 2)), file_of(photo(10 + k))), id=str(k)) for k in range(4)]
    pages += [replace(page_with(file_of(other)), id=f"o{k}") for k in range(3)]
    found = step.conclude((page.id, step.observe(page)) for page in pages)
    assert len(found) == 4 and set(found.values()) == {4}
    after = [step(page, found) for page in pages]
    assert [len(page.pictures) for page in after] == [1, 1, 1, 1, 1, 1, 1]
    assert after[0].refused[0].reason == "on many pages: 4"


def test_pages_without_pictures_are_kept_in_a_stated_share():
    pages = [Page(str(k), parts=("words",)) for k in range(2000)]
    kept = [page for page in map(Balance(share=0.25), pages) if isinstance(page, Page)]
    assert 430 < len(kept) < 570
    assert [page.id for page in map(Balance(share=0.25), pages[1000:]) if isinstance(page, Page)] == [
        p.id for p in kept if int(p.id) >= 1000
    ]
    many = Page("m", parts=tuple(Picture(str(k)) for k in range(31)))
    assert Balance()(many) == Dropped("many pictures: 31")


# ----------------------------------------------------------------------------------------------------------------- bytes


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "site" / "pix").mkdir(parents=True)
    (tmp_path / "site" / "pix" / "a.png").write_bytes(b"a picture")
    (tmp_path / "secret.png").write_bytes(b"not for you")
    return tmp_path


def filled(folder: Path, *addresses: str, **options) -> Page:
    step = Fill((("site", str(folder / "site")),), **options)
    return step(Page("1", parts=("x", *map(Picture, addresses)), notes={"root": "site"}))


def test_a_picture_comes_from_beside_its_page_and_from_nowhere_else(folder):
    (folder / "site" / "out").symlink_to(folder)
    (folder / "site" / "link.png").symlink_to(folder / "secret.png")
    (folder / "site" / "inside.png").symlink_to(folder / "site" / "pix" / "a.png")
    page = filled(
        folder, "pix/a.png", "inside.png", "pix/b.png", "../secret.png", "out/secret.png", "link.png", "/etc/passwd", "pix",
        "a\0b", "https://a.org/a.png",
    )  # fmt: skip
    assert [p.data for p in page.pictures] == [b"a picture"] * 2
    assert page.pictures[0].sha256.startswith("8") or len(page.pictures[0].sha256) == 64
    reasons = [r.reason for r in page.refused]
    assert reasons == [
        "not at hand: no such file",
        *["address: leads out of the folder"] * 4,
        "not at hand: no such file",
        "not at hand: no such file",
        "not at hand: fetching is off",
    ]


def test_a_pipe_and_a_giant_are_not_read(folder):
    import os

    os.mkfifo(folder / "site" / "pipe.png")
    page = filled(folder, "pipe.png", "pix/a.png", most=3)
    assert [r.reason for r in page.refused] == ["not at hand: no such file", "too many bytes: more than 3"]


def test_a_picture_is_decoded_once_for_all_steps():
    look.cache_clear()
    page = page_with(file_of(photo()))
    for step in STEPS:
        page = step(page)
    assert look.cache_info().misses == 1
