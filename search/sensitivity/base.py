"""The scorer contract.

A scorer is a frozen dataclass whose fields are its options and whose kebab-case `name` is its name in text, written like a pass:
`hessian-trace{probes=32}`. It turns a float program, samples and the choices of each layer into a table of expected losses with
a confidence interval. Scores of one scorer are comparable with each other and add up over layers; solvers need no more.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from ...ir.data import Calibration
from ...ir.errors import CalibrationError, DataError
from ...ir.program import Program
from ...ir.registry import Registry
from ...passes.pipeline import pass_text
from ...passes.quantize.codebooks import Codebook
from ...passes.quantize.encoding import Encoding
from ..store import Store


@dataclass(frozen=True)
class Layer:
    """A layer whose weight can be written in several formats.

    Attributes:
        origin: its name in plans.
        node: the convolution or linear node of the scored program.
        weight: float, (C, ...), output channels first.
        encodings: format name -> encoding or codebook of the weight in it, by the quantizer the pipeline will use.
    """

    origin: str
    node: fx.Node
    weight: torch.Tensor
    encodings: dict[str, Encoding | Codebook]

    def rounded(self, choice: str) -> torch.Tensor:
        """The weight after rounding to the format `choice`, float32."""
        encoding = self.encodings[choice]
        return encoding.dequantize(encoding.quantize(self.weight))


@dataclass(frozen=True)
class Task:
    """What a scorer works on.

    Attributes:
        program: float and canonical; a scorer must not write into it.
        layers: in graph order.
        choices: format names; every layer has all of them.
        samples: calibration inputs, or None.
        labels: integer classes, one row of the batch each: (rows, ...) or (samples, batch, ...), or None.
        store: where partial results are kept; `key` names this program, samples and choices in it.
        progress: called as progress(done, total, what).
    """

    program: Program
    layers: tuple[Layer, ...]
    choices: tuple[str, ...]
    samples: Calibration | None = None
    labels: torch.Tensor | None = None
    store: Store = field(default_factory=Store)
    key: str = ""
    seed: int = 0
    progress: Callable[[int, int, str], None] = lambda done, total, what: None


@dataclass(frozen=True)
class Scores:
    """loss[layer][choice] with the half-width of its 95% confidence interval, both (layers, choices) float64.

    `half_width` is 0 where a score does not depend on samples, and infinite (null in JSON) where one sample says nothing about
    the spread. `count` is the number of samples behind the scores.
    """

    scorer: str
    layers: tuple[str, ...]
    choices: tuple[str, ...]
    loss: np.ndarray
    half_width: np.ndarray
    count: int
    seconds: float = 0.0
    #: (i, j) -> (choices, choices): loss on top of the sum where both layers are quantized; scorers of single layers have none.
    pairs: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "scorer": self.scorer,
            "layers": list(self.layers),
            "choices": list(self.choices),
            "loss": self.loss.tolist(),
            "half_width": [[w if math.isfinite(w) else None for w in row] for row in self.half_width.tolist()],
            "count": self.count,
            "seconds": self.seconds,
            "pairs": [[i, j, table.tolist()] for (i, j), table in self.pairs.items()],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scores:
        return cls(
            data["scorer"],
            tuple(data["layers"]),
            tuple(data["choices"]),
            np.array(data["loss"], dtype=np.float64),
            np.array([[np.inf if w is None else w for w in row] for row in data["half_width"]], dtype=np.float64),
            data["count"],
            data["seconds"],
            {(i, j): np.array(table, dtype=np.float64) for i, j, table in data["pairs"]},
        )

    def uncertain(self) -> list[str]:
        """Layers whose interval reaches so far that the order of the layers is open: wider than the score itself."""
        wide = np.any(self.half_width > np.abs(self.loss), axis=1)
        return [name for name, flag in zip(self.layers, wide, strict=True) if flag]


class Scorer(abc.ABC):
    """Base of all scorers; see the module text."""

    name: ClassVar[str]
    needs_samples: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    #: What is scored: the formats of `weights`, or of `activations` (`analyze` shows them; a bit search chooses weights).
    of: ClassVar[str] = "weights"

    @abc.abstractmethod
    def score(self, task: Task) -> Scores:
        """Raises CalibrationError or DataError where samples or labels are missing (`require`)."""

    @property
    def wants_labels(self) -> bool:
        """Whether it needs labels with the options chosen."""
        return self.needs_labels

    def require_labels(self, labels: torch.Tensor | None) -> None:
        """Raises DataError where labels are needed and missing; to be asked before anything runs on the samples."""
        if labels is not None or not self.wants_labels:
            return
        always = [name for name, cls in registry().items() if cls.needs_labels]
        raise DataError(
            f"scorer {pass_text(self)} needs a label for each calibration sample: give labels=... (CLI: --labels FILE.npy), or "
            f"take another. Labels are needed by {', '.join(always)} and wherever loss=labels is asked for; not by "
            + ", ".join(name for name in registry() if name not in always)
        )

    def require(self, task: Task) -> None:
        if self.needs_samples and task.samples is None:
            raise CalibrationError(
                f"scorer {self.name} needs calibration samples; without any there are: "
                + ", ".join(n for n, c in registry().items() if not c.needs_samples)
            )
        self.require_labels(task.labels)


_SCORERS: Registry[Scorer] = Registry("scorer", __package__ or "")
register, registry, find = _SCORERS.register, _SCORERS.all, _SCORERS.find
