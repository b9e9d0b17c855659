"""People compare two systems' answers, without knowing whose they are: a page from a small server on this machine.

    python -m evaluate vote howto500 --out runs/p --a runs/x --b runs/y          then open http://127.0.0.1:8008/
    python -m evaluate vote howto500 --out runs/p --a runs/x --b runs/y --host 0.0.0.0       for phones in a network one trusts
    python -m evaluate report --out runs/p

Each voter, known by a cookie, gets the pairs of answers in an order of their own, and for each of them chance says which system
stands left: both follow from --seed, the voter and the pair. A vote is a line of votes.jsonl, on the disk before the page goes
on, so a reload, a kill or a full disk loses none. The same folder may hold what judges say of the same systems (`pairs`); the
report makes the same tables of both.

What a browser gets names no system and no file: a picture is known by its place in the pair, and is encoded anew, since a
file's form and its remarks could tell whose it is. Nothing but the pictures of these answers is served.
"""

import argparse
import json
import re
import secrets
import socket
import sys
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from checkpoint import InputError
from evaluate.answers import alone
from evaluate.ballot import CHOICES, Ballot, encoded
from evaluate.contest import add_contest_flags, begin
from flags import Parser
from pages.template import render

LONGEST = 1024  # bytes of what a browser may send: a vote has about a hundred
DRAINED = 65536  # bytes of what is refused that are read nevertheless
VOTER = re.compile(r"[\w-]{22}", re.ASCII)  # a cookie of ours
HEADERS = {
    # Another voter of the same browser has other pictures under the same addresses.
    "Cache-Control": "no-store",
    # The page has its script and style in it, and asks nobody but this server.
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; connect-src 'self'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def main(argv: list[str]) -> None:
    p = Parser("python -m evaluate vote", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_contest_flags(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    p.add_argument("--port", type=int, default=8008, help="port to listen at; 0: any that is free (8008)")
    p.add_argument("--seed", type=int, default=0, help="of order and sides (0)")
    args = p.parse_flags(argv)
    contest = begin(args)
    with alone(contest.out, "vote", (0, 1)):
        ballot = Ballot(contest, args.seed)
        try:
            server = serve(ballot, args.host, args.port)
        except (OSError, OverflowError) as e:
            raise InputError(f"--host {args.host} --port {args.port}: cannot listen there ({e}): choose another port") from None
        # 0.0.0.0 means all addresses of this machine, and is none that a phone could open.
        host = socket.gethostname() if args.host == "0.0.0.0" else args.host
        where = f"http://{host}:{server.server_port}/"
        print(f"{len(ballot.tasks)} pairs of answers to vote on: {where} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()
        print(f"{ballot.count()} votes: {ballot.file}; python -m evaluate report --out {contest.out}")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A browser that goes away in the midst of something is no error of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def serve(ballot: Ballot, host: str, port: int) -> Server:
    """A server that listens; serve_forever answers."""
    page = render("vote.html", title=ballot.contest.module.TITLE).encode()
    handler = type("Bound", (Handler,), {"ballot": ballot, "page": page})
    return Server((host, port), handler)


class Refused(Exception):
    """A request that gets no other answer than a status and a word."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    ballot: Ballot
    page: bytes
    unread: int | None = None  # bytes of the body, where its length is known
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds until a silent connection is closed

    def version_string(self) -> str:
        return "vote"

    def log_message(self, *_) -> None:
        """Nothing for each request: votes are in the file."""

    def do_GET(self) -> None:
        self.answer(self.get)

    def do_POST(self) -> None:
        self.answer(self.post)

    def refuse_method(self) -> None:
        self.answer(self.no_method)

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = refuse_method

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong by itself: a request that is none, or a method of another's invention."""
        self.refuse(405 if code == 501 else code, "not understood")

    def answer(self, how: Callable[[], None]) -> None:
        """Whatever goes wrong is a status and one line, and the server goes on."""
        length = self.headers.get("Content-Length", "")
        self.unread = int(length) if re.fullmatch(r"\d{1,9}", length, re.ASCII) else None
        try:
            how()
        except Refused as e:
            self.refuse(e.status, str(e))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except InputError as e:
            print(f"error: {e}", file=sys.stderr, flush=True)
            self.refuse(404, "a picture cannot be read")
        except OSError as e:
            print(f"error: {self.ballot.file}: cannot be written ({e.strerror})", file=sys.stderr, flush=True)
            self.refuse(507, "the vote could not be saved")

    def refuse(self, status: int, reason: str) -> None:
        # Who is cut off while still sending does not hear the reason.
        if self.unread and self.unread <= DRAINED:
            self.rfile.read(self.unread)
        self.close_connection = True
        self.send(status, "application/json", json.dumps({"error": reason}).encode())

    def no_method(self) -> None:
        raise Refused(405, "only GET and POST")

    def get(self) -> None:
        path = urlsplit(self.path).path
        if path == "/":
            cookie = {}
            if self.voter() is None:
                name = secrets.token_urlsafe(16)
                cookie = {"Set-Cookie": f"voter={name}; Path=/; Max-Age=31536000; HttpOnly; SameSite=Strict"}
            self.send(200, "text/html; charset=utf-8", self.page, cookie)
        elif path == "/next":
            self.send_json(self.ballot.next(self.known_voter()))
        elif path == "/favicon.ico":
            self.send(204, "image/png", b"")  # every browser asks for it
        elif path.startswith("/picture/"):
            self.send(200, "image/png", self.picture(path.split("/")[2:]))
        else:
            raise Refused(404, "nothing there")

    def picture(self, words: list[str]) -> bytes:
        """words: request, pair, side, number. They are looked up, and never become a path."""
        voter = self.known_voter()
        if len(words) != 4 or not re.fullmatch(r"\d{1,4}", words[3], re.ASCII):
            raise Refused(404, "nothing there")
        try:
            source = self.ballot.image(voter, f"{unquote(words[0])}/{words[1]}", words[2], int(words[3]))
        except LookupError:
            raise Refused(404, "nothing there") from None
        return encoded(source)

    def post(self) -> None:
        path = urlsplit(self.path).path
        if path not in ("/vote", "/undo"):
            raise Refused(404, "nothing there")
        body = self.body()
        voter = self.known_voter()
        try:
            if path == "/undo":
                self.ballot.undo(voter)
            elif body.get("choice") not in CHOICES:
                raise Refused(400, f"choice must be one of {', '.join(CHOICES)}")
            else:
                self.ballot.vote(voter, body.get("task"), body["choice"])
        except (KeyError, TypeError):
            raise Refused(409, "there is no such vote: reload the page") from None
        self.send_json(self.ballot.next(voter))

    def body(self) -> dict:
        """JSON of a page of ours: another site's script can send neither this type nor from this origin."""
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            raise Refused(403, "from another site")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "only application/json")
        if self.unread is None:
            raise Refused(411, "its length is missing")
        if self.unread > LONGEST:
            raise Refused(413, f"longer than {LONGEST} bytes")
        sent = self.rfile.read(self.unread)
        self.unread = 0
        try:
            value = json.loads(sent)
        except (ValueError, RecursionError):
            raise Refused(400, "not JSON") from None
        if not isinstance(value, dict):
            raise Refused(400, "no object")
        return value

    def voter(self) -> str | None:
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get("voter")
        except CookieError:
            return None
        return cookie.value if cookie is not None and VOTER.fullmatch(cookie.value) else None

    def known_voter(self) -> str:
        voter = self.voter()
        if voter is None:
            raise Refused(403, "no voter: open the page first, with cookies allowed")
        return voter

    def send_json(self, value: dict) -> None:
        self.send(200, "application/json", json.dumps(value).encode())

    def send(self, status: int, kind: str, body: bytes, more: dict | None = None) -> None:
        self.send_response(status)
        about = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in (about | HEADERS | (more or {})).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
