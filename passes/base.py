"""The pass contract.

A pass is a frozen dataclass whose fields are its options; `name` is its kebab-case name in pipeline text; `effect` is what it
promises about the program's values. It gets a clone to edit and must never write into a tensor.

    requires(program, context)  ->  run(program, context) -> PassResult  ->  ensures(result, context)
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..ir.data import Calibration, Sample
from ..ir.errors import OptionError, PassError
from ..ir.program import Program, Stage, dtype_of, half_node, origin_of
from ..ir.registry import Registry

T = TypeVar("T")


@dataclass(frozen=True)
class Effect:
    """What a pass promises about output values.

    exact: equal up to float re-association (bit-equal from the integer stage on). bounded: the largest difference stays under
    `tolerance` times the largest magnitude of that output. lossy: no promise; the loss is measured and written down.
    """

    kind: str
    tolerance: float | None = None

    def __str__(self) -> str:
        return self.kind if self.tolerance is None else f"{self.kind}({self.tolerance:g})"


EXACT = Effect("exact")
LOSSY = Effect("lossy")


def bounded(tolerance: float) -> Effect:
    return Effect("bounded", tolerance)


@dataclass(frozen=True)
class Training:
    """Where and on what passes train. It decides nothing that a pipeline's text should say, so it is not in it.

    Attributes:
        samples: inputs without labels; None: the calibration samples.
        checkpoints: a folder for the state of unfinished runs, so that a killed one goes on; None: nothing is kept.
        device: as torch names it; None: `cuda` where torch sees one, else `cpu`.
    """

    samples: Calibration | None = None
    checkpoints: Path | None = None
    device: str | None = None


@dataclass
class PassContext:
    """What passes may read besides the program: data, a seed, and a place to report progress."""

    calibration: Calibration | None = None
    training: Training = field(default_factory=Training)
    #: The program as the pipeline found it, which the manager fills in: what a compressed one should still compute.
    original: Program | None = None
    probes: tuple[Sample, ...] = ()
    seed: int = 0
    #: Called as progress(done, total, what) during long work.
    progress: Callable[[int, int, str], None] = field(default=lambda done, total, what: None)
    #: What `remember` keeps; contexts that share it, and the calibration, share that work.
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise OptionError(f"the seed must fit in 64 bits, which {self.seed} does not; take another")

    def require_calibration(self, who: str) -> Calibration:
        if self.calibration is None:
            raise PassError(f"{who} needs calibration data; pass calibration=... (CLI: --calibration FILE.npz)")
        return self.calibration

    def remember(self, key: str, compute: Callable[[], T]) -> T:
        """compute(), once a key. The key must name everything the result depends on but the calibration."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]


@dataclass(frozen=True)
class PassResult:
    """A pass's outcome. `stats` are plain numbers or strings for the report, such as {"folded": 12}."""

    program: Program
    modified: bool
    stats: dict[str, Any] = field(default_factory=dict)


class Pass(abc.ABC):
    """Base of all passes; see the module text for the contract."""

    name: ClassVar[str]
    effect: ClassVar[Effect]
    #: Stages a pass accepts, and the stage it leaves (None: unchanged).
    accepts: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED, Stage.CANONICAL, Stage.COMPRESSED)
    leaves: ClassVar[Stage | None] = None
    #: Whether it refuses to run without calibration samples.
    needs_calibration: ClassVar[bool] = False
    #: Whether it refuses programs that compute values of 16 bits, and whether it makes such programs.
    float32_only: ClassVar[bool] = False
    leaves_half: ClassVar[bool] = False

    def requires(self, program: Program, context: PassContext) -> None:
        """Raises PassError where the program cannot be handled. Overriders call super()."""
        if program.stage not in self.accepts:
            stages = ", ".join(s.label for s in self.accepts)
            raise PassError(f"{self.name} takes a program in stage {stages}, but '{program.name}' is {program.stage.label}")
        half = half_node(program) if self.float32_only else None
        if half is not None:
            raise PassError(
                f"{self.name} computes in float32, but '{origin_of(half)}' of '{program.name}' is {str(dtype_of(half))[6:]}; "
                f"take the model in float32 (model.float()), and put cast-float behind {self.name} where it shall have 16 bits"
            )
        if self.needs_calibration:
            context.require_calibration(self.name)

    @abc.abstractmethod
    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrites `program` (a clone the pass owns). `modified` must be true exactly when something changed."""

    def ensures(self, result: PassResult, context: PassContext) -> None:  # noqa: B027 (optional)
        """Raises PassError where the result is not what the pass promises beyond its stage's spec."""


_PASSES: Registry[Pass] = Registry("pass", __package__ or "", entry_point_group="graphwright.passes")
register, registry, find = _PASSES.register, _PASSES.all, _PASSES.find
