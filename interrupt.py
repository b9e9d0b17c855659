"""Ctrl-C while a script still imports and loads: one line and status 130. The first thing that a training script imports.

    if __name__ == "__main__":
        import interrupt

        interrupt.end_quietly()

An exception could not do it: PyTorch's import alone takes seconds, and what runs in them may swallow it or print a traceback.
Nothing is half written then; once the steps have begun, `training.Run.loop` takes over.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import types

STATUS = 128 + signal.SIGINT  # what a shell reports of a program that Ctrl-C ended


def end_quietly() -> None:
    """From here on Ctrl-C ends this process at once."""
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: types.FrameType | None) -> None:
    end_now("interrupted" if os.environ.get("RANK", "0") == "0" else "")


def say(message: str) -> None:
    """On stderr, from within a signal's handler; whoever reads it may have been interrupted as well."""
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())


def end_now(message: str) -> None:
    """End this process and its data workers without any cleaning up, which might wait for somebody."""
    with contextlib.suppress(OSError, RuntimeError):  # the signal may have come in the midst of a print
        sys.stdout.flush()
    if message:
        say(message)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(STATUS)
