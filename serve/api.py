"""OpenAI's chat completions, as far as this system has them: a request in, a completion or its chunks out.

    {"messages": [{"role": "user", "content": "How do I draw a house?"}], "stream": true, "seed": 1, "steps": 20}

Messages are OpenAI's: text, or parts {"type": "text"} and {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
(only data URLs: a server that fetched addresses for strangers would reach what they cannot). All of `pipeline.Settings`
may stand beside OpenAI's own fields. What would change the answer and is not there (tools, n, logprobs) is refused, what would
not is passed over.

Where the last message is the assistant's, its answer goes on behind what stands there. With "draw": true a picture comes first,
so that a picture is drawn again: the same messages up to it, and another seed.

The answer's message has content parts of the same form, text and pictures in order. In a stream a piece of text is a chunk with
delta.content a string, a picture one with a list of that one part.
"""

import base64
import io
import time
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from checkpoint import InputError
from pipeline import Answer, DuoGen, Picture, Settings, override
from records.validate import load_image

SAME = {"max_completion_tokens": "max_tokens"}  # OpenAI's names of ours
OURS = {f.name for f in fields(Settings)} - {"system"}
# Of OpenAI's fields: with these values they ask for nothing, with others for what is not there.
PLAIN = {
    "n": (1, None),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
    "stop": (None, []),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"], ["text", "image"], ["image", "text"]),
    "audio": (None,),
    "prediction": (None,),
}
# These say something to the server, not to the model.
PASSED_OVER = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "reasoning_effort", "safety_identifier"}
PASSED_OVER |= {"prompt_cache_key", "verbosity"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
FINISH = {"end": "stop", "max_tokens": "length", "max_images": "length", "context": "length", "interrupted": "stop"}


@dataclass
class Limits:
    """What a request may have. Its tokens are limited by the server's capacity."""

    messages: int = 64
    pictures: int = 16
    characters: int = 100_000  # of all texts


@dataclass
class Request:
    """A request that was understood."""

    messages: list[dict]  # as pipeline.read_dialogue wants them
    begun: list[str | Image.Image]  # what the answer begins with
    draw: bool  # whether a picture comes first
    settings: Settings
    stream: bool
    usage: bool  # whether a stream ends with a chunk that says how many tokens there were
    previews: int  # so many steps between two looks at a picture in the making; 0: none


def parse(body: Any, duo: DuoGen, limits: Limits, models: tuple[str, ...]) -> Request:
    """InputError says what is wrong with a request, in one line."""
    if not isinstance(body, dict):
        raise InputError("the body must be a JSON object")
    body = {SAME.get(key, key): value for key, value in body.items()}
    model = body.pop("model", None)
    if model is not None and model not in models:
        raise InputError(f"model {model!r:.60}: here is {models[0]}")
    messages = read_messages(body.pop("messages", None), limits)
    begun = []
    if messages[-1]["role"] == "assistant":
        begun = [part["text"] if part["type"] == "text" else load_image(part["image"]) for part in messages.pop()["content"]]
    draw = flag(body, "draw")
    stream = flag(body, "stream")
    options = body.pop("stream_options", None) or {}
    if not isinstance(options, dict):
        raise InputError("stream_options: must be an object")
    previews = body.pop("previews", 0)
    if type(previews) is not int or not 0 <= previews <= 1000:
        raise InputError("previews: must be a whole number of steps, 0 for none")

    # Everything else is a setting of ours, or a field of OpenAI's that must ask for nothing.
    values = {}
    for key, value in body.items():
        if key in OURS:
            values[key] = value
        elif key in PLAIN:
            if value not in PLAIN[key]:
                raise InputError(f"{key}: {value!r:.60} is not supported: leave it out")
        elif key not in PASSED_OVER:
            raise InputError(f"{key:.60}: unknown field")
    values = {key: value for key, value in values.items() if value is not None}
    settings = override(duo.defaults, values, "request")
    return Request(messages, begun, draw, settings, stream, bool(options.get("include_usage")), previews)


def flag(body: dict, name: str) -> bool:
    value = body.pop(name, False)
    if value not in (True, False, None):
        raise InputError(f"{name}: must be true or false")
    return bool(value)


def read_messages(messages: Any, limits: Limits) -> list[dict]:
    """OpenAI's messages as ours."""
    if not isinstance(messages, list) or not messages:
        raise InputError("messages: must be a list of at least one message")
    if len(messages) > limits.messages:
        raise InputError(f"messages: {len(messages)} of them, {limits.messages} at most")
    out = []
    pictures = 0
    characters = 0
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(f"{where}: must be an object with a role of {', '.join(ROLES)}")
        content = read_content(message.get("content"), where)
        pictures += sum(part["type"] == "image" for part in content)
        characters += sum(len(part["text"]) for part in content if part["type"] == "text")
        out.append({"role": ROLES[role], "content": content})
    if pictures > limits.pictures:
        raise InputError(f"messages: {pictures} pictures, {limits.pictures} at most")
    if characters > limits.characters:
        raise InputError(f"messages: {characters:,} characters, {limits.characters:,} at most")
    return out


def read_content(content: Any, where: str) -> list[dict]:
    """A message's content: text, or parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InputError(f"{where}.content: must be text or a list of parts")
    parts = []
    for k, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
            continue
        address = part.get("image_url") if kind == "image_url" else None
        url = address.get("url") if isinstance(address, dict) else None
        if not isinstance(url, str):
            form = '{"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}'
            raise InputError(f"{where}.content[{k}]: must be {form}")
        if not url.startswith("data:"):
            raise InputError(f"{where}.content[{k}]: {url!r:.40}: only data URLs are read, nothing is fetched")
        parts.append({"type": "image", "image": url})
    return parts


# --------------------------------------------------------------------------------------------------------------- the answer


def data_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def picture_part(image: Image.Image) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def usage(answer: Answer) -> dict:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt_tokens + answer.tokens,
    }


def completion(id: str, model: str, answer: Answer) -> dict:
    """A whole answer, without what it began with."""
    content = []
    for part in answer.parts[answer.given :]:
        content.append(picture_part(part.image) if isinstance(part, Picture) else {"type": "text", "text": part})
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": FINISH[answer.stop]}
    head = {"id": id, "object": "chat.completion", "created": int(time.time()), "model": model}
    return head | {"choices": [choice], "usage": usage(answer)}


def chunk(id: str, model: str, created: int, delta: dict, finish: str | None = None, **more) -> dict:
    """A piece of one."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    head = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}
    return head | {"choices": [choice]} | more


def error(message: str, kind: str = "invalid_request_error") -> dict:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
