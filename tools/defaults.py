"""Which passes run where a user names none: chosen by what the network is made of, each by measurement (docs/BENCHMARKS.md)."""

from __future__ import annotations

from ..ir.program import Program, Stage
from ..passes.quantize import operators as ops

#: 8-bit weights and activations of a convolutional network, integer arithmetic throughout.
CONVOLUTIONAL = "canonicalize,equalize,quantize,align-scales,correct-bias,lower-integer"

#: The same of a transformer: outlying activation channels are taken out first, and what is left must not be clipped.
TRANSFORMER = (
    "canonicalize,equalize,split-outliers,smooth-quant{alpha=0.7},quantize{activation_observer=min-max},"
    "align-scales,correct-bias,lower-integer"
)

#: Weights of fewer bits: ranges by squared error, and codes chosen by what they do to the layer's output.
LOW_BIT_CONVOLUTIONAL = "canonicalize,equalize,quantize{weight_observer=mse},align-scales,adaround,correct-bias,lower-integer"
LOW_BIT_TRANSFORMER = (
    "canonicalize,equalize,split-outliers,smooth-quant{alpha=0.7},quantize{weight_observer=mse,activation_observer=min-max},"
    "align-scales,gptq,correct-bias,lower-integer"
)


def is_transformer(program: Program) -> bool:
    """Whether layer norms stand in the program; convolutional networks have batch norms, or none once these are folded."""
    return any(node.target is ops.LAYER_NORM for node in program.nodes)


def default_pipeline(program: Program) -> str:
    """Pipeline text for 8 bits."""
    return _from_stage(program, TRANSFORMER if is_transformer(program) else CONVOLUTIONAL)


def half_pipeline(program: Program, dtype: str) -> str:
    """Pipeline text for `bfloat16` or `float16`."""
    return _from_stage(program, f"canonicalize,cast-float{{dtype={dtype}}}")


def fp8_pipeline(program: Program) -> str:
    """Pipeline text for layers of 8-bit floats, with float16 between them: for GPUs that multiply them."""
    return _from_stage(program, "canonicalize,quantize-fp8,cast-float{dtype=float16}")


def search_pipeline(program: Program) -> str:
    """Pipeline text where layers have different formats."""
    return _from_stage(program, LOW_BIT_TRANSFORMER if is_transformer(program) else LOW_BIT_CONVOLUTIONAL)


def _from_stage(program: Program, text: str) -> str:
    """What is left to do: a compressed program is canonical already."""
    return text.removeprefix("canonicalize,") if program.stage is Stage.COMPRESSED else text
