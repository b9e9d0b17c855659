"""Text and dialogues to token ids and back: Qwen's byte-level BPE, and the chat form that the language models read.

    tokenizer = Tokenizer.from_pretrained("checkpoints/duogen-7b/mllm")
    rendered = render(tokenizer, messages, grids=[(2, 2)])    # ids, loss mask, where the pictures are

BPE (Sennrich et al., arXiv 1508.07909) over bytes: NFC, split into words by a regex, then merge neighbours in the order the
merges were learned. tiktoken does the merging; `vocab.json` and `merges.txt` hold the tables. A picture stands in the text as

    <|vision_start|> <|image_pad|> x (h * w) <|vision_end|>

and `<|vision_start|>` is BOV, the token with which the model asks for a picture. Only `render` writes control tokens: text that
happens to contain the characters "<|im_end|>" stays text, whoever wrote it.
"""

import codecs
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from checkpoint import InputError, read_json, read_text, resolve, write_json

WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5's added tokens in id order; they follow the base vocabulary. The first 14 are "special": decoding leaves them out.
ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
    "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> "
    "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()
SPECIAL = 14
BLANKS = 400_000  # tiktoken's regex runs out of stack on a run of about a million
SYSTEM = "You are a helpful assistant."
# What `render` does, in the language that `transformers` reads; the published template also covers video.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    f"{SYSTEM}<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# GPT-2's printable stand-in for every byte, in vocabulary order: readable ASCII and Latin-1 as they are, the rest from U+0100.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = _PLAIN + [b for b in range(256) if b not in _PLAIN]
CHAR_OF = {b: chr(b) for b in _PLAIN}
CHAR_OF |= {b: chr(256 + i) for i, b in enumerate(_BYTES[len(_PLAIN) :])}
BYTE_OF = {c: b for b, c in CHAR_OF.items()}


class Tokenizer:
    """`vocab`: printable token -> id for the base vocabulary; `merges`: pairs of printable tokens, first learned first;
    `config`: tokenizer_config.json, whose `added_tokens_decoder` names the added tokens."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], config: dict):
        self.vocab = vocab
        self.merges = merges
        self.config = config
        ranks = self._ranks()
        self.added, self.special = self._added_tokens()
        for name in ADDED[:SPECIAL]:
            if name not in self.added:
                raise InputError(f"tokenizer_config.json: added_tokens_decoder lacks {name}, which dialogues and pictures need")

        # Both directions: ids to bytes by a table, text to ids by tiktoken.
        self.bytes_of = {id: b for b, id in ranks.items()}
        for name, id in self.added.items():
            self.bytes_of[id] = name.encode()
        self.bpe = tiktoken.Encoding("qwen", pat_str=WORD, mergeable_ranks=ranks, special_tokens=self.added)
        # Longest first: of two names that begin alike, a regex takes the one that stands first.
        names = sorted(self.added, key=len, reverse=True)
        self.control = regex.compile("(" + "|".join(map(regex.escape, names)) + ")")
        self.vocab_size = 1 + max(self.bytes_of)  # rows that an embedding must have

        # Those that the rest of the system asks for by name.
        self.endoftext = self.added["<|endoftext|>"]
        self.im_start = self.added["<|im_start|>"]
        self.im_end = self.added["<|im_end|>"]
        self.vision_start = self.added["<|vision_start|>"]
        self.vision_end = self.added["<|vision_end|>"]
        self.image_pad = self.added["<|image_pad|>"]
        self.video_pad = self.added["<|video_pad|>"]

        # A model may write ordinary tokens, ask for a picture, and end. Everything else is for others to write.
        self.writable = [*vocab.values(), self.vision_start, self.im_end, self.endoftext]

    def _ranks(self) -> dict[bytes, int]:
        """The base vocabulary as tiktoken reads it, bytes -> id; InputError where vocab and merges do not fit together."""
        vocab = self.vocab
        merges = self.merges
        whole_numbers = all(type(id) is int for id in vocab.values())
        if not whole_numbers or set(vocab.values()) != set(range(len(vocab))):
            raise InputError(f"vocab.json: the ids of its {len(vocab):,} tokens must be 0, 1, 2, ...: copy it again")

        # tiktoken merges by the id of the result, BPE by the order of the merges: these two make them the same order.
        if len(vocab) != 256 + len(merges):
            raise InputError(f"vocab.json has {len(vocab)} tokens, merges.txt {len(merges)} lines: they must differ by 256")
        for i, (a, b) in enumerate(merges):
            if vocab.get(a + b) != 256 + i:
                raise InputError(f"merges.txt, merge {i} ({a} {b}): vocab.json must give its result the id {256 + i}")

        try:
            return {bytes(BYTE_OF[c] for c in token): id for token, id in vocab.items()}
        except KeyError as e:
            raise InputError(f"vocab.json: {e} stands for no byte; this is not a byte-level vocabulary") from None

    def _added_tokens(self) -> tuple[dict[str, int], set[int]]:
        """Name -> id of the config's added tokens in the order of ids, and the special ones; InputError where it is damaged."""
        try:
            # The keys are text in JSON; as text, "99" would come behind "100".
            found = {int(id): t for id, t in self.config.get("added_tokens_decoder", {}).items()}
            added = {t["content"]: id for id, t in sorted(found.items())}
            for name, id in added.items():
                if not (isinstance(name, str) and name and len(self.vocab) <= id < 2**24):
                    raise ValueError("a name that is empty or no text, or an id that is no place behind vocab.json")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            form = '{"ID": {"content": NAME, ...}, ...}'
            raise InputError(f"tokenizer_config.json: added_tokens_decoder must be {form} ({e!r:.90})") from None
        special = {id for id, t in found.items() if t.get("special")}
        return added, special

    @classmethod
    def from_pretrained(cls, source: str | Path, subfolder: str | None = None, revision: str | None = None) -> "Tokenizer":
        """From a folder with vocab.json, merges.txt and tokenizer_config.json, or transformers 5's single tokenizer.json."""
        folder = resolve(source, subfolder, revision)
        config = read_json(folder / "tokenizer_config.json")
        if (folder / "vocab.json").exists():
            vocab = read_json(folder / "vocab.json")
            lines = read_text(folder / "merges.txt").split("\n")
            # One merge a line, behind a first line that says which version of the format it is.
            merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        elif (folder / "tokenizer.json").exists():
            vocab, merges, added = _read_single_file(folder / "tokenizer.json")
            # Where both files know of added tokens, the config's word counts.
            config = {"added_tokens_decoder": added} | config
        else:
            raise InputError(f"{folder}: no vocab.json (with merges.txt) and no tokenizer.json here")
        if any(len(m) != 2 for m in merges):
            raise InputError(f"{folder}: a merge, in merges.txt or tokenizer.json, is not a pair of tokens")
        return cls(vocab, merges, config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the published layout: `transformers.AutoTokenizer` loads the folder and gives the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "vocab.json", self.vocab)
        lines = [f"{a} {b}\n" for a, b in self.merges]
        (folder / "merges.txt").write_text("".join(lines), encoding="utf-8")
        write_json(folder / "tokenizer_config.json", self.config)
        template = self.config.get("chat_template", CHAT_TEMPLATE)
        write_json(folder / "chat_template.json", {"chat_template": template})

    def encode(self, text: str) -> list[int]:
        """Ordinary text; never gives a control token."""
        # The length alone is known at once; only a text that long is searched.
        if len(text) > BLANKS and regex.search(rf"\s{{{BLANKS}}}", text):
            raise InputError(f"text: more than {BLANKS:,} blanks in a row; take some out")
        return self.bpe.encode_ordinary(unicodedata.normalize("NFC", text))

    def encode_with_control(self, text: str) -> list[int]:
        """What `transformers` does: names of added tokens in the text become those tokens. For trusted templates only.

        The split comes before NFC, which could otherwise fuse a token's last character with a combining mark behind it.
        """
        ids = []
        for i, piece in enumerate(self.control.split(text)):
            # A regex with a group splits into text, name, text, name, ..., text.
            if i % 2:
                ids.append(self.added[piece])
            else:
                ids += self.encode(piece)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD; ids behind the vocabulary (unused embedding rows) vanish."""
        skip = self.special if skip_special else ()
        # All bytes first, then text: a character may be spread over several tokens.
        pieces = [self.bytes_of.get(i, b"") for i in ids if i not in skip]
        return b"".join(pieces).decode("utf-8", errors="replace")


def _read_single_file(path: Path) -> tuple[dict[str, int], list[tuple], dict[str, dict]]:
    """transformers 5's tokenizer.json -> vocab, merges, added_tokens_decoder."""
    whole = read_json(path)
    try:
        vocab = dict(whole["model"]["vocab"])
        merges = []
        for merge in whole["model"]["merges"]:
            # Older files hold "a b", newer ones ["a", "b"].
            if isinstance(merge, str):
                merge = merge.split(" ")
            merges.append(tuple(merge))
        added = {str(t["id"]): t for t in whole["added_tokens"]}
    except (KeyError, TypeError, ValueError) as e:
        what = f"no byte-level BPE ({e!r:.60}): use the language model's own"
        raise InputError(f"{path}: {what}") from None
    return vocab, merges, added


class StreamDecoder:
    """Decodes ids as they come: `push` gives the characters that are complete, `flush` what is left at the end."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self.tokenizer = tokenizer
        self.skip = tokenizer.special if skip_special else ()
        # Keeps the bytes of a character that is not complete.
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        if id in self.skip:
            return ""
        return self.utf8.decode(self.tokenizer.bytes_of.get(id, b""))

    def flush(self) -> str:
        # A character that was never completed becomes U+FFFD.
        return self.utf8.decode(b"", final=True)


# ----------------------------------------------------------------------------------------------------------- training


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from texts: repeatedly fuse the most frequent pair of neighbours inside words (ties: the smaller ids).

    vocab_size counts everything, the 256 bytes and the added tokens too. Training works on distinct words and their counts, and
    ends early when every word is one token. The added tokens have Qwen's names and stand behind the base vocabulary.
    """
    room = vocab_size - 256 - len(ADDED)
    if room < 0:
        raise InputError(f"vocab_size {vocab_size} is too small: bytes and added tokens alone need {256 + len(ADDED)}")
    # Words and how often each occurs; a pair counts as often as the words that it is in.
    split = regex.compile(WORD)
    counts = Counter()
    for text in texts:
        counts.update(split.findall(unicodedata.normalize("NFC", text)))
    weights = list(counts.values())

    # At first every byte is a token, numbered in the order of the vocabulary.
    id_of = {b: i for i, b in enumerate(_BYTES)}
    tokens = [CHAR_OF[b] for b in _BYTES]
    words = [[id_of[b] for b in word.encode()] for word in counts]
    pairs = Counter()  # pair -> count over the corpus
    where = defaultdict(set)  # pair -> words that have contained it
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += weights[i]
            where[pair].add(i)

    def rank(pair: tuple[int, int]) -> tuple[int, int, int]:
        """Frequent pairs first, of equals that of smaller ids."""
        return pairs[pair], -pair[0], -pair[1]

    merges = []
    while len(merges) < room and pairs:
        best = max(pairs, key=rank)
        # Every word is one token.
        if pairs[best] <= 0:
            break
        # Only words that contain the pair change: their old pairs go, their new ones come.
        for i in sorted(where[best]):
            old = words[i]
            new = _fuse(old, best, len(tokens))
            words[i] = new
            for pair in pairwise(old):
                pairs[pair] -= weights[i]
            for pair in pairwise(new):
                pairs[pair] += weights[i]
                where[pair].add(i)
        a, b = (tokens[id] for id in best)
        merges.append((a, b))
        tokens.append(a + b)
        pairs.pop(best)

    vocab = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(vocab, merges, _config(len(tokens)))


def _config(base: int) -> dict:
    """tokenizer_config.json of a new tokenizer, whose added tokens stand behind `base` others; fields as published."""
    added = {}
    for i, name in enumerate(ADDED):
        added[str(base + i)] = {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": i < SPECIAL,
        }
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": ADDED[1:SPECIAL],
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }


def _fuse(word: list[int], pair: tuple[int, int], id: int) -> list[int]:
    """The word with `id` wherever the pair stood, read from the left."""
    out = []
    i = 0
    while i < len(word):
        fits = word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]
        out.append(id if fits else word[i])
        i += 2 if fits else 1
    return out


# ---------------------------------------------------------------------------------------------------------- dialogues


@dataclass
class ImageSpan:
    """One picture in a rendered dialogue: BOV at ids[bov], <|image_pad|> at ids[start:end], <|vision_end|> at ids[end]."""

    bov: int
    start: int
    end: int
    role: str  # "user" or "assistant"


@dataclass
class Rendered:
    """A dialogue as token ids. loss[i]: token i is something the assistant must say (its text, BOV, its <|im_end|>)."""

    ids: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)
    images: list[ImageSpan] = field(default_factory=list)
    system_end: int = 0  # number of tokens of the system turn, its line break included

    def condition_lengths(self, j: int) -> tuple[int, int]:
        """How many leading tokens condition picture j, with guidance's positive and negative branch.

        Positive: everything before BOV. Negative: without the last text chunk, that is up to the end of the previous picture,
        <|vision_end|> included, or of the system turn when there is no earlier picture. It is a prefix, because in a causal
        model all states behind a text carry that text.
        """
        positive = self.images[j].bov
        negative = self.images[j - 1].end + 1 if j else self.system_end
        return positive, negative

    def add(self, ids: list[int], loss: bool) -> None:
        """Append tokens that are all learned, or none of them."""
        self.ids += ids
        self.loss += [loss] * len(ids)


def render(
    tokenizer: Tokenizer,
    messages: list[dict],
    grids: list[tuple[int, int]],
    *,
    generation_prompt: bool = False,
    default_system: str = SYSTEM,
) -> Rendered:
    """The ids of Qwen2.5-VL's chat template for a dialogue, and what training and sampling need to know about them.

    messages: [{"role": "system" | "user" | "assistant", "content": text or [{"type": "text", "text": ...}, {"type": "image"}]}]
    grids: merged patches (h, w) of every picture in reading order. generation_prompt opens an answer at the end.
    The role's line and the text behind it are encoded as one string, as the template has it, except in answers: there the
    model starts from a finished "assistant\\n". Only an answer that begins with a line break can tell the difference.
    """
    if not messages:
        raise InputError("messages: a dialogue needs at least one message")
    # The template begins with a system turn, whoever wrote it.
    if messages[0].get("role") != "system":
        messages = [{"role": "system", "content": default_system}, *messages]
    out = Rendered()
    grids = list(grids)
    for n, message in enumerate(messages):
        _render_message(out, tokenizer, message, grids)
        if n == 0:
            out.system_end = len(out.ids)
    if len(out.images) != len(grids):
        raise InputError(f"messages: {len(out.images)} pictures, but sizes of {len(grids)} are given")
    if generation_prompt:
        out.add([tokenizer.im_start, *tokenizer.encode("assistant\n")], False)
    return out


def _render_message(out: Rendered, tokenizer: Tokenizer, message: dict, grids: list[tuple[int, int]]) -> None:
    """Append <|im_start|>role, the content, <|im_end|> and a line break."""
    role = message.get("role")
    content = message.get("content")
    if role not in ("system", "user", "assistant"):
        raise InputError(f"messages: role {role!r} is none of system, user, assistant")
    answer = role == "assistant"
    parts = content or []
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]

    # An answer starts behind a finished role line. Elsewhere line and text are one string.
    out.add([tokenizer.im_start], False)
    text = f"{role}\n"
    if answer:
        out.add(tokenizer.encode(text), False)
        text = ""

    # Text is gathered until a picture or the end: what stands side by side is encoded as one string.
    for part in parts:
        if part.get("type") == "image":
            if role == "system":
                raise InputError("messages: a picture cannot stand in the system message")
            if len(out.images) == len(grids):
                raise InputError(f"messages: more pictures than the {len(grids)} whose sizes are given")
            out.add(tokenizer.encode(text), answer)
            text = ""
            _render_picture(out, tokenizer, role, grids[len(out.images)])
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise InputError(f"messages: a {role} part must be text or image, not {part!r:.60}")
    out.add(tokenizer.encode(text), answer)

    # An answer ends by itself: its <|im_end|> is learned, the line break behind it is not.
    out.add([tokenizer.im_end], answer)
    out.add(tokenizer.encode("\n"), False)


def _render_picture(out: Rendered, tokenizer: Tokenizer, role: str, grid: tuple[int, int]) -> None:
    """Append BOV, h * w places for the picture's vectors, and <|vision_end|>."""
    h, w = grid
    # To ask for a picture is the assistant's own decision; what follows is put there for it.
    out.add([tokenizer.vision_start], role == "assistant")
    start = len(out.ids)
    end = start + h * w
    out.images.append(ImageSpan(start - 1, start, end, role))
    out.add([tokenizer.image_pad] * (h * w), False)
    out.add([tokenizer.vision_end], False)
