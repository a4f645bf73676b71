"""Programs through the TVM backend, compared with their reference."""

from __future__ import annotations

import numpy as np
import torch
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes
from graphwright.ir.program import Program

HERE = Target.parse("cpu")


def compiled(program: Program, target: Target = HERE):
    return TVMBackend().compile(program, target)


def kinds(result) -> dict[str, int]:
    """Launched kernels by name, the running numbers of equal names cut off."""
    counts: dict[str, int] = {}
    for row in result.kernels:
        name = row.name.rstrip("0123456789")
        counts[name] = counts.get(name, 0) + 1
    return counts


def check_bits(program: Program, *samples: tuple[torch.Tensor, ...], target: Target = HERE):
    """Compiles and compares every output of every sample; returns the compiled program."""
    result = compiled(program, target)
    run = load_bytes(result.library)
    for sample in samples:
        for got, expected in zip(run(*(x.numpy() for x in sample)), program(*sample), strict=True):
            assert got.dtype == expected.numpy().dtype and got.shape == tuple(expected.shape)
            np.testing.assert_array_equal(got, expected.numpy())
    return result
