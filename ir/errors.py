"""Every error graphwright raises on purpose. Each message names the culprit and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphwrightError(Exception):
    """Root of the typed errors; the CLI prints these without a traceback."""


class CaptureError(GraphwrightError):
    """The model cannot be turned into a Program (control flow, a broken file, an untrusted container)."""


class UnsupportedOpError(CaptureError):
    """An operator no importer or lowering rule covers. Names the op, the node, where it came from and near relatives."""


class VerificationError(GraphwrightError):
    """A Program breaks the rules of its stage. Names the node, its origin and the rule."""


class PassError(GraphwrightError):
    """A pass failed or broke its declared contract."""


class PassContractError(PassError):
    """A pass did not do what it declares: wrong values, changed interface, or a lie about `modified`."""


class PipelineSyntaxError(GraphwrightError):
    """A pipeline text that does not parse; the message points at the position."""


class UnknownNameError(GraphwrightError):
    """A name (pass, option, target, model, observer) that does not exist; carries the nearest known one."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        super().__init__(f"unknown {kind} '{name}'; {hint}known: {', '.join(known) or '(none)'}")
        self.kind, self.name, self.known = kind, name, known


class OptionError(GraphwrightError):
    """An option with a value of the wrong type or out of range."""


class DataError(GraphwrightError):
    """Calibration or evaluation data that cannot be used: wrong shape, empty, NaN, or a missing data set."""


class CalibrationError(DataError):
    """Calibration samples that do not fit the model."""


class TargetError(GraphwrightError):
    """A target string that does not parse, or that this build of TVM cannot emit."""


class ArtifactError(GraphwrightError):
    """An artifact that is damaged, truncated, of another version, or built for another machine."""


class TuningError(GraphwrightError):
    """A tuning database that cannot be read; names the file and the line."""


class BoardError(GraphwrightError):
    """A board for measurements that cannot be reached, or was lost; names the tracker, the key and what to start."""


class OutputError(GraphwrightError):
    """An output path that cannot be written or already holds something else."""
