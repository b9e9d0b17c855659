"""An OpenAI-compatible server, and a page to talk to it.

    python -m serve                                              the bundled miniature at http://127.0.0.1:8000
    python -m serve --ckpt owner/name --dtype bf16 --batch 16
    python -m serve --host 0.0.0.0 --port 80 --key SECRET        open to others: with a key, for the page has no users

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="default", messages=[{"role": "user", "content": "How do I draw a house?"}])

--batch answers are written together, each token of all in one pass, each picture's steps too; more wait, --queue at most.
SIGTERM and Ctrl-C: what is being written is finished, within --grace seconds, and everything else is refused.
"""

import interrupt

if __name__ == "__main__":
    interrupt.quiet()  # until the server is reached: importing PyTorch takes a second or two

import argparse
import contextlib
import sys

import torch

from checkpoint import InputError, parse_dtype, pick_device
from flags import Parser, add_flags
from ops import set_backend
from families.registry import PARTS
from pipeline import DuoGen, Settings, check_device, override

try:
    import uvicorn

    from serve.app import Service, make_app
    from serve.worker import Worker
except ModuleNotFoundError as e:
    if e.name not in ("starlette", "uvicorn", "anyio"):
        raise
    print(f"error: {e.name} is missing: pip install -r serve/requirements.txt", file=sys.stderr)
    sys.exit(2)


def arguments(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    p = Parser("python -m serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="port; 0: any that is free (8000)")
    p.add_argument("--key", help="what clients must send as their API key (default: nobody is asked)")
    p.add_argument("--batch", type=int, default=8, help="answers written together (8)")
    p.add_argument("--queue", type=int, default=64, help="requests that may wait for a place (64)")
    p.add_argument("--capacity", type=int, default=8192, help="tokens of a prompt and its answer at most (8192)")
    p.add_argument("--body", type=float, default=32.0, help="MB of a request at most (32)")
    p.add_argument("--grace", type=int, default=60, help="seconds for what is being written when the server ends (60)")
    p.add_argument("--ckpt", help="checkpoint: folder or Hub name (default: the bundled miniature)")
    p.add_argument("--revision", help="branch, tag or commit of a --ckpt on the Hub")
    for part in PARTS:
        p.add_argument(f"--{part}", help="this part from a run, a folder or a Hub name")
    p.add_argument("--dtype", default="auto", help="auto, bf16, fp32, fp16")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    p.add_argument("--attention", default="auto", help="auto, triton, sdpa")
    p.add_argument("--offload", action="store_true", help="for a small GPU: weights wait in host memory, see docs/fit.md")
    add_flags(p, Settings, title="settings of requests that say nothing else (defaults: the checkpoint's)", given_only=True)
    args = p.parse_flags(argv)
    for name in ("batch", "capacity", "body", "grace"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name} {getattr(args, name)}: must be above 0")
    if args.queue < 0 or not 0 <= args.port < 65536:
        raise InputError("--queue must be 0 or more, --port from 0 to 65535")
    return args, {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}


def load(args: argparse.Namespace, values: dict) -> DuoGen:
    device = pick_device(args.device)
    dtype = parse_dtype(args.dtype, device)
    set_backend(args.attention, device)
    check_device(device, args.offload, None)
    with contextlib.redirect_stdout(sys.stderr):
        options = {name: getattr(args, name) for name in (*PARTS, "revision", "offload")}
        duo = DuoGen.from_pretrained(args.ckpt, **options, dtype=dtype, device=device, asked=values)
    duo.defaults = override(duo.defaults, values, "settings")
    return duo


def world() -> str:
    """What the bundled miniature knows of: whoever asks it for a poem should not wonder."""
    from sketchbook.scenes import COLOURS, SUBJECTS

    things = ", ".join(SUBJECTS)
    colours = ", ".join(COLOURS)
    return (
        f"This is the miniature. It draws {len(SUBJECTS)} things ({things}) in {len(COLOURS)} colours ({colours}), "
        "changes them, tells stories of them and says what it sees. Of anything else it knows nothing."
    )


class Server(uvicorn.Server):
    """uvicorn's, whose first signal also keeps new answers from being begun."""

    def __init__(self, config: uvicorn.Config, worker: Worker):
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, *args) -> None:
        self.worker.close()
        super().handle_exit(*args)

    async def startup(self, *args, **kwargs) -> None:
        await super().startup(*args, **kwargs)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"listening at http://{host}:{port} (the page), http://{host}:{port}/v1 (the API)", flush=True)


def main(argv: list[str]) -> None:
    args, values = arguments(argv)
    duo = load(args, values)
    capacity = min(args.capacity, duo.context)
    worker = Worker(duo, args.batch, args.queue, capacity)
    worker.start()
    bundled = args.ckpt is None and not any(getattr(args, part) for part in PARTS)
    name = args.ckpt or "duogen-miniature"
    service = Service(duo, worker, name, body=int(args.body * 1e6), key=args.key, world=world() if bundled else "")
    config = uvicorn.Config(
        make_app(service),
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=args.grace,
    )
    Server(config, worker).run()
    worker.join(timeout=1.0)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        main(sys.argv[1:])
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
