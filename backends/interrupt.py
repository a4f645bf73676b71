"""Ctrl-C around calls into libraries that do not pass it on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Holds Ctrl-C back until the block ends, then raises KeyboardInterrupt.

    TVM turns an exception raised inside one of its Python callbacks into a bare RuntimeError; an interrupt there would read as
    a failed compilation. Outside the main thread, where Python delivers no signals, the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = False

    def note(number: int, frame: object) -> None:
        nonlocal caught
        caught = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if caught:
        raise KeyboardInterrupt
