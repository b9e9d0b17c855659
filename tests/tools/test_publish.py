"""Publishing, against a small server on 127.0.0.1 in the Hub's place: what arrives is what sample.py can load."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from checkpoint import BUNDLED, InputError
from pipeline import DuoGen
from tools import publish

ROOT = Path(__file__).parent.parent.parent
REPO = "acme/duo"


class Hub:
    """Takes commits of one user. files: path -> bytes, as they arrived."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.private = None
        self.commits = 0
        self.refuse = 0  # a status to answer with


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def reply(self, status: int, value: dict | None = None, **headers: str) -> None:
        body = json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        """Also one that comes in pieces of unknown number."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_PUT(self) -> None:
        data = self.body()
        self.hub.large[hashlib.sha256(data).hexdigest()] = data
        self.reply(200)

    def do_POST(self) -> None:
        data = self.body()
        if self.headers.get("Authorization") != "Bearer good":
            return self.reply(401, X_Error_Message="Invalid username or password.")
        if self.hub.refuse:
            return self.reply(self.hub.refuse, X_Error_Message="You have no rights here")
        here = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            self.hub.private = json.loads(data).get("visibility") == "private"
            return self.reply(200, {"url": f"{here}/{REPO}", "name": REPO})
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > 100_000 else "regular", "shouldIgnore": False}
                for f in json.loads(data)["files"]
            ]
            return self.reply(200, {"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{here}/lfs/{o['oid']}", "header": {}}}}
                for o in json.loads(data)["objects"]
            ]
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    self.hub.files[entry["value"]["path"]] = self.hub.large[entry["value"]["oid"]]
            self.hub.commits += 1
            return self.reply(200, {"commitOid": "0" * 40, "commitUrl": f"{here}/{REPO}/commit/1", "hookOutput": ""})
        return self.reply(404, X_Error_Message=f"no {self.path}")


@pytest.fixture
def hub():
    hub = Hub()
    handler = type("OneHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()


def run(hub: Hub, *flags: str, token: str = "good", tmp: Path) -> subprocess.CompletedProcess:
    """The client reads its environment when it is imported: a process of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp / "hf"), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "tools.publish", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_what_is_published_can_be_loaded(hub, tmp_path):
    done = run(hub, BUNDLED, REPO, "--licence", "mit", "--private", "--data", "A sketchbook.", tmp=tmp_path)
    assert done.returncode == 0 and "published 13 files" in done.stdout, done.stderr
    assert hub.commits == 1 and hub.private is True
    for path, data in hub.files.items():
        (tmp_path / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / path).write_bytes(data)
    assert (tmp_path / "copy" / "dit" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        Path(BUNDLED) / "dit" / "diffusion_pytorch_model.safetensors"
    ).read_bytes()
    duo = DuoGen.from_pretrained(tmp_path / "copy")
    assert duo.generate("Draw a red star.", duo.settings(steps=2)).pictures
    text = hub.files["README.md"].decode()
    assert "license: mit" in text and "A sketchbook." in text and "7,467,008" in text and "--ckpt acme/duo" in text
    assert str(ROOT) not in text


def test_refusals_are_one_line(hub, tmp_path):
    for change, told in (({"token": "bad"}, "HTTP 401"), ({"refuse": 403}, "You have no rights here")):
        hub.refuse = change.get("refuse", 0)
        done = run(hub, BUNDLED, REPO, "--licence", "mit", token=change.get("token", "good"), tmp=tmp_path)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert hub.commits == 0


def test_a_run_with_figures(parts, tmp_path, capsys):
    """Its weights go, what it needs to go on does not; and no folder of this machine is named."""
    run = tmp_path / "run"
    step = run / "step_000004"
    shutil.copytree(parts / "dit", step / "dit")
    (step / "state.json").write_text("{}")
    (step / "trainer.safetensors").write_bytes(b"x")
    about = {"step": 4, "seconds": 7200.0, "world_size": 8, "device": "NVIDIA H200", "seed": 3, "code_sha256": "ab" * 32}
    (step / "about.json").write_text(json.dumps(about | {"config": {"data": "a.jsonl", "lr": 3e-5}}))
    (tmp_path / "results.json").write_text(json.dumps({"command": "python -m evaluate sketchbook --seed 1"}))
    (tmp_path / "table.md").write_text("| a | b |\n|---|---|\n| 1 | 2 |\n")
    flags = ["--licence", "other", "--figures", str(tmp_path / "results.json"), "--base", "nvidia/Cosmos-Predict2.5-2B"]
    publish.main([str(run), REPO, *flags, "--dry-run"])
    told = capsys.readouterr().out
    assert "4 steps in 2.0 h on 8 x NVIDIA H200" in told and "| 1 | 2 |" in told and "evaluate sketchbook --seed 1" in told
    assert "base_model:\n- nvidia/Cosmos-Predict2.5-2B\n" in told and "NVIDIA Open Model License" in told
    assert "dit/config.json" in told and "trainer.safetensors" not in told and str(tmp_path) not in told


def test_mistakes(parts, tmp_path):
    for source, repo, more, told in (
        ("runs/nowhere", REPO, [], "no such folder"),
        (str(tmp_path), REPO, [], "neither a checkpoint"),
        (BUNDLED, "noslash", [], "must be owner/name"),
        (BUNDLED, REPO, ["--figures", str(tmp_path / "x.json")], "missing"),
    ):
        with pytest.raises(InputError, match=told):
            publish.main([source, repo, "--licence", "mit", "--dry-run", *more])
    adapters = tmp_path / "ckpt" / "dit"
    shutil.copytree(parts / "dit", adapters)
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(parts / "dit")}))
    with pytest.raises(InputError, match="a folder of this machine"):
        publish.main([str(tmp_path / "ckpt"), REPO, "--licence", "mit", "--dry-run"])
