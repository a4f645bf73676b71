"""Progress of long work on the terminal. One callable serves passes, backends and benches: progress(done, total, what)."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .interrupt import raise_if_interrupted


class TerminalProgress:
    """A rich progress display with one bar a kind of work; usable as the `progress` callable everywhere.

    Every step, and the end of the block, is also where a Ctrl-C that was lost inside a library is raised again.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._display = Progress(
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
            transient=False,
        )
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._display.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._display.stop()
        if kind is None:
            raise_if_interrupted()

    def __call__(self, done: int, total: int, what: str) -> None:
        raise_if_interrupted()
        if what not in self._tasks:
            self._tasks[what] = self._display.add_task(what, total=total)
        self._display.update(self._tasks[what], completed=done, total=total)  # type: ignore[arg-type]


def silent(done: int, total: int, what: str) -> None:
    """No display: the default of the library, which never prints."""
