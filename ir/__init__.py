"""The intermediate representation: programs, their dialect, capture, verification and printing."""

from .capture import capture
from .data import Calibration
from .errors import GraphwrightError
from .printer import print_program
from .program import Program, Stage, TensorSpec
from .verify import verify

__all__ = ["Calibration", "GraphwrightError", "Program", "Stage", "TensorSpec", "capture", "print_program", "verify"]
