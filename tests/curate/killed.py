"""A run that is killed again and again ends with the same bytes as one that is not.

    python tests/curate/killed.py [TIMES]              kills a run over real pages of ../shared that many times (20), at random
    python tests/curate/killed.py [TIMES] --video      the same over films that it renders

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

from film import Scene, Thing, pictures, write

ROOT = Path(__file__).parent.parent.parent
DIFFERENT = ("index.html", "timings.json")  # they say how long it took


def start(*words: str | Path) -> subprocess.Popen:
    """python -m curate with these words."""
    command = [sys.executable, "-m", "curate", *map(str, words)]
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
        process = start(*command, "--out", out)
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
    wait(start(*command, "--out", out))
    return [*ended, (here, out)]


def pages(folder: Path) -> tuple:
    """The command over the real pages, a copy of them."""
    howto = ROOT.parent / "shared" / "data" / "howto"
    shutil.copytree(howto / "html", folder / "pages" / "html")
    shutil.copytree(howto / "images", folder / "pages" / "images")
    return "web", folder / "pages" / "html", "--root", folder / "pages", "--tasks", "40"


def films(folder: Path) -> tuple:
    """The command over eight films of three scenes each, a thing moving in every one."""
    (folder / "films").mkdir()
    for k in range(8):
        scenes = []
        for seed in range(3 * k, 3 * k + 3):
            thing = Thing((0.3, 0.5), way=(0.1 + 0.02 * seed, 0.0))
            scenes.append(Scene(6.0, seed=seed, things=(thing,)))
        write(folder / "films" / f"{k}.mp4", pictures(scenes, (240, 320), 12), 12)
    return "video", folder / "films"


def main() -> None:
    numbers = [word for word in sys.argv[1:] if word != "--video"]
    times = int(numbers[0]) if numbers else 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = films(folder) if "--video" in sys.argv else pages(folder)
        began = time.perf_counter()
        wait(start(*command, "--out", folder / "whole", "--workers", "1"))
        seconds = time.perf_counter() - began
        print(f"uninterrupted: {seconds:.0f} s", flush=True)
        whole = digests(folder / "whole")
        for kills, out in kill_often((*command, "--workers", "2"), folder, times, seconds / 3, 0):
            found = digests(out)
            different = [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)]
            print(f"killed {kills} times: {len(found)} files, {len(different)} different {different[:5]}", flush=True)


if __name__ == "__main__":
    main()
