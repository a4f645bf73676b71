"""canonicalize: every fold pass, to a fixed point."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.errors import OptionError, PassError
from ...ir.program import Program, Stage
from ..base import EXACT, Pass, PassContext, PassResult, register
from .canonicalize_activation import CanonicalizeActivation
from .eliminate_common_subexpressions import EliminateCommonSubexpressions
from .eliminate_dead_code import EliminateDeadCode
from .expand_attention import ExpandAttention
from .fold_batch_norm import FoldBatchNorm
from .fold_constants import FoldConstants
from .fold_pad import FoldPad
from .fold_scale_shift import FoldScaleShift
from .merge_linear import MergeLinear
from .merge_pointwise_conv import MergePointwiseConv
from .merge_reshapes import MergeReshapes
from .raise_idioms import RaiseIdioms
from .remove_no_ops import RemoveNoOps

#: In the order in which one feeds the next. Idioms are raised before constants fold, so that a transposed weight that is also
#: read untransposed (tied embeddings) becomes a linear layer and not a second copy.
STEPS: tuple[Pass, ...] = (
    EliminateDeadCode(),
    RemoveNoOps(),
    EliminateCommonSubexpressions(),
    RaiseIdioms(),
    FoldConstants(),
    ExpandAttention(),
    FoldPad(),
    FoldBatchNorm(),
    FoldScaleShift(),
    MergeLinear(),
    MergePointwiseConv(),
    CanonicalizeActivation(),
    MergeReshapes(),
)


@register
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Runs all fold passes in turn until none of them changes the program, and leaves the canonical stage.

        %c = aten.convolution(aten.constant_pad_nd(%x, [1, 1, 1, 1]), %W, ...);  aten.relu6(aten.batch_norm(%c, ...))
     -> aten.clamp(aten.convolution(%x, %W', %b', padding=[1, 1], ...), 0, 6)

    The stats count, for each pass that changed something, the rounds in which it did.

    Args:
        max_rounds: how often the whole list may run.

    Raises:
        PassError: no fixed point within `max_rounds`; names the passes that still rewrite.
    """

    max_rounds: int = 16

    name = "canonicalize"
    effect = EXACT
    leaves = Stage.CANONICAL
    accepts = (Stage.CAPTURED, Stage.CANONICAL)

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise OptionError("canonicalize: max_rounds must be at least 1")

    def run(self, program: Program, context: PassContext) -> PassResult:
        stats: dict[str, int] = {}
        captured = program.stage is Stage.CAPTURED
        for _ in range(self.max_rounds):
            changed = [step.name for step in STEPS if _step(step, program, context)]
            for name in changed:
                stats[name] = stats.get(name, 0) + 1
            if not changed:
                return PassResult(program, captured or bool(stats), stats)
        raise PassError(
            f"no fixed point after {self.max_rounds} rounds; still rewriting: {', '.join(changed)} (max_rounds allows more, but "
            "two passes that undo each other never end: run them one by one with --print-after)"
        )


def _step(step: Pass, program: Program, context: PassContext) -> bool:
    result = step.run(program, context)
    if result.modified:
        program.sweep()
    return result.modified
