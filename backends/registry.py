"""Which backend serves a target."""

from __future__ import annotations

from ..ir.errors import TargetError
from .base import Backend
from .target import Target


def backend_for(target: Target) -> Backend:
    """The backend that compiles for `target`. Raises TargetError where none can, saying what to do."""
    if target.arch in ("x86", "arm64", "cuda"):
        from .tvm.backend import TVMBackend  # TVM loads in seconds; only when something is compiled

        return TVMBackend()
    raise TargetError(f"no backend compiles for '{target}'; write an ONNX file with `graphwright rewrite -o model.onnx` instead")
