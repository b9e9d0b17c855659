"""A checkpoint goes to the Hub, with a card that says what it is, what it came from and how good it is.

    python -m tools.publish checkpoints/mine owner/name --licence apache-2.0 --figures out/eval/results.json
    python -m tools.publish runs/stage2 owner/name --licence mit --dry-run       print the card, send nothing

What is sent: duogen.json, the parts beside it and README.md, the card; of a training run the parts of its newest sound
checkpoint. Parts that duogen.json takes from the Hub stay where they are. The token is that of `hf auth login`, or HF_TOKEN.
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, errors
from safetensors import safe_open
from tqdm import tqdm

from checkpoint import HUB_NAME, InputError, is_run, newest_sound, parts_in, read_json
from flags import Parser
from pipeline import PARTS, read_manifest
from training import run_script

# Licences under which the published base models are distributed. A derived checkpoint has to keep to them.
BASES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen research licence",
    "Qwen/Qwen2.5-VL-7B-Instruct": "Apache 2.0",
    "Qwen/Qwen2.5-VL-32B-Instruct": "Apache 2.0",
    "Qwen/Qwen3-VL-2B-Instruct": "Apache 2.0",
    "Qwen/Qwen3-VL-4B-Instruct": "Apache 2.0",
    "Qwen/Qwen3-VL-8B-Instruct": "Apache 2.0",
    "Qwen/Qwen3-VL-32B-Instruct": "Apache 2.0",
    "nvidia/Cosmos-Predict2.5-2B": "NVIDIA Open Model License",
    "nvidia/Cosmos-Predict2.5-14B": "NVIDIA Open Model License",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "Apache 2.0",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "Apache 2.0",
}
NEVER = ("trainer.safetensors", "state.json", "*.tmp", ".*")  # of a run: for going on, not for using
CARD = """\
---
license: {licence}
library_name: duogen
pipeline_tag: any-to-any
tags:
- interleaved-text-and-image
{bases}---

# {name}

Asked in words and pictures, this model answers in words and pictures: a language model writes, decides by itself when a
picture is due, and a diffusion transformer paints it looking at every picture so far (DuoGen, arXiv 2602.00508).

    python sample.py --ckpt {repo} --prompt "..."

## Parts

| part | parameters | comes from |
|---|---|---|
{parts}
{licences}
## Training

{training}

## How good it is

{figures}

## Limits

It can be wrong, in words and in pictures, and what it says of pictures is no proof of what they show. It has learnt from the
data named above and knows little beyond them. Nothing filters what it is asked or what it answers: whoever offers it to others
has to.
"""


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser("python -m tools.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", help="folder of a checkpoint, or a training run")
    p.add_argument("repo", help="owner/name on the Hub; made if it is not there")
    p.add_argument("--licence", required=True, help="of the checkpoint, as the Hub names it: apache-2.0, mit, other, ...")
    p.add_argument("--figures", metavar="FILE", help="results.json of python -m evaluate sketchbook, or of a report")
    p.add_argument("--base", action="append", default=[], metavar="NAME", help="a Hub model that it came from; repeatable")
    p.add_argument("--data", help="what it was trained on, in a sentence (default: what the run's settings say)")
    p.add_argument("--revision", default="main", help="branch to write to (main)")
    p.add_argument("--private", action="store_true", help="a repository that others do not see")
    p.add_argument("--dry-run", action="store_true", help="print the card and the files, send nothing")
    return p.parse_flags(argv)


def folder_of(source: str) -> Path:
    """The folder that is sent."""
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"{source}: no such folder")
    if is_run(folder):
        return folder if (folder / "state.json").is_file() else newest_sound(folder)
    if not (folder / "duogen.json").is_file() and not parts_in(folder):
        raise InputError(f"{source}: neither a checkpoint with duogen.json nor a training run")
    return folder


def files_of(folder: Path) -> list[Path]:
    """What is sent of it, but the card."""
    parts = [part for part in PARTS if (folder / part).is_dir()]
    files = [folder / "duogen.json"] if (folder / "duogen.json").is_file() else []
    for part in parts:
        files += sorted(f for f in (folder / part).rglob("*") if f.is_file() and not any(f.match(never) for never in NEVER))
    if not files:
        raise InputError(f"{folder}: holds none of {', '.join(PARTS)}")
    return files


def parameters(folder: Path) -> int:
    """Of a part, from the heads of its files: nothing is read but these."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                size = 1
                for side in f.get_slice(name).get_shape():
                    size *= side
                total += size
    return total


def sources_of(folder: Path) -> dict[str, str]:
    """{part: where it comes from}."""
    named = read_manifest(folder / "duogen.json")["parts"] if (folder / "duogen.json").is_file() else {}
    sources = {}
    for part in PARTS:
        if (folder / part).is_dir():
            adapters = folder / part / "adapter_config.json"
            own = "this repository"
            sources[part] = f"adapters in {own} for {base_of(adapters)}" if adapters.is_file() else own
        elif part in named:
            sources[part] = named[part]
    return sources


def base_of(adapters: Path) -> str:
    """What adapters are for; a folder of this disk is of no use to anybody else."""
    base = str(read_json(adapters).get("base_model_name_or_path", ""))
    if not HUB_NAME.fullmatch(base) or Path(base).exists():
        raise InputError(f"{adapters}: its base is {base!r:.80}, a folder of this machine: merge it first (tools.merge)")
    return base


def trained_on(folder: Path, said: str | None) -> str:
    """How it was trained: what the run wrote down, and what the user says."""
    lines = [said] if said else []
    if (folder / "about.json").is_file():
        about = read_json(folder / "about.json")
        c = about["config"]
        hours = about["seconds"] / 3600
        where = f"{about['world_size']} x {about['device']}"
        how = f"data `{c['data']}`, learning rate {c['lr']:g}, seed {about['seed']}, code {about['code_sha256'][:12]}"
        lines.append(f"{about['step']:,} steps in {hours:.1f} h on {where}, {how}.")
    return "\n\n".join(lines) or "Not stated."


def figures_of(file: str | None) -> str:
    """The table of an evaluation, and the command that made it."""
    if file is None:
        return "Not measured."
    table = Path(file).with_name("table.md")
    results = read_json(file)
    if not table.is_file():
        raise InputError(f"{file}: beside it lies no table.md: name the results.json that python -m evaluate has written")
    command = results.get("command")
    return "\n\n".join([f"`{command}`" if command else "By `python -m evaluate`.", table.read_text(encoding="utf-8").strip()])


def card(args: argparse.Namespace, folder: Path) -> str:
    """README.md of the repository."""
    sources = sources_of(folder)
    rows = []
    for part, source in sources.items():
        count = f"{parameters(folder / part):,}" if (folder / part).is_dir() else ""
        rows.append(f"| {part} | {count} | {source} |\n")
    hub = [HUB_NAME.fullmatch(source)["repo"] for source in sources.values() if HUB_NAME.fullmatch(source)]
    bases = list(dict.fromkeys([*args.base, *hub]))
    known = [f"`{base}`: {BASES[base]}" for base in bases if base in BASES]
    return CARD.format(
        licence=args.licence,
        bases="".join(["base_model:\n", *(f"- {base}\n" for base in bases)]) if bases else "",
        name=args.repo.rpartition("/")[2],
        repo=args.repo,
        parts="".join(rows),
        licences=f"Licences of the base models: {'; '.join(known)}.\n" if known else "",
        training=trained_on(folder, args.data),
        figures=figures_of(args.figures),
    )


def main(argv: list[str]) -> None:
    args = arguments(argv)
    if not HUB_NAME.fullmatch(args.repo) or args.repo.count("/") != 1 or "@" in args.repo:
        raise InputError(f"{args.repo}: must be owner/name")
    folder = folder_of(args.source)
    files = files_of(folder)
    text = card(args, folder)
    if args.dry_run:
        print(text)
        for file in files:
            print(f"{file.stat().st_size:>15,}  {file.relative_to(folder)}")
        return
    send(args, folder, files, text)


def send(args: argparse.Namespace, folder: Path, files: list[Path], text: str) -> None:
    """One commit with all of it: a repository never holds half of a checkpoint."""
    api = HfApi()
    added = [CommitOperationAdd("README.md", text.encode())]
    for file in tqdm(files, unit="file", leave=False):  # each is hashed
        added.append(CommitOperationAdd(file.relative_to(folder).as_posix(), str(file)))
    try:
        api.create_repo(args.repo, private=args.private, exist_ok=True)
        if args.revision != "main":
            api.create_branch(args.repo, branch=args.revision, exist_ok=True)
        done = api.create_commit(args.repo, added, commit_message=f"{folder.name}: {len(files)} files", revision=args.revision)
    except errors.LocalTokenNotFoundError:
        raise InputError("the Hub wants a token: run `hf auth login`, or set HF_TOKEN") from None
    except errors.HfHubHTTPError as e:
        reason = e.server_message or e.response.reason_phrase
        raise InputError(f"{args.repo}: the Hub refuses it (HTTP {e.response.status_code}: {reason})") from None
    except errors.OfflineModeIsEnabled:
        raise InputError("HF_HUB_OFFLINE is set: unset it to publish") from None
    print(f"published {len(files)} files: {done.commit_url}")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
