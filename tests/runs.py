"""Training processes for tests: forked from a server that has everything imported, so that a rank starts in a moment."""

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
context = multiprocessing.get_context("forkserver")
# A first optimizer step imports torch._dynamo, which takes as long as torch itself.
context.set_forkserver_preload(["train_stage1", "train_stage2", "sketchbook.pretrain", "torch._dynamo"])
KINDS = ("stage1", "stage2", "vae", "mllm", "eye", "dit")


def config(kind: str, parts: Path, out: Path, **options):
    """The smallest run of that kind."""
    import train_stage1
    import train_stage2
    from sketchbook import pretrain

    classes = {"stage1": train_stage1.Stage1Config, "stage2": train_stage2.Stage2Config}
    classes |= {k: pretrain.COMMANDS[k][0] for k in ("vae", "mllm", "eye", "dit")}
    common = {"out": str(out), "device": "cpu", "dtype": "fp32", "sheet_every": 0, "save_every": 0, "log_every": 1}
    common |= {"steps": 4, "decay": 0.0, "warmup": 2}
    own = {
        "stage1": {"mllm": str(parts), "tokens": 300},
        "stage2": {"mllm": str(parts), "dit": str(parts), "vae": str(parts), "documents": 2},
        "vae": {"batch": 2, "size": 32},
        "mllm": {"batch": 2, "size": 32, "vocabulary": 400},
        "eye": {"mllm": str(parts), "batch": 2, "size": 32},
        "dit": {"mllm": str(parts), "vae": str(parts), "batch": 2, "size": 32},
    }[kind]
    return classes[kind](**{**common, **own, **options})


def flags(c) -> list[str]:
    """The command line of that run."""
    return [f"--{'' if v is not False else 'no-'}{k}" + ("" if isinstance(v, bool) else f"={v}") for k, v in vars(c).items()]


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def healing() -> dict[str, str]:
    """The environment of a torchrun that restarts lost ranks."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def shrink() -> None:
    """What only the miniature's size needs: a large tokenizer, a DiT of full depth, the gate after the VAE."""
    from dataclasses import replace

    from families import registry
    from sketchbook import pretrain

    text, picture = pretrain.corpus, pretrain.picture
    pretrain.corpus = lambda n: text(15)
    pretrain.picture = lambda size, seed: picture(size, seed % 10**9)
    pretrain.vae_gate = lambda *_: None
    pretrain.measure_latents = lambda vae, pictures, measure=pretrain.measure_latents: measure(vae, pictures[:4])
    registry.PRESETS["dit"]["tiny"] = replace(registry.PRESETS["dit"]["tiny"], num_layers=1)


def rank_main(kind, c, rank, size, port, log, hook) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    faulthandler.enable(2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    import train_stage1
    import train_stage2
    import training
    from sketchbook import pretrain

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the data workers, as in a run of its own
    shrink()
    train = {"stage1": train_stage1.train, "stage2": train_stage2.train}
    train |= {k: pretrain.COMMANDS[k][1] for k in ("vae", "mllm", "eye", "dit")}
    try:
        if hook:
            hook[0](rank, *hook[1:])
        training.run_script(lambda: train[kind](c))
    except SystemExit as e:  # at once: the end of a forked process would wait for its data worker
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(e.code)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def start(kind, c, log: Path, ranks: int = 1, hook=None) -> list:
    """The processes of a run; hook: (function, arguments...), called in each as function(rank, arguments...)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = [(kind, c, rank, ranks, port, str(log), hook) for rank in range(ranks)]
    processes = [context.Process(target=rank_main, args=a) for a in arguments]
    for process in processes:
        process.start()
    return processes


def finish(processes: list, seconds: float = 120) -> list[int]:
    """Their exit statuses."""
    for process in processes:
        process.join(seconds)
        if process.exitcode is None:  # it hangs: its log gets the stacks of its threads
            os.kill(process.pid, signal.SIGABRT)
            process.join(5)
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def run(kind, c, log: Path, ranks: int = 1, hook=None) -> str:
    """A run that ends well; what it printed."""
    statuses = finish(start(kind, c, log, ranks, hook))
    assert statuses == [0] * ranks, f"{statuses}\n{log.read_text()[-3000:]}"
    return log.read_text()


# ------------------------------------------------------------------------------------------------ hooks, run in each rank


def after_step(action) -> None:
    """Call action(run) after every step, saved if it was due."""
    from training import Run

    save_if_due = Run.save_if_due

    def wrapped(self, *args):
        save_if_due(self, *args)
        action(self)

    Run.save_if_due = wrapped


def signal_at(rank: int, who: int, step: int, number: int) -> None:
    """One rank gets a signal in the middle of a step."""
    from training import Run

    clip = Run.clip

    def wrapped(self):
        if rank == who and self.step == step:
            os.kill(os.getpid(), number)
        return clip(self)

    Run.clip = wrapped


def signal_group_at(rank: int, step: int, number: int = signal.SIGTERM) -> None:
    """The whole process group, data workers included, is asked to end: as a batch system does, or a terminal at Ctrl-C."""
    os.setpgrp()
    from training import Run

    clip = Run.clip

    def wrapped(self):
        if self.step == step:
            os.killpg(0, number)
        return clip(self)

    Run.clip = wrapped


def note_names(rank: int, folder: str) -> None:
    """Which documents each step of each rank had."""
    from training import Run

    finite = Run.finite

    def wrapped(self, loss, norm, names):
        with open(Path(folder) / f"names_{self.ranks.size}_{rank}.jsonl", "a") as f:
            f.write(json.dumps(list(names)) + "\n")
        return finite(self, loss, norm, names)

    Run.finite = wrapped


def keep_gradients(rank: int, file: str) -> None:
    """The gradients of the first step before they are clipped."""
    from safetensors.torch import save_file

    from training import Run

    clip = Run.clip

    def wrapped(self):
        if rank == 0 and self.step == 1:
            zeros = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self.params]
            save_file({n: g.clone() for n, g in zip(self.names, zeros, strict=True)}, file)
        return clip(self)

    Run.clip = wrapped


def spoil(rank: int, who: int, steps: list[int]) -> None:
    """One rank's gradient is not a number at these steps."""
    from flow import FlowLoss
    from training import LanguageLoss, Run

    current = {"step": 0}
    lr_factor = Run.lr_factor

    def noted(self, step):
        current["step"] = step
        return lr_factor(self, step)

    Run.lr_factor = noted
    for cls in (LanguageLoss, FlowLoss):
        forward = cls.forward

        def wrapped(self, *args, forward=forward):
            loss = forward(self, *args)
            factor = float("nan") if rank == who and current["step"] in steps else 1.0
            return tuple(x * factor for x in loss) if isinstance(loss, tuple) else loss * factor

        cls.forward = wrapped
