"""The NVIDIA GPU of this machine, asked through its driver alone."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

#: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """A device: its name and its compute capability, 90 for sm_90."""

    name: str
    capability: int

    def runs(self, capability: int) -> bool:
        """Whether machine code for `capability` runs here: of the same major number, and of no higher minor one."""
        return self.capability // 10 == capability // 10 and self.capability >= capability


def capability_of(level: str) -> int:
    """90 for "sm_90"."""
    return int(level.removeprefix("sm_"))


@functools.cache
def first_gpu() -> Gpu | str:
    """Device 0 of this process, or what is missing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver (libcuda.so.1 does not load)"
    count, device, major, minor = (ctypes.c_int() for _ in range(4))
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"the NVIDIA driver of this machine does not start (CUDA error {status})"
    if count.value == 0:
        return "this process sees no NVIDIA GPU"
    name = ctypes.create_string_buffer(100)
    status = (
        driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    if status:
        return f"the NVIDIA driver of this machine does not describe device 0 (CUDA error {status})"
    return Gpu(name.value.decode(), 10 * major.value + minor.value)


def missing_to_run(level: str) -> str:
    """What this machine lacks to run code for `level`; empty where nothing."""
    gpu = first_gpu()
    if isinstance(gpu, str):
        return gpu
    if not gpu.runs(capability_of(level)):
        return f"this machine's GPU ({gpu.name}) is sm_{gpu.capability}"
    return ""
