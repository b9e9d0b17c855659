"""A run that is killed again and again ends with the same bytes as one that is not.

    python tests/curate/killed.py [TIMES [PAGES]]      kills a run over real pages of ../shared that many times (20), at random

Even times all of its processes are killed at once, as by a machine that fails; odd times the first one alone, whose workers may
go on for a while beside those of the next start.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DIFFERENT = ("index.html", "timings.json")  # they say how long it took


def start(pages: Path, root: Path, out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "curate", "web", str(pages), "--root", str(root), "--out", str(out), *more]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    # A session of its own: killing it kills all of its processes, and nobody else's.
    return subprocess.Popen(
        command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of all that a run is for, by its name."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        # Whoever reads records puts indices beside them.
        if path.is_file() and not name.startswith(("work/", *DIFFERENT)) and path.suffix != ".index":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def wait(process: subprocess.Popen) -> None:
    said, _ = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(said.decode())


def kill_often(command: tuple, folder: Path, times: int, seconds: float, seed: int) -> list[tuple[int, Path]]:
    """Kill runs at random times, `seconds` after their start at most, until so many have been killed; the last one may end.

    A run goes on where the one before was killed, until it has ended; then another begins in a new folder. Returns [(kills,
    folder)] of the runs that ended.
    """
    rng = random.Random(seed)
    ended = []
    killed = here = 0
    while killed < times:
        out = folder / f"killed-{len(ended)}"
        process = start(*command[:2], out, *command[2:])
        try:
            process.wait(rng.uniform(0.3, 1.0) * seconds)
            wait(process)
            ended.append((here, out))
            here = 0
            continue
        except subprocess.TimeoutExpired:
            killed += 1
            here += 1
        if killed % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.communicate()
    out = folder / f"killed-{len(ended)}"
    wait(start(*command[:2], out, *command[2:]))
    return [*ended, (here, out)]


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    n = int(sys.argv[2]) if len(sys.argv) > 2 else 351
    howto = ROOT.parent / "shared" / "data" / "howto"
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder, "pages", "html")
        pages.mkdir(parents=True)
        for path in sorted((howto / "html").iterdir())[:n]:
            shutil.copy(path, pages)
        shutil.copytree(howto / "images", pages.parent / "images")
        began = time.perf_counter()
        wait(start(pages, pages.parent, Path(folder, "whole"), "--tasks", "40", "--workers", "1"))
        seconds = time.perf_counter() - began
        print(f"uninterrupted: {seconds:.0f} s", flush=True)
        whole = digests(Path(folder, "whole"))
        command = (pages, pages.parent, "--tasks", "40", "--workers", "2")
        for kills, out in kill_often(command, Path(folder), times, seconds / 3, 0):
            found = digests(out)
            different = [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)]
            print(f"killed {kills} times: {len(found)} files, {len(different)} different {different[:5]}", flush=True)


if __name__ == "__main__":
    main()
