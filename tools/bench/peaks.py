"""What this machine can do at best: operations a second of each arithmetic unit, bytes a second from each level of memory.

The rates are measured, never typed: small kernels built as the product's own are, best of many repeats, because a shared
machine is now and then undisturbed. They are kept in the user's cache folder by processor, level and thread count; measuring
again keeps the better value of each. A rate counts two operations for a multiply-accumulate.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...backends.cache import cache_folder
from ...backends.host import host_processor, host_threads
from ...backends.target import Target
from ...ir.errors import TargetError
from ...ir.files import write_atomically

#: Independent sums of a rate kernel: enough to hide the latency of an instruction, and they fit the register file.
SUMS = 24
STEPS = 20_000
#: Accumulator tiles that hide the latency of a tile product, and the multiply-accumulates of one.
TILE_SUMS, TILE_MACS = 4, 16 * 16 * 64
#: Seconds each kernel is repeated for.
SECONDS = 0.6

#: Kernel of a unit: acc, a, b -> acc. No product may be the same in every step, or the compiler would take it out of the loop.
Step = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Peaks:
    """Attainable rates of `threads` threads.

    units: giga-operations a second by unit (`int8`, `float32`, `int8-tiles` of AMX). bandwidth: gigabytes a second of reading
    from `l2`, `l3` and `memory`. caches: bytes of `l2` (one core's) and `l3`.
    """

    processor: str
    level: str
    threads: int
    date: str
    units: dict[str, float]
    bandwidth: dict[str, float]
    caches: dict[str, int]

    @property
    def text(self) -> str:
        """One line for the foot of a table."""
        units = ", ".join(f"{name} {rate:.0f} GOP/s" for name, rate in self.units.items())
        levels = ", ".join(f"{level} {rate:.0f} GB/s" for level, rate in self.bandwidth.items())
        return f"measured on {self.processor}, {self.level}, {self.threads} threads: {units}; read from {levels}"

    def unit(self, dtype: str) -> str:
        """The best unit that multiplies elements of `dtype`; float32 where the processor has none for it."""
        names = {"uint8": ("int8-tiles", "int8"), "int8": ("int8-tiles", "int8"), "bfloat16": ("bf16-tiles", "bf16")}
        return next((name for name in names.get(dtype, ()) if name in self.units), "float32")

    def microseconds(self, macs: int, dtype: str) -> float:
        return 2 * macs / self.units[self.unit(dtype)] / 1e3

    def transfer(self, size: int, held: int) -> float:
        """Microseconds to read `size` bytes out of `held` bytes in all, which lie in the first memory level that holds them."""
        for name in ("l2", "l3"):
            if held <= self.caches[name] * (self.threads if name == "l2" else 1):
                return size / self.bandwidth[name] / 1e3
        return size / self.bandwidth["memory"] / 1e3


def peaks(target: Target, threads: int, fresh: bool = False) -> Peaks:
    """The rates kept for this processor, or measured now (about 5 s); `fresh` measures in any case.

    Raises:
        TargetError: the target does not run here, or the system does not say how large its caches are.
    """
    path = cache_folder() / "peaks.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    key = f"{host_processor()} | {target} | {threads} threads"
    if key in kept and not fresh:
        return Peaks(**kept[key])
    found = _measure(target, threads)
    if key in kept:
        older = Peaks(**kept[key])
        for mine, theirs in ((found.units, older.units), (found.bandwidth, older.bandwidth)):
            mine.update({name: max(mine[name], theirs.get(name, 0.0)) for name in mine})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({**kept, key: asdict(found)}, indent=1) + "\n").encode())
    return found


def cache_sizes() -> dict[str, int]:
    """Bytes of the first core's second- and third-level cache, as the kernel tells them."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        text = (index / "size").read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}[text[-1]]
        sizes[f"l{(index / 'level').read_text().strip()}"] = int(text[:-1]) * unit
    if not {"l2", "l3"} <= sizes.keys():
        raise TargetError(f"the system does not say how large its caches are (it names {sorted(sizes)}); no bandwidths from it")
    return {name: sizes[name] for name in ("l2", "l3")}


def _measure(target: Target, threads: int) -> Peaks:
    from ...backends.tvm.executor import set_threads
    from ...backends.tvm.kernels.isa import isa_of
    from ...backends.tvm.target import kernel_levels, require_run

    require_run(target)
    # One pool for every thread count: a loop of fewer iterations than the pool has workers keeps as many busy.
    set_threads(host_threads())
    units = {}
    for name, (features, vector, operands, macs, step) in _units(target).items():
        run = _compile(_rate_kernel(threads, vector, operands, step), target, features)
        arrays = [_filled((64,), dtype) for dtype in (vector, operands)] + [np.zeros(threads * SUMS * 16, vector)]
        units[name] = round(2 * macs * threads * SUMS * STEPS / _best(run, arrays) / 1e9, 1)
    if isa_of(kernel_levels(target)[0]).tiles is not None:
        arrays = [np.zeros(1024, np.int8), np.zeros(1024, np.int8), np.zeros(1024, np.int32), np.zeros(threads * 1024, np.int32)]
        best = _best(_compile(_tile_kernel(threads, target), target, ()), arrays)
        units["int8-tiles"] = round(2 * TILE_MACS * threads * TILE_SUMS * STEPS / best / 1e9, 1)
    caches = cache_sizes()
    footprints = {"l2": caches["l2"] // 2, "l3": 16 << 20, "memory": max(256 << 20, 2 * caches["l3"] // threads)}
    bandwidth = {}
    for name, size in footprints.items():
        passes = max(1, (8 << 20) // size)
        run = _compile(_read_kernel(threads, size // 4, passes), target, ())
        arrays = [np.ones(threads * size // 4, np.int32), np.zeros(threads * 16, np.int32)]
        bandwidth[name] = round(threads * size * passes / _best(run, arrays) / 1e9, 1)
    return Peaks(host_processor(), target.level, threads, datetime.date.today().isoformat(), units, bandwidth, caches)


def _units(target: Target) -> dict[str, tuple[tuple[str, ...], str, str, int, Step]]:
    """name -> (further features, type of a sum, type of an operand, multiply-accumulates a step, step)."""
    from ...backends.tvm.kernels.isa import T
    from ...backends.tvm.target import kernel_levels

    def intrinsic(result: str, name: str) -> Step:
        return lambda acc, a, b: T.call_llvm_pure_intrin(result, name, acc, a, b)

    def chained(acc: Any, a: Any, b: Any) -> Any:
        return acc * a + b

    units: dict[str, tuple[tuple[str, ...], str, str, int, Step]] = {
        # Without a dot instruction bytes are widened and multiplied in 32 bits.
        "int8": ((), "int32", "int32", 16, chained),
        "float32": ((), "float32", "float32", 16, lambda acc, a, b: T.call_llvm_pure_intrin("float32x16", "llvm.fma", acc, a, b)),
    }
    if kernel_levels(target)[0] != "portable":
        units["int8"] = ((), "int32", "int8", 64, intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512"))
    return units


def _rate_kernel(threads: int, vector: str, operand: str, step: Step) -> Any:
    """SUMS chains of STEPS dependent steps a thread. Buffers: starts [64], operands [64], results."""
    from ...backends.tvm.kernels.emit import accumulator, arguments, bind, build, loop, store
    from ...backends.tvm.kernels.isa import T

    bits = {"int32": 32, "float32": 32, "int8": 8, "bfloat16": 16}
    lanes = 512 // bits[operand]

    def body() -> None:
        starts, operands, out = arguments(
            ("starts", (64,), vector), ("operands", (64,), operand), ("out", (threads * SUMS * 16,), vector)
        )
        with loop(threads, "parallel") as thread:
            acc = [accumulator(vector) for _ in range(SUMS)]
            for sums in acc:
                store(sums, 0, starts.vload([0], f"{vector}x16"))
            a = bind(operands.vload([0], f"{operand}x{lanes}"))
            b = bind(operands.vload([64 - lanes], f"{operand}x{lanes}"))
            with T.serial(0, STEPS):
                for sums in acc:
                    store(sums, 0, step(sums.vload([0], f"{vector}x16"), a, b))
            for index, sums in enumerate(acc):
                store(out, (thread * SUMS + index) * 16, sums.vload([0], f"{vector}x16"))

    return build("main", body)


def _tile_kernel(threads: int, target: Target) -> Any:
    """TILE_SUMS chains of STEPS products of whole tiles a thread. Buffers: A and B (s8), starts and sums (s32)."""
    from ...backends.tvm.kernels.emit import arguments, build, loop
    from ...backends.tvm.kernels.isa import T, isa_of
    from ...backends.tvm.target import kernel_levels

    unit = isa_of(kernel_levels(target)[0]).tiles
    assert unit is not None

    def body() -> None:
        a, b, starts, out = arguments(
            ("a", (1024,), "int8"), ("b", (1024,), "int8"), ("starts", (1024,), "int32"), ("out", (threads * 1024,), "int32")
        )
        with loop(threads, "parallel") as thread, unit.task() as tiles:
            for index in range(TILE_SUMS):
                tiles.load(index, starts, 256 * index, 16)
            for index in range(2):
                tiles.load(TILE_SUMS + index, a, 0, 64)
                tiles.load(TILE_SUMS + 2 + index, b, 0, 64)
            with T.serial(0, STEPS):
                for index in range(TILE_SUMS):
                    tiles.dot(index, TILE_SUMS + index // 2, TILE_SUMS + 2 + index % 2, signed=True)
            for index in range(TILE_SUMS):
                tiles.store(index, out, thread * 1024 + 256 * index)

    return build("main", body)


def _read_kernel(threads: int, words: int, passes: int) -> Any:
    """Each thread adds up its own `words` 32-bit words, `passes` times. Buffers: data, sums."""
    from ...backends.tvm.kernels.emit import accumulator, arguments, bind, build, loop, splat, store
    from ...backends.tvm.kernels.isa import T

    block = 8 * 16

    def body() -> None:
        data, out = arguments(("data", (threads * words,), "int32"), ("out", (threads * 16,), "int32"))
        with loop(threads, "parallel") as thread:
            acc = [accumulator() for _ in range(8)]
            for sums in acc:
                store(sums, 0, splat(T.int32(0)))
            with loop(passes), T.serial(0, words // block) as index:
                base = bind(thread * words + index * block)
                for j, sums in enumerate(acc):
                    store(sums, 0, sums.vload([0], "int32x16") ^ data.vload([base + j * 16], "int32x16"))
            total = acc[0].vload([0], "int32x16")
            for sums in acc[1:]:
                total = total ^ sums.vload([0], "int32x16")
            store(out, thread * 16, total)

    return build("main", body)


def _compile(function: Any, target: Target, features: tuple[str, ...]) -> Callable[..., None]:
    import tvm

    from ...backends.tvm.target import FEATURES, PROCESSORS, TRIPLES

    options = {
        "kind": "llvm", "mtriple": TRIPLES[target.arch], "mcpu": PROCESSORS[str(target)],
        "mattr": [*FEATURES.get(str(target), ()), *features],
    }  # fmt: skip
    module = tvm.IRModule({"main": function})
    return tvm.compile(module, target=tvm.target.Target(options))["main"]


def _filled(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Ones: sums neither overflow to infinity nor become denormal."""
    return np.ones(shape, dtype)


def _best(run: Callable[..., None], arrays: list[np.ndarray]) -> float:
    import tvm

    tensors = [tvm.runtime.tensor(array) for array in arrays]
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        run(*tensors)
        best = min(best, time.perf_counter() - start)
    return best
