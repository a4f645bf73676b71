"""`make demo`: the main job on real models and data.

EfficientNet-lite0 (published weights, real photographs) and the Fashion-MNIST MobileNetV2 (real labels) are compressed to
int8, measured beside ONNX Runtime, written as artifacts, and one of them is run by gw-run, without Python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from ..backends.loader import load
from ..ir.errors import GraphwrightError, OutputError
from . import zoo
from .bench import run_bench, table
from .progress import TerminalProgress

RUNNER = Path("build/x86_64/gw-run")
#: Model, evaluation samples.
MODELS = (("mobilenetv2", 10_000), ("efficientnet-lite0", 500))


def demo(folder: Path, console: Console) -> None:
    """Writes the artifacts and reports into `folder` and prints the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    for model, evaluate in MODELS:
        with TerminalProgress(Console(stderr=True)) as progress:
            bench = run_bench(model, ["ort", "ort-int8"], 2, 20, 512, evaluate, progress, keep=folder)
        console.print(table(bench))
        for peer, reason in bench.failures.items():
            console.print(f"{peer} did not run: {reason}", markup=False, highlight=False)
        console.print(f"artifact {folder / model}.gw, report {folder / model}.html\n")
    run_without_python(folder / "mobilenetv2.gw", console)


def run_without_python(artifact: Path, console: Console) -> None:
    """Runs one test image through gw-run and through Python, and requires equal bits."""
    sample = zoo.load("mobilenetv2").example_inputs[0].numpy()
    inputs, outputs = artifact.with_suffix(".input.npy"), artifact.with_suffix(".output.npy")
    np.save(inputs, sample)
    command = [str(RUNNER), str(artifact), "--input", str(inputs), "--output", str(outputs), "--repeat", "100"]
    console.print(f"without Python: {' '.join(command)}", highlight=False)
    done = subprocess.run(command, capture_output=True, text=True)
    console.print(done.stdout.strip(), highlight=False)
    if done.returncode:
        raise GraphwrightError(f"gw-run failed with status {done.returncode}: {done.stderr.strip()}")
    expected = np.asarray(load(artifact)(sample))
    if not np.array_equal(expected, np.load(outputs)):
        raise OutputError("gw-run and Python disagree")
    console.print(f"gw-run's {expected.size} logits equal Python's bit for bit; class {int(expected.argmax())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    try:
        demo(parser.parse_args().output, Console())
    except GraphwrightError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
