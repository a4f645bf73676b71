"""TVM's runtime through its C ABI (`tvm/ffi/c_api.h`, `tvm/ffi/extra/c_env_api.h`): a deployed model needs no torch.

`tvm_ffi`, the Python package around the same library, imports torch wherever that is installed: 1.5 of the 1.8 s that a process
took to its first answer. Running a model takes functions, tensors, strings and integers; no more of the ABI is here.
"""

from __future__ import annotations

import builtins
import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...ir.errors import TargetError

#: DLDeviceType.
CPU, CUDA = 1, 2

#: DLDataTypeCode by the kind of a numpy type.
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}

#: TVMFFITypeIndex: what a value is. Objects, which are counted, begin at 64.
_NONE, _INT, _BOOL, _TENSOR_POINTER, _RAW_STRING, _SMALL_STRING, _OBJECT, _STRING = 0, 1, 2, 7, 8, 11, 64, 65

#: Bytes of an object before its content: count of references, type index, deleter.
_HEADER = 24


class _Any(ctypes.Structure):
    """TVMFFIAny. length: of a string that lies in `value` itself."""

    _fields_ = (("type_index", ctypes.c_int32), ("length", ctypes.c_uint32), ("value", ctypes.c_int64))


class _Bytes(ctypes.Structure):
    """TVMFFIByteArray."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))

    def text(self) -> str:
        return ctypes.string_at(self.data, self.size).decode() if self.size else ""


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("rank", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
    )


class Tensor:
    """A dense tensor in memory that `owner` keeps alive."""

    def __init__(
        self, owner: Any, address: int, shape: Sequence[int], dtype: np.dtype, device: tuple[int, int] = (CPU, 0)
    ) -> None:
        rank, strides, step = len(shape), [], 1
        for extent in reversed(shape):
            strides.append(step)
            step *= extent
        self._owner = owner
        self._extents = (ctypes.c_int64 * (2 * rank))(*shape, *reversed(strides))
        kind, start = _Type(_CODES[dtype.kind], 8 * dtype.itemsize, 1), ctypes.addressof(self._extents)
        self._tensor = _DLTensor(address, _Device(*device), rank, kind, start, start + 8 * rank, 0)
        self.address = ctypes.addressof(self._tensor)


class Object:
    """A reference to one of the runtime's objects."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    @property
    def type_index(self) -> int:
        return ctypes.c_int32.from_address(self.handle + 8).value

    def __call__(self, *arguments: Any) -> Any:
        """Calls a function. Raises what it raised: a Python error of that name (MemoryError, ...), or a RuntimeError."""
        # The callee borrows what it is given, so encoded strings live until it returns.
        encoded = [a.encode() if isinstance(a, str) else a for a in arguments]
        given = (_Any * len(encoded))(*map(_argument, encoded))
        result = _Any()
        if _library().TVMFFIFunctionCall(self.handle, given, len(arguments), ctypes.byref(result)):
            raise _raised()
        return _value(result)

    def __del__(self) -> None:
        _library().TVMFFIObjectDecRef(self.handle)


class Frame:
    """A function and the tensors it takes, laid out once: from one call to the next their addresses change, and nothing else.

    Laying arguments out costs Python as much time as a small model takes.
    """

    def __init__(self, called: Object, tensors: Sequence[Tensor]) -> None:
        self._owners = called, tensors
        self._tensors = [tensor._tensor for tensor in tensors]
        self._given, self._result = (_Any * len(tensors))(*map(_argument, tensors)), _Any()
        self._call = _library().TVMFFIFunctionCall
        self._arguments = called.handle, ctypes.addressof(self._given), len(tensors), ctypes.addressof(self._result)

    def __call__(self, addresses: Sequence[int]) -> None:
        """addresses: of the tensors, in their order; the caller keeps them alive. Raises as `Object`."""
        for tensor, address in zip(self._tensors, addresses, strict=True):
            tensor.data = address
        if self._call(*self._arguments):
            raise _raised()


class Module:
    """A loaded library; its code is mapped as long as this lives."""

    def __init__(self, path: Path) -> None:
        self._module = function("ffi.ModuleLoadFromFile")(str(path))

    def __getitem__(self, name: str) -> Object:
        """Raises AttributeError where the library has no such function."""
        found = function("ffi.ModuleGetFunction")(self._module, name, False)
        if found is None:
            raise AttributeError(f"it has no function '{name}'")
        return found


def function(name: str) -> Object:
    """A function of the runtime's registry. Raises RuntimeError where there is none."""
    handle, key = ctypes.c_void_p(), name.encode()
    place = ctypes.cast(ctypes.c_char_p(key), ctypes.c_void_p)
    _library().TVMFFIFunctionGetGlobal(ctypes.byref(_Bytes(place, len(key))), ctypes.byref(handle))
    if not handle.value:
        raise RuntimeError(f"TVM's runtime has no function '{name}'")
    return Object(handle.value)


def set_stream(index: int, handle: int) -> int:
    """Work that this thread gives the GPU `index` goes to this stream (a CUstream) from now on. Returns the stream before."""
    before = ctypes.c_void_p()
    _library().TVMFFIEnvSetStream(CUDA, index, handle, ctypes.byref(before))
    return before.value or 0


@functools.cache
def _library() -> ctypes.CDLL:
    """libtvm_ffi with TVM's runtime behind it. Where Python has loaded TVM itself, these are the same libraries."""
    runtime, base = (importlib.util.find_spec(name) for name in ("tvm", "tvm_ffi"))
    if runtime is None or base is None or runtime.origin is None or base.origin is None:
        raise TargetError("running a compiled model needs TVM's runtime; pip install apache-tvm apache-tvm-ffi")
    library = ctypes.CDLL(str(Path(base.origin).parent / "lib" / "libtvm_ffi.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(Path(runtime.origin).parent / "lib" / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
    library.TVMFFIFunctionCall.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)
    library.TVMFFIObjectDecRef.argtypes = (ctypes.c_void_p,)
    library.TVMFFIEnvSetStream.argtypes = (ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
    return library


def _argument(value: Any) -> _Any:
    """What `value` is to a callee. It must outlive the call."""
    if isinstance(value, Tensor):
        return _Any(_TENSOR_POINTER, 0, value.address)
    if isinstance(value, Object):
        return _Any(value.type_index, 0, value.handle)
    if isinstance(value, bool):
        return _Any(_BOOL, 0, value)
    if isinstance(value, bytes):
        return _Any(_RAW_STRING, 0, ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p).value)
    return _Any(_INT, 0, value)


def _value(result: _Any) -> Any:
    """A result, which is ours."""
    if result.type_index == _NONE:
        return None
    if result.type_index in (_INT, _BOOL):
        return result.value
    if result.type_index == _SMALL_STRING:
        return result.value.to_bytes(8, "little", signed=True)[: result.length].decode()
    if result.type_index < _OBJECT:
        raise RuntimeError(f"TVM's runtime returned a value of type {result.type_index}, which running a model never does")
    found = Object(result.value)
    return _Bytes.from_address(found.handle + _HEADER).text() if result.type_index == _STRING else found


def _raised() -> Exception:
    """The error that a call left."""
    handle = ctypes.c_void_p()
    _library().TVMFFIErrorMoveFromRaised(ctypes.byref(handle))
    if not handle.value:
        return RuntimeError("a call of TVM's runtime failed without a message")
    error = Object(handle.value)
    kind, message = (_Bytes.from_address(error.handle + _HEADER + at).text() for at in (0, ctypes.sizeof(_Bytes)))
    known = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, Exception):
        return known(message)
    return RuntimeError(f"{kind}: {message}")
