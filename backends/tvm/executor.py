"""Runs a compiled library in this process: numpy arrays in and out, through TVM's runtime.

The library holds one parallel region (`backends/runtime/region.c` says what it exports). Only `libtvm_runtime.so` is loaded, see
`abi`: `import tvm` takes 2 s and 260 MB of compiler that a deployed model does not need.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        inputs, outputs: (shape, dtype) of each.
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
        self.inputs, self.outputs = (
            [(tuple(t["shape"]), np.dtype(t["dtype"])) for t in description[role]] for role in ("inputs", "outputs")
        )
        self._input_sizes, self._output_sizes = (
            [prod(shape) * dtype.itemsize for shape, dtype in specs] for specs in (self.inputs, self.outputs)
        )
        self._frames: dict[tuple[int, int], abi.Frame] = {}
        self.step_names = [(name, kernel) for name, kernel in description["steps"]]

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Always returns a tuple, one array an output. Nothing is copied but inputs that are strided or unaligned.

        Raises:
            ValueError: a wrong number of inputs, or one whose bytes are not as many as the program reads.
        """
        _check_sizes("inputs", inputs, self._input_sizes)
        return self._run_at([placed(x) for x in inputs])

    def run_tensors(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """A call with torch tensors on the CPU, of the shapes and dtypes in `inputs`. Raises as a call."""
        _check_sizes("inputs", inputs, self._input_sizes)
        return tuple(map(sys.modules["torch"].from_numpy, self._run_at([_placed_tensor(x) for x in inputs])))

    def _run_at(self, inputs: Sequence[tuple[Any, int]]) -> tuple[np.ndarray, ...]:
        """inputs: what holds each, and its address."""
        outputs = [_aligned(shape, dtype) for shape, dtype in self.outputs]
        with self._lock:
            self._frame((abi.CPU, 0))([self._base, *[address for _, address in (*inputs, *outputs)]])
        return tuple([array for array, _ in outputs])

    def run_on_device(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """A run on tensors of one GPU, queued on torch's current stream there.

        Their shapes and dtypes are those in `inputs` and `outputs`; outputs are dense. Raises as a call.
        """
        _check_sizes("inputs", inputs, self._input_sizes)
        _check_sizes("outputs", outputs, self._output_sizes)
        self.queue_on_device(inputs, outputs)

    def queue_on_device(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """`run_on_device` for tensors that are known to have the program's shapes and dtypes."""
        tensors, index = [*map(_dense, inputs), *outputs], inputs[0].get_device()
        addresses = [tensor.data_ptr() for tensor in tensors]
        # What torch.compile's code calls; torch.cuda.current_stream() takes microseconds.
        stream = sys.modules["torch"]._C._cuda_getCurrentRawStream(index)
        before = abi.set_stream(index, stream)
        try:
            with self._lock:
                self._frame((abi.CUDA, index))([self._base, *addresses])
        finally:
            if before != stream:
                abi.set_stream(index, before)

    def _frame(self, device: tuple[int, int]) -> abi.Frame:
        """For tensors on the device of this kind and index."""
        frame = self._frames.get(device)
        if frame is None:
            specs = (self._memory.shape, self._memory.dtype), *self.inputs, *self.outputs
            frame = abi.Frame(self._main, [Tensor(None, 0, shape, dtype, device) for shape, dtype in specs])
            self._frames[device] = frame
        return frame

    def empty_outputs(self) -> list[np.ndarray]:
        return [aligned_empty(shape, dtype) for shape, dtype in self.outputs]

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
    array, address = placed(array)
    return Tensor(array, address, array.shape, array.dtype)


def placed(array: np.ndarray) -> tuple[np.ndarray, int]:
    """The array where it is dense, of native byte order and aligned, else a copy that is; and the address."""
    address = address_of(array)
    if array.flags.c_contiguous and array.dtype.isnative and not address % ALIGNMENT:
        return array, address
    copy = aligned_copy(array)
    return copy, address_of(copy)


def _check_sizes(role: str, tensors: Sequence[np.ndarray] | Sequence[torch.Tensor], sizes: list[int]) -> None:
    """A frame has the sizes that the program reads and writes, so the library cannot see that a tensor has fewer."""
    found = [tensor.nbytes for tensor in tensors]
    if found != sizes:
        raise ValueError(f"this program takes {sizes} bytes of {role}, not {found}")


def _placed_tensor(tensor: torch.Tensor) -> tuple[Any, int]:
    """As `placed`, for a tensor on the CPU."""
    tensor = _dense(tensor)
    address = tensor.data_ptr()
    if address and not address % ALIGNMENT:
        return tensor, address
    return placed(tensor.detach().numpy())


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where its memory holds its values in order, else a copy that does."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().resolve_neg().contiguous()


def address_of(array: np.ndarray) -> int:
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    except (TypeError, ValueError):  # read-only, strided or empty; this way takes a microsecond, three times as long
        return array.__array_interface__["data"][0]


def aligned_copy(array: np.ndarray) -> np.ndarray:
    copy = aligned_empty(array.shape, array.dtype.newbyteorder("="))
    copy[...] = array
    return copy


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Aligned, with as many readable bytes after its end: what kernels expect of memory that is not the caller's."""
    return _aligned(shape, dtype)[0]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, int]:
    """`aligned_empty`, and its address."""
    raw = np.empty(prod(shape) * dtype.itemsize + 2 * ALIGNMENT, np.uint8)
    start = address_of(raw)
    skip = -start % ALIGNMENT
    return np.ndarray(shape, dtype, raw, skip), start + skip


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
