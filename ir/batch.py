"""Batches of another size than a program was captured with.

`with_batch` fixes a symbolic batch: what a backend of static shapes compiles. `over_samples` runs a function of one sample on
many at once, whatever batch its reshapes have baked in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import OptionError, VerificationError
from .program import Program, tensor_spec, tensors_of


def with_batch(program: Program, batch: int) -> Program:
    """A clone whose inputs have `batch` as their first dimension; tensors are shared. Captured with `dynamic_batch=True`.

    Raises:
        OptionError: a batch below 1, or an input whose first dimension is fixed to another size.
        VerificationError: the graph fixes the batch somewhere (an operator rejects the new shapes).
    """
    if batch < 1:
        raise OptionError(f"batch {batch}: a batch has at least one sample")
    for spec in program.input_specs:
        if not spec.shape or spec.shape[0] not in (None, batch) or None in spec.shape[1:]:
            raise OptionError(f"input '{spec}' has no free batch dimension; capture the model with dynamic_batch=True")
    result = program.clone()
    resized(result, batch)
    for node in list(result.nodes):
        # Sizes are numbers now, and so is what was computed from them.
        if isinstance(node.meta.get("val"), int):
            node.replace_all_uses_with(node.meta["val"])  # type: ignore[arg-type]
    result.sweep()
    result.infer_shapes()
    for node in result.nodes:
        _require_static(node)
    return result


def resized(program: Program, batch: int) -> None:
    """Gives the inputs `batch` as their first dimension, in place, and every node the shapes that follow.

    Raises:
        VerificationError: an operator rejects the new shapes.
    """
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    for node in program.inputs:
        spec = tensor_spec(node, str(node.target))
        with mode:
            node.meta["val"] = torch.empty((batch, *(int(d or 0) for d in spec.shape[1:])), dtype=spec.dtype)
    for node in list(program.nodes):
        if node.op == "get_attr":
            parameter = program.parameter(node)
            assert parameter is not None
            node.meta["val"] = mode.from_tensor(parameter, static_shapes=True)
    program.infer_shapes()


def _require_static(node: fx.Node) -> None:
    for tensor in tensors_of(node):
        if not all(isinstance(d, int) for d in tensor.shape):
            raise VerificationError(f"'{node.name}' ({node.target}) still has a symbolic shape: {tuple(tensor.shape)}")


def over_samples(function: Callable[..., Any], *batched: Any) -> Any:
    """`function` of one sample on all samples: every tensor of `batched` has them along its first dimension (None stays None).

    Attention runs in its plain form, which can be batched and has all derivatives.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(function, in_dims=tuple(None if value is None else 0 for value in batched))(*batched)
