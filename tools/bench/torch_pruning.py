"""Channel pruning by Torch-Pruning on a reference model, at a budget of multiply-accumulates.

    python3.11 -m venv tp && tp/bin/pip install torch==2.13.0 torch-pruning

It runs in an environment of its own (torch_pruning_worker.py), gets the float network with its batch normalizations, our
calibration samples and our evaluation samples, prunes with each of its criteria, in every layer alike and globally, and gives
outputs back; they are scored here. No fine-tune follows; every pruned network is scored as it comes and with its batch
normalizations' statistics taken anew from the calibration samples.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...ir.errors import GraphwrightError
from ...ir.load import load_program
from ...ir.program import Program
from .. import zoo
from .mct import export

_WORKER = Path(__file__).with_name("torch_pruning_worker.py")

IMPORTANCES = ("magnitude", "l1", "lamp", "fpgm", "bn-scale", "taylor", "random")


class TorchPruningError(GraphwrightError):
    """Torch-Pruning's process failed."""


@dataclass(frozen=True)
class Pruned:
    """One network that Torch-Pruning made.

    Attributes:
        method: criterion, `global` or `uniform`, and whether batch-norm statistics were taken anew.
        share: of the float network's multiply-accumulates.
        outputs: for each evaluation batch.
        program: the network itself, batch 1, where it was asked for.
    """

    method: str
    share: float
    seconds: float
    outputs: tuple[torch.Tensor, ...]
    program: Program | None


def run_torch_pruning(
    python: Path,
    model: str,
    share: float,
    samples: int,
    evaluation: Sequence[torch.Tensor],
    importances: Sequence[str] = IMPORTANCES,
    programs: bool = False,
    threads: int = 1,
) -> tuple[str, list[Pruned]]:
    """Torch-Pruning's version, and every network it makes of `model` at `share` of the multiply-accumulates.

    Raises:
        TorchPruningError: its process failed; the end of what it wrote is in the message.
    """
    reference = zoo.load(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(reference, folder, samples, evaluation)
        settings = {"share": share, "importances": list(importances), "programs": programs, "threads": threads}
        (folder / "settings.json").write_text(json.dumps(settings))
        done = subprocess.run([python, "-P", _WORKER, folder], capture_output=True, text=True, check=False)
        if done.returncode:
            raise TorchPruningError(
                f"Torch-Pruning in {python} ended with {done.returncode}: ...{(done.stderr or done.stdout)[-1500:]}"
            )
        result = json.loads((folder / "result.json").read_text())
        found = []
        for index, row in enumerate(result["rows"]):
            with np.load(folder / f"outputs-{index}.npz") as stored:
                outputs = tuple(torch.from_numpy(stored[key]) for key in stored.files)
            words = [
                row["importance"],
                "global" if row["global"] else "uniform",
                *(["new statistics"] if row["statistics"] else []),
            ]
            program = load_program(folder / f"model-{index}.pt2") if programs else None
            found.append(Pruned(", ".join(words), row["share"], row["seconds"], outputs, program))
    return result["version"], found
