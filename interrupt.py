"""Ctrl-C and SIGTERM end a program quietly, and not before what is finished is kept.

    import interrupt

    if __name__ == "__main__":
        interrupt.quiet()  # before the heavy imports: Ctrl-C among them is one line, no traceback out of other people's modules

    with interrupt.heard():  # around the work of sample.py: there both are exceptions
        try:
            work()
        except KeyboardInterrupt as e:
            sys.exit(interrupt.status(e))

It imports next to nothing itself: what it does must be in force before PyTorch, whose import takes seconds, is begun. Only the
hundredths of a second in which Python itself starts remain uncovered. In a training `training.Run.loop` takes over with the
first step.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator

STATUS = 128 + signal.SIGINT  # what a shell reports of a program that Ctrl-C ended


class Terminated(KeyboardInterrupt):
    """SIGTERM. Whoever minds Ctrl-C minds it too."""


def quiet() -> None:
    """From here on Ctrl-C ends the program at once. Where it was ignored, as in a shell's background jobs, it still is."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_) -> None:
    # No exception: an import in progress could swallow it. Of several ranks one speaks for all.
    end_now("interrupted" if os.environ.get("RANK", "0") == "0" else "")


def say(message: str) -> None:
    """On stderr, from within a signal's handler; whoever reads it may have been interrupted as well."""
    # Not print: the signal may have come in the midst of one, and its buffer must not be entered twice.
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())


def end_now(message: str) -> None:
    """End this process and its data workers without any cleaning up, which might wait for somebody."""
    with contextlib.suppress(OSError, RuntimeError):  # the signal may have come in the midst of a print
        sys.stdout.flush()
    if message:
        say(message)
    # Past everything that runs at an exit: it might join a worker or a rank that does not end.
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(STATUS)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Inside, Ctrl-C is a KeyboardInterrupt and SIGTERM a Terminated; afterwards both are what they were."""
    before = {}
    # Python lets only the main thread decide about signals.
    if threading.current_thread() is threading.main_thread():
        wanted = {
            signal.SIGINT: signal.default_int_handler,
            signal.SIGTERM: _terminate,
        }
        for number, handler in wanted.items():
            # Ignored by whoever started us, as shells do for their background jobs: it stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        # A handler that was set from C is None to Python, and cannot be set again.
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _terminate(*_) -> None:
    # A second one, as whole process groups get it from schedulers, must not cut short the saving that the first one began.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def status(e: KeyboardInterrupt) -> int:
    """What a shell shows of a program that such a signal ended: 128 + its number."""
    return 128 + signal.SIGTERM if isinstance(e, Terminated) else STATUS
