"""The Hub as seen by checkpoint.resolve, against a small server on 127.0.0.1 that speaks the part of its protocol we need.

The client reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported, so every question has a process of its own.
"""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from torch import nn

from checkpoint import hub_problem, load_weights, save_weights

ROOT = Path(__file__).parent.parent
REPO = "acme/duo"


class Hub:
    """One repository with a commit for every revision: revisions[name] = {path: bytes}."""

    def __init__(self) -> None:
        self.revisions: dict[str, dict[str, bytes]] = {}
        self.gated = False
        self.token_refused = False
        self.cut: dict[str, int] = {}  # path -> how many bytes are sent before the connection is cut for the first time
        self.heal = False  # whether the server is well after that, or answers 503
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []

    def commit(self, revision: str) -> str:
        return hashlib.sha1(revision.encode()).hexdigest()

    def files(self, commit: str) -> dict[str, bytes] | None:
        return next((f for name, f in self.revisions.items() if commit in (name, self.commit(name))), None)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if self.hub.token_refused:
            return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        if path.startswith("/api/models/"):
            return self.api(*path.removeprefix("/api/models/").split("/"))
        if "/resolve/" in path:
            revision, file = path.split("/resolve/")[1].split("/", 1)
            return self.file(unquote(file), self.hub.files(revision) or {}, revision)
        return self.answer(404)

    def api(self, owner: str, name: str, what: str = "revision", revision: str = "main") -> None:
        """/api/models/owner/name[/revision/R] tells the commit, /api/models/owner/name/tree/COMMIT the files."""
        if f"{owner}/{name}" != REPO:
            return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        revision = unquote(revision)
        files = self.hub.files(revision)
        if files is None:
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        if what == "tree":
            value = [
                {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for p, b in files.items()
            ]
        else:
            value = {"id": REPO, "sha": self.hub.commit(revision), "siblings": [{"rfilename": p} for p in files]}
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def file(self, path: str, files: dict[str, bytes], commit: str) -> None:
        if self.hub.gated:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to model acme/duo is restricted")
        if path not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        body, start = files[path], 0
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if self.command == "GET":
            self.hub.requests[path] += 1
        if "Range" in self.headers:
            self.hub.ranges.append(self.headers["Range"])
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.command == "GET" and path in self.hub.cut:
            if self.hub.requests[path] == 1:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: self.hub.cut[path]])
                self.close_connection = True
                return None
            if not self.hub.heal:
                return self.answer(503)
        return self.answer(206 if start else 200, body[start:], **headers)


class Toy(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 64), nn.Linear(64, 8))


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, tuple[Toy, dict[str, bytes]]]:
    """Two sets of weights and their files, as a repository of the system has them: a sharded dit/ and a small vae/."""
    made = {}
    for name in ("main", "diffusers/base/post-trained"):
        toy, folder = Toy(), tmp_path_factory.mktemp("repo")
        save_weights(toy.state_dict(), folder / "dit", {"name": name}, stem="diffusion_pytorch_model", shard_bytes=16_500)
        save_weights({"a": torch.ones(1)}, folder / "vae", {})
        (folder / "duogen.json").write_text("{}")
        (folder / "notes.txt").write_text("words")
        (folder / "pytorch_model.bin").write_bytes(b"never fetched")
        made[name] = (toy, {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()})
    return made


@pytest.fixture
def hub(toys):
    hub = Hub()
    hub.revisions = {name: dict(files) for name, (_, files) in toys.items()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.stop = lambda: (server.shutdown(), server.server_close())
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    hub.stop()


# One process imports PyTorch and is then forked for each question; the fork imports the client with the variables asked for.
FORKS = """
import json, os, sys, torch
for line in sys.stdin:
    variables, calls = json.loads(line)
    if os.fork() == 0:
        os.environ.update(variables)
        from checkpoint import InputError, resolve
        answers = []
        for arguments in calls:
            try:
                answers.append(str(resolve(*arguments)))
            except InputError as e:
                answers.append(f"error: {e}")
        print(json.dumps(answers), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit("the fork failed")
"""


@pytest.fixture(scope="module")
def forks():
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    command, pipes = [sys.executable, "-c", FORKS], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def ask(forks, hub):
    """ask(home, *calls, **variables): what resolve(*call) returns, or "error: " and its line, for each call."""

    def ask(home: Path, *calls: tuple, **variables: str) -> list[str]:
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | variables
        print(json.dumps([variables, calls]), file=forks.stdin, flush=True)
        return json.loads(forks.stdout.readline())

    return ask


def assert_same(folder: str | Path, toy: Toy) -> None:
    with torch.device("meta"):
        loaded = Toy()
    load_weights(loaded, folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), toy.parameters(), strict=True))


def contents(folder: str | Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


def test_whole_repository_part_and_revision(ask, hub, toys, tmp_path):
    """A system's folder; a part of it in three spellings; the same part at a revision with slashes, fetched by name alone."""
    part = f"{REPO}/dit"
    at = "diffusers/base/post-trained"
    parts = ask(tmp_path / "parts", (REPO, "dit"), (part,), (f"{part}@{at}",), (REPO, "dit", at), (part, None, at))
    assert parts[0] == parts[1] and parts[2] == parts[3] == parts[4] != parts[0]
    assert_same(parts[0], toys["main"][0])
    assert_same(parts[2], toys[at][0])
    assert set(hub.requests) == {p for p in toys["main"][1] if p.startswith("dit/")}, "only the part is fetched"
    assert set(hub.requests.values()) <= {1, 2}, "each file once for each revision"

    (whole,) = ask(tmp_path / "whole", (REPO,))
    assert contents(whole) == {p: b for p, b in toys["main"][1].items() if not p.endswith(".bin")}
    assert_same(Path(whole) / "dit", toys["main"][0])


def test_mistakes_are_one_line(ask, hub, tmp_path):
    repository, revision, folder = ask(tmp_path, ("acme/du",), (REPO, None, "v2"), (f"{REPO}/transformer",))
    assert repository == (
        "error: acme/du: no such folder, and no repository acme/du on the Hub: if it is a private one, run `hf auth login`"
    )
    assert revision == f"error: {REPO}: no revision v2: see the branches and tags at {hub.url}/{REPO}/tree/main"
    assert folder == (
        f"error: {REPO}: no folder transformer with json or safetensors files at revision main: see {hub.url}/{REPO}"
    )


def test_only_pickles_in_the_repository(ask, hub, tmp_path):
    hub.revisions["main"] = {"pytorch_model.bin": b"pickle", "README.md": b"words"}
    words = f"error: {REPO}: no json or safetensors files at revision main: see {hub.url}/{REPO}"
    assert ask(tmp_path, (REPO,)) == [words]


def test_gated_and_refused(ask, hub, tmp_path):
    hub.gated = True
    words = f"error: {REPO}: access is gated: accept its licence at {hub.url}/{REPO}, then run `hf auth login`"
    assert ask(tmp_path, (REPO,)) == [words]
    hub.token_refused = True
    (line,) = ask(tmp_path, (REPO,), HF_TOKEN="hf_expired")
    assert line == (
        f"error: {REPO}: the Hub refuses access (HTTP 401: Invalid credentials in Authorization header): run `hf auth login` "
        "with a token that may read it"
    )


def test_a_cut_connection_is_resumed_at_once(ask, hub, tmp_path):
    """The client reads 10 MiB at a time, and keeps what it has read."""
    hub.revisions = {"main": {"big.safetensors": os.urandom(11 * 2**20)}}
    hub.cut, hub.heal = {"big.safetensors": 10 * 2**20 + 1000}, True
    (folder,) = ask(tmp_path, (REPO,))
    assert hub.ranges == [f"bytes={10 * 2**20}-"]
    assert contents(folder) == hub.revisions["main"]


def test_a_download_that_stops_is_finished_by_the_next_call(ask, hub, toys, tmp_path):
    """The server sends 5,000 bytes of one shard, then fails for good. No partial file stays; the other files are kept."""
    file = "dit/diffusion_pytorch_model-00001-of-00002.safetensors"
    hub.cut = {file: 5000}
    (line,) = ask(tmp_path, (REPO, "dit"))
    words = f"error: {REPO}: the download stopped (HTTP 503: Service Unavailable): run it again, complete files are kept"
    assert line == words
    (snapshot,) = (tmp_path / "hub" / "models--acme--duo" / "snapshots").iterdir()
    kept = {p for p in toys["main"][1] if p.startswith("dit/")} - {file}
    assert contents(snapshot) == {p: toys["main"][1][p] for p in kept}
    assert not list(tmp_path.rglob("*.incomplete"))

    (offline,) = ask(tmp_path, (REPO, "dit"), HF_HUB_OFFLINE="1")
    assert offline == (
        f"error: {REPO}: no such folder, and {REPO}@main is not complete in the cache: unset HF_HUB_OFFLINE to download it, "
        "or name a local folder"
    )
    hub.cut = {}
    (folder,) = ask(tmp_path, (REPO, "dit"))
    assert_same(folder, toys["main"][0])
    assert {p: hub.requests[p] for p in kept} == dict.fromkeys(kept, 1)


def test_offline_and_server_down(ask, hub, tmp_path):
    """Nothing in the cache is an error that says which switch is on; what is in the cache needs neither switch nor server."""
    (folder,) = ask(tmp_path, (REPO, "dit"))
    fetched = Counter(hub.requests)
    absent = "error: acme/other: no such folder, and acme/other@main is not in the cache"
    assert ask(tmp_path, (REPO, "dit"), ("acme/other",), HF_HUB_OFFLINE="1") == [
        folder,
        f"{absent}: unset HF_HUB_OFFLINE to download it, or name a local folder",
    ]
    assert hub.requests == fetched
    hub.stop()
    cached, line = ask(tmp_path, (REPO, "dit"), ("acme/other",))
    assert cached == folder
    assert line.startswith(f"{absent}, and the Hub cannot be reached (ConnectError: ")
    assert line.endswith("): check the network, or name a local folder")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_cache_that_cannot_be_written(code):
    line = hub_problem(OSError(code, os.strerror(code)), REPO, "main", REPO)
    assert line.startswith(f"{REPO}: ") and f"cannot be written ({os.strerror(code)}): make room, or set HF_HOME" in line
