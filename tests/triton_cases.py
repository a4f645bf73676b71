"""What the workers that run Triton kernels share: random codes and blocks, a launch, and a line a case.

Triton reads TRITON_INTERPRET when its functions are defined: with it kernels run in its interpreter, without it on the GPU.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable

import numpy as np
import torch
from graphwright.backends.tvm.cuda.kernels.blocks import Block
from graphwright.backends.tvm.cuda.kernels.plans import Plan, run
from graphwright.backends.tvm.kernels.base import Convolution, padded

DEVICE = "cpu" if "TRITON_INTERPRET" in os.environ else "cuda"
TORCH = {name: getattr(torch, name) for name in ("uint8", "int8", "int32", "float32", "float16", "bfloat16")}

#: What was run, what it gave, what it must give.
Case = tuple[str, torch.Tensor, torch.Tensor]


def codes(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    low, high = (0, 256) if dtype == "uint8" else (-128, 128)
    return torch.randint(low, high, shape, dtype=TORCH[dtype])


def physical(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N, H, W, Cp] with anything in the lanes past C."""
    n, c, h, w = x.shape
    out = (
        codes(str(x.dtype).removeprefix("torch."), (n, h, w, padded(c)))
        if x.dtype != torch.float32
        else torch.randn(n, h, w, padded(c))
    )
    out[..., :c] = x.permute(0, 2, 3, 1)
    return out.contiguous()


def launched(plan: Plan, inputs: list) -> torch.Tensor:
    """Checks the inputs against the plan's buffers, runs it, and returns its output."""
    tensors = [torch.from_numpy(t) if isinstance(t, np.ndarray) else t for t in inputs]
    for tensor, (name, shape, dtype) in zip(tensors, plan.operands[:-1], strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, TORCH[dtype]), (name, tensor.shape, shape)
    _, shape, dtype = plan.operands[-1]
    out = torch.full(shape, 77, dtype=TORCH[dtype], device=DEVICE)
    run(plan, [*(tensor.to(DEVICE) for tensor in tensors), out])
    return out.cpu()


def some_block() -> Block | None:
    return random.choice((None, Block(16, 16, 32, 4, 2, 1), Block(32, 64, 64, 4, 3, 3), Block(64, 32, 32, 4, 3, 8)))


def some_shape(kind: str) -> Convolution:
    kernel = random.choice(((1, 1), (3, 3), (3, 3), (2, 5)))
    channels, filters = random.choice((1, 3, 8, 16, 20, 32, 64)), random.choice((1, 10, 16, 40, 64))
    groups = 1
    if kind == "grouped":
        groups = random.choice((2, 3, 4, 5))
        channels, filters = groups * random.choice((1, 4, 9, 16)), groups * random.choice((2, 4, 11, 24))
    if kind == "depthwise":
        channels = filters = groups = random.choice((3, 16, 40, 100))
    if kind == "image":
        channels, kernel = random.choice((1, 3)), (3, 3)
    if kind == "framed":
        channels, kernel = random.choice((2, 3, 4)), random.choice(((7, 7), (5, 7), (6, 9)))
    padding = random.choice(((0, 0), (1, 1), (2, 1))) if kernel != (1, 1) else (0, 0)
    return Convolution(
        batch=random.choice((1, 2)),
        channels=channels,
        height=random.randint(9, 12),
        width=random.randint(9, 12),
        filters=filters,
        kernel=kernel,
        stride=random.choice(((1, 1), (2, 2), (1, 2))),
        padding=padding,
        dilation=random.choice(((1, 1), (1, 1), (2, 1))) if kernel == (3, 3) else (1, 1),
        groups=groups,
    )


def main(cases: dict[str, Callable[[], Case]]) -> None:
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    for group in sys.argv[3:] or cases:
        for index in range(count):
            random.seed(seed + index)
            torch.manual_seed(seed + index)
            try:
                text, out, expected = cases[group]()
            except Exception as error:  # one kernel that does not compile must not hide the others
                cause = f"{error} {error.__cause__ or ''}"[-2000:]
                print(json.dumps({"group": group, "case": f"seed {seed + index}", "error": cause}), flush=True)
                continue
            wrong = int((out != expected).sum()) if out.shape == expected.shape else -1
            row = {"group": group, "case": text, "wrong": wrong, "values": len(expected.unique())}
            print(json.dumps(row), flush=True)
