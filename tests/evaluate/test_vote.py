"""People vote blind: what the server gives away, what it keeps and what it refuses; the page in a real browser; the report."""

import errno
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from checkpoint import InputError
from evaluate import figures, pairs, vote
from evaluate.ballot import Ballot, encoded
from evaluate.contest import LETTERS, begin, read_votes
from unruly import Unruly

ROOT = Path(__file__).parent.parent.parent
TOY = str(Path(__file__).parent / "toy.py")
COLOURS = ("red", "blue", "green", "yellow")
NAMES = ("zebra", "okapi")  # of the systems: nothing that a browser gets may hold them


def system(folder: Path, words: str) -> Path:
    """Answers of two pictures each, as files that say in every way whose they are."""
    remarks = PngInfo()
    remarks.add_text("Software", folder.name)
    for n, colour in enumerate(COLOURS):
        (folder / colour).mkdir(parents=True)
        parts = []
        for k, size in enumerate(((48, 32), (32, 48))):
            # Of another grey for each system, so that a test can tell them apart.
            image = Image.new("RGB", size, (100 if words == "stripes" else 200, n, k))
            image.save(folder / colour / f"{folder.name}_{k}.png", pnginfo=remarks)
            parts.append({"type": "text", "text": f"{words} {k + 1} of a {colour} house."})
            parts.append({"type": "image", "image": f"{folder.name}_{k}.png"})
        (folder / colour / "answer.json").write_text(json.dumps({"parts": parts}))
    return folder


@pytest.fixture
def two(tmp_path) -> list[Path]:
    return [system(tmp_path / "zebra", "stripes"), system(tmp_path / "okapi", "spots")]


def contest(out: Path, systems: list[Path]):
    given = dict.fromkeys(LETTERS) | dict(zip(LETTERS, map(str, systems), strict=False))
    return begin(Namespace(benchmark=TOY, out=str(out), items=None, n=None, **given))


@pytest.fixture
def open_ballot(tmp_path):
    """open_ballot(systems, seed) -> (ballot, address, its server), as the command opens it."""
    servers = []

    def start(systems: list[Path], seed: int = 0, port: int = 0):
        ballot = Ballot(contest(tmp_path / "p", systems), seed)
        server = vote.serve(ballot, "127.0.0.1", port)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return ballot, server.server_address, server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Voter:
    """Somebody with a browser, less the browser."""

    def __init__(self, address: tuple[str, int], cookie: str | None = None):
        self.address = address
        self.cookie = cookie
        if cookie is None:
            _, headers, self.page = self.ask("GET", "/")
            self.cookie = headers["Set-Cookie"].partition(";")[0]

    def ask(self, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, dict, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=10)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie:
            named = {"Cookie": self.cookie} | named
        connection.request(method, path, body, named)
        reply = connection.getresponse()
        found = reply.status, dict(reply.headers), reply.read()
        connection.close()
        return found

    def post(self, path: str, value: object) -> tuple[int, dict]:
        status, _, body = self.ask("POST", path, json.dumps(value).encode(), Content_Type="application/json")
        return status, json.loads(body)

    def next(self) -> dict:
        return json.loads(self.ask("GET", "/next")[2])

    def vote(self, choice: str) -> dict:
        status, state = self.post("/vote", {"task": self.next()["task"]["id"], "choice": choice})
        assert status == 200
        return state


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "votes.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------------------- blind


def test_nothing_says_whose_an_answer_is(open_ballot, two, tmp_path):
    ballot, address, _ = open_ballot(two)
    voter = Voter(address)
    got = [voter.page]
    for _ in ballot.tasks:
        state = voter.next()
        got.append(json.dumps(state).encode())
        for side in ("left", "right"):
            for picture in state["task"][side]["pictures"]:
                status, headers, body = voter.ask("GET", picture["url"])
                assert status == 200 and headers["Content-Type"] == "image/png" and body[:4] == b"\x89PNG"
                got += [body, json.dumps(headers).encode(), picture["url"].encode()]
        got.append(json.dumps(voter.vote("left")).encode())
    got += [body + json.dumps(headers).encode() for _, headers, body in (voter.ask("GET", path) for path in ("/", "/nothing"))]
    assert len(got) > 4 * 2 * 2 * 3
    for name in (*NAMES, str(tmp_path), "answer.json", "Software", "_0.png", "Python"):
        assert not any(name.encode() in piece for piece in got), name


def test_sides_and_order_are_drawn_for_each_voter_and_each_pair(open_ballot, two):
    ballot, address, _ = open_ballot(two)
    sides = Counter()
    orders = set()
    for n in range(100):
        name = f"{n:022d}"
        for task in ballot.tasks.values():
            left, right = ballot.sides(name, task)
            assert {left, right} == set(NAMES)
            sides[left] += 1
        orders.add(tuple(ballot.order(name)))
    # 400 throws of a coin: three standard deviations are 30.
    assert abs(sides["zebra"] - 200) <= 30 and len(orders) > 15
    # The same seed draws the same again, another one something else.
    again = Ballot(ballot.contest, 0)
    other = Ballot(ballot.contest, 1)
    everybody = [(f"{n:022d}", task) for n in range(20) for task in ballot.tasks.values()]
    drawn = [ballot.sides(*one) for one in everybody]
    assert drawn == [again.sides(*one) for one in everybody] != [other.sides(*one) for one in everybody]


def test_a_side_has_the_words_and_the_pictures_of_one_system(open_ballot, two, tmp_path):
    ballot, address, _ = open_ballot(two)
    seen = set()
    for _ in range(6):
        voter = Voter(address)
        name = voter.cookie.removeprefix("voter=")
        task = voter.next()["task"]
        for side, system_name in zip(("left", "right"), ballot.sides(name, ballot.tasks[task["id"]]), strict=True):
            word, grey = {"zebra": ("stripes", 100), "okapi": ("spots", 200)}[system_name]
            assert [text.split()[0] for text in task[side]["texts"] if text] == [word, word]
            assert [(p["width"], p["height"]) for p in task[side]["pictures"]] == [(48, 32), (32, 48)]
            for k, picture in enumerate(task[side]["pictures"]):
                (tmp_path / "seen.png").write_bytes(voter.ask("GET", picture["url"])[2])
                with Image.open(tmp_path / "seen.png") as image:
                    assert image.getpixel((0, 0))[::2] == (grey, k) and not image.info
            seen.add((side, system_name))
    assert len(seen) == 4


# -------------------------------------------------------------------------------------------------------------------- votes


def test_a_vote_is_on_the_disk_before_it_is_confirmed(open_ballot, two, tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file)))
    ballot, address, _ = open_ballot(two)
    voter = Voter(address)
    task = voter.next()["task"]
    state = voter.vote("right")
    assert (state["done"], state["of"]) == (1, 4) and state["task"]["id"] != task["id"]
    assert synced == [(tmp_path / "p/votes.jsonl").stat().st_size]
    (line,) = lines(tmp_path / "p")
    left, right = ballot.sides(line["voter"], ballot.tasks[task["id"]])
    assert (line["left"], line["better"], line["a"], line["b"]) == (left, right, *NAMES)
    assert line["voter"] == voter.cookie.removeprefix("voter=") and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+Z", line["date"])


def test_ties_undo_and_the_end(open_ballot, two, tmp_path):
    _, address, _ = open_ballot(two)
    voter = Voter(address)
    assert voter.post("/undo", {})[0] == 409
    first = voter.next()["task"]
    voter.vote("tie")
    second = voter.vote("left")
    # Undone: the pair comes again, with the same sides.
    status, state = voter.post("/undo", {})
    assert status == 200 and state["done"] == 1
    state = voter.post("/undo", {})[1]
    assert state["done"] == 0 and state["task"] == first
    for _ in range(4):
        state = voter.vote("tie")
    assert state == {"done": 4, "of": 4, "task": None} and second["done"] == 2
    assert voter.post("/vote", {"task": first["id"], "choice": "left"})[0] == 200  # another tab: the last word holds
    votes = read_votes(tmp_path / "p/votes.jsonl")
    assert len(votes) == 4 and [v.better for v in votes[:3]] == [None] * 3 and votes[3].better == votes[3].left
    assert len(lines(tmp_path / "p")) == 4 + 4 + 1


def test_a_kill_loses_no_vote_and_the_voter_goes_on(open_ballot, two, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p"
    words = ["vote", TOY, "--out", str(out), "--port", "0", "--a", str(two[0]), "--b", str(two[1])]
    process = subprocess.Popen([sys.executable, "-m", "evaluate", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        started = process.stdout.readline()
        assert started.startswith("4 pairs of answers to vote on: http://127.0.0.1:")
        voter = Voter(("127.0.0.1", int(re.search(r":(\d+)/", started)[1])))
        assert voter.vote("left")["done"] == 1
        # Two that write the same votes would not know of each other's.
        with pytest.raises(InputError, match="another process is at it"):
            vote.main(words[1:])
    finally:
        process.kill()
        process.communicate(timeout=30)
    # As a kill in the midst of a line leaves it.
    with open(out / "votes.jsonl", "a") as file:
        file.write('{"voter": "half of a')
    _, address, _ = open_ballot(two)
    again = Voter(address, voter.cookie)
    assert again.next()["done"] == 1 and again.vote("left")["done"] == 2
    assert len(lines(out)) == len(read_votes(out / "votes.jsonl")) == 2

    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(vote.Server, "serve_forever", interrupted)
    vote.main(words[1:])
    assert f"2 votes: {out / 'votes.jsonl'}; python -m evaluate report" in capsys.readouterr().out


def test_a_full_disk_is_told_and_takes_nothing(open_ballot, two, tmp_path, monkeypatch, capsys):
    _, address, _ = open_ballot(two)
    voter = Voter(address)
    voter.vote("left")
    before = (tmp_path / "p/votes.jsonl").read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        status, told = voter.post("/vote", {"task": voter.next()["task"]["id"], "choice": "left"})
    assert status == 507 and "could not be saved" in told["error"] and "No space left" in capsys.readouterr().err
    assert (tmp_path / "p/votes.jsonl").read_bytes() == before and voter.next()["done"] == 1
    assert voter.vote("left")["done"] == 2


def test_many_vote_at_once(open_ballot, two, tmp_path):
    ballot, address, _ = open_ballot(two)

    def all_of_it():
        voter = Voter(address)
        for choice in ("left", "tie", "right", "left"):
            voter.vote(choice)

    threads = [threading.Thread(target=all_of_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = read_votes(tmp_path / "p/votes.jsonl")
    assert len(votes) == len(lines(tmp_path / "p")) == 32 == ballot.count() and len({v.voter for v in votes}) == 8


def test_pictures_of_the_request_are_shown_with_it(two, tmp_path):
    """A benchmark of edits: one request has its picture as a file, the other one in memory."""
    file = tmp_path / "edits.py"
    Image.new("RGB", (20, 10), (7, 7, 7)).save(tmp_path / "given_by_zebra.png")
    file.write_text(f'''
from PIL import Image
from evaluate.benchmark import Request
NAME = TITLE = "edits"
SOURCE, PUBLISHED = {{}}, []
score = aggregate = None


def requests(items):
    for id, picture in (("red", {str(tmp_path / "given_by_zebra.png")!r}), ("blue", Image.new("RGB", (20, 10), (9, 9, 9)))):
        parts = [{{"type": "image", "image": picture}}, {{"type": "text", "text": "Make it darker."}}]
        yield Request(id, [{{"role": "user", "content": parts}}], {{}})
''')
    given = dict.fromkeys(LETTERS) | {"a": str(two[0]), "b": str(two[1])}
    ballot = Ballot(begin(Namespace(benchmark=str(file), out=str(tmp_path / "p"), items=None, n=None, **given)), 0)
    greys = {}
    for id in ballot.order("v"):
        state = ballot.next("v")
        assert state["task"]["id"] == id and state["task"]["asked"] == ["Make it darker."]
        (shown,) = state["task"]["given"]
        assert (shown["url"], shown["width"], shown["height"]) == (f"/picture/{id}/given/0", 20, 10)
        (tmp_path / "seen.png").write_bytes(encoded(ballot.image("v", id, "given", 0)))
        with Image.open(tmp_path / "seen.png") as image:
            greys[id] = image.getpixel((0, 0))[0]
        ballot.vote("v", id, "tie")
    assert greys == {"red/1": 7, "blue/1": 9}


def test_three_systems_make_three_pairs(open_ballot, two, tmp_path):
    _, address, _ = open_ballot([*two, system(tmp_path / "tapir", "snouts")])
    voter = Voter(address)
    while voter.next()["task"]:
        voter.vote("left")
    votes = read_votes(tmp_path / "p/votes.jsonl")
    assert Counter((v.a, v.b) for v in votes) == {("zebra", "okapi"): 4, ("zebra", "tapir"): 4, ("okapi", "tapir"): 4}
    assert all(v.better == v.left for v in votes)


# ----------------------------------------------------------------------------------------------------------------- security


@pytest.mark.parametrize("path", [
    "/../zebra/red/answer.json", "/picture/../../zebra/red/zebra_0.png",
    "/picture/red/1/left/../../../../zebra/red/answer.json", "/picture/%2e%2e%2fzebra/1/left/0", "/picture/red%2f1/left/0",
    "//etc/passwd", "/picture//etc/passwd", "/etc/passwd", "/picture/red/1/left/2", "/picture/red/1/left/-1",
    "/picture/red/1/left/0/", "/picture/red/1/middle/0", "/picture/red/2/left/0", "/picture/red/1/given/0",
    "/picture/pink/1/left/0", "/picture/red/1/left/0%00", "/picture/red/1/left/²", "/votes.jsonl", "/run.json", "/picture/",
    "/picture/red/1/left", "/vote", "/undo", "/next/", "/index.html",
])  # fmt: skip
def test_only_the_pictures_of_this_contest_are_served(open_ballot, two, path):
    _, address, _ = open_ballot(two)
    voter = Voter(address)
    with socket.create_connection(address, timeout=10) as raw:
        # As it is: a client would tidy it up.
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nCookie: {voter.cookie}\r\nConnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: raw.recv(65536), b""))
    assert reply.startswith(b"HTTP/1.1 404 ") and reply.endswith(b'{"error": "nothing there"}')


def test_what_is_no_vote_is_refused(open_ballot, two, tmp_path):
    _, address, _ = open_ballot(two)
    voter = Voter(address)
    task = voter.next()["task"]["id"]
    good = json.dumps({"task": task, "choice": "left"}).encode()
    typed = {"Content_Type": "application/json"}
    stranger = Voter(address, cookie="voter=../../etc")
    cases = [
        (405, voter.ask("PUT", "/vote", good, **typed)), (405, voter.ask("DELETE", "/")), (405, voter.ask("HEAD", "/")),
        (405, voter.ask("OPTIONS", "/vote")), (405, voter.ask("BREW", "/")), (404, voter.ask("POST", "/", good, **typed)),
        (404, voter.ask("POST", "/next", good, **typed)),
        (415, voter.ask("POST", "/vote", good)), (415, voter.ask("POST", "/vote", good, Content_Type="text/plain")),
        (403, voter.ask("POST", "/vote", good, **typed, Origin="http://elsewhere.example")),
        (403, stranger.ask("POST", "/vote", good, **typed)), (403, stranger.ask("GET", "/next")),
        (403, stranger.ask("GET", f"/picture/{task}/left/0")),
        (413, voter.ask("POST", "/vote", good + b" " * 2000, **typed)),
        (400, voter.ask("POST", "/vote", b"{", **typed)), (400, voter.ask("POST", "/vote", b"\xff\xfe", **typed)),
        (400, voter.ask("POST", "/vote", b"[" * 1000, **typed)), (400, voter.ask("POST", "/vote", b"[]", **typed)),
        (400, voter.ask("POST", "/vote", json.dumps({"task": task, "choice": "zebra"}).encode(), **typed)),
        (400, voter.ask("POST", "/vote", json.dumps({"task": task, "choice": []}).encode(), **typed)),
        (409, voter.ask("POST", "/vote", b'{"task": "pink/1", "choice": "left"}', **typed)),
        (409, voter.ask("POST", "/vote", b'{"task": [], "choice": "left"}', **typed)),
        (409, voter.ask("POST", "/vote", b'{"choice": "left"}', **typed)),
    ]  # fmt: skip
    assert [status for status, _ in cases] == [found[0] for _, found in cases]
    assert all(json.loads(body)["error"] for _, (_, headers, body) in cases if body)
    for length in ("Transfer-Encoding: chunked", "Content-Length: -5", "Content-Length: 1e3"):
        head = f"POST /vote HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nCookie: {voter.cookie}\r\n{length}\r\n\r\n"
        with socket.create_connection(address, timeout=10) as raw:
            raw.sendall(head.encode())
            assert raw.recv(1000).startswith(b"HTTP/1.1 411 ")
    with socket.create_connection(address, timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        assert re.match(rb"(HTTP/1.1 400 |\{)", raw.recv(1000))
    # None of it was a vote, and the server is as well as before.
    assert not (tmp_path / "p/votes.jsonl").exists() and voter.vote("left")["done"] == 1
    headers = voter.ask("GET", "/")[1]
    assert "default-src 'none'" in headers["Content-Security-Policy"] and "Set-Cookie" not in headers
    fresh = Voter.__new__(Voter)
    fresh.address, fresh.cookie = address, None
    assert {"HttpOnly", "SameSite=Strict"} <= set(fresh.ask("GET", "/")[1]["Set-Cookie"].split("; "))


def test_bad_input_is_one_line(open_ballot, two, tmp_path):
    command = [TOY, "--out", str(tmp_path / "p"), "--a", str(two[0]), "--b", str(two[1])]
    _, address, _ = open_ballot(two)
    with pytest.raises(InputError, match="cannot listen there"):
        vote.main([*command, "--port", str(address[1])])
    with pytest.raises(InputError, match="cannot listen there"):
        vote.main([*command, "--port", "70000"])
    with pytest.raises(InputError, match="two systems at least"):
        vote.main(command[:-2])
    (two[0] / "red/zebra_0.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="zebra_0.png: no picture"):
        vote.main(command)
    (two[0] / "red/zebra_0.png").unlink()
    with pytest.raises(InputError, match="zebra_0.png: no picture"):
        vote.main(command)
    for colour in COLOURS:
        (two[0] / colour / "answer.json").unlink()
    with pytest.raises(InputError, match="no request that two systems have answered"):
        vote.main(command)
    votes = tmp_path / "p/votes.jsonl"
    votes.write_text('{"voter": "x"}\n{"voter": "y"}\n')
    with pytest.raises(InputError, match=r"votes.jsonl:1: no vote \(KeyError: 'item'\)"):
        read_votes(votes)


# ------------------------------------------------------------------------------------------------------------------- report


def test_votes_make_the_same_tables_as_a_judge(open_ballot, two, tmp_path):
    """People and a judge who agree in everything but one tie."""
    pytest.importorskip("choix", reason="choix is not installed: evaluate/requirements.txt")
    out = tmp_path / "p"
    ballot, address, _ = open_ballot(two)

    def judge(body, n):
        texts = [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]
        first = texts[texts.index("First answer:") + 1]
        better = "stripes" if "red" in first or "blue" in first else "spots"
        return json.dumps({"reason": "so", "score": 1 if first.startswith(better) else 3})

    with Unruly(judge) as unruly:
        options = ["--judge", unruly.url, "--judge-model", "judge-1"]
        pairs.main([TOY, "--out", str(out), "--a", str(two[0]), "--b", str(two[1]), *options])
    voters = [Voter(address), Voter(address)]
    for voter in voters:
        name = voter.cookie.removeprefix("voter=")
        while task := voter.next()["task"]:
            colour = task["id"].partition("/")[0]
            better = "zebra" if colour in ("red", "blue") else "okapi"
            left = ballot.sides(name, ballot.tasks[task["id"]])[0]
            choice = "left" if left == better else "right"
            voter.vote("tie" if colour == "yellow" else choice)
    figures.main(["--out", str(out), "--draws", "50"])
    found = {jury["judge"]: jury for jury in json.loads((out / "report.json").read_text())["juries"]}
    counts = {name: [jury["pairs"][0][key] for key in ("wins", "ties", "losses")] for name, jury in found.items()}
    assert counts == {"judge-1": [2, 0, 2], "people": [4, 2, 2]}
    assert found["people"].keys() == found["judge-1"].keys()
    best = found["people"]["ratings"][0]
    assert (best["system"], best["wins"], best["ties"], best["losses"]) == ("zebra", 4, 2, 2)
    assert found["people"]["notes"]["votes"].startswith("8 by 2 voters")
    text = (out / "report.md").read_text()
    assert "| judge-1 | 4             | 3    | 1         | 0        |" in text
    page = (out / "report.html").read_text()
    assert page.count("<article") == 4 and "people, zebra or okapi:" in page and "equal: 2" in page


# ------------------------------------------------------------------------------------------------------------------ browser


def progress(page, text: str) -> None:
    page.locator("#progress", has_text=re.compile(f"^{text}$")).wait_for()


def loaded(page) -> None:
    page.locator(".picture img").evaluate_all("all => Promise.all(all.map(image => image.decode()))")


def cookie_of(page) -> str:
    (cookie,) = page.context.cookies()
    return cookie["value"]


def url(address: tuple[str, int]) -> str:
    return f"http://127.0.0.1:{address[1]}/"


def test_voting_by_keys(open_ballot, two, tmp_path, visit):
    ballot, address, _ = open_ballot(two)
    page = visit()
    page.goto(url(address))
    progress(page, "0 of 4")
    asked = page.inner_text("#asked")
    # Side by side, each with its own pictures.
    left, right = (page.locator(f"#{side}").bounding_box() for side in ("left", "right"))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    loaded(page)
    for number, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowDown"), 1):
        page.keyboard.press(key)
        progress(page, f"{number} of 4")
    # A reload goes on where the voter was; undo works across it.
    page.reload()
    progress(page, "3 of 4")
    for number, key in ((2, "ArrowUp"), (1, "Backspace"), (0, "ArrowUp")):
        page.keyboard.press(key)
        progress(page, f"{number} of 4")
    assert page.inner_text("#asked") == asked
    page.keyboard.press("ArrowUp")  # there is nothing to undo any more
    for number, key in enumerate((" ", "ArrowLeft", "ArrowRight", "ArrowDown"), 1):
        page.keyboard.press(key)
        progress(page, f"{number} of 4")
    assert page.is_visible("#end") and not page.is_visible("#task") and page.is_disabled("[data-choice=left]")

    votes = read_votes(tmp_path / "p/votes.jsonl")
    assert {v.voter for v in votes} == {cookie_of(page)}
    assert [None if v.better is None else v.better == v.left for v in votes] == [None, True, False, None]
    assert not page.errors and all(request.startswith(url(address)) for request in page.requests)
    assert not any(name in page.content() for name in NAMES)


def test_a_key_that_is_held_down_is_one_vote(open_ballot, two, visit):
    ballot, address, _ = open_ballot(two)
    page = visit()
    page.goto(url(address))
    progress(page, "0 of 4")
    page.keyboard.down("ArrowLeft")
    progress(page, "1 of 4")
    for _ in range(3):
        page.keyboard.down("ArrowLeft")
        page.wait_for_timeout(100)
    assert ballot.count() == 1
    # With Ctrl or Alt it is the browser's own.
    page.keyboard.up("ArrowLeft")
    page.keyboard.press("Control+ArrowLeft")
    page.wait_for_timeout(200)
    assert ballot.count() == 1


def test_on_a_phone(open_ballot, two, visit):
    _, address, _ = open_ballot(two)
    page = visit(390, 844)
    page.goto(url(address))
    progress(page, "0 of 4")
    loaded(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    left, right = (page.locator(f"#{side}").bounding_box() for side in ("left", "right"))
    assert left["y"] + left["height"] < right["y"]
    # The buttons are at hand wherever one is, and large enough for thumbs.
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    boxes = [box.bounding_box() for box in page.locator("nav button").all()]
    assert all(b["y"] + b["height"] <= 844 and b["height"] >= 44 and b["x"] + b["width"] <= 390 for b in boxes)
    # The last picture can be scrolled to above them.
    last = page.locator(".picture").last.bounding_box()
    assert last["y"] + last["height"] < min(b["y"] for b in boxes)
    for number, choice in enumerate(("left", "tie", "right"), 1):
        page.click(f"[data-choice={choice}]")
        progress(page, f"{number} of 4")
        assert page.evaluate("scrollY") == 0
    page.click("#undo")
    progress(page, "2 of 4")
    assert not page.errors


def test_a_tap_enlarges_a_picture_and_no_key_votes_meanwhile(open_ballot, two, visit):
    ballot, address, _ = open_ballot(two)
    page = visit(390, 844)
    page.goto(url(address))
    progress(page, "0 of 4")
    small = page.locator("#left .picture img").first
    before = small.bounding_box()
    small.click()
    large = page.locator("dialog img")
    after = large.bounding_box()
    assert large.get_attribute("src") == small.get_attribute("src") and after["width"] > 1.5 * before["width"]
    assert after["width"] / after["height"] == pytest.approx(48 / 32, rel=0.02) and after["width"] <= 390
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(200)
    assert ballot.count() == 0
    large.click()
    assert not large.is_visible()
    page.keyboard.press("ArrowLeft")
    progress(page, "1 of 4")


def test_two_voters_do_not_disturb_each_other(open_ballot, two, visit):
    ballot, address, _ = open_ballot(two)
    pages = [visit(), visit()]
    for page in pages:
        page.goto(url(address))
        progress(page, "0 of 4")
    pages[0].keyboard.press("ArrowLeft")
    progress(pages[0], "1 of 4")
    pages[1].reload()
    progress(pages[1], "0 of 4")
    assert cookie_of(pages[0]) != cookie_of(pages[1]) and ballot.count() == 1


def test_a_server_that_does_not_answer(open_ballot, two, visit):
    """Nothing is counted that was not kept, and the page needs no reload."""
    ballot, address, _ = open_ballot(two)
    page = visit()
    page.goto(url(address))
    progress(page, "0 of 4")
    page.context.set_offline(True)
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#problem:not([hidden])")
    assert "does not answer" in page.inner_text("#problem") and page.inner_text("#progress") == "0 of 4"
    page.context.set_offline(False)
    page.keyboard.press("ArrowLeft")
    progress(page, "1 of 4")
    assert not page.is_visible("#problem") and ballot.count() == 1


def test_words_of_an_answer_stay_words(open_ballot, two, tmp_path, visit):
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script> & <b>bold</b> " + "x" * 300
    for colour in COLOURS:
        (two[0] / colour / "answer.json").write_text(json.dumps({"parts": [{"type": "text", "text": evil}]}))
        (two[1] / colour / "answer.json").write_text('{"parts": []}')
    _, address, _ = open_ballot(two)
    page = visit(390, 844)
    page.on("dialog", lambda dialog: page.errors.append(dialog.message))
    page.goto(url(address))
    progress(page, "0 of 4")
    shown = {page.inner_text("#left"), page.inner_text("#right")}
    assert shown == {evil, "no answer"}
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert not page.errors
