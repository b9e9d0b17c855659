"""The routes: /v1/chat/completions, /v1/models, /health, and the page at /.

Every error is OpenAI's {"error": {"message": ...}} with a status that its clients know: 400 for a request that cannot be
answered as it is, 413 for one that is too large, 429 where too many wait, 503 when the server is about to end.
"""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTP
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from checkpoint import InputError
from pipeline import DuoGen, Picture, Text
from serve import api
from serve.api import Limits, chunk, completion, error, parse
from serve.worker import Ended, Job, Preview, Refused, Worker

HERE = Path(__file__).parent
FILES = {  # what the page is made of
    "/": (HERE / "page.html", "text/html"),
    "/page.js": (HERE / "page.js", "text/javascript"),
    "/page.css": (HERE / "page.css", "text/css"),
}
RETRY = "2"  # seconds that a client whose request was refused is told to wait
# The page talks to this server alone, and shows nothing from elsewhere.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; connect-src 'self'"


class Service:
    """What the routes share."""

    def __init__(
        self,
        duo: DuoGen,
        worker: Worker,
        name: str,
        limits: Limits | None = None,
        body: int = 32_000_000,
        key: str | None = None,
        world: str = "",
    ):
        self.duo = duo
        self.worker = worker
        self.names = (name, "default")
        self.limits = limits or Limits()
        self.body = body  # bytes of a request at most
        self.key = key  # that clients must send, if any
        self.world = world  # what the model knows of, where that is little

    # ---- routes

    async def page(self, http: HTTP) -> Response:
        file, kind = FILES[http.url.path]
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return Response(file.read_text(encoding="utf-8"), media_type=kind, headers=headers)

    async def about(self, http: HTTP) -> Response:
        """What the page wants to know: the model, and the settings that hold where a request says nothing else."""
        shown = ("steps", "guidance", "max_images", "max_tokens", "temperature")
        defaults = {name: getattr(self.duo.defaults, name) for name in shown}
        return JSONResponse({"model": self.names[0], "key": bool(self.key), "settings": defaults, "world": self.world})

    async def models(self, http: HTTP) -> Response:
        model = {"id": self.names[0], "object": "model", "created": 0, "owned_by": "duogen"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, http: HTTP) -> Response:
        """What a load balancer asks, and an operator."""
        ending = self.worker.closing
        state = {"status": "ending" if ending else "ok", "writing": len(self.worker.jobs), "waiting": len(self.worker.queue)}
        return JSONResponse(state, 503 if ending else 200)

    async def complete(self, http: HTTP) -> Response:
        if self.key and not hmac.compare_digest(http.headers.get("authorization", ""), f"Bearer {self.key}"):
            return JSONResponse(error("this server wants its key as Authorization: Bearer KEY", "authentication_error"), 401)
        try:
            request = parse(await self.read(http), self.duo, self.limits, self.names)
            # Pictures are decoded and texts encoded here, and a large one must not hold up the others.
            begun = {"begun": request.begun, "drawing": request.draw}
            answer = await asyncio.to_thread(self.duo.answer, request.messages, request.settings, **begun)
            events = asyncio.Queue()
            put = teller(events)
            job = self.worker.submit(answer, put, request.previews if request.stream else 0)
        except TooLarge as e:
            return JSONResponse(error(str(e)), 413)
        except InputError as e:
            return JSONResponse(error(str(e)), 400)
        except Refused as e:
            status = 503 if self.worker.closing else 429
            return JSONResponse(error(str(e), "overloaded_error"), status, {"Retry-After": RETRY})
        except ClientDisconnect:
            return Response(status_code=499)
        id = f"chatcmpl-{uuid.uuid4().hex}"
        if request.stream:
            return StreamingResponse(self.stream(id, job, request, events), media_type="text/event-stream")
        return await self.whole(id, job, events, http)

    # ---- parts of complete

    async def read(self, http: HTTP) -> object:
        """The body as JSON, of which no more is taken in than is allowed."""
        data = bytearray()
        async for piece in http.stream():
            data += piece
            if len(data) > self.body:
                raise TooLarge(f"the request has more than {self.body:,} bytes")
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise InputError("the body is no JSON") from None

    async def whole(self, id: str, job: Job, events: asyncio.Queue, http: HTTP) -> Response:
        """The finished answer; it is given up when its reader has gone."""
        waiting = asyncio.ensure_future(self.ended(events))
        while True:
            done, _ = await asyncio.wait([waiting], timeout=1.0)
            if done:
                break
            if await http.is_disconnected():
                self.worker.cancel(job)
        problem = waiting.result()
        if problem:
            return JSONResponse(error(problem, "server_error"), 503 if self.worker.closing else 500)
        return JSONResponse(await asyncio.to_thread(completion, id, self.names[0], job.answer))

    async def ended(self, events: asyncio.Queue) -> str:
        """Wait for the end; what was wrong, or empty."""
        while True:
            event = await events.get()
            if isinstance(event, Ended):
                return event.problem

    async def stream(self, id: str, job: Job, request: api.Request, events: asyncio.Queue) -> AsyncIterator[str]:
        """Server-sent events. When the reader goes, the answer is given up: starlette then closes this generator."""
        created = int(time.time())

        def line(delta: dict, finish: str | None = None, **more) -> str:
            return f"data: {json.dumps(chunk(id, self.names[0], created, delta, finish, **more))}\n\n"

        try:
            yield line({"role": "assistant", "content": ""})
            while True:
                event = await events.get()
                if isinstance(event, Ended):
                    break
                if isinstance(event, Text):
                    yield line({"content": event.text})
                elif isinstance(event, Picture):
                    part = await asyncio.to_thread(api.picture_part, event.image)
                    yield line({"content": [part]}, seed=str(event.seed))
                elif isinstance(event, Preview):
                    url = await asyncio.to_thread(api.data_url, event.image)
                    yield line({}, preview={"number": event.number, "step": event.step, "steps": event.steps, "url": url})
            if event.problem:
                yield f"data: {json.dumps(error(event.problem, 'server_error'))}\n\n"
                return
            yield line({}, api.FINISH[job.answer.stop])
            if request.usage:
                last = chunk(id, self.names[0], created, {})
                yield f"data: {json.dumps(last | {'choices': [], 'usage': api.usage(job.answer)})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.worker.cancel(job)


class TooLarge(InputError):
    """A body beyond the limit."""


def teller(events: asyncio.Queue) -> Callable[[object], None]:
    """A function that puts something into a queue of this thread's loop, from any other thread."""
    loop = asyncio.get_running_loop()

    def put(event: object) -> None:
        # A loop that has ended has no readers either.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    return put


def make_app(service: Service) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        yield
        service.worker.close()

    routes = [
        *(Route(path, service.page) for path in FILES),
        Route("/about", service.about),
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/chat/completions", service.complete, methods=["POST"]),
    ]

    async def failed(http: HTTP, e: Exception) -> Response:
        # Its traceback is in the server's log; a stranger learns nothing of it.
        return JSONResponse(error("the server failed", "server_error"), 500)

    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={Exception: failed})
