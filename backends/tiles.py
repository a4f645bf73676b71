"""The Linux kernel's permission to use AMX tiles, which a process must ask for once: they enlarge every thread's saved state.

Without it the first tile instruction kills the process. See Documentation/arch/x86/xstate.rst of the kernel.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from ..ir.errors import TargetError

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18


def request_tiles(flags: Iterable[str]) -> None:
    """Asks for the permission where code needs the flag `amx_tile`; asking again is free. Threads started earlier have it, too.

    Raises:
        TargetError: the kernel (before 5.16) or a sandbox around this process refuses.
    """
    if "amx_tile" not in flags:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise TargetError(
            f"the kernel refuses this process AMX tiles ({reason}); use Linux 5.16 or later outside a sandbox that hides them, "
            "or build for target 'x86:avx512-vnni'"
        )
