"""Bit-exactness on a GPU: int8 artifacts beside what the torch reference made of the same inputs elsewhere.

    python -m graphwright.tools.bench.cuda_exact prepare resnet20 minilm-l6 -n 1000 -o folder     # where the compiler is
    python -m graphwright.tools.bench.cuda_exact check folder --json rows.jsonl                   # where the GPU is

EfficientNet-lite0 takes windows of photographs at their own resolution, which travel as the photographs and make the same floats
on every machine; the other models' inputs travel as they are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from ...ir.errors import TargetError

app = typer.Typer(add_completion=False, no_args_is_help=True)

#: Samples that the reference computes at once.
CHUNK = 20
WINDOW, SEED = 224, 7


def windows(photographs: Sequence[np.ndarray], count: int) -> np.ndarray:
    """`count` windows of (H, W, 3) uint8 photographs as EfficientNet-lite0 reads them, [count, 3, 224, 224] float32, half of them
    mirrored. Subtracting 127 and dividing by 128 is exact."""
    rng = np.random.default_rng(SEED)
    out = np.empty((count, 3, WINDOW, WINDOW), np.float32)
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        top, left = (int(rng.integers(0, size - WINDOW + 1)) for size in photograph.shape[:2])
        window = photograph[top : top + WINDOW, left : left + WINDOW]
        window = window[:, ::-1] if rng.integers(2) else window
        out[index] = (window.transpose(2, 0, 1).astype(np.float32) - 127.0) / 128.0
    return out


def inputs_of(arrays: Any) -> list[np.ndarray]:
    """One array an input, samples first, from the file that `prepare` wrote."""
    pixels = [arrays[name] for name in sorted(arrays.files) if name.startswith("photograph")]
    if pixels:
        return [windows(pixels, int(arrays["count"]))]
    return [arrays[name] for name in sorted(arrays.files) if name.startswith("x")]


@app.command()
def prepare(
    models: list[str],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for artifacts, inputs and reference outputs.")],
    samples: Annotated[int, typer.Option("--samples", "-n")] = 1000,
    target: str = "cuda:sm_90",
) -> None:
    """Compiles each model for one sample in int8, and runs the torch reference on `samples` inputs."""
    from ...ir.batch import with_batch  # these bring the compiler, which `check` does without
    from ..optimize import optimize
    from ..progress import TerminalProgress
    from ..quick import quick_program
    from ..sources import resolve
    from ..zoo.photographs import EVALUATION_PHOTOGRAPHS, read_photograph
    from .exactness import take_samples

    out.mkdir(parents=True, exist_ok=True)
    with TerminalProgress() as progress:
        for model in models:
            source = resolve(model, dynamic_batch=True)
            program = quick_program(source, "int8", progress)
            arrays: dict[str, Any]
            if model == "efficientnet-lite0":
                photographs = [read_photograph(*p).permute(1, 2, 0).numpy() for p in EVALUATION_PHOTOGRAPHS]
                arrays = {f"photograph{i}": photograph for i, photograph in enumerate(photographs)} | {"count": samples}
                inputs = [windows(photographs, samples)]
            else:
                columns = zip(*take_samples(source, samples)[0], strict=True)
                inputs = [torch.cat(column).numpy() for column in columns]
                arrays = {f"x{i}": x for i, x in enumerate(inputs)}
            artifact = optimize(with_batch(program, 1), target=target, pipeline="", measure=False, progress=progress).artifact
            artifact.save(out / f"{model}.exact.gw", overwrite=True)
            chunked = with_batch(program, CHUNK)
            found = []
            for start in range(0, samples, CHUNK):
                progress(start, samples, f"reference of {model}")
                found.append(chunked(*[torch.from_numpy(x[start : start + CHUNK]) for x in inputs]))
            outputs = [torch.cat(column).numpy() for column in zip(*found, strict=True)]
            named: dict[str, Any] = {**arrays, **{f"y{i}": y for i, y in enumerate(outputs)}}
            np.savez_compressed(out / f"{model}.exact.npz", **named)


@app.command()
def check(
    folder: Path,
    json_file: Annotated[Path | None, typer.Option("--json", help="Rows, one a line, written as they are found.")] = None,
) -> None:
    """Runs every artifact of FOLDER on this machine's GPU, and counts the samples whose outputs have the reference's bits."""
    if not torch.cuda.is_available():
        raise TargetError("PyTorch finds no GPU here; `prepare` runs anywhere, `check` where the GPU is")
    for path in sorted(folder.glob("*.exact.gw")):
        row: dict[str, Any] = {"exact": path.name.removesuffix(".exact.gw"), "gpu": torch.cuda.get_device_name()}
        start = time.perf_counter()
        try:
            results = list(_compared(path))
            row |= {"samples": len(results), "equal": sum(results)}
        except Exception as error:  # the other models are still compared
            row["error"] = f"{type(error).__name__}: {error}"[-400:]
        line = json.dumps(row | {"seconds": round(time.perf_counter() - start, 1)})
        print(line, flush=True)
        if json_file is not None:
            with json_file.open("a") as stream:
                stream.write(line + "\n")


def _compared(path: Path) -> Iterator[bool]:
    """For each sample, whether every output of the artifact has the reference's bits."""
    from ...backends.loader import load

    model, arrays = load(path), np.load(path.with_suffix(".npz"))
    inputs = inputs_of(arrays)
    expected = [arrays[name] for name in sorted(arrays.files) if name.startswith("y")]
    for index in range(len(expected[0])):
        outputs = model(*[torch.from_numpy(x[index : index + 1]).cuda() for x in inputs])
        found = outputs if isinstance(outputs, tuple) else (outputs,)
        yield all(a.cpu().numpy().tobytes() == b[index : index + 1].tobytes() for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    app()
