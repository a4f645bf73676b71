"""Float linear layer whose weight is stored by rows: `gw::sparse_linear`."""

from __future__ import annotations

from tvm import tirx

from .emit import arguments, bind, build, loop, parallel_kind
from .isa import T

#: Products a microsecond of one core, for the choice between a serial and a parallel loop: each gathers its value.
PRODUCTS_PER_US = 800


def sparse_linear(rows: int, inputs: int, outputs: int, entries: int, columns: str, values: str) -> tirx.PrimFunc:
    """(X f32 [rows, inputs], start s32 [outputs + 1], columns [entries], values [entries], Y f32 [rows, outputs]).

    columns, values: dtypes. A result differs from the exact one by at most (K + 1) * eps * sum |x| |w|, K its row's entries.
    """

    def body() -> None:
        named = [("X", (rows, inputs), "float32"), ("start", (outputs + 1,), "int32")]
        named += [("columns", (entries,), columns), ("values", (entries,), values)]
        x, start, column, value, y = arguments(*named, ("Y", (rows, outputs), "float32"))
        with loop(outputs, parallel_kind(rows * entries / PRODUCTS_PER_US)) as output:
            first, stop = bind(start[output]), bind(start[output + 1])
            total = T.alloc_buffer((1,), "float32")
            with loop(rows) as row:
                T.buffer_store(total, T.float32(0.0), [0])
                with T.serial(0, stop - first) as place:
                    source = bind(row * inputs + T.Cast("int32", column[first + place]))
                    T.buffer_store(total, total[0] + x[source] * T.Cast("float32", value[first + place]), [0])
                T.buffer_store(y, total[0], [row * outputs + output])

    return build("sparse_f32", body)
