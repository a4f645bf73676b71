"""Runs a compiled library in this process: numpy arrays in and out, through TVM's runtime.

The library holds one parallel region (`backends/runtime/region.c` says what it exports). Only `libtvm_runtime.so` is loaded, see
`abi`: `import tvm` takes 2 s and 260 MB of compiler that a deployed model does not need.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...ir.errors import ArtifactError, OptionError
from ..host import host_threads
from . import abi
from .abi import Tensor

if TYPE_CHECKING:
    import torch

#: What generated code assumes of every buffer (TVM's kAllocAlignment); an unaligned one crashes the process.
ALIGNMENT = 64
#: ThreadGroup::kSpecifyThreadShareAllCore: workers float over the cores given instead of being pinned to one each.
_SHARE_CORES = -3


class Executor:
    """A loaded library. Inputs must have the shapes and dtypes it was compiled for. Calls from several threads take turns.

    Attributes:
        outputs: (shape, dtype) of each output.
        step_names: (function, number of its kernel call) of each step, in the order they run.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path).resolve()
        try:
            library = abi.Module(path)
            self._main, self._profile = library["main"], library["profile"]
            description = json.loads(library["describe"]())
        except (RuntimeError, AttributeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ArtifactError(f"TVM's runtime cannot load the compiled library '{path}': {reason}") from error
        self._library = library  # the functions do not keep their code mapped
        self._lock = threading.Lock()
        self._memory = aligned_empty((description["arena"],), np.dtype(np.uint8))
        self._arena, self._base = to_tvm(self._memory), address_of(self._memory)
        self._frames: dict[tuple, abi.Frame] = {}
        self.outputs = [(tuple(o["shape"]), np.dtype(o["dtype"])) for o in description["outputs"]]
        self.step_names = [(name, kernel) for name, kernel in description["steps"]]

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Always returns a tuple, one array an output. Nothing is copied but inputs that are strided or unaligned."""
        arrays = [*map(placed, inputs), *self.empty_outputs()]
        key = tuple((x.shape, x.dtype) for x in arrays)
        with self._lock:
            frame = self._frames.get(key)
            if frame is None:
                frame = self._frames[key] = abi.Frame(
                    self._main, [Tensor(None, 0, x.shape, x.dtype) for x in (self._memory, *arrays)]
                )
            frame([self._base, *map(address_of, arrays)])
        return tuple(arrays[len(inputs) :])

    def empty_outputs(self) -> list[np.ndarray]:
        return [aligned_empty(shape, dtype) for shape, dtype in self.outputs]

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """One run on tensors that are already in place; this is what gets timed."""
        with self._lock:
            self._main(self._arena, *inputs, *outputs)

    def run_on_device(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """`run` on dense tensors of one GPU, queued on torch's current stream there."""
        import torch  # whoever has such a tensor has imported it

        device = inputs[0].device
        with abi.stream(device.index, torch.cuda.current_stream(device).cuda_stream):
            self.run([_on_device(x) for x in inputs], [_on_device(y) for y in outputs])

    def profile(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[float]:
        """One run; microseconds of each step of `step_names`, the wait for the slowest task included."""
        times = aligned_empty((len(self.step_names) + 1,), np.dtype(np.int64))
        with self._lock:
            self._profile(to_tvm(times), self._arena, *inputs, *outputs)
        return (np.diff(times) / 1e3).tolist()


def load_library(path: str | Path, threads: int | None = None) -> Executor:
    """Loads a compiled library; the file may be deleted once this returns.

    Args:
        threads: worker threads, for all models of this process; by default TVM_NUM_THREADS, else every core it may use.

    Raises:
        ArtifactError: the file is missing, no shared library, or built for another machine.
        OptionError: a thread count that this machine or this process cannot give.
    """
    set_threads(threads)
    return Executor(path)


def load_bytes(library: bytes, threads: int | None = None) -> Executor:
    """As `load_library`, for a library that lies in memory.

    It goes through a file in a private folder, gone once it is mapped. The name is a new one each time: under a name that is
    loaded already the dynamic linker would hand back the older library.
    """
    with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
        path = Path(folder) / "model.so"
        path.write_bytes(library)
        return load_library(path, threads)


def to_tvm(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory where that can be, else a copy; see `placed`."""
    array = placed(array)
    return Tensor(array, address_of(array), array.shape, array.dtype)


def placed(array: np.ndarray) -> np.ndarray:
    """The array where it is dense, of native byte order and aligned, else a copy that is."""
    if array.flags.c_contiguous and array.dtype.isnative and not address_of(array) % ALIGNMENT:
        return array
    return aligned_copy(array)


def address_of(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]  # `array.ctypes.data` takes three times as long


def _on_device(tensor: torch.Tensor) -> Tensor:
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    return Tensor(tensor, tensor.data_ptr(), tuple(tensor.shape), dtype, (abi.CUDA, tensor.device.index))


def aligned_copy(array: np.ndarray) -> np.ndarray:
    copy = aligned_empty(array.shape, array.dtype.newbyteorder("="))
    copy[...] = array
    return copy


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Aligned, with as many readable bytes after its end: what kernels expect of memory that is not the caller's."""
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + 2 * ALIGNMENT, np.uint8)
    skip = -address_of(raw) % ALIGNMENT
    return raw[skip : skip + size].view(dtype).reshape(shape)


def set_threads(threads: int | None) -> None:
    """Sets the size of TVM's thread pool, which all models of a process share; see `load_library`."""
    allowed = host_threads()
    if threads is None:
        if "TVM_NUM_THREADS" not in os.environ:
            _default_threads()
        return
    if not 1 <= threads <= allowed:
        raise OptionError(f"threads={threads}: this process may use 1 to {allowed} cores")
    _configure(threads)
    started = abi.function("runtime.NumThreads")()
    if started != threads:
        raise OptionError(
            f"threads={threads}: TVM's pool was started with {started} threads in this process and cannot grow; "
            "pass threads=... the first time a model is loaded, or set TVM_NUM_THREADS"
        )


@functools.cache
def _default_threads() -> None:
    """Once a process: TVM's own default on x86 is half of the cores, for hyper-threads it does not look for."""
    _configure(host_threads())


def _configure(threads: int) -> None:
    cores = abi.function("ffi.Array")(*(str(core) for core in sorted(os.sched_getaffinity(0))))
    abi.function("runtime.config_threadpool")(_SHARE_CORES, threads, cores)
