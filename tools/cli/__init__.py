"""`graphwright`: the command line. Thin verbs over the library; every expected failure prints one message and exits with 1."""

from __future__ import annotations

import sys

from ...ir.errors import GraphwrightError
from ..interrupt import kept_interrupt
from . import compress, look, measure, search
from .options import app, err

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
        err.print("interrupted: nothing half-written is left behind")
        sys.exit(130)
