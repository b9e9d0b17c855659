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
    files = [path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] not in ("work", *DIFFERENT)]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def kill_often(pages: Path, root: Path, out: Path, times: int, seconds: float, seed: int, *more: str) -> tuple[int, int]:
    """Kill runs at random times within `seconds`, then let one end. (how many were alive when killed, tasks done by then)."""
    rng = random.Random(seed)
    alive = 0
    for k in range(times):
        process = start(pages, root, out, *more)
        time.sleep(rng.uniform(0.2, 1.0) * seconds)
        alive += process.poll() is None
        if k % 2 == 0:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        process.stdout.close()
    done = len(list(out.glob("work/stage-*/completions/*")))
    process = start(pages, root, out, *more)
    said, _ = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(said.decode())
    return alive, done


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
        process = start(pages, pages.parent, Path(folder, "whole"), "--tasks", "40")
        said, _ = process.communicate(timeout=600)
        seconds = time.perf_counter() - began
        print(said.decode().strip(), f"in {seconds:.1f} s")
        more = ("--tasks", "40", "--workers", "2")
        alive, done = kill_often(pages, pages.parent, Path(folder, "killed"), times, seconds / 3, 0, *more)
        whole, killed = digests(Path(folder, "whole")), digests(Path(folder, "killed"))
        print(f"{alive} of {times} were at work when killed; {done} tasks were done when the last one began")
        print(
            f"{len(whole)} files, {sum(whole[name] != killed.get(name) for name in whole)} different, {len(killed) - len(whole)} more"
        )


if __name__ == "__main__":
    main()
