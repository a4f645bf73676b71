"""graphwright: compiler-style compression of trained networks.

result = graphwright.optimize(model, target="cpu", calibration=batches)
result.artifact.save("model.gw")
outputs = graphwright.load("model.gw")(x)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Finetune", "__version__", "load", "optimize"]

if TYPE_CHECKING:
    from .backends.loader import load
    from .tools.finetune import Finetune
    from .tools.optimize import optimize


def __getattr__(name: str) -> Any:
    # torch and TVM take seconds to import: only when one of these is used.
    if name == "optimize":
        from .tools.optimize import optimize

        return optimize
    if name == "Finetune":
        from .tools.finetune import Finetune

        return Finetune
    if name == "load":
        from .backends.loader import load

        return load
    raise AttributeError(f"module 'graphwright' has no attribute '{name}'")
