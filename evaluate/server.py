"""A judge behind any OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`, a paid service).

    server = Server("http://localhost:8000/v1", "Qwen/Qwen3-VL-32B-Instruct")
    server.ask(Question("yes", [picture, "Is it red?"], {}))

Where the server can, a yes comes with the probabilities of the first words, and numbers in JSON by a schema; a server that
refuses either is asked without it from then on. One that is busy (429), fails (5xx) or is silent is asked again after pauses.
The key is read from JUDGE_API_KEY; that of the Hub is never sent.
"""

import base64
import io
import math
import os
import random
import time

from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError

from checkpoint import InputError
from evaluate.judges import Question, Reply, Unanswered
from model import to_rgb

LATER = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # worth another try
PAUSE = 60.0  # seconds between two tries at most
FIRST = 1.0  # before the second try; it doubles


class Server:
    """A judges.Backend. Any number of threads may ask."""

    def __init__(self, url: str, model: str, timeout: float = 120.0, tries: int = 6, max_tokens: int = 1024):
        self.url = url.rstrip("/")
        self.model = model
        self.name = model
        self.tries = tries
        self.max_tokens = max_tokens
        # The address is not in it: the same model elsewhere answers the same.
        self.identity = {"model": model, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
        self.logprobs = True  # until the server says that it cannot
        self.structured = True
        key = os.environ.get("JUDGE_API_KEY", "none")
        self.client = InferenceClient(base_url=self.url, api_key=key, timeout=timeout)
        # The Hub's client refuses all traffic under HF_HUB_OFFLINE, but a judge is not the Hub.
        get_session().event_hooks = {}
        self.check(key)

    def check(self, key: str) -> None:
        """One line now, not after the first pictures, if nobody is there or the model has another name."""
        base = self.url if self.url.endswith("/v1") else f"{self.url}/v1"
        try:
            reply = get_session().get(f"{base}/models", headers={"Authorization": f"Bearer {key}"}, timeout=20)
        except Exception as e:
            raise InputError(f"--judge {self.url}: nobody answers there ({reason(e)}): start the server first") from None
        if reply.status_code in (401, 403):
            raise InputError(f"--judge {self.url}: it wants a key (HTTP {reply.status_code}): put it into JUDGE_API_KEY")
        try:
            there = [entry["id"] for entry in reply.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return  # not every server tells which models it has
        if there and self.model not in there:
            raise InputError(f"--judge-model {self.model}: the server has {', '.join(map(str, there[:8]))}")

    def ask(self, question: Question) -> Reply:
        """Raises Unanswered when all tries are used up."""
        pause = FIRST
        for left in reversed(range(self.tries)):
            try:
                return self.once(question)
            except InputError:
                raise
            # An answer that is no chat completion (cut off, other types) fails in many ways.
            except (OSError, ValueError, TypeError, LookupError, AttributeError) as e:
                status = getattr(getattr(e, "response", None), "status_code", None)
                if status in (401, 403, 404):
                    raise InputError(f"{self.url}: {reason(e)}: correct the address, the model or JUDGE_API_KEY") from None
                if status is not None and status not in LATER:
                    if self.without(question, e):
                        return self.ask(question)
                    raise Unanswered(f"{self.url}: {reason(e)}") from None
                problem = e
            except Exception as e:  # of the HTTP library, which is the Hub's own choice
                if not type(e).__module__.startswith(("httpx", "httpcore")):
                    raise
                problem = e
            if left:
                told = retry_after(problem)
                # Many threads that failed together must not come back together.
                time.sleep(min(PAUSE, told if told is not None else pause * random.uniform(0.8, 1.2)))
                pause *= 2
        raise Unanswered(f"{self.url}: {reason(problem)}")

    def without(self, question: Question, e: HfHubHTTPError) -> bool:
        """Whether an error means that the server lacks something that one can do without."""
        if e.response.status_code not in (400, 415, 422, 501) or filtered(e):
            return False
        if question.kind == "yes" and self.logprobs:
            self.logprobs = False
            return True
        if question.kind == "fields" and self.structured:
            self.structured = False
            return True
        return False

    def once(self, question: Question) -> Reply:
        options = {}
        if question.kind == "yes" and self.logprobs:
            options = {"logprobs": True, "top_logprobs": 10}
        if question.kind == "fields" and self.structured:
            schema = {"name": "scores", "schema": question.schema(), "strict": True}
            options = {"response_format": {"type": "json_schema", "json_schema": schema}}
        messages = [{"role": "user", "content": [content(part) for part in question.parts]}]
        try:
            out = self.client.chat_completion(
                messages, model=self.model, max_tokens=self.max_tokens, temperature=0, seed=0, **options
            )
        except HfHubHTTPError as e:
            if filtered(e):
                return Reply(reason(e), refused=True, model=self.model)
            raise
        choice = out.choices[0]
        refusal = getattr(choice.message, "refusal", None)
        words = choice.message.content
        tokens = (getattr(out.usage, "prompt_tokens", 0), getattr(out.usage, "completion_tokens", 0))
        if not isinstance(words, str):
            words = "" if words is None else f"not text: {words!r}"
        reply = Reply(words, model=str(out.model))
        reply.tokens = tuple(n if isinstance(n, int) else 0 for n in tokens)
        if refusal or choice.finish_reason == "content_filter":
            reply.refused = True
            reply.words = reply.words or str(refusal or "filtered")
        elif question.kind == "yes" and self.logprobs:
            reply.value = probability(choice)
        return reply


def content(part) -> dict:
    """A text or a picture of a message; a picture as it is, in its own size and aspect."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    data = io.BytesIO()
    to_rgb(part).save(data, "PNG")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()}}


def probability(choice) -> dict[str, float] | None:
    """Of yes against no, where the answer's first word stands; None where the server gives no probabilities."""
    try:
        for token in choice.logprobs.content:
            if word(token.token) in ("yes", "no"):
                mass = {"yes": 0.0, "no": 0.0}
                for each in token.top_logprobs or [token]:
                    if word(each.token) in mass:
                        mass[word(each.token)] += math.exp(each.logprob)
                return {"yes": mass["yes"] / (mass["yes"] + mass["no"])}
            if token.token.strip():
                return None  # it begins with something else: its words are read
    except (AttributeError, TypeError, ZeroDivisionError, OverflowError):
        pass
    return None


def word(token: str) -> str:
    return token.strip(" \n\t\"'.*Ġ▁").lower()


def filtered(e: HfHubHTTPError) -> bool:
    """Whether a filter before the judge refused: an error to the protocol, an answer to us."""
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
