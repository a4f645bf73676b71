"""A lowered CUDA program on this CPU: Triton kernels in Triton's interpreter, all other functions compiled by LLVM.

TRITON_INTERPRET=1 must be set before Triton is imported, so this runs in a process of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tvm
from graphwright.backends.tvm.cuda.kernels.plans import run
from graphwright.backends.tvm.cuda.launch import triton_call
from graphwright.backends.tvm.cuda.measure import plan_of
from tvm import relax as _relax

relax: Any = _relax


def evaluate(module: tvm.IRModule, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs of the module's `main`."""
    with tvm.target.Target("llvm"):
        module = relax.transform.LegalizeOps()(module)
    main = module["main"]
    values: dict[Any, Any] = dict(zip(main.params, inputs, strict=True))
    for block in main.body.blocks:
        for binding in block.bindings:
            values[binding.var] = _value(module, binding.value, values)
    return list(_value(module, main.body.body, values))


def _value(module: tvm.IRModule, expression: Any, values: dict[Any, Any]) -> Any:
    if isinstance(expression, relax.Var):
        return values[expression]
    if isinstance(expression, relax.Tuple):
        return tuple(_value(module, field, values) for field in expression.fields)
    if isinstance(expression, relax.TupleGetItem):
        return _value(module, expression.tuple_value, values)[expression.index]
    if not isinstance(expression, relax.Call):
        return expression.value.numpy() if hasattr(expression, "value") else expression.data.numpy()
    if expression.op == tvm.ir.Op.get("relax.reshape"):
        return _value(module, expression.args[0], values).reshape([int(d) for d in expression.ty.shape])
    assert expression.op == tvm.ir.Op.get("relax.call_tir"), expression.op
    arguments = [np.ascontiguousarray(a) for a in _value(module, expression.args[1], values)]
    return _called(module[expression.args[0]], arguments)


def _called(function: Any, arguments: list[np.ndarray]) -> Any:
    written = [np.zeros([int(d) for d in p.shape], str(p.dtype)) for p in function.params[len(arguments) :]]
    if triton_call(function) is not None:
        tensors = [torch.from_numpy(a.copy()) for a in (*arguments, *written)]
        run(plan_of(function), tensors)
        out = [tensor.numpy() for tensor in tensors[len(arguments) :]]
    else:
        kernel = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target="llvm")
        buffers = [tvm.runtime.tensor(a) for a in (*arguments, *written)]
        kernel["main"](*buffers)
        out = [buffer.numpy() for buffer in buffers[len(arguments) :]]
    return out[0] if len(out) == 1 else tuple(out)
