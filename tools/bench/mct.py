"""Mixed precision by Sony's Model Compression Toolkit (MCT) on a reference model, at a budget of weight bytes.

    python3.11 -m venv mct && mct/bin/pip install torch==2.13.0 torchvision==0.28.0 model-compression-toolkit
    python -m graphwright.tools.bench.mct --python mct/bin/python resnet20 --average-bits 4.5

MCT pins other versions of packages than graphwright does, so it runs in an environment of its own (mct_worker.py). It gets the
float network, our calibration samples and our evaluation samples, chooses weights of 8, 4 or 2 bits per layer with activations
of 8, and gives the network's outputs back; they are scored here.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.package.package_exporter import PackageExporter

from ...ir.errors import GraphwrightError
from .. import zoo
from .markdown import markdown

_WORKER = Path(__file__).with_name("mct_worker.py")


class MctError(GraphwrightError):
    """MCT's process failed."""


@dataclass(frozen=True)
class MctResult:
    """What MCT made of a model.

    Attributes:
        bits: of each quantized layer's weights, by its name in MCT's graph.
        weight_bytes: of all quantized weights at their bits; scales and biases, float in MCT, are not counted.
        average_bits: of a quantized weight.
        seconds: of MCT's scoring, search and quantization.
    """

    version: str
    score: float
    float_score: float
    bits: dict[str, int]
    weight_bytes: float
    average_bits: float
    seconds: float


def run_mct(
    python: Path, model: str, average_bits: float, samples: int, score_images: int, evaluate: int | None, threads: int
) -> MctResult:
    """MCT's mixed-precision post-training quantization of `model` to `average_bits` bits a weight.

    Args:
        python: the interpreter of an environment with our version of torch, its torchvision, and model-compression-toolkit.
        samples: calibration samples, ours.
        score_images: how many of them MCT compares outputs on per layer and bit width.
        evaluate: evaluation samples; None takes all.

    Raises:
        MctError: a model of several inputs, or MCT's process failed; the end of what it wrote is in the message.
    """
    reference = zoo.load(model)
    if len(reference.example_inputs) != 1:
        raise MctError(f"{model} has {len(reference.example_inputs)} inputs; the worker feeds networks of one input")
    with torch.inference_mode():
        float_score = reference.evaluate(lambda inputs: reference.model(*inputs), evaluate)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(reference, folder, samples, [inputs[0] for inputs, _ in reference.evaluation(evaluate)])
        settings = {"average_bits": average_bits, "score_images": score_images, "threads": threads}
        (folder / "settings.json").write_text(json.dumps(settings))
        done = subprocess.run([python, "-P", _WORKER, folder], capture_output=True, text=True, check=False)
        if done.returncode:
            raise MctError(f"MCT in {python} ended with {done.returncode}: ...{(done.stderr or done.stdout)[-1500:]}")
        result = json.loads((folder / "result.json").read_text())
        with np.load(folder / "outputs.npz") as stored:
            outputs = iter([torch.from_numpy(stored[key]) for key in stored.files])
    score = reference.evaluate(lambda _: next(outputs), evaluate)
    layers = result["layers"]
    weights = sum(layer["weights"] for layer in layers)
    stored_bits = sum(layer["weights"] * layer["bits"] for layer in layers)
    bits = {layer["name"]: layer["bits"] for layer in layers}
    return MctResult(result["version"], score, float_score, bits, stored_bits / 8, stored_bits / weights, result["seconds"])


def export(reference: zoo.ReferenceModel, folder: Path, samples: int, evaluation: Sequence[torch.Tensor]) -> None:
    """model.pt (code and weights in one archive), calibration.npz and evaluation.npz, one array a batch."""
    with warnings.catch_warnings(), PackageExporter(folder / "model.pt") as exporter:
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)  # torch.package's own use of it
        exporter.intern("graphwright.**")
        exporter.extern("**")
        exporter.save_pickle("model", "model.pkl", reference.model)
    np.savez(folder / "calibration.npz", *[inputs[0].numpy() for inputs in reference.calibration(samples)])
    np.savez(folder / "evaluation.npz", *[batch.numpy() for batch in evaluation])


def main(
    model: Annotated[str, typer.Argument(help="A reference model with one input.")],
    python: Annotated[Path, typer.Option(help="Interpreter of the environment that has MCT.")],
    average_bits: Annotated[float, typer.Option(help="Weight bits on average, 2 to 8.")] = 4.5,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 512,
    score_images: Annotated[int, typer.Option(help="Samples MCT scores bit widths on (its default: 32).")] = 32,
    evaluate: Annotated[int, typer.Option(help="Evaluation samples; 0: all.")] = 0,
    threads: int = 1,
) -> None:
    """MCT's mixed precision: score, bits of each layer, weight bytes and time."""
    try:
        result = run_mct(python, model, average_bits, samples, score_images, evaluate or None, threads)
    except GraphwrightError as error:
        raise SystemExit(f"error: {error}") from error
    typer.echo(markdown(["layer", "bits"], [[name, str(bits)] for name, bits in result.bits.items()]))
    head = ["system", "float", "score", "average bits", "weight bytes", "time (s)"]
    row = [f"MCT {result.version}", f"{result.float_score:.4f}", f"{result.score:.4f}", f"{result.average_bits:.3f}"]
    typer.echo("\n" + markdown(head, [[*row, f"{result.weight_bytes:,.0f}", f"{result.seconds:.0f}"]]))


if __name__ == "__main__":
    typer.run(main)
