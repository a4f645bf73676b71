"""Lowers a Program to a Relax module: one rule an op (in `rules/`), kernels called by `call_tir`, layouts followed per value.

The walk is one pass over the graph in order. A rule may look ahead and cover the nodes that read its result (a rescale, a
residual addition); those are then skipped. Every kernel is generated once for each distinct specification and shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax as _relax
from tvm import tirx

from ...ir.errors import TargetError, UnsupportedOpError
from ...ir.program import Program, Stage, origin_of, shape_of
from ...ir.verify import neighbourhood
from ..base import KernelRow, Progress
from ..target import Target
from .chains import Deferred, Source, numbered
from .cuda.kernels import layer_norm_exact, maps
from .cuda.signed import signed
from .families import family_of, generator_of
from .kernels import layout, quantize_image
from .kernels.base import padded
from .kernels.half import NUMPY
from .strided import Strided
from .target import bfloat16_level, dots_bfloat16, float16_level, generating, kernel_levels
from .tuning import TuningDatabase
from .tuning.families import tuned
from .values import (
    CONSTANT,
    DTYPES,
    Expr,
    FloatImage,
    Frame,
    Normalization,
    Value,
    dtype_of_var,
    item_size,
    of_node,
    shape_of_var,
)

#: Relax, untyped: the stubs know every expression only by its base class.
relax: Any = _relax

Rule = Callable[["Lowering", fx.Node], None]

#: op -> the function that emits it.
RULES: dict[Any, Rule] = {}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Registers the decorated function for each of `ops`; a second rule for one op is a mistake."""

    def register(function: Rule) -> Rule:
        for op in ops:
            if op in RULES:
                raise ValueError(f"two lowering rules for {op}: {RULES[op].__name__} and {function.__name__}")
            RULES[op] = function
        return function

    return register


@dataclass(frozen=True)
class Lowered:
    """A Relax module whose function `main` is the program, and one row a launched kernel.

    specs: (generator, arguments) of every distinct kernel. tuned: keys of the tuning rows that were used.
    """

    module: tvm.IRModule
    kernels: tuple[KernelRow, ...]
    specs: tuple[tuple[Any, tuple[Any, ...]], ...] = ()
    tuned: tuple[str, ...] = ()


def lower(program: Program, target: Target, progress: Progress | None = None, tunings: TuningDatabase | None = None) -> Lowered:
    """Lowers a canonical, compressed or integer program.

    Args:
        tunings: measured kernels; by default those that ship with the package and the user's own.

    Raises:
        TargetError: a symbolic shape. UnsupportedOpError: an op without a rule, named with its node, origin and neighbours.
    """
    from . import rules  # registers the rules; they import this module

    _require_static(program)
    program = signed(program) if target.arch == "cuda" else program
    tunings = TuningDatabase.of(target.arch) if tunings is None else tunings
    with generating(target):
        return Lowering(program, target, rules.fallback, tunings).run(progress)


def _require_static(program: Program) -> None:
    for spec in (*program.input_specs, *program.output_specs):
        if None in spec.shape:
            raise TargetError(
                f"'{program.name}' has a symbolic dimension at '{spec}'; the TVM backend compiles static shapes: "
                "capture with dynamic_batch=False and example inputs of the batch size to deploy"
            )


class Lowering:
    """State of one lowering: the module under construction and the value of every node so far."""

    def __init__(self, program: Program, target: Target, fallback: Rule, tunings: TuningDatabase) -> None:
        self.program = program
        self.target = target
        self.int8_level, self.float_level = kernel_levels(target)
        self._bfloat16_level, self._dots_bfloat16 = bfloat16_level(target), dots_bfloat16(target)
        self._float16_level = float16_level(target)
        self.builder = relax.BlockBuilder()
        self.tunings = tunings
        self.rows: list[KernelRow] = []
        self._fallback = fallback
        self._values: dict[fx.Node, Value | list[Value]] = {}
        self._functions: dict[Any, tuple[Any, Any]] = {}
        self._inputs: set[Any] = set()
        #: Memory that no output may be: the inputs', and that of the outputs so far.
        self._given: set[Any] = set()
        self._tuned: dict[str, None] = {}

    @property
    def integer(self) -> bool:
        return self.program.stage is Stage.INTEGER

    def run(self, progress: Progress | None) -> Lowered:
        inputs = [
            relax.Var(str(n.target), relax.TensorType(shape_of(n), DTYPES[n.meta["val"].dtype])) for n in self.program.inputs
        ]
        self._inputs.update(inputs)
        self._given.update(inputs)
        nodes = [n for n in self.program.nodes if n.op == "call_function"]
        with self.builder.function("main", inputs):
            with self.builder.dataflow():
                for node, var in zip(self.program.inputs, inputs, strict=True):
                    self.bind(node, of_node(node, dense=var))
                for index, node in enumerate(nodes):
                    if progress is not None:
                        progress(index + 1, len(nodes), "lower to kernels")
                    if node not in self._values:
                        self._emit(node)
                outputs = [self._output(n) for n in self.program.outputs]
            self.builder.emit_func_output(relax.Tuple(outputs))
        return Lowered(self.builder.finalize(), tuple(self.rows), tuple(self._functions), tuple(self._tuned))

    def inline(self, module: fx.GraphModule, inputs: dict[fx.Node, fx.Node]) -> None:
        """Lowers the nodes of another graph among this one's. inputs: placeholder there -> node here."""
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.bind(node, self.value(inputs[node]))
            elif node.op == "get_attr":
                self.bind(node, of_node(node, dense=self.constant(getattr(module, str(node.target)))))
            elif node.op == "call_function" and node not in self._values:
                self._emit(node)

    def _emit(self, node: fx.Node) -> None:
        RULES.get(node.target, self._fallback)(self, node)
        if node not in self._values:
            raise RuntimeError(f"the rule of {node.target} left '{node.name}' without a value")

    def _output(self, node: fx.Node) -> Expr:
        """The value in memory of its own: the caller brings the memory of every output."""
        var = self.dense(node)
        origin = self._origin(var)
        if isinstance(origin, CONSTANT) or origin in self._given:
            var = self._copied(var)
        self._given.add(self._origin(var))
        return self.builder.emit_output(var)

    def with_slack(self, var: Expr) -> Expr:
        """`var`, or a copy of it where it is the caller's input: that is shared, and no byte after its end may be read."""
        return self._copied(var) if self._origin(var) in self._inputs else var

    def _copied(self, var: Expr) -> Expr:
        return self.builder.emit(relax.op.add(var, relax.const(np.zeros((), dtype_of_var(var)))))

    def _origin(self, var: Expr) -> Expr:
        """The variable or constant whose memory `var` is a view of."""
        bound: Any = self.builder.lookup_binding(var) if isinstance(var, relax.Var) else None
        if isinstance(bound, relax.Call) and bound.op == tvm.ir.Op.get("relax.reshape"):
            return self._origin(bound.args[0])
        return var

    def level(self, dtype: str) -> str:
        """Level of the float kernels whose tensors are of `dtype`."""
        return self._bfloat16_level if dtype == "bfloat16" else self.float_level

    def layer_level(self, dtype: str) -> str:
        """Level of the layers, products with constant weights, of `dtype`."""
        return self._float16_level if dtype == "float16" else self.level(dtype)

    def dots(self, dtype: str) -> bool:
        """Whether products of `dtype` multiply pairs."""
        return dtype == "bfloat16" and self._dots_bfloat16

    # -- values ----------------------------------------------------------------------------------------------------------

    def bind(self, node: fx.Node, value: Value | list[Value]) -> None:
        if isinstance(value, Value) and value.shape != shape_of(node):
            raise RuntimeError(f"'{node.name}' ({node.target}) was lowered to shape {value.shape}, not {shape_of(node)}")
        self._values[node] = value

    def bind_all(self, nodes: Sequence[fx.Node], value: Value) -> None:
        """Binds the last of the nodes one kernel covers; the values before it exist nowhere, and nobody else reads them."""
        for node in nodes[:-1]:
            self._values[node] = []
        self.bind(nodes[-1], value)

    def value(self, node: fx.Node) -> Value:
        """The value of a tensor node; parameters become constants on first use."""
        found = self._values.get(node)
        if found is None:
            tensor = self.program.parameter(node)
            if tensor is None:
                raise RuntimeError(f"'{node.name}' is read before it is lowered")
            found = of_node(node, dense=self.constant(tensor))
            self._values[node] = found
        if isinstance(found, list):
            raise RuntimeError(f"'{node.name}' holds {len(found)} values; read them through getitem")
        return found

    def values(self, node: fx.Node) -> list[Value]:
        """The values of a node with several results."""
        found = self._values[node]
        return found if isinstance(found, list) else [found]

    def lowered(self, node: fx.Node) -> bool:
        """Whether the node's value exists already (parameters and inputs always do)."""
        return node in self._values or node.op == "get_attr"

    def lower_ahead(self, node: fx.Node, current: fx.Node) -> bool:
        """Lowers `node` and what it needs before its turn, for the kernel of `current`; False where it depends on `current`."""
        missing: dict[fx.Node, None] = {}
        stack = [node]
        while stack:
            needed = stack.pop()
            if needed is current:
                return False
            if not self.lowered(needed) and needed not in missing:
                missing[needed] = None
                stack.extend(needed.all_input_nodes)
        for needed in self.program.nodes:
            if needed in missing and needed not in self._values:
                self._emit(needed)
        return True

    def constant(self, tensor: torch.Tensor | np.ndarray) -> Expr:
        if isinstance(tensor, torch.Tensor):
            tensor = tensor.detach().cpu().contiguous()
            half = tensor.dtype is torch.bfloat16
            tensor = tensor.view(torch.int16).numpy().view(NUMPY["bfloat16"]) if half else tensor.numpy()
        return relax.const(np.ascontiguousarray(tensor))

    def is_channels(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return False
        value = self.value(node)
        return value.channels is not None or value.pending is not None

    def dense(self, node: fx.Node) -> Expr:
        """The value, row-major in its logical shape; converted on first use where it lives as Channels."""
        value = self.value(node)
        if value.dense is None and value.normalization is not None:
            inputs = self.normalized(value.normalization)
            rows = (prod(value.shape[:-1]), value.shape[-1])
            value.dense = self.kernel(layer_norm_exact.apply_statistics, *rows, inputs=inputs, nodes=(node,))
        if value.dense is None and value.expression is not None:
            value.dense = self._computed(value.expression)
        if value.dense is None:
            if value.moved is None:
                self.channels(node)
            value.dense = self._moved(value, node) if value.moved is not None else self._from_channels(value, node)
        value.dense = self.reshape(value.dense, value.shape)
        return value.dense

    def _computed(self, deferred: Deferred) -> Expr:
        sources: list[Source] = []
        expression = numbered(deferred.expression, sources)
        inputs = tuple((source.shape, source.dtype) for source in sources)
        variables = [source.var for source in sources]
        return self.kernel(
            maps.elementwise, expression, inputs, inputs=variables, nodes=deferred.nodes, label=maps.name(expression)
        )

    def normalized(self, normalization: Normalization) -> list[Expr]:
        """The buffers of a normalization that is carried out where it is read."""
        affine = [self.dense(normalization.weight), self.dense(normalization.bias)]
        return [self.dense(normalization.source), normalization.statistics, *affine]

    def channels(self, node: fx.Node) -> Expr:
        """The value as [N, H, W, Cp]; converted on first use. Rank 3 and up; further axes count as one row."""
        value = self.value(node)
        if value.channels is None and value.pending is not None:
            value.channels = self._carried_out(value, value.pending, node)
        if value.channels is None:
            self.dense(node)
            value.channels = self._to_channels(value, node)
        shape = (value.shape[0], *value.spatial, padded(value.shape[1]))
        value.channels = self.reshape(value.channels, shape)
        return value.channels

    def strided(self, node: fx.Node) -> tuple[Expr, Strided]:
        """The value as an index map over a variable that exists; what data movement composes on."""
        value = self.value(node)
        if value.dense is None and value.moved is not None:
            return value.moved
        return self.dense(node), Strided.whole(value.shape)

    def bind_moved(self, node: fx.Node, source: Expr, strided: Strided) -> None:
        """Binds a movement of `source`; the copy is made when the dense form is read, and not at all where order is kept."""
        self.bind(node, self.moved_value(source, strided))

    def moved_value(self, source: Expr, strided: Strided) -> Value:
        dtype = dtype_of_var(source)
        if strided.moves_nothing:
            return Value(strided.shape, dtype, dense=source)
        return Value(strided.shape, dtype, moved=(source, strided))

    def _moved(self, value: Value, node: fx.Node) -> Expr:
        assert value.moved is not None
        source, strided = value.moved
        return self.kernel(layout.copy_strided, strided, value.dtype, inputs=[source], nodes=(node,))

    def settled(self, node: fx.Node) -> Value:
        """The value with nothing pending: in the layout its reader finds it in."""
        value = self.value(node)
        if value.pending is not None:
            self.channels(node)
        return value

    def _carried_out(self, value: Value, pending: Frame | FloatImage, node: fx.Node) -> Expr:
        if isinstance(pending, FloatImage):
            spec = ((*value.shape[:2], *value.spatial), pending.quantize, self.int8_level)
            return self.kernel(quantize_image.quantize_image, *spec, inputs=[pending.source], nodes=(node,))
        source = self.channels(pending.source)
        spec = (shape_of_var(source), pending.before, pending.after, pending.fill, dtype_of_var(source))
        return self.kernel(layout.pad_channels, *spec, inputs=[source], nodes=(node,))

    def _from_channels(self, value: Value, node: fx.Node) -> Expr:
        n, c = value.shape[:2]
        pixels = prod(value.shape[2:])
        if pixels == 1:
            return self.rows_without_lanes(value.channels, n, c, node)
        shape = (n, c, *value.spatial)
        return self.kernel(layout.from_channels, shape, value.dtype, inputs=[value.channels], nodes=(node,))

    def _to_channels(self, value: Value, node: fx.Node) -> Expr:
        n, c = value.shape[:2]
        if isinstance(value.dense, CONSTANT):
            return relax.const(_packed(_array(value.dense).reshape(n, c, *value.spatial)))
        if prod(value.shape[2:]) == 1:
            return self.rows_with_lanes(value.dense, n, c, node)
        shape = (n, c, *value.spatial)
        return self.kernel(layout.to_channels, shape, value.dtype, inputs=[value.dense], nodes=(node,))

    def rows_without_lanes(self, var: Expr, rows: int, channels: int, node: fx.Node) -> Expr:
        """[rows, Cp] -> [rows, C]; free where nothing was padded."""
        if channels == padded(channels):
            return self.reshape(var, (rows, channels))
        return self.kernel(layout.drop_lanes, rows, channels, dtype_of_var(var), inputs=[var], nodes=(node,))

    def rows_with_lanes(self, var: Expr, rows: int, channels: int, node: fx.Node) -> Expr:
        """[rows, C] -> [rows, Cp]; free where nothing must be padded."""
        if channels == padded(channels):
            return self.reshape(var, (rows, channels))
        return self.kernel(layout.add_lanes, rows, channels, dtype_of_var(var), inputs=[var], nodes=(node,))

    # -- emission --------------------------------------------------------------------------------------------------------

    def family(self, module: ModuleType) -> Any:
        """A kernel family of this target, by the CPUs' module of it: for what a rule asks of it besides its kernels."""
        return family_of(self.target.arch, module)

    def reshape(self, var: Expr, shape: Sequence[int]) -> Expr:
        """The same memory under another shape; emits nothing where the shape is already right."""
        shape = tuple(shape)
        if shape_of_var(var) == shape:
            return var
        if isinstance(var, CONSTANT):
            return relax.const(_array(var).reshape(shape))
        return self.builder.emit(relax.op.reshape(var, shape))

    def kernel(
        self,
        generator: Callable[..., tirx.PrimFunc],
        *spec: Any,
        inputs: Sequence[Expr | np.ndarray],
        nodes: Sequence[fx.Node],
        macs: int = 0,
        label: str = "",
    ) -> Expr:
        """Calls the kernel `generator(*spec)`; inputs are reshaped to its buffers. Returns its output.

        label: name of the function in the library; the generator's own by default.
        """
        return self.kernel_outputs(generator, *spec, inputs=inputs, nodes=nodes, macs=macs, label=label)[0]

    def kernel_outputs(
        self,
        generator: Callable[..., tirx.PrimFunc],
        *spec: Any,
        inputs: Sequence[Expr | np.ndarray],
        nodes: Sequence[fx.Node],
        macs: int = 0,
        label: str = "",
        outputs: int = 1,
        multiplied: str = "",
    ) -> list[Expr]:
        """As `kernel`, for a kernel whose last `outputs` buffers are written. multiplied: the type, where bytes hold floats."""
        variable, function = self.function(generator, spec, label or generator.__name__)
        buffers, written = function.params[:-outputs], function.params[-outputs:]
        if len(buffers) != len(inputs):
            raise RuntimeError(f"kernel {variable.name_hint} reads {len(buffers)} buffers, not {len(inputs)}")
        arguments = []
        for buffer, given in zip(buffers, inputs, strict=True):
            var = self.constant(given) if isinstance(given, np.ndarray) else given
            if dtype_of_var(var) != str(buffer.dtype):
                raise RuntimeError(
                    f"kernel {variable.name_hint} reads {buffer.dtype} at '{buffer.name}', not {dtype_of_var(var)}"
                )
            arguments.append(self.reshape(var, [int(d) for d in buffer.shape]))
        types = [relax.TensorType([int(d) for d in out.shape], str(out.dtype)) for out in written]
        result = self.builder.emit(relax.call_tir(variable, arguments, types if outputs > 1 else types[0]))
        results = [result] if outputs == 1 else [self.builder.emit(relax.TupleGetItem(result, i)) for i in range(outputs)]
        self.record(variable.name_hint, nodes, "designed", [*arguments, *results], macs, _work(spec), multiplied)
        return results

    def function(self, generator: Callable[..., tirx.PrimFunc], spec: tuple[Any, ...], label: str):
        """The module's function for one kernel specification, generated on first use."""
        generator = generator_of(self.target.arch, generator)
        spec, row = tuned(generator, spec, self.tunings)
        if row is not None:
            self._tuned[row] = None
        key = (generator, spec)
        if key not in self._functions:
            function = generator(*spec).without_attr("global_symbol").with_attr("tirx.is_scheduled", True)
            self._functions[key] = (self.builder.add_func(function, label), function)
        return self._functions[key]

    def record(
        self,
        name: str,
        nodes: Sequence[fx.Node],
        kind: str,
        moved: Sequence[Expr],
        macs: int = 0,
        work: str = "",
        dtype: str = "",
    ) -> None:
        """Writes down a launched kernel. moved: its operands, then its results. work: shapes of the first and last by default;
        dtype: what their types say by default."""
        sizes = [prod(shape_of_var(v)) * item_size(dtype_of_var(v)) for v in moved]
        if not macs:
            # A gather reads of its table no more than it writes.
            sizes = [min(size, sizes[-1]) if isinstance(v, CONSTANT) else size for size, v in zip(sizes, moved, strict=True)]
        constants = [size for size, v in zip(sizes, moved, strict=True) if isinstance(v, CONSTANT)]
        weights = sum(constants) if macs else 0
        work = work or " -> ".join("x".join(map(str, shape_of_var(v))) or "1" for v in (moved[0], moved[-1]))
        covered = tuple(n.name for n in nodes)
        # A layer that quantizes its own input multiplies bytes: the type of its weights says so.
        bytes_ = [d for d in map(dtype_of_var, moved[:-1]) if d in ("int8", "uint8")] if macs else []
        dtype = dtype or next(iter(bytes_), dtype_of_var(moved[0]))
        self.rows.append(KernelRow(name, covered, kind, macs, sum(sizes), weights, dtype, work))


def _work(spec: Sequence[Any]) -> str:
    """What a kernel specification says of its work, where a part of it can (`Convolution`, `LinearInt8`, ...)."""
    return next((text for text in (getattr(part, "work", "") for part in spec) if text), "")


def _array(constant: Expr) -> np.ndarray:
    return constant.value.numpy()


def _packed(array: np.ndarray) -> np.ndarray:
    """[N, C, H, W] -> [N, H, W, Cp], zero in the lanes past C."""
    missing = padded(array.shape[1]) - array.shape[1]
    return np.ascontiguousarray(np.pad(array, ((0, 0), (0, missing), (0, 0), (0, 0))).transpose(0, 2, 3, 1))


def unsupported(node: fx.Node, why: str) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"the TVM backend cannot lower {node.target} at '{node.name}' (from {origin_of(node)}): {why}\n{neighbourhood(node)}"
    )
