"""Programs with layers of 8-bit floats, lowered for a GPU and evaluated on this CPU, against torch: prints a JSON line a program.

TRITON_INTERPRET=1 python fp8_network.py
"""

from __future__ import annotations

import json

import torch
from graphwright.backends.target import Target
from graphwright.backends.tvm.lower import lower
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from interpreted import evaluate
from torch import nn


class Network(nn.Module):
    """Odd sizes: padded lanes, a strided and a pointwise layer, residual additions whose sum is read as codes and as values, an
    explicit pad, a layer behind a float one, a reshape to rows, layer normalization, attention, and codes of an output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 20, 3, padding=1)
        self.b, self.down = nn.Conv2d(20, 20, 1), nn.Conv2d(20, 37, 3, stride=2)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.depthwise, self.project = nn.Conv2d(37, 37, 3, padding=1, groups=37), nn.Conv2d(37, 24, 1)
        self.norm, self.c, self.d = nn.LayerNorm(24), nn.Linear(24, 50), nn.Linear(50, 24)
        self.packed, self.mix, self.out = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 7)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        x = torch.relu(self.down(self.pad(x)))
        x = self.project(torch.relu(self.depthwise(x)))
        rows = x.flatten(2).transpose(1, 2)
        rows = rows + self.d(nn.functional.gelu(self.c(self.norm(rows))))
        q, k, v = self.packed(rows).reshape(*rows.shape[:2], 3, 2, 12).permute(2, 0, 3, 1, 4)
        heads = torch.softmax(q @ k.transpose(2, 3) * 12**-0.5, -1) @ v
        rows = rows + self.mix(heads.transpose(1, 2).reshape(rows.shape))
        return self.out(rows), rows


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 8)
    source = capture(Network().eval(), (x,))
    calibration = Calibration.for_program(source, [(x,)])
    for text in ("canonicalize,quantize-fp8", "canonicalize,quantize-fp8,cast-float{dtype=float16}"):
        program = PassManager().run(source, parse(text), PassContext(calibration=calibration)).program
        lowered = lower(program, Target("cuda", "sm_90"))
        outputs = [torch.from_numpy(out) for out in evaluate(lowered.module, [x.numpy()])]
        row = {"pipeline": text, "kernels": [(kernel.name, kernel.nodes) for kernel in lowered.kernels]}
        row["off"] = [relative(out, wanted) for out, wanted in zip(outputs, program(x), strict=True)]
        row["loss"] = [relative(wanted, exact) for wanted, exact in zip(program(x), source(x), strict=True)]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
