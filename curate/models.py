"""The model that some steps ask: none, this project's own MLLM in the same process, or any OpenAI-compatible server.

    model = Model("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-7B-Instruct", calls="data/web/calls")
    model.check()                                     one clear line now if nobody is there
    model.write([prompt("caption"), picture])         words, or Unanswered
    model.write_all([[...], [...]])                   many at once

A `Model` is a description: it can be a field of a step, travels to other processes, and connects where it is first asked. Any
number of threads may ask (`abreast`), and up to `at_once` questions of a process are under way at the same time.

What was asked and answered lies in `calls`, a file by the hash of its content, of a picture that of its file: the same
question to the same model is answered from there, so a second run costs nothing and gives the same bytes. A server that is
busy, fails or is silent is asked again after pauses; one that stays silent is left alone for a minute, and its questions are
`Unanswered` meanwhile. The key is read from MODEL_API_KEY; that of the Hub is never sent.
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from huggingface_hub import AsyncInferenceClient, get_async_session, get_session, set_async_client_factory
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from checkpoint import InputError, read_json, read_text
from curate.page import Dropped, Page, Picture, Step
from evaluate.judges import Tally, Unanswered, plain
from evaluate.server import FIRST, LATER, PAUSE
from pages.answer import harmless_json, write_text
from records.validate import load_image

FORMAT = 1  # of a question: a change of how it is put makes another one
PATIENCE = 5  # questions in a row without an answer, until a server is taken to be gone
REST = 60.0  # seconds until it is asked again then
PROMPTS = Path(__file__).parent / "prompts"
Asked = list[str | Picture]  # texts and pictures in the order in which the model is to see them


@cache
def prompt_file(name: str) -> str:
    return read_text(PROMPTS / f"{name}.txt").strip()


def prompt(name: str, **words: str) -> str:
    """A prompt; {word} in it is replaced, and braces of what is put in stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: words[match[1]], prompt_file(name))


def prompt_hashes() -> dict[str, str]:
    """{name: SHA-256} of all prompts, for the manifest."""
    return {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(PROMPTS.glob("*.txt"))}


@dataclass(frozen=True)
class Model:
    """Which model is asked, and how."""

    where: str = "none"  # none, self, or the address of an OpenAI-compatible server
    name: str = ""  # what the server calls it
    calls: str = ""  # folder in which answers are kept; empty: nowhere
    at_once: int = 16  # questions under way at the same time, of one process
    timeout: float = 120.0  # seconds until a silent server is asked again
    tries: int = 6  # how often a question is asked of a failing server
    side: int = 768  # pixels of a picture's longer side as it is sent, at most
    ckpt: str | None = None  # of self: checkpoint; None: the bundled miniature
    mllm: str | None = None  # of self: the language model alone, from a run, a folder or a Hub name
    device: str = "auto"  # of self
    dtype: str = "auto"  # of self

    def __bool__(self) -> bool:
        return self.where != "none"

    def manifest(self) -> dict:
        """What its answers depend on, and nothing of this machine."""
        if self.where == "none":
            return {"model": "none"}
        if self.where == "self":
            return {"model": "self", "weights": self.mllm or self.ckpt or "bundled"}
        return {"model": self.name, "side": self.side, "temperature": 0, "seed": 0}

    def check(self) -> None:
        """InputError, one line, where it cannot be asked."""
        if self.where in ("none", "self"):
            return
        if not self.where.startswith(("http://", "https://")):
            example = "such as http://localhost:8000/v1"
            raise InputError(f"--model {self.where}: must be none, self, or the address of a server, {example}")
        if not self.name:
            raise InputError("--model-name is missing: what the server calls its model")
        check_server(self.where, self.name)

    def write(self, asked: Asked, max_tokens: int = 1024) -> str:
        """What it answers. Raises Unanswered: it is silent, it refuses, or its answer was cut off."""
        answer = self.write_all([asked], max_tokens)[0]
        if isinstance(answer, Unanswered):
            raise answer
        return answer

    def write_all(self, questions: list[Asked], max_tokens: int = 1024) -> list[str | Unanswered]:
        """Answers to independent questions, which are asked at the same time."""
        return connection(self).answers([(asked, {"max_tokens": max_tokens}) for asked in questions])

    def choose(self, questions: list[Asked], options: list[str]) -> list[str | Unanswered]:
        """Which option is the likeliest answer to each question: measured by its probability, which only `self` can."""
        if self.where != "self":
            raise InputError(f"{self.where}: only --model self can choose")
        return connection(self).answers([(asked, {"options": options}) for asked in questions])

    @property
    def tally(self) -> Tally:
        """What asking took so far in this process."""
        return connection(self).tally


def connection(model: Model) -> "Connection":
    """The one of this process: neither threads nor sockets outlive a fork."""
    key = (model, os.getpid())
    # Many threads come here first at the same time.
    with OPENING:
        if key not in CONNECTIONS:
            CONNECTIONS[key] = Connection(model)
        return CONNECTIONS[key]


CONNECTIONS: dict[tuple[Model, int], "Connection"] = {}
OPENING = threading.Lock()


class Connection:
    """Asks, and keeps the answers."""

    def __init__(self, model: Model):
        if not model:
            raise InputError("no model: a step that asks one needs --model self or the address of a server")
        self.backend = Own(model) if model.where == "self" else Server(model)
        self.model = model
        self.identity = {"format": FORMAT, **self.backend.identity}
        self.tally = Tally()
        self.ledger = f"{os.uname().nodename}-{os.getpid()}-{time.time_ns()}.json"  # a file of its own for it
        # Questions wait in a loop of their own, so that steps need not be coroutines.
        self.loop = asyncio.new_event_loop()
        self.room = asyncio.Semaphore(1 if model.where == "self" else model.at_once)
        self.under_way: dict[str, asyncio.Future] = {}  # hash of a question: who asks the same waits for its answer
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def answers(self, questions: list[tuple[Asked, dict]]) -> list[str | Unanswered]:
        async def together() -> list:
            return await asyncio.gather(*(self.answer(*question) for question in questions), return_exceptions=True)

        found = asyncio.run_coroutine_threadsafe(together(), self.loop).result()
        for each in found:
            if isinstance(each, BaseException) and not isinstance(each, Unanswered):
                raise each
        return found

    async def answer(self, asked: Asked, options: dict) -> str:
        described = [part if isinstance(part, str) else {"sha256": part.sha256} for part in asked]
        question = {"model": self.identity, "asked": described, **options}
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        if key not in self.under_way:
            self.under_way[key] = asyncio.ensure_future(self.kept_or_new(key, question, asked, options))
        try:
            reply = await asyncio.shield(self.under_way[key])
        finally:
            self.under_way.pop(key, None)
        if reply["problem"]:
            raise Unanswered(reply["problem"])
        return reply["words"]

    async def kept_or_new(self, key: str, question: dict, asked: Asked, options: dict) -> dict:
        file = Path(self.model.calls) / key[:2] / f"{key}.json" if self.model.calls else None
        if file is not None and file.is_file():
            self.tally.kept += 1
            return read_json(file)["reply"]
        async with self.room:
            reply = await self.backend.ask(asked, options)
        self.tally.asked += 1
        self.tally.read += reply["tokens"][0]
        self.tally.written += reply["tokens"][1]
        if file is None:
            return reply
        keep(file, {"question": question, "reply": reply})
        self.write_spent()
        # Another process may have been first: its answer is the one that all later runs will read.
        return read_json(file)["reply"]

    def write_spent(self) -> None:
        """What was taken so far, for `spent`."""
        folder = Path(self.model.calls) / "spent"
        folder.mkdir(parents=True, exist_ok=True)
        counts = {field.name: getattr(self.tally, field.name) for field in fields(Tally) if field.name != "models"}
        write_text(folder / self.ledger, harmless_json(counts))


def keep(file: Path, content: dict) -> None:
    """Whole or not at all; a file that is there already stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        temporary.write_text(harmless_json(content), encoding="utf-8")
        os.link(temporary, file)
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------- backends


def reply_of(words: str, tokens: tuple[int, int] = (0, 0), problem: str = "") -> dict:
    """What is kept of an answer. problem: why it is none, where asking again would not help."""
    return {"words": words, "problem": problem, "tokens": list(tokens)}


class Own:
    """This project's MLLM, one question at a time."""

    def __init__(self, model: Model):
        from evaluate.own import Own as Judge

        self.judge = Judge.from_pretrained(model.ckpt, model.mllm, model.device, model.dtype)
        self.identity = {"self": self.judge.identity}
        self.alone = ThreadPoolExecutor(1)

    async def ask(self, asked: Asked, options: dict) -> dict:
        # In a thread of its own, so that answers from the disk do not wait for it.
        return await asyncio.get_running_loop().run_in_executor(self.alone, self.answer, asked, options)

    def answer(self, asked: Asked, options: dict) -> dict:
        try:
            parts = [part if isinstance(part, str) else load_image(part.data) for part in asked]
            return self.likeliest(parts, options["options"]) if "options" in options else self.written(parts, options)
        except InputError as e:  # longer than its context, or a picture that is none
            return reply_of("", problem=str(e))

    def likeliest(self, parts: list[str | Image.Image], options: list[str]) -> dict:
        found, read = self.judge.probabilities(parts, options)
        return reply_of(max(options, key=found.__getitem__), (read, 0))

    def written(self, parts: list[str | Image.Image], options: dict) -> dict:
        from pipeline import Settings, Writer

        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        judge = self.judge
        writer = Writer(judge.mllm, judge.tokenizer, judge.processor)
        settings = Settings(max_images=0, max_tokens=options["max_tokens"])
        answer = writer.generate([{"role": "user", "content": content}], settings)
        return reply_of(answer.text.strip(), (answer.prompt_tokens, answer.tokens))


class Server:
    """An OpenAI-compatible server."""

    def __init__(self, model: Model):
        self.model = model
        # The address is not in it: the same model elsewhere answers the same.
        self.identity = {"model": model.name, "temperature": 0, "seed": 0, "side": model.side}
        # The Hub's own sessions refuse all traffic under HF_HUB_OFFLINE, but this server is not the Hub.
        session = type(get_async_session())
        set_async_client_factory(lambda: session(follow_redirects=True, timeout=None))
        key = os.environ.get("MODEL_API_KEY", "none")
        self.client = AsyncInferenceClient(base_url=model.where.rstrip("/"), api_key=key, timeout=model.timeout)
        self.silent = 0  # questions in a row that it left unanswered
        self.last = 0.0  # when it was last asked for the last time

    async def ask(self, asked: Asked, options: dict) -> dict:
        """Raises Unanswered when all tries are used up."""
        if self.silent >= PATIENCE and time.monotonic() < self.last + REST:
            raise Unanswered(f"{self.model.where}: has been silent {self.silent} times in a row: left alone for a while")
        try:
            messages = [{"role": "user", "content": [self.content(part) for part in asked]}]
        except InputError as e:  # a picture that is none
            return reply_of("", problem=str(e))
        pause = FIRST
        for left in reversed(range(self.model.tries)):
            try:
                reply = await self.once(messages, options["max_tokens"])
                self.silent = 0
                return reply
            except InputError:
                raise
            except Exception as e:
                if not (left and worth_another_try(e)):
                    raise self.unanswered(e) from None
                told = retry_after(e)
            await asyncio.sleep(min(PAUSE, pause if told is None else told))
            pause *= 2
        raise AssertionError("the last try returns or raises")

    def unanswered(self, e: Exception) -> Unanswered:
        status = status_of(e)
        if status in (401, 403, 404):
            remedy = "correct the address, the name of the model or MODEL_API_KEY"
            raise InputError(f"{self.model.where}: {reason(e)}: {remedy}") from None
        # A request that it will not have says nothing about the next one.
        if status is None or status in LATER:
            self.silent += 1
            self.last = time.monotonic()
        return Unanswered(f"{self.model.where}: {reason(e)}")

    async def once(self, messages: list[dict], max_tokens: int) -> dict:
        try:
            out = await self.client.chat_completion(
                messages, model=self.model.name, max_tokens=max_tokens, temperature=0, seed=0
            )
        except HfHubHTTPError as e:
            if filtered(e):
                return reply_of("", problem=f"refused: {reason(e)}")
            raise
        choice = out.choices[0]
        words = choice.message.content
        counts = getattr(out.usage, "prompt_tokens", 0), getattr(out.usage, "completion_tokens", 0)
        tokens = tuple(n if isinstance(n, int) else 0 for n in counts)
        refusal = getattr(choice.message, "refusal", None)
        if refusal or choice.finish_reason == "content_filter":
            return reply_of("", tokens, problem=f"refused: {refusal or 'filtered'}")
        if choice.finish_reason == "length":
            return reply_of("", tokens, problem=f"cut off: more than {max_tokens} tokens")
        if not isinstance(words, str):
            return reply_of("", tokens, problem=f"not text: {words!r:.100}")
        return reply_of(plain(words).strip(), tokens)

    def content(self, part: str | Picture) -> dict:
        """A part of a message; a picture no larger than `side`, as JPEG."""
        if isinstance(part, str):
            return {"type": "text", "text": part}
        image = load_image(part.data)
        image.thumbnail((self.model.side, self.model.side))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=90)
        url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}


def filtered(e: HfHubHTTPError) -> bool:
    """Whether a filter before the model refused: an error to the protocol, an answer to us."""
    text = (e.response.text or "")[:5000].lower()
    return e.response.status_code in (400, 403, 422) and ("content_filter" in text or "content policy" in text)


def retry_after(e: Exception) -> float | None:
    """Seconds that the server asks for."""
    try:
        return max(0.0, float(e.response.headers["Retry-After"]))
    except (AttributeError, KeyError, ValueError, TypeError):
        return None


def reason(e: Exception) -> str:
    """An error in one short line."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]


def status_of(e: Exception) -> int | None:
    return getattr(getattr(e, "response", None), "status_code", None)


def worth_another_try(e: Exception) -> bool:
    status = status_of(e)
    if status is not None:
        return status in LATER
    # No answer, or one that is no chat completion, which fails in many ways. What else fails is a mistake here.
    transport = type(e).__module__.startswith(("httpx", "httpcore"))
    if transport or isinstance(e, OSError | ValueError | TypeError | LookupError | AttributeError):
        return True
    raise e


def check_server(url: str, name: str) -> None:
    """One line now, not after the first pages, if nobody is there or the model has another name."""
    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    get_session().event_hooks = {}
    key = os.environ.get("MODEL_API_KEY", "none")
    try:
        reply = get_session().get(f"{base}/models", headers={"Authorization": f"Bearer {key}"}, timeout=20)
    except Exception as e:
        raise InputError(f"--model {url}: nobody answers there ({reason(e)}): start the server first") from None
    if reply.status_code in (401, 403):
        raise InputError(f"--model {url}: it wants a key (HTTP {reply.status_code}): put it into MODEL_API_KEY")
    try:
        there = [entry["id"] for entry in reply.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return  # not every server tells which models it has
    if there and name not in there:
        raise InputError(f"--model-name {name}: the server has {', '.join(map(str, there[:8]))}")


# ------------------------------------------------------------------------------------------------------- what it has taken


def spent(calls: str | Path) -> Tally:
    """What all processes have taken that kept their answers there, in earlier runs too."""
    total = Tally()
    for file in sorted(Path(calls).glob("spent/*.json")):
        for name, value in read_json(file).items():
            setattr(total, name, getattr(total, name) + value)
    return total


# ------------------------------------------------------------------------------------------------------------------- steps


def asking(model: Model, *prompts: str) -> dict:
    """What a step that asks a model says of itself in the manifest."""
    hashes = prompt_hashes()
    return {"model": model.manifest(), "prompts": {name: hashes[name] for name in prompts}}


def at_once(model: Model) -> int:
    """Pages that such a step takes at a time, in threads."""
    return model.at_once if model else 1


def abreast(step: Step, pages: Iterable[Page], at_once: int) -> Iterator[tuple[Page, Page | Dropped]]:
    """(page, what became of it), in the pages' order, several pages at a time: for steps that wait for a model."""
    waiting: deque = deque()
    with ThreadPoolExecutor(at_once) as pool:
        for page in pages:
            waiting.append((page, pool.submit(step, page)))
            if len(waiting) == at_once:
                before, future = waiting.popleft()
                yield before, future.result()
        for before, future in waiting:
            yield before, future.result()


def parsed(words: str) -> object:
    """The one JSON value in a model's words, prose around an object left out; None where there is none.

    A second object would leave a choice.
    """
    words = plain(words)
    start = words.find("{")
    try:
        value, end = json.JSONDecoder().raw_decode(words, max(0, start))
    except (ValueError, RecursionError):
        return None
    return None if "{" in words[end:] else value
