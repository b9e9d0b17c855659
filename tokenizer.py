"""Text and dialogues to token ids and back: Qwen2.5's byte-level BPE, and the chat form that the language model reads.

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
BYTE_OF = {chr(b if i < len(_PLAIN) else 256 + i - len(_PLAIN)): b for i, b in enumerate(_BYTES)}
CHAR_OF = {b: c for c, b in BYTE_OF.items()}


class Tokenizer:
    """`vocab`: printable token -> id for the base vocabulary; `merges`: pairs of printable tokens, first learned first;
    `config`: tokenizer_config.json, whose `added_tokens_decoder` names the added tokens."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], config: dict):
        self.vocab, self.merges, self.config = vocab, merges, config
        if any(type(id) is not int for id in vocab.values()) or {*vocab.values()} != {*range(len(vocab))}:
            raise InputError(f"vocab.json: the ids of its {len(vocab):,} tokens must be 0, 1, 2, ...: copy it again")
        # tiktoken merges by the id of the result, BPE by the order of the merges: these two make them the same order.
        if len(vocab) != 256 + len(merges):
            raise InputError(f"vocab.json has {len(vocab)} tokens, merges.txt {len(merges)} lines: they must differ by 256")
        for i, (a, b) in enumerate(merges):
            if vocab.get(a + b) != 256 + i:
                raise InputError(f"merges.txt, merge {i} ({a} {b}): vocab.json must give its result the id {256 + i}")
        try:
            ranks = {bytes(BYTE_OF[c] for c in token): id for token, id in vocab.items()}
        except KeyError as e:
            raise InputError(f"vocab.json: {e} stands for no byte; this is not a byte-level vocabulary") from None
        try:
            added = {int(id): t for id, t in config.get("added_tokens_decoder", {}).items()}
            self.added = {t["content"]: id for id, t in sorted(added.items())}
            if not all(isinstance(name, str) and name and len(vocab) <= id < 2**24 for name, id in self.added.items()):
                raise ValueError("a name that is empty or no text, or an id that is no place behind vocab.json")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            form = '{"ID": {"content": NAME, ...}, ...}'
            raise InputError(f"tokenizer_config.json: added_tokens_decoder must be {form} ({e!r:.90})") from None
        self.special = {id for id, t in added.items() if t.get("special")}
        missing = [name for name in ADDED[:SPECIAL] if name not in self.added]
        if missing:
            raise InputError(f"tokenizer_config.json: added_tokens_decoder lacks {missing[0]}; a Qwen2.5-VL tokenizer has it")
        self.bytes_of = {id: b for b, id in ranks.items()} | {id: name.encode() for name, id in self.added.items()}
        self.bpe = tiktoken.Encoding("qwen", pat_str=WORD, mergeable_ranks=ranks, special_tokens=self.added)
        longest_first = sorted(self.added, key=len, reverse=True)
        self.control = regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")
        self.vocab_size = 1 + max(self.bytes_of)  # rows that an embedding must have
        self.endoftext, self.im_start, self.im_end = (self.added[f"<|{n}|>"] for n in ("endoftext", "im_start", "im_end"))
        self.vision_start, self.vision_end = self.added["<|vision_start|>"], self.added["<|vision_end|>"]
        self.image_pad, self.video_pad = self.added["<|image_pad|>"], self.added["<|video_pad|>"]
        # A model may write ordinary tokens, ask for a picture, and end. Everything else is for others to write.
        self.writable = [*vocab.values(), self.vision_start, self.im_end, self.endoftext]

    @classmethod
    def from_pretrained(cls, source: str | Path, subfolder: str | None = None, revision: str | None = None) -> "Tokenizer":
        """From a folder with vocab.json, merges.txt and tokenizer_config.json, or transformers 5's single tokenizer.json."""
        folder = resolve(source, subfolder, revision)
        config = read_json(folder / "tokenizer_config.json")
        if (folder / "vocab.json").exists():
            vocab = read_json(folder / "vocab.json")
            lines = read_text(folder / "merges.txt").split("\n")
            merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        elif (folder / "tokenizer.json").exists():
            whole = read_json(folder / "tokenizer.json")
            try:
                vocab = dict(whole["model"]["vocab"])
                merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in whole["model"]["merges"]]
                config = {"added_tokens_decoder": {str(t["id"]): t for t in whole["added_tokens"]}} | config
            except (KeyError, TypeError, ValueError) as e:
                what = f"no byte-level BPE ({e!r:.60}): use that of Qwen2.5-VL"
                raise InputError(f"{folder / 'tokenizer.json'}: {what}") from None
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
        (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in self.merges), encoding="utf-8")
        write_json(folder / "tokenizer_config.json", self.config)
        write_json(folder / "chat_template.json", {"chat_template": self.config.get("chat_template", CHAT_TEMPLATE)})

    def encode(self, text: str) -> list[int]:
        """Ordinary text; never gives a control token."""
        if len(text) > BLANKS and regex.search(rf"\s{{{BLANKS}}}", text):
            raise InputError(f"text: more than {BLANKS:,} blanks in a row; take some out")
        return self.bpe.encode_ordinary(unicodedata.normalize("NFC", text))

    def encode_with_control(self, text: str) -> list[int]:
        """What `transformers` does: names of added tokens in the text become those tokens. For trusted templates only.

        The split comes before NFC, which could otherwise fuse a token's last character with a combining mark behind it.
        """
        pieces = enumerate(self.control.split(text))
        return [id for i, piece in pieces for id in ([self.added[piece]] if i % 2 else self.encode(piece))]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD; ids behind the vocabulary (unused embedding rows) vanish."""
        skip = self.special if skip_special else ()
        return b"".join(self.bytes_of.get(i, b"") for i in ids if i not in skip).decode("utf-8", errors="replace")


class StreamDecoder:
    """Decodes ids as they come: `push` gives the characters that are complete, `flush` what is left at the end."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self.tokenizer, self.skip = tokenizer, tokenizer.special if skip_special else ()
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        return "" if id in self.skip else self.utf8.decode(self.tokenizer.bytes_of.get(id, b""))

    def flush(self) -> str:
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
    split = regex.compile(WORD)
    counts = Counter(w for text in texts for w in split.findall(unicodedata.normalize("NFC", text)))
    id_of = {b: i for i, b in enumerate(_BYTES)}
    words = [[id_of[b] for b in w.encode()] for w in counts]
    weights = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # pair -> count over the corpus, pair -> words that have contained it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            pairs[pair] += weights[i]
            where[pair].add(i)
    tokens = [CHAR_OF[b] for b in _BYTES]
    merges = []
    while len(merges) < room and pairs:
        best = max(pairs, key=lambda p: (pairs[p], -p[0], -p[1]))
        if pairs[best] <= 0:
            break
        for i in sorted(where[best]):
            old = words[i]
            words[i] = new = _fuse(old, best, len(tokens))
            for pair in zip(old, old[1:], strict=False):
                pairs[pair] -= weights[i]
            for pair in zip(new, new[1:], strict=False):
                pairs[pair] += weights[i]
                where[pair].add(i)
        merges.append((tokens[best[0]], tokens[best[1]]))
        tokens.append("".join(merges[-1]))
        pairs.pop(best)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(len(tokens) + i): {"content": name, **flags, "special": i < SPECIAL} for i, name in enumerate(ADDED)
        },
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
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges, config)


def _fuse(word: list[int], pair: tuple[int, int], id: int) -> list[int]:
    out, i = [], 0
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
        return self.images[j].bov, self.images[j - 1].end + 1 if j else self.system_end

    def add(self, ids: list[int], loss: bool) -> None:
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
    if messages[0].get("role") != "system":
        messages = [{"role": "system", "content": default_system}, *messages]
    out = Rendered()
    grids = list(grids)
    for n, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise InputError(f"messages: role {role!r} is none of system, user, assistant")
        answer = role == "assistant"
        out.add([tokenizer.im_start], False)
        text = f"{role}\n"
        if answer:
            out.add(tokenizer.encode(text), False)
            text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
            if part.get("type") == "image":
                if role == "system":
                    raise InputError("messages: a picture cannot stand in the system message")
                if len(out.images) == len(grids):
                    raise InputError(f"messages: more pictures than the {len(grids)} whose sizes are given")
                h, w = grids[len(out.images)]
                out.add(tokenizer.encode(text), answer)
                text = ""
                out.add([tokenizer.vision_start], answer)
                start = len(out.ids)
                out.images.append(ImageSpan(start - 1, start, start + h * w, role))
                out.add([tokenizer.image_pad] * (h * w) + [tokenizer.vision_end], False)
            elif part.get("type") == "text" and isinstance(part.get("text"), str):
                text += part["text"]
            else:
                raise InputError(f"messages: a {role} part must be text or image, not {part!r:.60}")
        out.add(tokenizer.encode(text), answer)
        out.add([tokenizer.im_end], answer)
        out.add(tokenizer.encode("\n"), False)
        if n == 0:
            out.system_end = len(out.ids)
    if len(out.images) != len(grids):
        raise InputError(f"messages: {len(out.images)} pictures, but sizes of {len(grids)} are given")
    if generation_prompt:
        out.add([tokenizer.im_start, *tokenizer.encode("assistant\n")], False)
    return out
