"""Statements that a parallel loop's slice needs once, although they stand in the loop's body.

    for i in parallel(n):                     before(); for i in [begin, end): work(i); after()
        once_a_slice("before"): before()  ->
        work(i)
        once_a_slice("after"): after()

In the body they are right wherever the loop runs, under TVM's own thread pool too; whoever cuts the loop into slices moves them
out with `hoist`. Configuring a tile unit costs as much as the unit's work on a small block, hence the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from tvm import tirx
from tvm.tirx.script.builder import ir

_T: Any = ir
_KEY = "gw.once_a_slice"


@contextmanager
def once_a_slice(place: Literal["before", "after"]) -> Iterator[None]:
    """Marks the statements emitted inside; they may read nothing that the loop's variable decides."""
    with _T.attr(_T.int32(0), _KEY, place):
        yield


def hoist(loop: Any) -> Any:
    """The loop with its marked statements, if the body's first level holds any, moved before and after it."""
    statements = _flat(loop.body)
    before, after = ([s.body for s in statements if _marked(s, place)] for place in ("before", "after"))
    if not before and not after:
        return loop
    body = tirx.stmt_seq(*(s for s in statements if not _marked(s, "before") and not _marked(s, "after")))
    return tirx.stmt_seq(*before, tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body), *after)


def _flat(body: Any) -> list[Any]:
    if isinstance(body, tirx.SeqStmt):
        return [inner for statement in body.seq for inner in _flat(statement)]
    return [body]


def _marked(statement: Any, place: str) -> bool:
    return isinstance(statement, tirx.AttrStmt) and statement.attr_key == _KEY and str(statement.value) == f'"{place}"'
