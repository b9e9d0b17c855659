"""What the commands of the data engine share: flags, other thresholds, a folder made empty, the start of a job."""

import argparse
import importlib.metadata
import json
import platform
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from shutil import rmtree

from checkpoint import InputError
from curate.engine import Job, Slurm, run
from curate.models import Model
from curate.page import Step
from evaluate.judging import parse_price


def with_thresholds(steps: list[Step], given: list[str]) -> list[Step]:
    """Steps with other thresholds, each given as Step.field=JSON. InputError for one that there is not."""
    steps = list(steps)
    for each in given:
        name, _, value = each.partition("=")
        name, _, key = name.partition(".")
        places = [k for k, step in enumerate(steps) if type(step).__name__ == name and is_dataclass(step)]
        if not places:
            raise InputError(
                f"--set {each}: no step is called {name!r}; there are {', '.join(type(s).__name__ for s in steps)}"
            )
        for k in places:
            old = {f.name: getattr(steps[k], f.name) for f in fields(steps[k])}
            if key not in old:
                raise InputError(f"--set {each}: {name} has no {key!r}, but {', '.join(old) or 'nothing to set'}")
            try:
                new = value if isinstance(old[key], str) else json.loads(value)
            except ValueError:
                raise InputError(f"--set {each}: {value!r} is no value") from None
            if not isinstance(new, type(old[key])) and not (isinstance(old[key], float) and type(new) is int):
                raise InputError(f"--set {each}: {name}.{key} is {old[key]!r}, which {value!r} is not like")
            steps[k] = replace(steps[k], **{key: new})
    return steps


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of what decides the output."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every command of the engine has."""
    parser.add_argument("--out", required=True, help="folder for records, pictures, shards, manifest and report")
    parser.add_argument(
        "--workers", type=int, default=1, help="tasks at a time (%(default)s); the output does not depend on it"
    )
    parser.add_argument("--tasks", type=int, default=0, help="how many tasks there are; default: one for 64 inputs")
    parser.add_argument("--megabytes", type=float, default=1000, help="size of a tar shard (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="do all of it again, in the same folder")
    parser.add_argument("--set", action="append", default=[], metavar="STEP.FIELD=VALUE", help="another threshold")
    parser.add_argument("--ray", action="store_true", help="tasks run in the Ray cluster that is there, or in one started here")
    parser.add_argument("--slurm", metavar="PARTITION", help="tasks run as jobs of Slurm; all nodes must see --out")
    parser.add_argument("--time", default="24:00:00", help="of a job of Slurm (%(default)s)")
    parser.add_argument("--memory", type=int, default=4, help="GB of a job of Slurm (%(default)s)")
    parser.add_argument("--environment", default="", help="what a job of Slurm runs first, as 'source .venv/bin/activate'")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags for the model that steps ask."""
    parser.add_argument("--model", default="none", metavar="none|self|URL", help="who is asked (none)")
    parser.add_argument("--model-name", default="", metavar="NAME", help="what the server calls its model")
    parser.add_argument("--at-once", type=int, default=16, help="questions to a model under way at the same time (16)")
    parser.add_argument("--price", metavar="IN,OUT", help="of a million tokens read and written, to show the cost")
    parser.add_argument("--ckpt", help="of --model self: checkpoint; default the bundled miniature")
    parser.add_argument("--mllm", help="of --model self: the language model alone")


def model_of(args: argparse.Namespace, calls: str = "") -> Model:
    """The model that those flags name. calls: folder in which its answers are kept; empty: nowhere."""
    if args.at_once < 1:
        raise InputError(f"--at-once {args.at_once}: must be 1 or more")
    args.price = parse_price(args.price)
    return Model(args.model, args.model_name, calls, args.at_once, ckpt=args.ckpt, mllm=args.mllm)


def start(args: argparse.Namespace, **job) -> None:
    """Run a job with what `add_engine_flags` has read."""
    for name, least in (("workers", 1), ("tasks", 0), ("memory", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: must be {least} or more")
    if args.megabytes <= 0:
        raise InputError(f"--megabytes {args.megabytes:g}: must be more than 0")
    if args.ray and args.slurm:
        raise InputError("--ray and --slurm: one of the two")
    how = "ray" if args.ray else "slurm" if args.slurm else "local"
    # Jobs elsewhere may begin in another folder.
    out = Path(args.out) if how == "local" else Path(args.out).resolve()
    slurm = Slurm(args.slurm or "", args.time, args.memory, args.environment)
    run(
        Job(
            out=out,
            workers=args.workers,
            tasks=args.tasks,
            megabytes=args.megabytes,
            how=how,
            slurm=slurm,
            **job,
        )
    )


def make_room(args: argparse.Namespace) -> None:
    """--fresh: what an earlier run of this engine has left goes. A folder of another kind is not touched."""
    out = Path(args.out)
    if not args.fresh or not out.exists():
        return
    if any(out.iterdir()) and not (out / "work" / "settings.json").exists():
        raise InputError(f"{out}: is no folder of this command; --fresh empties none but its own")
    for name in ("records.jsonl", "manifest.json", "index.html", "timings.json"):
        (out / name).unlink(missing_ok=True)
    for path in (out / "pictures", out / "shards", *(out / "work").iterdir()):
        # What a model has answered was paid for.
        if path.name == "calls":
            continue
        if path.is_dir():
            rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
