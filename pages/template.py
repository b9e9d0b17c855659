"""The templates of all pages: HTML files beside this one, filled in by jinja2.

    text = render("overview.html", title="My prompts", cards=[...], problems=[], of=3)

Whatever {{ }} puts into a page is text, whoever wrote it: escaped, and free of control characters. A page is one file without
scripts or network: `style.css` and all pictures are in it. But for two: a benchmark's page has a script, for its filters, and
pictures that lie beside it, for they are thousands; the page on which people vote talks to the server that gave it.
"""

import base64
import io
import re
import unicodedata
from math import ceil
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

HERE = Path(__file__).parent
# Overrides and isolates of direction: text that is read in another order than it is written.
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
SMALL = 256  # pixels; such pictures stand beside their text where there is room


def printable(text: str) -> str:
    """Without what could steer a terminal, or make text look like other text: control characters, overrides of direction."""
    return "".join(c for c in text if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in BIDI))


def harmless(value: object) -> object:
    """What {{ }} shows before it is escaped; HTML that another template made stays as it is."""
    return value if isinstance(value, Markup) else printable(str(value))


def paragraphs(text: str) -> list[str]:
    blocks = (block.strip() for block in re.split(r"\n\s*\n", text))
    return [block for block in blocks if block]


def small(image: Image.Image) -> bool:
    return max(image.size) <= SMALL


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture at a few times its size.

    Bicubic keeps the edges of a flat drawing, which browsers, being bilinear, fray.
    """
    if not small(image):
        return image
    k = ceil(1.5 * SMALL / max(image.size))
    return image.resize((k * image.width, k * image.height), Image.Resampling.BICUBIC)


def data_url(image: Image.Image, optimize: bool = False) -> Markup:
    """The picture itself as the address of an <img>; optimize: fewer bytes, in more time."""
    data = io.BytesIO()
    image.save(data, "PNG", optimize=optimize)
    # Markup, for there is nothing to escape in it, and looking for it would take as long as all the rest.
    return Markup("data:image/png;base64," + base64.b64encode(data.getvalue()).decode())


TEMPLATES = Environment(
    loader=FileSystemLoader(HERE),
    autoescape=True,
    finalize=harmless,
    undefined=StrictUndefined,  # a value that is missing is an error, not an empty place
    auto_reload=False,  # a training run rewrites its page for days, and its page stays the one of its own code
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"paragraphs": paragraphs, "enlarged": enlarged, "data_url": data_url}
TEMPLATES.tests["small"] = small
TEMPLATES.globals["style"] = Markup((HERE / "style.css").read_text(encoding="utf-8"))


def render(template: str, /, **values) -> str:
    """The template of this name, filled in. What is to go on into another template as HTML must be made Markup first."""
    return TEMPLATES.get_template(template).render(values)
