"""What a float kernel leaves in memory: its values, their codes as 8-bit floats, or both (`triton_e4m3.keep`)."""

from __future__ import annotations

from dataclasses import dataclass

from .....ir.errors import OptionError
from .plans import Buffer, Constant

#: 1 / scale of the codes: a buffer, so that layers of one shape are one kernel whatever their scales.
INVERSE: Buffer = ("inverse", (1,), "float32")


@dataclass(frozen=True)
class Store:
    """value: the kernel's result. codes: what `gw::quantize_fp8` makes of it, for the layers that follow."""

    value: bool = True
    codes: bool = False

    def __post_init__(self) -> None:
        if not self.value and not self.codes:
            raise OptionError("a kernel stores its value, codes of it, or both")

    @property
    def outputs(self) -> int:
        return self.value + self.codes

    def buffers(self, shape: tuple[int, ...], dtype: str) -> list[Buffer]:
        """The last buffers of a kernel: (inverse), (Y), (Q)."""
        value, codes = [("Y", shape, dtype)] * self.value, [("Q", shape, "uint8")] * self.codes
        return [INVERSE] * self.codes + value + codes

    @property
    def constants(self) -> dict[str, Constant]:
        """None for the pointers that a launch has no buffer for."""
        present = {"y": self.value, "codes": self.codes, "inverse": self.codes}
        return {name: None for name, given in present.items() if not given}


#: The value alone, as a kernel does that knows nothing of codes.
VALUE = Store()
