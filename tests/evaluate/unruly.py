"""An OpenAI-compatible server of the tests that can misbehave in every way that real ones have been seen to."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Unruly:
    """answer(body, n) -> words, or what `Handler.misbehave` knows; n counts the calls. All bodies are in `asked`."""

    def __init__(self, answer, model: str = "judge-1"):
        self.answer = answer
        self.model = model
        self.asked: list[dict] = []
        self.times: list[list[float]] = []  # of each: when it came, and when its answer had gone out
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"unruly": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    unruly: Unruly

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send(200, json.dumps({"data": [{"id": "judge-1"}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.unruly.lock:
            self.unruly.asked.append(body)
            times = [time.monotonic()]
            self.unruly.times.append(times)
            self.unruly.keys.add(self.headers["Authorization"])
            n = len(self.unruly.asked)
        words = self.unruly.answer(body, n)
        if isinstance(words, int):  # a status
            self.send(words, b'{"error": "busy"}', {"Retry-After": "0"})
        elif isinstance(words, bytes):  # a body of its own
            self.send(200, words)
        elif words == "hang":
            time.sleep(3)
        elif words == "half":  # it promises more than it sends, and closes
            self.send(200, b'{"choices": [', {"Content-Length": "1000"})
        elif words == "drip":
            self.drip()
        elif isinstance(words, tuple):  # status, error and perhaps headers
            self.send(words[0], words[1].encode(), *words[2:])
        else:
            message = dict(words) if isinstance(words, dict) else {"content": words}
            choice = {"index": 0, "finish_reason": "stop"} | message.pop("choice", {})
            choice["message"] = {"role": "assistant"} | message
            usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
            self.send(200, json.dumps({"model": self.unruly.model, "choices": [choice], "usage": usage}).encode())
            times.append(time.monotonic())

    def drip(self):
        """A byte now and then, as long as the client listens."""
        self.send(200, b"{", {"Content-Length": "1000"})
        try:
            for _ in range(60):
                self.wfile.write(b" ")
                time.sleep(0.05)
        except OSError:
            pass

    def send(self, status: int, body: bytes, headers: dict | None = None):
        try:
            self.send_response(status)
            headers = {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # the client has gone
