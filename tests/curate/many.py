"""Many pages at once: how fast, and whether memory stays flat.

    python tests/curate/many.py [PAGES [WORKERS]]     100,000 pages on 2 workers

The real pages of ../shared, as often as it takes, some words changed in every copy, so that no two are the same. Their
pictures are the real ones, from one folder; that they stand on many pages is allowed. What is printed: pages and pictures a
second, and the memory of all processes of the run together, and of the largest, in each quarter of the time.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HOWTO = ROOT.parent / "shared" / "data" / "howto"


def changed(html: str, rng: random.Random, words: list[str]) -> str:
    """One word of ten is another; tags and Chinese, where words have no blanks, but for a number, are as they were."""
    texts = re.split(r"(<[^>]*>)", html)
    for k in range(0, len(texts), 2):
        texts[k] = re.sub(r"\b[a-z]{3,}\b", lambda word: rng.choice(words) if rng.random() < 0.1 else word[0], texts[k])
        texts[k] = re.sub(r"。", lambda end: f"{end[0]}{rng.randrange(10**6)}" if rng.random() < 0.3 else end[0], texts[k])
    return "".join(texts)


def write(folder: Path, n: int) -> None:
    sources = [path.read_text(encoding="utf-8") for path in sorted((HOWTO / "html").iterdir())]
    words = sorted(set(re.findall(r"\b[a-z]{3,}\b", " ".join(sources))))
    for k in range(n):
        place = folder / "html" / f"{k // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        html = changed(sources[k % len(sources)], random.Random(k), words).replace("../images/", "/images/")
        (place / f"{k:06d}.html").write_text(html, encoding="utf-8")
    shutil.copytree(HOWTO / "images", folder / "images")


def memory(session: int) -> tuple[float, float]:
    """MB of all processes of a session, and of its largest; pages that several share count once for each."""
    sizes = [0.0]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            sizes.append(int(fields[21]) * 4096 / 1e6)
    return sum(sizes), max(sizes)


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    workers = sys.argv[2] if len(sys.argv) > 2 else "2"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "many")
        write(folder, n)
        print(f"{n} pages written", flush=True)
        command = [sys.executable, "-m", "curate", "web", str(folder / "html"), "--root", str(folder), "--out", f"{name}/out"]
        command += ["--workers", workers, "--set", "Repeated.pages=1000000000"]
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        seen = []
        while process.poll() is None:
            seen.append(memory(process.pid))
            time.sleep(2)
        seconds = time.monotonic() - began
        if process.returncode:
            sys.exit(process.returncode)
        manifest = json.loads(Path(name, "out", "manifest.json").read_text())
        pictures = manifest["counts"]["07 Fill"]["pictures out"]
        print(
            f"{n} pages, {pictures} pictures in {seconds:.0f} s: {n / seconds:.1f} pages/s, {pictures / seconds:.1f} pictures/s"
        )
        for k in range(4):
            quarter = seen[len(seen) * k // 4 : len(seen) * (k + 1) // 4]
            together, largest = (max(column) for column in zip(*quarter, strict=True))
            print(f"quarter {k + 1}: {together:.0f} MB together, {largest:.0f} MB the largest")
        print(json.dumps(json.loads(Path(name, "out", "timings.json").read_text())))


if __name__ == "__main__":
    main()
