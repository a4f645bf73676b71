"""`graphwright`: the command line. Thin verbs over the library; every expected failure prints one message and exits with 1."""

from __future__ import annotations

import sys

from ...backends.interrupt import deferred_interrupt
from ..interrupt import kept_interrupt

INTERRUPTED = "interrupted: nothing half-written is left behind"

try:
    # They import torch, which takes seconds, and which ends the process with a dump where an interrupt comes in between.
    with deferred_interrupt():
        from ...ir.errors import GraphwrightError
        from . import compress, look, measure, search
        from .options import app, err
except KeyboardInterrupt:
    print(INTERRUPTED, file=sys.stderr)
    sys.exit(130)

__all__ = ["app", "compress", "look", "main", "measure", "search"]


def main() -> None:
    """Entry point: expected errors are one message on stderr and exit status 1; Ctrl-C exits with 130."""
    try:
        with kept_interrupt():
            app()
    except GraphwrightError as error:
        err.print(f"[bold red]error:[/bold red] {type(error).__name__}: ", end="")
        err.print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print(INTERRUPTED)
        sys.exit(130)
