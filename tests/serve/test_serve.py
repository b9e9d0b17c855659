"""The server, by the client that people use: answers, streams, limits, what goes wrong, and its end."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from checkpoint import BUNDLED, InputError

pytest.importorskip("starlette", reason="the server needs serve/requirements.txt")
pytest.importorskip("uvicorn", reason="the server needs serve/requirements.txt")
__main__ = pytest.importorskip("serve.__main__")
openai = pytest.importorskip("openai", reason="the client is the reference here")

ROOT = Path(__file__).parent.parent.parent
QUICK = {"steps": 2, "max_images": 2}
HOUSE = "How do I draw a red house with a blue door?"


def start(*flags: str) -> tuple[subprocess.Popen, str]:
    """A server of its own, and its address."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "serve", "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    line = process.stdout.readline()
    assert "listening at" in line, line
    return process, line.split()[2]


@pytest.fixture(scope="module")
def address():
    process, address = start("--batch", "4", "--queue", "40", "--body", "1", "--capacity", "2048")
    yield address
    process.terminate()
    assert process.wait(20) in (0, -signal.SIGTERM)


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def duo():
    from pipeline import DuoGen

    return DuoGen.from_pretrained(BUNDLED)


def ask(client, text=HOUSE, stream=False, **settings):
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return client.chat.completions.create(model="default", messages=messages, stream=stream, extra_body=QUICK | settings)


def unpacked(content: list[dict]) -> list:
    """Texts and pictures."""
    out = []
    for part in content:
        if part["type"] == "text":
            out.append(part["text"])
        else:
            data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
            out.append(Image.open(io.BytesIO(data)))
    return out


def difference(a: Image.Image, b: Image.Image) -> int:
    return max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))


def same(mine: list, theirs: list) -> bool:
    """Texts equal, pictures up to what answers that are written together round otherwise."""
    if [type(x) is str for x in mine] != [type(x) is str for x in theirs]:
        return False
    return all(x == y if isinstance(x, str) else difference(x, y) <= 2 for x, y in zip(mine, theirs, strict=True))


def expected(duo, text: str, **settings) -> list:
    answer = duo.generate(text, duo.settings(**QUICK | settings))
    return [part if isinstance(part, str) else part.image for part in answer.parts]


def test_an_answer_is_the_one_that_sample_gives(client, duo):
    reply = ask(client, seed=3)
    choice = reply.choices[0]
    assert same(unpacked(choice.message.content), expected(duo, HOUSE, seed=3))
    assert choice.finish_reason == "length"  # two pictures of five
    assert reply.usage.completion_tokens > 10 and reply.usage.prompt_tokens > 10
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")


def test_a_stream_has_the_same_parts(client):
    whole = unpacked(ask(client, seed=3).choices[0].message.content)
    parts = []
    finish = None
    used = None
    for chunk in ask(client, stream=True, seed=3, stream_options={"include_usage": True}):
        if chunk.usage:
            used = chunk.usage
        if not chunk.choices:
            continue
        finish = chunk.choices[0].finish_reason or finish
        content = chunk.choices[0].delta.content
        if isinstance(content, str) and content:
            if parts and isinstance(parts[-1], str):
                parts[-1] += content
            else:
                parts.append(content)
        elif content:
            parts += unpacked(content)
    assert same(parts, whole)
    assert finish == "length" and used.total_tokens == used.prompt_tokens + used.completion_tokens


def test_previews_show_a_picture_in_the_making(client):
    seen = []
    for chunk in ask(client, "Draw a red star.", stream=True, previews=2, steps=8):
        if preview := chunk.model_extra.get("preview"):
            seen.append((preview["number"], preview["step"]))
            assert preview["url"].startswith("data:image/png;base64,")
    assert seen == [(0, 2), (0, 4), (0, 6)]


def test_a_dialogue_goes_on_with_its_pictures(client, duo):
    first = ask(client, "Draw a red star.").choices[0].message.content
    messages = [{"role": "user", "content": "Draw a red star."}, {"role": "assistant", "content": first}]
    messages += [{"role": "user", "content": "Make the star blue."}]
    told = unpacked(ask(client, messages).choices[0].message.content)
    answer = duo.generate("Draw a red star.", duo.settings(**QUICK))
    again = duo.generate(
        [*answer.messages, answer.message, {"role": "user", "content": "Make the star blue."}], duo.settings(**QUICK)
    )
    assert same(told, [part if isinstance(part, str) else part.image for part in again.parts])


def test_a_picture_is_drawn_again_and_the_answer_goes_on(client):
    """The same messages up to the picture, and another seed; with the same seed it is the same picture."""
    parts = ask(client).choices[0].message.content
    asked = [{"role": "user", "content": HOUSE}]
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text"]
    begun = [*asked, {"role": "assistant", "content": parts[:1]}]
    same_seed = unpacked(ask(client, begun, draw=True).choices[0].message.content)
    other = unpacked(ask(client, begun, draw=True, seed=9).choices[0].message.content)
    first = unpacked(parts)
    assert difference(same_seed[0], first[1]) <= 2
    assert difference(other[0], first[1]) > 20
    assert isinstance(other[1], str) and len(other) == 4  # the second step, its picture, and what the third one would be

    # The second picture: the first one counts among the two that are allowed, and as a condition.
    begun = [*asked, {"role": "assistant", "content": parts[:3]}]
    second = unpacked(ask(client, begun, draw=True).choices[0].message.content)
    assert difference(second[0], first[3]) <= 2 and len(second) == 2


def test_many_at_once_get_their_own_answers(client, duo):
    """Nothing is lost or mixed up, though they are written together and end at different times."""
    colours = ("red", "blue", "green", "yellow", "purple", "orange")
    asked = [f"Draw a {colour} {thing}." for colour in colours for thing in ("star", "heart", "circle", "square")]

    def one(k: int) -> list:
        return unpacked(ask(client, asked[k], seed=k).choices[0].message.content)

    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(one, range(len(asked))))
    for k in range(0, len(asked), 3):
        assert same(told[k], expected(duo, asked[k], seed=k)), asked[k]
    for text, parts in zip(asked, told, strict=True):
        assert text.split()[2] in parts[0] and len(parts) == 2


def test_whoever_goes_away_frees_the_place(client, address):
    stream = ask(client, stream=True, steps=60, max_images=5)
    next(iter(stream))
    assert settled(address, writing=1)
    stream.close()
    assert settled(address, writing=0)


def settled(address: str, writing: int) -> bool:
    """Whether so many answers are being written, soon: an answer begins, and ends, a moment after its client knows."""
    deadline = time.monotonic() + 30
    while health(address)["writing"] != writing and time.monotonic() < deadline:
        time.sleep(0.1)
    return health(address)["writing"] == writing


def health(address: str) -> dict:
    with urllib.request.urlopen(f"{address}/health", timeout=10) as reply:
        return json.load(reply)


def post(address: str, body: bytes, method: str = "POST", path: str = "/v1/chat/completions", **headers) -> tuple[int, str]:
    """Status and body."""
    request = urllib.request.Request(address + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def png(*size: int) -> str:
    data = io.BytesIO()
    Image.new("RGB", size).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def user(content) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


def shown(url) -> dict:
    return user([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}])


FINE = user("Draw a star.")
BAD = {
    "no object": [1],
    "text": "hello",
    "number": 5,
    "null": None,
    "no messages": {},
    "messages null": {"messages": None},
    "messages empty": {"messages": []},
    "messages text": {"messages": "hi"},
    "message text": {"messages": ["hi"]},
    "no role": {"messages": [{"content": "hi"}]},
    "unknown role": {"messages": [{"role": "robot", "content": "hi"}]},
    "role a list": {"messages": [{"role": ["user"], "content": "hi"}]},
    "tool role": {"messages": [{"role": "tool", "content": "hi"}]},
    "no content": {"messages": [{"role": "user"}]},
    "content null": user(None),
    "content number": user(3),
    "content object": user({"type": "text", "text": "hi"}),
    "content empty": user(""),
    "content blank": user(" \n "),
    "content no parts": user([]),
    "part text": user(["hi"]),
    "part unknown": user([{"type": "audio", "audio": "x"}]),
    "part without text": user([{"type": "text"}]),
    "part text number": user([{"type": "text", "text": 5}]),
    "part image text": user([{"type": "image_url", "image_url": "data:x"}]),
    "part image none": user([{"type": "image_url"}]),
    "half a surrogate": user("a\ud800b"),
    "system only": {"messages": [{"role": "system", "content": "hi"}]},
    "assistant only": {"messages": [{"role": "assistant", "content": "hi"}]},
    "system with picture": {
        "messages": [{"role": "system", "content": shown(png(8, 8))["messages"][0]["content"]}, *FINE["messages"]]
    },
    "address": shown("http://127.0.0.1:1/x.png"),
    "file": shown("file:///etc/passwd"),
    "path": shown("/etc/passwd"),
    "relative path": shown("../../checkpoints/tiny/duogen.json"),
    "data of text": shown("data:text/plain;base64,aGk="),
    "data not base64": shown("data:image/png;base64,@@@@"),
    "data no picture": shown("data:image/png;base64,aGVsbG8="),
    "data empty": shown("data:image/png;base64,"),
    "svg": shown("data:image/svg+xml;base64," + base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()),
    "picture cut off": shown(png(64, 64)[:-40]),
    "picture of a line": shown(png(1, 900)),
    "too many pictures": user([{"type": "image_url", "image_url": {"url": png(8, 8)}}] * 17),
    "too many messages": {"messages": FINE["messages"] * 65},
    "too long": user("draw " * 30_000),
    "too many tokens": user("a star and " * 3000),
    "model": FINE | {"model": "gpt-4o"},
    "model number": FINE | {"model": 4},
    "n": FINE | {"n": 2},
    "tools": FINE | {"tools": [{"type": "function"}]},
    "json": FINE | {"response_format": {"type": "json_object"}},
    "logprobs": FINE | {"logprobs": True},
    "stop": FINE | {"stop": ["x"]},
    "stream text": FINE | {"stream": "yes"},
    "stream options": FINE | {"stream": True, "stream_options": 3},
    "steps text": FINE | {"steps": "many"},
    "steps 0": FINE | {"steps": 0},
    "steps huge": FINE | {"steps": 10**9},
    "size": FINE | {"height": 63},
    "size huge": FINE | {"height": 100_000, "width": 100_000},
    "seed": FINE | {"seed": -1},
    "seed half": FINE | {"seed": 0.5},
    "temperature": FINE | {"temperature": -3},
    "max_tokens": FINE | {"max_tokens": 0},
    "more than the capacity": FINE | {"max_tokens": 100_000},
    "unknown": FINE | {"stepz": 3},
    "previews": FINE | {"previews": -1},
    "draw text": FINE | {"draw": "yes"},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_in_a_line_and_change_nothing(address, name):
    status, text = post(address, json.dumps(BAD[name]).encode())
    message = json.loads(text)["error"]["message"]
    assert status in (400, 413), text
    assert message and "\n" not in message and "Traceback" not in text and len(message) < 600
    assert "/root" not in text and "root:" not in text and str(ROOT) not in text


def test_bad_requests_of_http(address):
    assert post(address, b"{")[0] == 400
    assert post(address, b"\xff\xfe")[0] == 400
    assert post(address, b"[" * 100_000)[0] == 400
    assert post(address, b'{"messages": NaN}')[0] == 400
    assert post(address, b" " * 1_100_000)[0] == 413
    assert post(address, None, "GET")[0] == 405
    assert post(address, b"{}", "DELETE")[0] == 405
    assert post(address, None, "GET", "/v1/files")[0] == 404
    for path in ("/../flow.py", "/%2e%2e/flow.py", "/page.js/../../flow.py", "//etc/passwd", "/worker.py"):
        assert post(address, None, "GET", path)[0] == 404
    assert settled(address, writing=0)
    assert health(address) == {"status": "ok", "writing": 0, "waiting": 0}


def test_a_slow_or_broken_connection_holds_up_nobody(address, client):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        assert ask(client, "Draw a red star.").choices[0].finish_reason == "stop"
    assert settled(address, writing=0)


def test_models_and_unknown_models(client):
    assert [model.id for model in client.models.list()] == ["duogen-miniature"]
    with pytest.raises(openai.BadRequestError, match="here is duogen-miniature"):
        client.chat.completions.create(model="gpt-4o", messages=FINE["messages"])


def test_a_full_queue_a_key_and_the_end():
    """One place, one that waits; SIGTERM lets the first finish and refuses the other."""
    process, address = start("--batch", "1", "--queue", "1", "--key", "secret", "--grace", "60")
    try:
        assert post(address, json.dumps(FINE).encode())[0] == 401
        assert post(address, json.dumps(FINE).encode(), Authorization="Bearer wrong")[0] == 401
        body = json.dumps(user(HOUSE) | {"steps": 25}).encode()
        replies = []

        def one() -> None:
            replies.append(post(address, body, Authorization="Bearer secret"))

        threads = [threading.Thread(target=one) for _ in range(2)]
        for n, thread in enumerate(threads, 1):
            thread.start()
            deadline = time.monotonic() + 20
            while sum(health(address)[k] for k in ("writing", "waiting")) < n and time.monotonic() < deadline:
                time.sleep(0.02)
        status, text = post(address, body, Authorization="Bearer secret")
        assert status == 429 and "waiting already" in text

        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert sorted(status for status, _ in replies) == [200, 503]
        whole = next(json.loads(text) for status, text in replies if status == 200)
        assert sum(part["type"] == "image_url" for part in whole["choices"][0]["message"]["content"]) == 5
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()


def test_mistakes_of_whoever_starts_it():
    for flags, told in (
        (["--prot", "1"], "did you mean --port"),
        (["--batch", "0"], "must be above 0"),
        (["--ckpt", "runs/nowhere"], "no such folder"),
        (["--steps", "0"], "steps 0"),
        (["--port", "70000"], "--port"),
    ):
        with pytest.raises(InputError, match=re.escape(told)):
            __main__.main(flags)
