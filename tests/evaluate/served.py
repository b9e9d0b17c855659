"""A real OpenAI-compatible server for tests: `transformers serve` with the bundled miniature's language model.

Its packages are no requirement of anything else here: without fastapi, uvicorn and openai its tests are skipped.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NEEDED = ("transformers", "fastapi", "uvicorn", "openai")
# Qwen2.5-VL's own processor reads films, too, and asks for torchvision. This one puts as many marks for a picture, by the same
# image processor, and reads none.
PROCESSOR = {"processor_class": "PaddleOCRVLProcessor", "image_token": "<|image_pad|>"}


def lacking() -> list[str]:
    """The packages that are not there."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def export(folder: Path) -> Path:
    """The miniature's language model as a folder that transformers loads with pictures."""
    shutil.copytree(ROOT / "checkpoints/tiny/mllm", folder)
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | PROCESSOR))
    return folder


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, str]]:
    """While it runs -> (address, name of its model). folder: for the exported model and the server's log."""
    folder.mkdir(parents=True, exist_ok=True)
    model = export(folder / "miniature")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "transformers"
    words = [program, "serve", model, "--port", port, "--device", "cpu", "--dtype", "float32"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen([*map(str, words)], stdout=log, stderr=log, env=env)
        try:
            wait_for(f"http://localhost:{port}/health", process, folder / "server.log")
            yield f"http://localhost:{port}/v1", str(model)
        finally:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer in {seconds} s: {log.read_text()[-2000:]}")
