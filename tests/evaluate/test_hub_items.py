"""Items by id and revision from the Hub, against the small server of tests/test_hub.py in the Hub's place."""

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from checkpoint import InputError
from evaluate import hub as hub_module
from evaluate.benchmark import find, names
from test_hub import REPO, Handler, Hub

ROOT = Path(__file__).parent.parent.parent
# The Hub's client reads its address when it is imported, so that the questions are asked in a process of their own.
ASK = """
import json, sys
from checkpoint import InputError
from evaluate.answers import items_of
from evaluate.benchmark import find

for name, items in json.load(sys.stdin):
    module = find(name)
    if items is None:
        module.SOURCE |= {"id": "acme/duo", "revision": "main"}
    try:
        requests, digest = items_of(module, items, None)
        found = [[p.get("text") or p["image"] for m in r.messages for p in m["content"]] for r in requests]
        print(json.dumps([found, digest]))
    except InputError as e:
        print(json.dumps(f"error: {e}"))
"""


def ask(url: str, home: Path, *questions: tuple, **variables: str) -> list:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | variables
    options = {"input": json.dumps(questions), "cwd": ROOT, "env": env, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", ASK], **options)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "PNG")
    return data.getvalue()


def zipped(**files: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def hub():
    """A repository as InterleavedBench's: items, and their pictures in archives, one with a folder and one without."""
    said = [{"from": "human", "value": "Go on: <image>"}]
    items = [{"id": f"i{k}", "image": [f"{name}/1.png"], "task_name": "vist", "conversations": said}
             for k, name in enumerate(("vist_images", "wiki_images"))]  # fmt: skip
    files = {
        "interleaved_bench.json": json.dumps(items).encode(),
        "zipped_images/vist_images.zip": zipped(**{"vist_images/1.png": picture(), "__MACOSX/._1.png": b""}),
        "zipped_images/wiki_images.zip": zipped(**{"1.png": picture()}),
        "weights.safetensors": b"never fetched",
    }
    hub = Hub()
    less = files | {"interleaved_bench.json": json.dumps(items[:1]).encode()}
    hub.revisions = {"main": files, "v1": less, "empty": {"a.json": b"{}"}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def test_items_come_by_id_and_revision_with_their_pictures(hub, tmp_path):
    questions = [("interleavedbench", f"hub:{REPO}@{revision}") for revision in ("main", "v1")]
    wrong = [f"hub:{REPO}@v7", "hub:acme/nobody@main", f"hub:{REPO}@empty", f"hub:{REPO}", "hub:main"]
    questions += [("interleavedbench", name) for name in wrong]
    (main, digest), (first, other), *lines = ask(hub.url, tmp_path, *questions, ("interleavedbench", None))
    own, own_digest = lines.pop()
    assert [Path(found[1]).read_bytes() for found in main] == [picture()] * 2
    # Another revision is another set of items, and the benchmark's own source is found in the same way.
    assert len(first) == 1 and other != digest and own_digest == digest and own == main
    assert hub.requests["weights.safetensors"] == 0 and hub.requests["zipped_images/vist_images.zip"] == 1
    told = ["no revision v7", "no repository acme/nobody", "interleaved_bench.json: no such file"]
    for line, said in zip(lines, [*told, *["must be hub:OWNER/NAME@REVISION"] * 2], strict=True):
        assert line.startswith("error: ") and said in line and "\n" not in line
    # The second time nothing is fetched, with or without the Hub.
    before = dict(hub.requests)
    ((again, _),) = ask(hub.url, tmp_path, ("interleavedbench", f"hub:{REPO}@main"), HF_HUB_OFFLINE="1")
    assert again == main and hub.requests == before


def test_an_archive_cannot_write_elsewhere(tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    with tarfile.open(snapshot / "a.tar", "w") as file:
        member = tarfile.TarInfo("../outside.png")
        file.addfile(member, io.BytesIO(b""))
    (tmp_path / "b.zip").write_bytes(zipped(**{"../outside.png": picture()}))
    (snapshot / "c.zip").write_bytes(b"no archive")
    for name, said in (("a.tar", "OutsideDestinationError"), ("c.zip", "BadZipFile")):
        with pytest.raises(InputError, match=said):
            hub_module.unpacked(snapshot, [snapshot / name], tmp_path / "to" / "files")
    hub_module.unpack(tmp_path / "b.zip", tmp_path / "to")
    assert not list(tmp_path.glob("outside.png")) and not (tmp_path / "to" / "files").exists()


def test_every_source_names_its_revision_and_licence():
    """What has no licence names the lack of one; a branch would be other items tomorrow."""
    for name in names():
        source = find(name).SOURCE
        assert source["licence"] and source["revision"] not in ("main", "master", "HEAD", ""), name
