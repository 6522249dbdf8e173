"""SIGTERM and SIGINT, by which schedulers, torchrun and users ask a training to end.

The first asks: the loop ends at its next step, when all ranks know of it, and keeps that step. A second one ends the
process at once. Files are written whole or not at all (`write_atomically`), so ending anywhere loses no file.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 25.0  # seconds for a step and its checkpoint among several ranks: torchrun kills after 30
SOON = 1.0  # seconds for a process that has nothing to save to end by itself
_SAME = 2.0  # seconds in which one request may come twice: from the scheduler, and from torchrun

_explained = threading.Event()


def explain(sentence: str) -> None:
    """Prints why this process ends; nothing else that ends it says anything then."""
    _explained.set()
    print(sentence, file=sys.stderr, flush=True)


def end_silently() -> None:
    """Another rank says why all of them end."""
    _explained.set()


def name_of(number: int) -> str:
    """A signal's name, such as SIGTERM."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Interrupted(KeyboardInterrupt):
    """A signal that came when there was nothing to save.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class StopRequest:
    """Whether a training is asked to end.

    Attributes:
        number: the signal that asks it to, 0 for none. Setting it asks without a signal.
        can_wait: set by the loop, once it looks at `number` after every step; before, a signal raises `Interrupted`.
    """

    def __init__(self) -> None:
        self.number = 0
        self.can_wait = False


@contextlib.contextmanager
def heeding_signals(sentence: str, *, ranks: int = 1) -> Iterator[StopRequest]:
    """Has SIGTERM and SIGINT ask for a stop, inside the `with`; in another thread than the main one, nothing does.

    A thread heeds them, woken by the signal itself: the main thread may be waiting inside NCCL, where no Python handler
    would ever run.

    Args:
        sentence: printed where the process has to be ended from outside its main thread.
        ranks: processes that train together. When one of them dies, torchrun ends the others by SIGTERM; they can then
            wait for the dead one, so they are ended after a while.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def interrupt(number: int, _: FrameType | None) -> None:
        if not request.can_wait:
            raise Interrupted(number)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    over = threading.Event()
    thread = threading.Thread(
        target=_heed, args=(reading, request, sentence, ranks, over), daemon=True, name="prunetrain signals"
    )
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers: dict[signal.Signals, Any] = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(before)
        over.set()
        os.write(writing, b"\0")  # ends the thread
        thread.join()
        os.close(reading)
        os.close(writing)


def _heed(reading: int, request: StopRequest, sentence: str, ranks: int, over: threading.Event) -> None:
    """Notes the first signal; ends the process at the second, or where several ranks do not end by themselves."""
    first, number = 0.0, 0
    while received := os.read(reading, 1)[0]:
        if received not in SIGNALS:
            continue
        if number and (ranks == 1 or time.monotonic() - first > _SAME):
            _end(sentence, received)
        if number:
            continue
        first, number = time.monotonic(), received
        request.number = number
        if ranks > 1:
            seconds = GRACE if request.can_wait else SOON
            threading.Thread(target=_end_after, args=(over, seconds, sentence, number), daemon=True).start()
        elif request.can_wait and number == signal.SIGINT:
            print("stopping after this step; press Ctrl-C again to end at once", file=sys.stderr, flush=True)


def _end_after(over: threading.Event, seconds: float, sentence: str, number: int) -> None:
    if not over.wait(seconds):  # the main thread may know better what has happened, and end by itself
        _end(sentence, number)


def _end(sentence: str, number: int) -> None:
    if not _explained.is_set():
        print(sentence, file=sys.stderr, flush=True)
    os._exit(128 + number)  # what a shell says of a program that a signal stopped
