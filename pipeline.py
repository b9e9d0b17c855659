"""The whole system at work: write text, decide that a picture is due, paint it, look at it, write on.

    duo = DuoGen.from_pretrained("checkpoints/tiny")
    answer = duo.generate("How do I draw a house?", duo.settings(seed=1))
    answer.parts                  # ["Step 1: ...", Picture, "Step 2: ...", Picture, ...]
    answer.stop                   # why it ends there, see STOPS

One loop makes a document (`Answer.write`). The language model reads the prompt once into a KV cache; of every token only the
connector's output is kept, a thousand numbers instead of the hundred thousand of all layers. When the model writes BOV, the DiT
paints under the condition of all tokens before it and of all earlier pictures; the new picture is appended to the cache, and
the model goes on. Nothing is ever read twice.

`write` is a coroutine: it yields what happens. Where tokens are to be read it yields a `Read` and waits to be sent the token
that follows; where a picture is due it yields a `Paint` and waits for the picture. So one driver shows a document as it grows
(`stream`), and another works on many (`write_many`): what several wait for is one packed pass, with the same results up to
rounding.

A checkpoint is a folder (or a Hub repository) with mllm/, dit/, vae/ and duogen.json:

    {"format": 1, "parts": {"mllm": "mllm", "dit": "dit", "vae": "vae"}, "sampling": {"steps": 35, "height": 704, ...}}

A part is a folder beside that file, or a Hub name "owner/name", "owner/name/folder", "owner/name/folder@revision"; nowhere else
on the disk, because a checkpoint may be a stranger's. Links are followed: whoever made them could read what they point to, and
a download makes none. "sampling" holds defaults for `Settings`; its height and width are the size of a picture in a dialogue
that has none yet.
"""

import hashlib
import math
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PureWindowsPath

import torch
from PIL import Image
from torch import Tensor, nn

from checkpoint import BUNDLED, InputError, config_from_json, is_run, part_folder, parts_in, read_json, resolve, write_json
from connector import features
from dit import DiTConfig, Painter
from families.registry import PARTS, load_model, load_processor, read_config
from flow import CONDITION_TIME, SAMPLERS, denoise, karras_schedule, shift_schedule
from model import ImageProcessor, KVCache, LanguageModel, MLLMConfig, mrope_positions, smart_resize
from ops import Graph, Segments
from records.validate import load_image
from threads import Crew
from tokenizer import SYSTEM, StreamDecoder, Tokenizer, render
from vae import VAE, VAEConfig, to_image, to_tensor

FORMAT = 1  # of duogen.json
SIZE = 704, 1280  # (H, W) of a picture where neither dialogue nor checkpoint says anything
PACK = 65536  # patches painted in one batch at most; an activation of the 2B network is then 0.5 GB in bf16
STOPS = {
    "end": "the model ended its answer",
    "max_tokens": "the limit of text tokens (max_tokens) is reached",
    "max_images": "one more picture was due than the limit (max_images) allows",
    "context": "the language model's context is full",
    "interrupted": "it was interrupted",
}


# --------------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """What may differ from one answer to the next. A checkpoint has its own defaults: start from `DuoGen.settings(...)`."""

    seed: int = 0  # of the text's sampling and of every picture's noise
    steps: int = 35  # calls of the DiT for a picture
    guidance: float = 8.0  # v = v_neg + guidance (v_pos - v_neg); 1 is none
    guidance_from: float = 0.0  # lowest and highest time, 0 clean and 1 noise, at which there is guidance: elsewhere a step ...
    guidance_to: float = 1.0  # ... costs half
    reuse: float = 0.0  # steps in which a picture changes less than this take their velocity from the steps before; 0: none
    sampler: str = "unipc"  # "unipc", "euler", or "ancestral": Euler with fresh noise in every step
    eta: float = 1.0  # how much of it, for the sampler ancestral; 0 is euler
    schedule: str = "shift"  # noise levels: "shift" as in training, or "karras" as for Cosmos' post-trained weights
    shift: float = 5.0  # of the noise levels of schedule shift, towards noise; below 1 towards data
    height: int | None = None  # pixels; not given: like the last picture of the dialogue, else the checkpoint's default
    width: int | None = None  # likewise
    max_area: int | None = 1280 * 704  # pixels; a larger picture is shrunk before the DiT sees it
    max_images: int = 8  # pictures in an answer
    max_tokens: int = 2048  # tokens that the language model writes, BOVs included
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # sample among the likeliest tokens that have this share together
    system: str = SYSTEM  # used where the dialogue does not begin with a system message of its own
    negative: str = "chunk"  # what guidance leaves out: the last "chunk" of text; all of it, "empty"; "none": no guidance
    use_condition_images: bool = True  # whether the DiT sees the earlier pictures
    condition_time: float | None = CONDITION_TIME  # what the DiT is told about clean pictures; None: the target's time

    def __post_init__(self):
        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise InputError(f"{name} {getattr(self, name)}: must be {what}")

        need(0 <= self.seed < 2**63, "seed", "a whole number from 0 to 2^63 - 1")
        need(1 <= self.steps <= 1000, "steps", "from 1 to 1000")
        # Beyond these limits nothing can be painted or written: numbers overflow, or all noise levels become one.
        need(-100 <= self.guidance <= 100, "guidance", "from -100 to 100, 1 for none")
        need(0 <= self.guidance_from <= 1, "guidance_from", "from 0 to 1")
        need(0 <= self.guidance_to <= 1, "guidance_to", "from 0 to 1")
        need(0 <= self.reuse <= 1000, "reuse", "from 0 to 1000")
        need(self.sampler in SAMPLERS, "sampler", f"one of {', '.join(SAMPLERS)}")
        need(0 <= self.eta <= 100, "eta", "from 0 to 100")
        need(self.schedule in ("shift", "karras"), "schedule", "shift or karras")
        need(0.01 <= self.shift <= 100, "shift", "from 0.01 to 100")
        for name in ("height", "width"):
            side = getattr(self, name)
            need(side is None or 1 <= side <= 8192, name, "from 1 to 8192")
        need(self.max_area is None or self.max_area >= 1, "max_area", "at least 1 pixel")
        need(0 <= self.max_images <= 1000, "max_images", "from 0 to 1000")
        need(1 <= self.max_tokens <= 10**6, "max_tokens", "from 1 to 1000000")
        need(self.temperature == 0 or 0.01 <= self.temperature <= 100, "temperature", "0, or from 0.01 to 100")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(self.negative in ("chunk", "empty", "none"), "negative", "chunk, empty or none")
        need(self.condition_time is None or 0 <= self.condition_time < 1, "condition_time", "from 0 to below 1")
        # Half a surrogate pair is a str to Python, but no text: the tokenizer would fail on it much later.
        try:
            self.system.encode()
        except UnicodeEncodeError as e:
            raise InputError(f"system is not Unicode text at character {e.start}: write it in UTF-8") from None

    @property
    def scale(self) -> float:
        """The guidance that is really in force."""
        return 1.0 if self.negative == "none" else self.guidance

    @property
    def painting(self) -> tuple:
        """What pictures that are painted in one batch have in common."""
        noise = self.steps, self.schedule, self.shift, self.condition_time
        return *noise, self.scale, self.interval, self.reuse, self.sampler, self.eta

    @property
    def interval(self) -> tuple[float, float]:
        """The times between which there is guidance."""
        return self.guidance_from, self.guidance_to


def override(settings: Settings, values: dict, where: str) -> Settings:
    """Settings with some values changed; unknown names and wrong types are an InputError that begins with `where`."""
    try:
        return config_from_json(Settings, asdict(settings) | values, where)
    except InputError as e:
        raise InputError(str(e) if str(e).startswith(where) else f"{where}: {e}") from None


# ----------------------------------------------------------------------------------------------------------------- events


@dataclass
class Text:
    """A piece of text, as it is written."""

    text: str


@dataclass(eq=False)
class Read:
    """Tokens continue a document. Whoever drives `Answer.write` sends the token in reply that the model puts behind them."""

    answer: "Answer"
    ids: list[int]
    pixels: Tensor | None  # patches of the pictures among them, (P, C * T * p * p)
    grids: list[tuple[int, int]]  # and their sizes in patches
    seconds: float = 0.0  # what the reading took; a batch's time is shared evenly


@dataclass
class Paint:
    """A picture is due. Whoever drives `Answer.write` sends it in reply."""

    answer: "Answer"
    number: int  # of the picture in the answer, from 0
    size: tuple[int, int]  # (H, W) in pixels
    seed: int  # of its noise
    conditions: list[Tensor]  # clean latents (C, h, w) of the earlier pictures; when it is painted, of all
    unseen: list[Tensor]  # earlier pictures (3, H, W) that are yet to be encoded
    positive: Tensor  # (n, text_dim) connector rows of all tokens before BOV
    negative: Tensor | None  # (m, text_dim), m < n; None where guidance is off
    seconds: float = 0.0  # what the painting took; a batch's time is shared evenly


@dataclass
class Picture:
    """A picture of the answer."""

    image: Image.Image
    seed: int  # of its noise
    context: tuple[int, int]  # tokens that conditioned guidance's positive and negative branch
    seconds: float


@dataclass
class Stop:
    """The end; reason is a key of STOPS."""

    reason: str


Event = Text | Read | Paint | Picture | Stop
Reply = int | Image.Image | None  # to a Read, to a Paint, to the others


# ----------------------------------------------------------------------------------------------------------------- answer


class Answer:
    """One answer: the loop that makes it (`write`), and then what it is. messages: as `read_dialogue` gives them.

    begun: texts and pictures that the answer begins with; the rest is written. drawing: what comes next is a picture, without
    asking the model: so a picture of an answer is drawn again, under another seed, and the answer goes on from there.
    """

    def __init__(
        self,
        duo: "Writer",
        messages: list[dict],
        settings: Settings,
        index: int = 0,
        begun: list[str | Image.Image] | None = None,
        drawing: bool = False,
    ):
        self.duo = duo
        self.settings = settings
        self.index = index
        self.messages = messages
        self.images = [part["image"] for m in self.messages for part in m["content"] if part["type"] == "image"]
        self.parts: list[str | Picture] = []
        self.stop = "interrupted"  # until it ends otherwise
        self.tokens = 0  # written by the language model, control tokens included
        self.cache: KVCache | None = None  # of it alone, unless a driver gives it a place in one that several share
        self.step: Callable | None = None  # what reads a token more of each document in the cache
        self.document = 0  # its place there
        self.text_seconds = 0.0
        self.paint_seconds = 0.0

        # The prompt as the language model reads it. The chunk that guidance leaves out begins behind the last picture, or where
        # there is none, behind the system turn.
        grids = [self._merged(image.height, image.width) for image in self.images]
        rendered = render(duo.tokenizer, self.messages, grids, generation_prompt=True, default_system=settings.system)
        self._ids = rendered.ids
        self.prompt_tokens = len(rendered.ids)
        self._chunk = rendered.images[-1].end + 1 if rendered.images else rendered.system_end

        # What the answer begins with is read like a prompt.
        self.drawing = drawing
        self.begun: list[Image.Image] = []
        for part in begun or []:
            if isinstance(part, str):
                self._ids += duo.tokenizer.encode(part)
                self.parts.append(part)
                continue
            self._ids += self._looked_at(self._merged(part.height, part.width))
            self._chunk = len(self._ids)
            self.begun.append(part)
            self.parts.append(Picture(part, seed=0, context=(0, 0), seconds=0.0))
        self.given = len(self.parts)  # of them
        self.images_before = [*self.images, *self.begun]

        # A picture is as large as the one before it, unless the settings say otherwise.
        height, width = duo.size
        if self.images_before:
            height, width = to_tensor(self.images_before[-1], duo.patch, settings.max_area).shape[1:]
        self.size = settings.height or height, settings.width or width
        check_size(self.size, duo.patch)
        if len(self._ids) >= duo.context:
            raise InputError(f"the prompt has {len(self._ids):,} tokens, the limit is {duo.context - 1:,}: shorten it")

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def text(self) -> str:
        """The text alone, pieces between pictures on lines of their own."""
        return "\n".join(part.strip() for part in self.parts if isinstance(part, str))

    @property
    def stop_meaning(self) -> str:
        """Why it ends there, in words."""
        return STOPS[self.stop]

    @property
    def message(self) -> dict:
        """The answer as a message: append it and a new question to `messages`, and the dialogue goes on."""
        parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p.image} for p in self.parts]
        return {"role": "assistant", "content": parts}

    def write(self) -> Generator[Event, Reply, None]:
        """The loop. Yields Text, Picture, at the end one Stop; Read, to be answered by a token, and Paint, by a picture."""
        duo = self.duo
        s = self.settings
        tokenizer = duo.tokenizer
        # One character may be several tokens: text is given out only when its bytes are whole.
        decoder = StreamDecoder(tokenizer)
        capacity = self.capacity
        # A source of chance of its own, so that an answer does not depend on which others are written beside it.
        self.choices = torch.Generator().manual_seed(derive(s.seed, self.index, "text"))
        if self.cache is None:
            self.cache = duo.cache(capacity)
            self.step = duo.step(self.cache)
        self.rows = []  # the connector's output for all that was read
        self.position = 0
        # What the DiT has not been shown yet, and the latents of what it has.
        unseen = [to_tensor(image, duo.patch, s.max_area) for image in self.images_before]
        latents = []
        # What the language model has not read yet: the prompt with its pictures, later a token or a picture at a time.
        unread = self._ids
        patches = [duo.processor(image) for image in self.images_before]
        pixels = torch.cat([p for p, _ in patches]) if patches else None
        grids = [grid for _, grid in patches]
        reason = "max_tokens"
        painted = len(self.begun)
        length = 0
        while self.tokens < s.max_tokens:
            # Read, and learn which token follows. What does not fit as a whole is not begun.
            if length + len(unread) > capacity:
                reason = "context"
                break
            reading = Read(self, unread, pixels, grids)
            token = yield reading
            if self.drawing:
                token = tokenizer.vision_start
                self.drawing = False
            self.text_seconds += reading.seconds
            self.tokens += 1
            length += len(unread)
            if token in (tokenizer.im_end, tokenizer.endoftext):
                reason = "end"
                break

            # BOV: a picture is due. It was the model's own choice; nothing but this token decides between text and picture.
            if token == tokenizer.vision_start:
                if painted == s.max_images:
                    reason = "max_images"
                    break
                yield from self._write(decoder.flush())
                # BOV itself is not read yet, so the condition ends with the token before it, as in training.
                rows = torch.cat(self.rows)                                            # (n, text_dim)
                self.rows = [rows]
                # The negative branch is a slice: causal states before the last chunk of text know nothing of it.
                kept = self._chunk if s.negative == "chunk" else 0
                negative = None if s.scale == 1 else rows[:kept]                       # (m, text_dim)
                shown = (latents, unseen) if s.use_condition_images else ([], [])
                paint = Paint(self, painted, self.size, derive(s.seed, self.index, painted), *shown, rows, negative)
                image = yield paint
                self.paint_seconds += paint.seconds
                context = len(rows), 0 if negative is None else len(negative)
                self.parts.append(Picture(image, paint.seed, context, paint.seconds))
                yield self.parts[-1]
                painted += 1
                # A generated picture conditions the later ones by what it is as a file: decoded, rounded to 8 bits and encoded
                # again. Its own latent, fresh from the sampler, would be another distribution than the encoded pictures of the
                # training, and an answer that is continued from its saved pages would differ from one continued at once.
                latents = paint.conditions
                unseen = [to_tensor(image, duo.patch, s.max_area)]
                # The language model looks at it, too: BOV, the picture and its end are read next.
                pixels, grid = duo.processor(image)
                grids = [grid]
                unread = self._looked_at(duo.processor.merged(grid))
                # The next picture's chunk is what will be written from here on.
                self._chunk = length + len(unread)
                continue

            # Any other token is text.
            yield from self._write(decoder.push(token))
            unread = [token]
            pixels = None
            grids = []
        # The answer may end within a character: what is there of it becomes U+FFFD, and nothing is dropped in silence.
        yield from self._write(decoder.flush())
        self.stop = reason
        # A list of finished answers is light.
        self.cache = self.step = None
        self.rows = []
        yield Stop(reason)

    @property
    def capacity(self) -> int:
        """Tokens that this answer can reach, so that its cache is allocated once."""
        h, w = self._merged(*self.size)
        most = len(self._ids) + self.settings.max_tokens + self.settings.max_images * (h * w + 2)
        return min(self.duo.context, most)

    def _looked_at(self, merged: tuple[int, int]) -> list[int]:
        """The tokens of a picture of that size in the answer: BOV, the picture and its end."""
        tokenizer = self.duo.tokenizer
        return [tokenizer.vision_start, *[tokenizer.image_pad] * (merged[0] * merged[1]), tokenizer.vision_end]

    def _merged(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (rows, columns) of a picture of that size in pixels."""
        p = self.duo.processor
        unit = p.patch_size * p.merge_size
        h, w = smart_resize(height, width, unit, p.min_pixels, p.max_pixels)
        return h // unit, w // unit

    def _write(self, text: str) -> Iterator[Text]:
        if not text:
            return
        # Between two pictures there is one part of text, however many tokens it came in.
        if self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += text
        else:
            self.parts.append(text)
        yield Text(text)


def read_dialogue(messages: str | list[dict]) -> list[dict]:
    """Messages with every content a list of parts and every picture loaded. The last one must be the user's."""
    out = []
    for message in [{"role": "user", "content": messages}] if isinstance(messages, str) else messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(p, dict) and p.get("type") in p for p in parts):
            form = '{"role": ..., "content": text or [{"type": "text", "text": ...}, {"type": "image", "image": ...}]}'
            raise InputError(f"messages: each must be {form}, not {message!r:.80}")
        # Unpaired surrogates come in with JSON escapes, and no tokenizer has bytes for them.
        for text in (p["text"] for p in parts if isinstance(p.get("text"), str)):
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise InputError(f"messages: not Unicode text at character {e.start} of {text!r:.40}") from None
        parts = [p | {"image": load_image(p["image"])} if p["type"] == "image" else p for p in parts]
        out.append(message | {"content": parts})
    if not out or out[-1].get("role") != "user":
        raise InputError("messages: the last one must be the user's: that is what gets an answer")
    if not any(p["type"] == "image" or str(p.get("text", "")).strip() for p in out[-1]["content"]):
        raise InputError("the prompt is empty: say what you want")
    return out


def derive(*key: int | str) -> int:
    """A seed that depends on nothing but the key, the same on every machine."""
    # Python's own hash of a text differs from process to process, and with seed + number (1, 2) and (2, 1) would get the same
    # noise. Shifted by a bit, since a seed is below 2^63.
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


# ---------------------------------------------------------------------------------------------------------------- offload


class Offload:
    """Weights in host memory, of which only those of the parts at work are on the device too: for a GPU too small for all.

    Here no weight ever changes: a part comes by a copy out of pinned memory and goes by being forgotten. It comes whole, each
    storage at once, so what `ops.join` laid side by side stays so.
    """

    def __init__(self, parts: dict[str, list[Tensor]], device: torch.device):
        self.device = device
        self.present = set()
        self.home: dict[str, list[tuple[Tensor, list]]] = {}  # storages as bytes, and the tensors in each with their layouts
        for name, tensors in parts.items():
            # By storage, not by tensor: joined projections are views of one, and copied apart they would be joined no more.
            storages = {}
            for t in tensors:
                storage = t.untyped_storage()
                _, views = storages.setdefault(storage.data_ptr(), (storage, []))
                views.append((t, t.dtype, t.storage_offset(), t.shape, t.stride()))
            # Only out of pinned memory can the GPU fetch by itself, while the host goes on.
            self.home[name] = []
            for storage, views in storages.values():
                flat = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.home[name].append((flat.pin_memory() if device.type == "cuda" else flat, views))
            self.leave(name)

    def bring(self, *names: str) -> None:
        """Only these parts are at work now."""
        # First out, then in: there may not be room for both.
        for name in self.present - {*names}:
            self.leave(name)
        for name in names:
            if name not in self.present:
                self.arrive(name)
        self.present = {*names}

    def leave(self, name: str) -> None:
        for flat, views in self.home[name]:
            point(views, flat)

    def arrive(self, name: str) -> None:
        for flat, views in self.home[name]:
            point(views, flat.to(self.device, non_blocking=True, copy=True))


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Its weights and whatever else it holds."""
    return [*module.parameters(), *module.buffers()]


def point(views: list, flat: Tensor) -> None:
    """Let tensors see the bytes in `flat`."""
    for t, dtype, offset, shape, stride in views:
        t.data = torch.empty(0, dtype=dtype, device=flat.device).set_(flat.untyped_storage(), offset, shape, stride)


# ----------------------------------------------------------------------------------------------------------------- writer


class Writer:
    """The language model at work on answers: what it reads, which token follows, and who waits for what.

    Painting is left to those who know how: `DuoGen`, or a training that shows the true pictures. size: (H, W) of a picture
    where the dialogue has none.
    """

    def __init__(
        self,
        mllm: LanguageModel,
        tokenizer: Tokenizer,
        processor: ImageProcessor,
        size: tuple[int, int] = SIZE,
        defaults: Settings | None = None,
        device: torch.device | None = None,
        graphs: bool | None = None,
    ):
        self.mllm = mllm
        self.tokenizer = tokenizer
        self.processor = processor
        self.size = size
        self.defaults = defaults or Settings()
        self.device = device or mllm.model.embed_tokens.weight.device
        self.graphs = graphs
        self.context = mllm.config.max_position_embeddings
        self.patch = 1  # a picture's sides are multiples of it; a painter has its own
        # The vocabulary holds tokens that are never to be written (image pads, roles): sampling is kept from them.
        allowed = torch.zeros(mllm.config.vocab_size, dtype=torch.bool)
        allowed[tokenizer.writable] = True
        self.allowed = allowed.to(self.device)

    # ---- what a painter adds

    def paint(self, requests: list[Paint], progress: Callable[[int, int], None] | None = None) -> list[Image.Image]:
        """The pictures that are due, one for each request."""
        raise NotImplementedError

    def connect(self, hidden: list[Tensor]) -> Tensor:
        """Hidden states, L tensors (N, H) -> what a painter is to know of these tokens, (N, any width): here nothing."""
        return hidden[-1][:, :0]

    def at_work(self, *parts: str) -> None:
        """These parts are needed next, and no others: "decoder" (with the connector), "vision", "dit", "vae"."""

    # ---- the drivers

    def answer(self, messages: str | list[dict], settings: Settings | None = None, index: int = 0, **begun) -> Answer:
        """An answer that is yet to be written. index: its number among those with the same seed; begun: see Answer."""
        return Answer(self, read_dialogue(messages), settings or self.defaults, index, **begun)

    def stream(self, answer: Answer, progress: Callable[[int, int], None] | None = None) -> Iterator[Event]:
        """Write one answer, painting what it asks for. progress(done, steps) is called while a picture is painted."""
        writer = answer.write()
        reply = None  # a coroutine has to be started with None
        while True:
            try:
                event = writer.send(reply)
            except StopIteration:
                return
            # Reading is the driver's own business. A Paint is shown before it is answered, so that a bar can appear.
            if isinstance(event, Read):
                reply = self.read([event])[0]
                continue
            yield event
            reply = self.paint([event], progress)[0] if isinstance(event, Paint) else None

    def generate(self, messages: str | list[dict], settings: Settings | None = None, index: int = 0) -> Answer:
        """The finished answer."""
        answer = self.answer(messages, settings, index)
        deque(self.stream(answer), maxlen=0)
        return answer

    def generate_many(
        self,
        dialogues: list[str | list[dict]],
        settings: Settings | list[Settings] | None = None,
        *,
        batch: int = 64,
        first: int = 0,
        done: Callable[[Answer], None] | None = None,
    ) -> list[Answer]:
        """One answer for each dialogue by `write_many`: answer i is that of generate(dialogues[i], settings, first + i).

        settings: one for all, or one each.
        """
        each = settings if isinstance(settings, list) else [settings] * len(dialogues)
        answers = [self.answer(m, s, first + i) for i, (m, s) in enumerate(zip(dialogues, each, strict=True))]
        self.write_many(answers, batch=batch, done=done)
        return answers

    def write_many(
        self,
        answers: list[Answer],
        *,
        batch: int = 64,
        done: Callable[[Answer], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write answers, up to `batch` of them at a time, each as it would be alone, up to rounding.

        All that have something to read take part in one pass for the next token of each. One that ends makes room for the next
        in the queue, one that needs a picture waits; when all wait, their pictures are painted together. done(answer) is called
        as soon as one is finished, progress(done, steps) while pictures are painted. Memory: `batch` KV caches.
        """
        queue = deque(answers)
        if not queue:
            return
        # One cache for all, as long as the longest may become.
        table = Table(self, max(a.capacity for a in answers), min(batch, len(queue)))
        while queue or table.active:
            while queue and table.free:
                table.seat(queue.popleft())
            for answer in table.turn(progress):
                if done is not None:
                    done(answer)

    # ---- one pass of the model

    def cache(self, capacity: int, documents: int = 1) -> KVCache:
        return KVCache(self.mllm.config, capacity, self.mllm.model.embed_tokens.weight.dtype, self.device, documents)

    def step(self, cache: KVCache) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """ids, positions (S,) -> connector rows (S, text_dim) and logits (S, vocab) of a token more in each of S documents."""

        def step(ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.mllm.decode(ids, positions, cache)
            return self.connect(hidden), self.mllm.logits(hidden[-1])

        # Only when asked for: what a recording gains here, no GPU has measured yet.
        return Graph(step) if self.graphs else step

    @torch.no_grad()
    def read(self, requests: list[Read]) -> list[int]:
        """Append what is to be read to each document -> the token that follows it.

        Single tokens of documents that share a cache are one pass. Prompts and pictures are long enough to be one each.
        """
        self.at_work("decoder", *["vision"] * any(r.grids for r in requests))
        # Decoding is bound by reading the weights: many documents that go on by a token each cost little more than one.
        tokens = {}
        step = [r for r in requests if len(r.ids) == 1]
        # A step costs a CPU as much for a place where nobody reads.
        if self.device.type == "cpu" and step and len(step) <= max(1, len(step[0].answer.cache.counts) // 8):
            step = []
        passes = [[r] for r in requests if r not in step]
        if step:
            passes.append(step)
        for batch in passes:
            began = time.perf_counter()
            rows, logits = self._step(batch) if batch is step else self._append(batch[0])
            for r, own, row in zip(batch, rows.chunk(len(batch)), logits, strict=True):
                r.answer.rows.append(own)
                tokens[id(r)] = self.choose(row, r.answer.settings, r.answer.choices)
            # Only now: choosing a token has waited for the device, so the clock shows work and not launches.
            for r in batch:
                r.seconds = (time.perf_counter() - began) / len(batch)
        return [tokens[id(r)] for r in requests]

    def _append(self, r: Read) -> tuple[Tensor, Tensor]:
        """What one document is to read -> connector rows (N, text_dim) and the logits of what follows (1, vocab)."""
        merged = [self.processor.merged(grid) for grid in r.grids]
        # A picture takes fewer positions than it has tokens (mRoPE), so they are counted apart from the length.
        positions, after = mrope_positions(r.ids, merged, self.tokenizer.image_pad)
        positions = positions + r.answer.position
        r.answer.position += after
        hidden = self.mllm(
            torch.tensor(r.ids, device=self.device),
            positions.to(self.device),
            Segments([len(r.ids)], self.device),
            None if r.pixels is None else r.pixels.to(self.device),
            r.grids or None,
            cache=r.answer.cache,
            document=r.answer.document,
        )
        # The connector wants every token; logits, a vocabulary wide, only the last one, behind which the model writes.
        return self.connect(hidden), self.mllm.logits(hidden[-1][-1:])

    def _step(self, batch: list[Read]) -> tuple[Tensor, Tensor]:
        """A token more in each of S documents of one cache -> connector rows (S, text_dim), logits (S, vocab)."""
        cache = batch[0].answer.cache
        places = [r.answer.document for r in batch]
        # Always all S places, for a graph has one shape. What those hold that wait is anything: it leaves no trace.
        ids, positions = torch.zeros(2, len(cache.counts), dtype=torch.long)               # (S,) each
        for r in batch:
            ids[r.answer.document] = r.ids[0]
            positions[r.answer.document] = r.answer.position
            r.answer.position += 1
        cache.advance(places)
        rows, logits = batch[0].answer.step(ids.to(self.device), positions.to(self.device))
        return rows[places], logits[places]  # copies: a graph writes its next result to the same place

    def choose(self, logits: Tensor, settings: Settings, generator: torch.Generator) -> int:
        """The next token from logits (vocab,): the likeliest, or drawn among the likeliest (nucleus; arXiv 1904.09751)."""
        logits = logits.float().masked_fill(~self.allowed, -torch.inf)
        # NaN and infinity show in what the host reads anyway: the largest logit, whose index a float holds, and the mass.
        if settings.temperature == 0:
            best, token = torch.stack([x.float() for x in logits.max(0)]).tolist()
            if not math.isfinite(best):
                raise not_finite("the language model's logits", self.mllm)
            return int(token)
        # Nucleus: of the likeliest as many as it takes to have the share top_p. The unlikely ones are many, and together
        # likely enough to spoil a text that draws among all.
        p, order = (logits / settings.temperature).softmax(0).sort(descending=True)
        mass = p.cumsum(0)
        keep = max(1, int((mass - p < settings.top_p).sum()))  # the smallest set that has the share top_p
        total = mass[keep - 1].cpu()
        if not total.isfinite():
            raise not_finite("the language model's logits", self.mllm)
        u = torch.rand((), generator=generator) * total  # one number from the CPU: every device draws the same
        return int(order[torch.searchsorted(mass[: keep - 1], u.to(mass.device), right=True)])


class Table:
    """Answers that are written together, each as it would be alone, up to rounding. New ones may come at any time.

        table = Table(writer, capacity=4096, places=8)
        table.seat(answer)                    where one is free: table.free
        finished = table.turn()               what all need next, once; again and again while there are any: table.active

    capacity: tokens that an answer can have, prompt and pictures included. Memory: so many KV caches as there are places.
    told(answer, event) hears what is written: Text, Picture and Stop.
    """

    def __init__(self, writer: Writer, capacity: int, places: int, told: Callable[[Answer, Event], None] | None = None):
        self.writer = writer
        self.told = told
        # One cache for all: a place is used again by whoever comes next.
        self.free = [*range(places)]
        self.cache = writer.cache(capacity, places)
        self.step = writer.step(self.cache)
        self.active: dict[Answer, tuple[Generator, Read | Paint]] = {}  # its coroutine, what it waits for
        self.ended: list[Answer] = []  # since the last turn

    def seat(self, answer: Answer) -> None:
        """Let an answer begin."""
        answer.cache = self.cache
        answer.step = self.step
        answer.document = self.free.pop()
        self.cache.truncate(answer.document, 0)
        self._go_on(answer, answer.write(), None)

    def leave(self, answer: Answer) -> None:
        """Nobody waits for it any more: it ends as it is."""
        writer, _ = self.active.pop(answer)
        writer.close()
        self.free.append(answer.document)

    def turn(self, progress: Callable[[int, int], None] | None = None) -> list[Answer]:
        """A token more for all who read; or, when all wait for a picture, their pictures, together. Returns who has ended."""
        if self.active:
            reading = [answer for answer, (_, event) in self.active.items() if isinstance(event, Read)]
            waiting = reading or list(self.active)
            requests = [self.active[answer][1] for answer in waiting]
            replies = self.writer.read(requests) if reading else self.writer.paint(requests, progress)
            for answer, reply in zip(waiting, replies, strict=True):
                self._go_on(answer, self.active[answer][0], reply)
        ended = self.ended
        self.ended = []
        return ended

    def _go_on(self, answer: Answer, writer: Generator, reply: Reply) -> None:
        """To where it needs something again."""
        while True:
            try:
                event = writer.send(reply)
            except StopIteration:
                break
            if isinstance(event, Read | Paint):
                self.active[answer] = writer, event
                return
            if self.told is not None:
                self.told(answer, event)
            reply = None
        self.active.pop(answer, None)
        self.free.append(answer.document)
        self.ended.append(answer)


# ----------------------------------------------------------------------------------------------------------------- system


class DuoGen(Writer):
    """The parts of the system, checked to fit together: a writer that paints.

    defaults: Settings of the checkpoint; size: (H, W) of a picture where the dialogue has none. sources: where each part came
    from, for the record. offload: the device to which parts that are in host memory come for as long as they are at work.
    graphs: steps are recorded as CUDA graphs (ops.Graph); None: those of pictures alone, where it pays.
    """

    def __init__(
        self,
        mllm: LanguageModel,
        tokenizer: Tokenizer,
        processor: ImageProcessor,
        dit: Painter,
        vae: VAE,
        defaults: Settings | None = None,
        size: tuple[int, int] = SIZE,
        sources: dict[str, str] | None = None,
        offload: torch.device | None = None,
        graphs: bool | None = None,
    ):
        check_fit(mllm.config, tokenizer, processor, dit.config, vae.config)
        # A graph knows its weights by their addresses, and offloading moves them.
        if offload and graphs is None:
            graphs = False
        super().__init__(mllm, tokenizer, processor, size, defaults, offload, graphs)
        for part in (mllm, dit, vae):
            part.eval().requires_grad_(False)
        # Before offloading, which remembers where each weight lies.
        mllm.fuse_for_inference()
        dit.fuse_for_inference()
        self.dit = dit
        self.vae = vae
        # Shown what becomes of each picture while it is painted, as watch(request, step, latent (C, h, w)); see `decoded`.
        self.watch: Callable[[Paint, int, Tensor], None] | None = None
        self.patch = pixels_per_patch(vae.config, dit.config)
        check_size(size, self.patch)
        self.sources = sources or {}
        self.offload = None
        if offload:
            connector = dit.crossattn_proj  # is in the DiT, but reads what the language model has just computed
            decoder = [*tensors_of(mllm.model), *tensors_of(mllm.lm_head), *tensors_of(connector)]
            told = {id(t) for t in tensors_of(connector)}
            painter = [t for t in tensors_of(dit) if id(t) not in told]
            parts = {"decoder": decoder, "vision": tensors_of(mllm.visual), "dit": painter, "vae": tensors_of(vae)}
            self.offload = Offload(parts, offload)
        # Threads pay by the size of the part that is at work, so the largest decides.
        largest = max(sum(p.numel() for p in part.parameters()) for part in (mllm, dit, vae))
        self.crew = Crew(largest, self.device.type)

    @classmethod
    def from_pretrained(
        cls,
        ckpt: str | Path | None = None,
        *,
        mllm: str | Path | None = None,
        dit: str | Path | None = None,
        vae: str | Path | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        offload: bool = False,
        graphs: bool | None = None,
        asked: dict | None = None,
    ) -> "DuoGen":
        """Load a checkpoint: a folder, or a Hub name (with `revision`). By default the bundled miniature.

        mllm, dit, vae: take this part from elsewhere: its folder, a folder with a subfolder of the part's name, a training run
        (its newest sound checkpoint) or one of its checkpoints, or a Hub name as in the module's docstring. With all three
        given and no ckpt, the sampling defaults are those of `Settings`.
        dtype: of the language model and the DiT. The VAE, a small share of the work, always computes in fp32.
        offload: weights wait in host memory, and are on the device only while they are at work (class Offload).
        graphs: steps are recorded as CUDA graphs, which hold addresses of weights, so not together with offload; None: those
        of pictures alone, where it pays (ops.pays_to_record).
        asked: settings that will be asked for: a size that these parts cannot paint is an InputError before weights are read.
        """
        check_device(device, offload, graphs)
        named = {"mllm": mllm, "dit": dit, "vae": vae}

        # Where each part comes from: whoever names it has the last word, the checkpoint speaks for the others.
        base = None
        sources = dict(named)
        sampling = {}
        if ckpt is not None or not all(named.values()):
            base = find_checkpoint(ckpt, revision)
            manifest = read_manifest(base / "duogen.json")
            sampling = manifest["sampling"]
            sources = {part: named[part] or manifest["parts"].get(part) for part in PARTS}
            for part, source in sources.items():
                if source is None:
                    raise InputError(f"{base / 'duogen.json'}: names no {part}: give one with {part}=...")
        elif revision:
            raise InputError(f"revision {revision}: it is a checkpoint's, and there is none: write NAME@{revision} for a part")

        # All that is small is read and held together first: a misfit is told before gigabytes are read.
        folders, configs = {}, {}
        for part in PARTS:
            folders[part] = part_folder(sources[part], part, base=None if named[part] else base)
            configs[part] = read_config(part, folders[part])
        tokenizer = Tokenizer.from_pretrained(folders["mllm"])
        processor = load_processor(folders["mllm"])
        check_fit(configs["mllm"], tokenizer, processor, configs["dit"], configs["vae"])
        height = sampling.pop("height", None) or SIZE[0]
        width = sampling.pop("width", None) or SIZE[1]
        patch = pixels_per_patch(configs["vae"], configs["dit"])
        for values in ({"height": height, "width": width}, asked or {}):
            check_size((values.get("height"), values.get("width")), patch)
        defaults = override(Settings(), sampling, "sampling of duogen.json")

        # The weights, straight to where they will wait or work.
        home = "cpu" if offload else device
        origins = {part: origin(folder) for part, folder in folders.items()}
        if base is not None:
            origins["ckpt"] = origin(base)
        return cls(
            load_model("mllm", folders["mllm"], dtype=dtype, device=home),
            tokenizer,
            processor,
            load_model("dit", folders["dit"], dtype=dtype, device=home),
            load_model("vae", folders["vae"], device=home),
            defaults,
            (height, width),
            origins,
            torch.device(device) if offload else None,
            graphs,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint folder; duogen.json, without which it is none, comes last."""
        folder = Path(folder)
        # As published: tokenizer and picture processor lie in the folder of the language model.
        for part in (self.mllm, self.tokenizer, self.processor):
            part.save_pretrained(folder / "mllm")
        self.dit.save_pretrained(folder / "dit")
        self.vae.save_pretrained(folder / "vae")
        write_manifest(folder, self.defaults, self.size)

    def settings(self, **values) -> Settings:
        """The checkpoint's defaults, with some values changed."""
        return override(self.defaults, values, "settings")

    def at_work(self, *parts: str) -> None:
        if self.offload:
            self.offload.bring(*parts)

    def connect(self, hidden: list[Tensor]) -> Tensor:
        """Hidden states, L tensors (N, H) -> what the DiT reads of these tokens (N, text_dim).

        Per token, hence in slices: the features of a long prompt would take 200 KB a token at full size.
        """
        dtype = self.dit.crossattn_proj[0].weight.dtype
        slices = zip(*(h.split(512) for h in hidden), strict=True)
        return torch.cat([self.dit.crossattn_proj(features(list(part)).to(dtype)) for part in slices])

    @torch.no_grad()
    def encode(self, pictures: list[Tensor]) -> list[Tensor]:
        """Pictures (3, H, W) in [-1, 1] -> normalised latents (C, H/8, W/8), each encoded alone."""
        return [self.vae.encode_latents(x[None].to(self.device))[0] for x in pictures]

    def read(self, requests: list[Read]) -> list[int]:
        self.crew.adapt()
        return super().read(requests)

    @torch.no_grad()
    def paint(self, requests: list[Paint], progress: Callable[[int, int], None] | None = None) -> list[Image.Image]:
        """The pictures of all requests, in packed batches: one for all with the same settings that fit into PACK patches.

        One part of the system after the other: all encoding, then all painting, then all decoding.
        """
        # Encode what the DiT has not been shown yet; the answer keeps the latents, so no picture is encoded twice.
        if any(r.unseen for r in requests):
            self.at_work("vae")
        for r in requests:
            began = time.perf_counter()
            r.conditions = r.conditions + self.encode(r.unseen)
            r.unseen = []
            r.seconds += time.perf_counter() - began

        # Paint. Pictures of different sizes and pasts lie in one pack, one behind the other.
        self.at_work("dit")
        latents = {}
        for batch in batches_of(requests, self.patch, self.vae.config.factor):
            began = time.perf_counter()
            for r, z in zip(batch, self._denoise(batch, progress), strict=True):
                latents[id(r)] = z
            for r in batch:
                r.seconds += (time.perf_counter() - began) / len(batch)

        # Decode, each alone: at 704 x 1280 and 96 channels a single activation of Wan's decoder is 0.35 GB in fp32.
        self.at_work("vae")
        images = []
        for r in requests:
            began = time.perf_counter()
            images.append(self._decode(r, latents[id(r)]))
            r.seconds += time.perf_counter() - began
        return images

    def _denoise(self, batch: list[Paint], progress: Callable[[int, int], None] | None) -> list[Tensor]:
        """The latents (C, h, w) of requests that share their settings, painted as one pack."""
        s = batch[0].answer.settings
        factor = self.vae.config.factor

        def step_done(done: int, steps: int) -> None:
            self.crew.adapt()  # a picture may take minutes: other programs come and go meanwhile
            if progress is not None:
                progress(done, steps)

        def seen(step: int, latents: list[Tensor]) -> None:
            for r, z in zip(batch, latents, strict=True):
                self.watch(r, step, z)

        return denoise(
            self.dit,
            [r.conditions for r in batch],
            [(r.size[0] // factor, r.size[1] // factor) for r in batch],
            [r.positive for r in batch],
            None if s.scale == 1 else [r.negative for r in batch],
            [r.seed for r in batch],
            sigmas=shift_schedule(s.steps, s.shift) if s.schedule == "shift" else karras_schedule(s.steps),
            guidance=s.scale,
            interval=s.interval,
            reuse=s.reuse,
            method=s.sampler,
            eta=s.eta,
            condition_time=s.condition_time,
            progress=step_done,
            graphs=self.graphs,
            watch=seen if self.watch else None,
        )

    @torch.no_grad()
    def decoded(self, latent: Tensor) -> Image.Image:
        """The picture of a latent (C, h, w) that is not finished yet: for who watches."""
        return to_image(self.vae.decode_latents(latent[None])[0])

    def _decode(self, r: Paint, latent: Tensor) -> Image.Image:
        """The picture of a painted latent (C, h, w); InputError where a number on its way is not finite."""
        pixels = self.vae.decode_latents(latent[None])[0]                                   # (3, H, W)
        # The first of these that is not finite is the cause. Read behind the picture, for which the host waits anyway.
        stages = [("what the connector says of the text", self.mllm, r.positive)]
        stages += [("the VAE's latents of an earlier picture", self.vae, z) for z in r.conditions]
        stages += [("the latents that the DiT has painted", self.dit, latent)]
        stages += [("the pixels that the VAE has decoded", self.vae, pixels)]
        sound = torch.stack([x.isfinite().all() for *_, x in stages])
        image = to_image(pixels)
        for (what, part, _), fine in zip(stages, sound.tolist(), strict=True):
            if not fine:
                raise not_finite(what, part)
        return image


def batches_of(requests: list[Paint], patch: int, factor: int) -> list[list[Paint]]:
    """Requests with the same settings together, as many as fit into PACK patches; one that is larger stands alone.

    patch, factor: pixels along a side of a patch and of a latent.
    """
    latents_per_patch = (patch // factor) ** 2
    batches: dict[tuple, list[list[Paint]]] = {}
    room: dict[tuple, int] = {}  # patches that the newest batch of these settings can still take
    for r in requests:
        patches = math.prod(r.size) // patch**2 + sum(z[0].numel() // latents_per_patch for z in r.conditions)
        # Guidance computes both branches in one pass: the picture and all that it looks at lie in the pack twice.
        patches *= 1 if r.negative is None else 2
        alike = r.answer.settings.painting
        if room.get(alike, 0) < patches:
            batches.setdefault(alike, []).append([])
            room[alike] = PACK
        batches[alike][-1].append(r)
        room[alike] -= patches
    return [batch for group in batches.values() for batch in group]


def not_finite(what: str, part: nn.Module) -> InputError:
    """What a user is told of NaN or infinity: numbers outgrow fp16 first (65,504 is its largest), seldom the other types."""
    dtype = next(p.dtype for p in part.parameters() if p.is_floating_point())
    remedy = {torch.float16: "try --dtype bf16 or fp32", torch.bfloat16: "try --dtype fp32"}.get(dtype)
    kind = str(dtype).removeprefix("torch.")
    return InputError(f"{what}: NaN or infinity, computed in {kind}: {remedy or 'its weights are damaged, take others'}")


# ------------------------------------------------------------------------------------------------------------- checkpoint


def pixels_per_patch(vae: VAEConfig, dit: DiTConfig) -> int:
    """Pixels along a side of what the DiT reads as one patch: 16 where a latent is 8 pixels and a patch 2 latents."""
    return vae.factor * dit.patch_size[1]


def check_size(size: tuple[int | None, int | None], patch: int) -> None:
    """InputError for a height or width, in pixels, that is no whole number of patches. None: not given."""
    for name, side in zip(("height", "width"), size, strict=True):
        if side is not None and side % patch:
            raise InputError(f"{name} {side}: must be a multiple of {patch}, the pixels along a patch of this DiT and VAE")


def check_fit(mllm: MLLMConfig, tokenizer: Tokenizer, processor: ImageProcessor, dit: DiTConfig, vae: VAEConfig) -> None:
    """InputError, with both numbers, where two parts do not belong together."""
    # The connector reads the states of all layers side by side (paper), so depth and width must both be right.
    layers = mllm.num_hidden_layers
    width = mllm.hidden_size
    if not dit.crossattn_proj_in_channels:
        raise InputError("this painter has no connector to a language model yet: train one with train_stage2.py --dit")
    if dit.crossattn_proj_in_channels != mllm.features:
        raise InputError(
            f"the connector in the DiT reads {dit.crossattn_proj_in_channels} numbers per token, the language model gives "
            f"{layers} layers x {width} = {layers * width}: take a DiT that was trained with this language model"
        )
    # Where there is a mask that tells clean pictures from the one that is painted, one channel more goes in than comes out.
    if (dit.out_channels, dit.in_channels) != (vae.z_dim, vae.z_dim + dit.mask_channels):
        raise InputError(
            f"the DiT paints latents of {dit.out_channels} channels (and reads {dit.in_channels}, masks included), the VAE "
            f"has {vae.z_dim}: take the VAE that the DiT was trained with"
        )
    # The processor's numbers stand in a file of their own, which can be exchanged without the weights.
    vision = mllm.vision
    seen = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    cut = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
    if seen != cut:
        raise InputError(f"preprocessor_config.json cuts patches {cut} (size, merge, frames), the language model reads {seen}")
    if tokenizer.vocab_size > mllm.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, the language model {mllm.vocab_size} embeddings")
    # More embeddings than tokens are usual (Qwen pads its table), fewer cannot be. The two ids are what pictures hang on.
    ids = tokenizer.image_pad, tokenizer.vision_start
    known = mllm.image_token_id, mllm.vision_start_token_id
    if ids != known:
        raise InputError(f"the tokenizer's <|image_pad|>, <|vision_start|> are {ids}, the language model's are {known}")


def check_device(device: str | torch.device, offload: bool, graphs: bool | None) -> None:
    """InputError for what only a GPU of NVIDIA's can do."""
    for name, asked in (("offload", offload), ("graphs", graphs)):
        if asked and torch.device(device).type != "cuda":
            raise InputError(f"--{name} is for NVIDIA GPUs, and the device is {device}: leave it out")
    if offload and graphs:
        raise InputError("--offload and --graphs exclude each other: a graph knows its weights by their addresses")


def find_checkpoint(ckpt: str | Path | None, revision: str | None) -> Path:
    """The folder of a checkpoint; None is the bundled one, which lies beside this file."""
    if ckpt is None:
        ckpt = Path(BUNDLED)
        if not ckpt.is_dir():
            raise InputError(f"{BUNDLED}: the bundled checkpoint is missing: train it with `make tiny`, or name one (--ckpt)")
    if revision and Path(ckpt).exists():
        raise InputError(f"revision {revision}: {ckpt} is a folder on this machine, which has none: leave it out")
    # An easy mistake, hence a message of its own: a training saves only the parts that it trains.
    folder = resolve(ckpt, revision=revision)
    if is_run(folder) and not (folder / "duogen.json").exists():
        flags = " ".join(f"--{part} {ckpt}" for part in parts_in(folder) if part in PARTS)
        raise InputError(f"{ckpt}: a training run, not a whole system: " + (f"give {flags} instead" if flags else "it has not "
                         "saved yet, wait for its first step_* folder"))  # fmt: skip
    if not (folder / "duogen.json").exists():
        raise InputError(f"{ckpt}: no duogen.json in it, so it is no checkpoint of the whole system: is it one of its parts?")
    return folder


def read_manifest(path: Path) -> dict:
    """duogen.json, checked: {"parts": {part: source}, "sampling": {setting: value}}."""
    manifest = read_json(path)
    # JSON's true equals 1 in Python, hence the look at the type.
    number = manifest.get("format")
    if number != FORMAT or type(number) is not int:
        raise InputError(f"{path}: format {number!r:.40}, this version reads format {FORMAT}: update the one or the other")
    for key in manifest:
        if key not in ("format", "parts", "sampling"):
            raise InputError(f"{path}: unknown key {key}: it may have format, parts and sampling")
    for key in ("parts", "sampling"):
        if not isinstance(manifest.get(key), dict):
            raise InputError(f"{path}: {key} is missing or no object")
    for part, source in manifest["parts"].items():
        if part not in PARTS:
            raise InputError(f"{path}: unknown part {part}: there are {', '.join(PARTS)}")
        if not isinstance(source, str) or not source:
            raise InputError(f"{path}: part {part} must be a folder's or a Hub repository's name, not {source!r:.40}")
        # A checkpoint may be a stranger's: it must not name what lies elsewhere on this disk.
        place = PureWindowsPath(source)  # knows both kinds of slashes
        if place.anchor or ".." in place.parts or source.startswith("~"):
            raise InputError(f"{path}: part {part} is {source!r:.80}, outside its own folder: only a folder in there or a Hub "
                             f"name may stand in a checkpoint; say --{part} for what lies elsewhere")  # fmt: skip
    override(Settings(), manifest["sampling"], f"{path}: sampling")
    return manifest


def write_manifest(folder: str | Path, defaults: Settings, size: tuple[int, int], parts: dict[str, str] | None = None) -> None:
    """duogen.json with the settings that differ from Settings(). parts: sources, by default the folders beside it."""
    # What equals the default is left out: it then follows the default if that changes.
    plain = asdict(Settings())
    sampling = {k: v for k, v in asdict(defaults).items() if v != plain[k]} | {"height": size[0], "width": size[1]}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / "duogen.json", {"format": FORMAT, "parts": parts or {p: p for p in PARTS}, "sampling": sampling})


def origin(folder: Path) -> str:
    """Where a part came from, so that it can be found again: a folder, or a Hub name with its commit."""
    hub = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(/.*)?$", folder.as_posix())
    return f"{hub[1]}/{hub[2]}{hub[4] or ''}@{hub[3]}" if hub else str(folder)
