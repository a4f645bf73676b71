"""Ctrl-C that cannot be lost.

Python delivers an interrupt wherever the interpreter happens to be. In a weak reference's callback or a `__del__` method the
KeyboardInterrupt is printed as "ignored" and the program goes on as if nobody had pressed a key; torch has such callbacks on
every tensor it tracks. So the handler also writes the request down, and long work asks for it at every step of its progress.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_pressed = False


@contextmanager
def kept_interrupt() -> Iterator[None]:
    """While the block runs, Ctrl-C raises KeyboardInterrupt at once and is also kept for `raise_if_interrupted`.

    Whatever leaves the block after a Ctrl-C is a KeyboardInterrupt: an extension module whose import is interrupted raises
    ImportError, and a callback through C may turn the interrupt into an error of its own.
    """
    global _pressed
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _pressed = False
    previous = signal.signal(signal.SIGINT, _keep)
    try:
        yield
        raise_if_interrupted()
    except (Exception, SystemExit) as error:
        if _pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, previous)
        _pressed = False


def raise_if_interrupted() -> None:
    """Raises KeyboardInterrupt where Ctrl-C was pressed and the exception was lost on its way."""
    if _pressed:
        raise KeyboardInterrupt


def _keep(number: int, frame: FrameType | None) -> None:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt
