"""Run by test_distill in a process that it kills: a training run with checkpoints and a pause at every step."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from graphwright.passes.recover import training

from .test_distill import context_of, distilled, program_of

if __name__ == "__main__":
    training.CHECKPOINT_SECONDS = 0.1
    program = program_of()
    context = context_of(program, checkpoints=Path(sys.argv[1]))
    context.progress = lambda step, total, what: time.sleep(0.1)
    distilled(program, context)
