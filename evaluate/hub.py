"""Items from the Hub: `hub:OWNER/NAME@REVISION`, or `hub:datasets/OWNER/NAME@REVISION` for a repository of data.

A revision is asked for, since items that change are another benchmark. What is downloaded is kept in the Hub's cache. Archives
in a repository (InterleavedBench has its pictures in six) are unpacked once, beside copies of its other files.
"""

import os
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

from huggingface_hub import cached_assets_path, snapshot_download
from tqdm import tqdm

from checkpoint import InputError, hub_problem

MARK = "hub:"
NAME = re.compile(r"hub:(datasets/)?([\w.-]+/[\w.-]+)@(.+)")
WANTED = ["*.json", "*.jsonl", "*.csv", "*.png", "*.jpg", "*.jpeg", "*.webp", "*.zip", "*.tar"]


def folder(name: str) -> Path:
    """The files of a repository at a revision; InputError, one line, where they cannot be had."""
    parts = NAME.fullmatch(name)
    if parts is None:
        raise InputError(f"--items {name}: must be hub:OWNER/NAME@REVISION or hub:datasets/OWNER/NAME@REVISION")
    kind, repo, revision = parts.groups()
    options = {"repo_type": "dataset" if kind else "model", "revision": revision, "allow_patterns": WANTED}
    try:
        snapshot = Path(snapshot_download(repo, **options))
    except Exception as e:  # the transports raise types of their own, without a common base
        raise InputError(hub_problem(e, f"{kind or ''}{repo}", revision, name)) from None
    archives = sorted(file for file in snapshot.rglob("*") if file.suffix in (".zip", ".tar"))
    if not archives:
        return snapshot
    # The snapshot's own name is the commit, whatever a revision is called.
    return unpacked(snapshot, archives, cached_assets_path("duogen", repo.replace("/", "--"), snapshot.name) / "files")


def unpacked(snapshot: Path, archives: list[Path], to: Path) -> Path:
    """A folder with all that is in the archives and all that is beside them: whole, or not there."""
    if to.is_dir():
        return to
    aside = to.with_name(f".{to.name}-{os.getpid()}")
    try:
        for file in snapshot.rglob("*"):
            if file.is_file() and file not in archives:
                copy = aside / file.relative_to(snapshot)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        for archive in tqdm(archives, desc="unpacking", unit="archive", leave=False, disable=None):
            unpack(archive, aside)
        try:
            os.rename(aside, to)
        except OSError:
            if not to.is_dir():  # otherwise another rank was first
                raise
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as e:
        raise InputError(f"{snapshot}: cannot be unpacked ({type(e).__name__}: {e}): make room, or remove it") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return to


def unpack(archive: Path, to: Path) -> None:
    """Into a folder of the archive's name, whether it has one in itself or not."""
    # Neither form may write outside the folder: zipfile cuts such names, tarfile refuses them.
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            file.extractall(to if has_folder(archive.stem, file.namelist()) else to / archive.stem)
    else:
        with tarfile.open(archive) as file:
            file.extractall(to if has_folder(archive.stem, file.getnames()) else to / archive.stem, filter="data")


def has_folder(stem: str, names: list[str]) -> bool:
    """Whether all files of an archive lie in a folder of its name; what a Mac adds does not count."""
    tops = {Path(name).parts[0] for name in names if Path(name).parts}
    return tops - {"__MACOSX"} == {stem}
