"""A judge behind any OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`, a paid service).

    server = Server("http://localhost:8000/v1", "Qwen/Qwen3-VL-32B-Instruct")
    server.ask(Question("yes", [picture, "Is it red?"], {}))

Where the server can, a yes comes with the probabilities of the first words, and numbers in JSON by a schema; a server that
refuses either is asked without it from then on. One that is busy (429), fails (5xx) or is silent is asked again after pauses.
The key is read from JUDGE_API_KEY; that of the Hub is never sent.
"""

import base64
import io
import json
import math
import os
import random
import time

from huggingface_hub import get_session

from checkpoint import InputError
from evaluate.judges import Question, Reply, Unanswered
from model import to_rgb

LATER = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # worth another try
PAUSE = 60.0  # seconds between two tries at most
FIRST = 1.0  # before the second try; it doubles
LARGEST = 16_000_000  # bytes of an answer: more is none


class Failed(Exception):
    """A try that brought no answer. status: of HTTP, 0 where there is none; after: seconds that the server asks for."""

    def __init__(self, why: str, status: int = 0, after: float | None = None):
        super().__init__(why)
        self.status = status
        self.after = after


class Server:
    """A judges.Backend. Any number of threads may ask."""

    def __init__(self, url: str, model: str, timeout: float = 120.0, tries: int = 6, max_tokens: int = 1024):
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        if not self.url.split("://")[-1].count("/"):
            self.url += "/v1"
        self.model = model
        self.name = model
        self.timeout = timeout
        self.tries = tries
        self.max_tokens = max_tokens
        # The address is not in it: the same model elsewhere answers the same.
        self.identity = {"model": model, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
        self.logprobs = True  # until the server says that it cannot
        self.structured = True
        self.headers = {"Authorization": f"Bearer {os.environ.get('JUDGE_API_KEY', 'none')}"}
        # The Hub's client refuses all traffic under HF_HUB_OFFLINE, but a judge is not the Hub.
        get_session().event_hooks = {}
        self.check()

    def check(self) -> None:
        """One line now, not after the first pictures, if nobody is there or the model has another name."""
        try:
            told = self.talk("GET", "/models", seconds=min(20.0, self.timeout))
            there = [str(entry["id"]) for entry in told["data"]]
        except Failed as e:
            if e.status in (401, 403):
                raise InputError(f"--judge {self.url}: it wants a key ({e}): put it into JUDGE_API_KEY") from None
            if not e.status:
                raise InputError(f"--judge {self.url}: nobody answers there ({e}): start the server first") from None
            return  # not every server tells which models it has
        except (KeyError, TypeError):
            return
        if there and self.model not in there and not self.knows():
            raise InputError(f"--judge-model {self.model}: the server has {', '.join(there[:8])}")

    def knows(self) -> bool:
        """Whether it answers under this name, though it does not tell of it: some list only what they keep themselves."""
        try:
            hello = [{"role": "user", "content": "Hello"}]
            told = self.talk("POST", "/chat/completions", {"model": self.model, "messages": hello, "max_tokens": 1})
            return str(told["model"]).startswith(self.model)
        except (Failed, KeyError, TypeError):
            return False

    def ask(self, question: Question) -> Reply:
        """Raises Unanswered when all tries are used up."""
        pause = FIRST
        for left in reversed(range(self.tries)):
            options = self.options(question)
            try:
                return self.once(question, options)
            except Failed as e:
                problem = e
            if problem.status in (401, 403, 404):
                raise InputError(f"{self.url}: {problem}: correct the address, the model or JUDGE_API_KEY")
            if problem.status in (400, 415, 422, 501) and options and (reply := self.without(question)):
                return reply
            if problem.status and problem.status not in LATER:
                break
            if left:
                # Many threads that failed together must not come back together.
                wait = pause * random.uniform(0.8, 1.2) if problem.after is None else problem.after
                time.sleep(min(PAUSE, wait))
                pause *= 2
        raise Unanswered(f"{self.url}: {problem}")

    def options(self, question: Question) -> dict:
        """What makes an answer better where the server can: probabilities of a yes, JSON by a schema."""
        if question.kind == "yes" and self.logprobs:
            return {"logprobs": True, "top_logprobs": 10}
        if question.kind == "fields" and self.structured:
            schema = {"name": "scores", "schema": question.schema(), "strict": True}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        return {}

    def without(self, question: Question) -> Reply | None:
        """The answer to a question that was refused with its options, if it is given without them.

        Only then is it the options that the server lacks. A single question may be refused for itself, for its length or its
        picture, and must not change how the others are asked.
        """
        try:
            reply = self.once(question, {})
        except Failed:
            return None
        if question.kind == "yes":
            self.logprobs = False
        else:
            self.structured = False
        return reply

    def once(self, question: Question, options: dict) -> Reply:
        """Raises Failed."""
        messages = [{"role": "user", "content": [content(part) for part in question.parts]}]
        asked = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0, "seed": 0}
        try:
            said = self.talk("POST", "/chat/completions", asked | options)
        except Failed as e:
            if filtered(e):
                return Reply(str(e), refused=True, model=self.model)
            raise
        # An answer that is no chat completion fails in many ways.
        try:
            (choice, *_) = said["choices"]
            words = choice["message"].get("content")
            refusal = choice["message"].get("refusal")
            stopped = choice.get("finish_reason")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise Failed(f"no chat completion: {json.dumps(said)[:120]}") from None
        if not isinstance(words, str):
            words = "" if words is None else f"not text: {words!r}"
        reply = Reply(words, model=str(said.get("model", "")), tokens=tokens_of(said.get("usage")))
        if refusal or stopped == "content_filter":
            reply.refused = True
            reply.words = reply.words or str(refusal or "filtered")
        elif question.kind == "yes" and options:
            reply.value = probability(choice)
        return reply

    def talk(self, method: str, path: str, body: dict | None = None, seconds: float | None = None) -> dict:
        """One request, answered as a whole in the given time: JSON. Raises Failed."""
        seconds = seconds or self.timeout
        until = time.monotonic() + seconds
        data = bytearray()
        # A redirect is not followed: the key and the pictures are for the address that was given.
        options = {"json": body, "headers": self.headers, "timeout": seconds, "follow_redirects": False}
        try:
            with get_session().stream(method, self.url + path, **options) as reply:
                for piece in reply.iter_bytes():
                    data += piece
                    # The client's own limit starts anew with every byte.
                    if time.monotonic() > until:
                        raise Failed(f"not at its end after {seconds:g} s")
                    if len(data) > LARGEST:
                        raise Failed(f"more than {LARGEST:,} bytes")
        except Failed:
            raise
        except Exception as e:  # of the HTTP library, which is the Hub's own choice
            if not isinstance(e, OSError) and not type(e).__module__.startswith(("httpx", "httpcore")):
                raise
            raise Failed(" ".join(f"{type(e).__name__}: {e}".split())[:300]) from None
        text = data.decode(errors="replace")
        if reply.is_redirect:
            raise Failed(f"HTTP {reply.status_code}: it sends on to {reply.headers.get('Location')}", reply.status_code)
        line = " ".join(text[:1000].split())[:200]
        if reply.status_code != 200:
            raise Failed(f"HTTP {reply.status_code}: {line}", reply.status_code, seconds_of(reply.headers))
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise Failed(f"no JSON: {line!r}") from None
        if not isinstance(value, dict):
            raise Failed(f"no JSON object: {line!r}")
        return value


def content(part) -> dict:
    """A text or a picture of a message; a picture as it is, in its own size and aspect."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    data = io.BytesIO()
    to_rgb(part).save(data, "PNG")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()}}


def probability(choice: dict) -> dict[str, float] | None:
    """Of yes against no, where the answer's first word stands; None where the server gives no probabilities."""
    try:
        for token in choice["logprobs"]["content"]:
            if word(token["token"]) in ("yes", "no"):
                mass = {"yes": 0.0, "no": 0.0}
                for each in token.get("top_logprobs") or [token]:
                    if word(each["token"]) in mass:
                        mass[word(each["token"])] += math.exp(each["logprob"])
                yes = mass["yes"] / (mass["yes"] + mass["no"])
                return {"yes": yes} if math.isfinite(yes) else None
            if token["token"].strip():
                return None  # it begins with something else: its words are read
    except (KeyError, AttributeError, TypeError, ZeroDivisionError, OverflowError):
        pass
    return None


def word(token: str) -> str:
    return token.strip(" \n\t\"'.*Ġ▁").lower()


def tokens_of(usage: object) -> tuple[int, int]:
    """Read and written; 0 where the server does not count."""
    counts = usage if isinstance(usage, dict) else {}
    read, written = (counts.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return (read if isinstance(read, int) else 0, written if isinstance(written, int) else 0)


def filtered(e: Failed) -> bool:
    """Whether a filter before the judge refused: an error to the protocol, an answer to us."""
    text = str(e).lower()
    return e.status in (400, 403, 422) and ("content_filter" in text or "content policy" in text)


def seconds_of(headers) -> float | None:
    """Seconds that the server asks us to wait."""
    try:
        return max(0.0, float(headers["Retry-After"]))
    except (KeyError, ValueError):
        return None
