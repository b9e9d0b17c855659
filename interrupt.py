"""Ctrl-C and SIGTERM end a program quietly, and not before what is finished is kept.

    import interrupt

    if __name__ == "__main__":
        interrupt.quiet()  # before the heavy imports: Ctrl-C among them is one line, no traceback out of other people's modules

    with interrupt.heard():  # around the work: there both are exceptions
        try:
            work()
        except KeyboardInterrupt as e:
            sys.exit(interrupt.status(e))

It imports next to nothing itself: what it does must be in force before PyTorch, whose import takes seconds, is begun. Only the
hundredths of a second in which Python itself starts remain uncovered.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Terminated(KeyboardInterrupt):
    """SIGTERM. Whoever minds Ctrl-C minds it too."""


def quiet() -> None:
    """From here on Ctrl-C ends the program at once. Where it was ignored, as in a shell's background jobs, it still is."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_) -> None:
    # No exception: an import in progress could swallow it. Nothing has begun yet that would have to be put in order.
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Inside, Ctrl-C is a KeyboardInterrupt and SIGTERM a Terminated; afterwards both are what they were."""
    before = {}
    # Python lets only the main thread decide about signals.
    if threading.current_thread() is threading.main_thread():
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, _terminate)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _terminate(*_) -> None:
    # A second one, as whole process groups get it from schedulers, must not cut short the saving that the first one began.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def status(e: KeyboardInterrupt) -> int:
    """What a shell shows of a program that such a signal ended: 128 + its number."""
    return 128 + (signal.SIGTERM if isinstance(e, Terminated) else signal.SIGINT)
