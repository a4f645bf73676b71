"""The parallel region: memory plan, kernels cut into phases, barriers where they are needed."""

import ctypes
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import tvm
import tvm_ffi
from graphwright.backends.host import host_arch, host_level
from graphwright.backends.target import Target
from graphwright.backends.tvm.kernels.emit import arguments, build
from graphwright.backends.tvm.kernels.isa import T
from graphwright.backends.tvm.memory import ALIGNMENT, SLACK, Lifetime, aligned, plan_arena
from graphwright.backends.tvm.pipeline import flatten, generate
from graphwright.backends.tvm.region import Place, Space, Step, _with_barriers
from graphwright.backends.tvm.target import linker, tvm_target
from graphwright.backends.tvm.tasks import split_tasks
from hypothesis import given
from hypothesis import strategies as st

# -- memory ----------------------------------------------------------------------------------------------------------------------

lifetimes = st.builds(
    lambda size, first, length: Lifetime(size, first, first + length),
    st.integers(1, 5000),
    st.integers(0, 20),
    st.integers(0, 8),
)


@given(st.lists(lifetimes, max_size=25))
def test_buffers_that_live_together_never_overlap(buffers):
    offsets, total = plan_arena(buffers)
    for i, (a, begin) in enumerate(zip(buffers, offsets, strict=True)):
        assert begin % ALIGNMENT == 0 and begin + a.size + SLACK <= total
        for b, other in zip(buffers[:i], offsets[:i], strict=True):
            if a.meets(b):
                assert begin + a.size <= other or other + b.size <= begin
    peak = max((sum(aligned(b.size) for b in buffers if b.first <= t <= b.last) for t in range(30)), default=0)
    assert total >= peak


def test_a_chain_needs_two_buffers_only():
    _, total = plan_arena([Lifetime(1000, step, step + 1) for step in range(50)])
    assert total == 2 * aligned(1000) + SLACK


# -- phases ----------------------------------------------------------------------------------------------------------------------


def staged(rows: int):
    """y[i] = 2 * x[i] + x[0], through scratch that the second loop reads at another place than its own."""

    def body():
        x, y = arguments(("X", (rows,), "int32"), ("Y", (rows,), "int32"))
        doubled = T.alloc_buffer((rows,), "int32")
        with T.parallel(0, rows) as i:
            T.buffer_store(doubled, x.vload([i]) * 2, [i])
        with T.parallel(0, rows) as i:
            T.buffer_store(y, doubled.vload([rows - 1 - i]) + x.vload([0]), [rows - 1 - i])

    return build("staged", body)


def phase_functions(kernel, folder):
    target = Target(host_arch(), host_level())
    module = tvm.IRModule({phase.name: phase.function for phase in kernel.phases})
    code, library = folder / "k.o", folder / "k.so"
    with tvm_target(target):
        code.write_bytes(generate(module, tvm_target(target)))
    subprocess.run([linker(target).command, "-shared", "-o", library, code], check=True)
    loaded = tvm_ffi.load_module(str(library))
    return loaded, [loaded[phase.name] for phase in kernel.phases]


def split(function):
    ((variable, flat),) = flatten(tvm.IRModule({"kernel": function})).functions_items()
    return split_tasks(variable.name_hint, flat)


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 50])
def test_every_task_does_its_share_and_no_more(tasks, tmp_path):
    rows = 13
    kernel = split(staged(rows))
    assert [phase.parallel for phase in kernel.phases] == [True, True] and kernel.scratch == (4 * rows,)
    _library, functions = phase_functions(kernel, tmp_path)
    x, y, scratch = (np.full(rows, -1, np.int32) for _ in range(3))
    x[:] = np.arange(3, 3 + rows)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, y, scratch)]
    done = np.zeros(rows, int)
    for task in range(tasks):
        scratch[:] = -1
        functions[0](*pointers, task, tasks)
        done += scratch != -1
    assert (done == 1).all()
    scratch[:] = 2 * x
    for task in reversed(range(tasks)):
        functions[1](*pointers, task, tasks)
    np.testing.assert_array_equal(y, 2 * x + x[0])


def test_a_function_without_parallel_loops_is_one_serial_phase():
    def body():
        x, y = arguments(("X", (4,), "int32"), ("Y", (4,), "int32"))
        with T.serial(0, 4) as i:
            T.buffer_store(y, x.vload([i]), [i])

    kernel = split(build("plain", body))
    assert [(phase.name, phase.parallel) for phase in kernel.phases] == [("kernel", False)] and kernel.scratch == ()


def test_large_buffers_of_an_iteration_belong_to_the_task():
    def body():
        x, y = arguments(("X", (8,), "int32"), ("Y", (8,), "int32"))
        with T.parallel(0, 8) as i:
            row = T.alloc_buffer((1000,), "int32")
            with T.serial(0, 1000) as j:
                T.buffer_store(row, x.vload([i]), [j])
            T.buffer_store(y, row.vload([999]), [i])

    kernel = split(build("rows", body))
    assert kernel.scratch == () and kernel.phases[0].scratch == (4000,)


def test_a_name_between_loops_is_refused():
    def body():
        x, y = arguments(("X", (8,), "int32"), ("Y", (8,), "int32"))
        with T.parallel(0, 8) as i:
            T.buffer_store(y, x.vload([i]), [i])
        first = T.Bind(y.vload([0]))
        with T.parallel(0, 8) as i:
            T.buffer_store(y, first, [i])

    with pytest.raises(RuntimeError, match="named between parallel loops"):
        split(build("bound", body))


# -- barriers --------------------------------------------------------------------------------------------------------------------


def step(reads, writes, parallel=True):
    places = tuple(Place(Space.ARENA, offset, 64) for offset in (*reads, *writes))
    return Step(SimpleNamespace(name="f", parallel=parallel), 0, places, len(reads))  # type: ignore[arg-type]


def barriers(*steps):
    return [s.barrier for s in _with_barriers(steps)]


def test_barriers_stand_where_tasks_meet():
    assert barriers(step([0], [64]), step([64], [128])) == [False, True], "reads what another task wrote"
    assert barriers(step([0], [64]), step([128], [0])) == [False, True], "writes what another task reads"
    assert barriers(step([0], [64]), step([0], [128])) == [False, False], "independent"
    assert barriers(step([0], [64], False), step([64], [128], False)) == [False, False], "one task runs both"
    assert barriers(step([0], [64]), step([0], [128]), step([64, 128], [192])) == [False, False, True]
    assert barriers(step([0], [64]), step([64], [128]), step([64], [192])) == [False, True, False], "met already"
