"""What sparsity costs in accuracy, and what it saves in the artifact.

python -m graphwright.tools.bench.sparsity accuracy gpt-small --level 0.5
python -m graphwright.tools.bench.sparsity storage gpt-small --level 0.5
python -m graphwright.tools.bench.sparsity decode

Weights are chosen on calibration data, scores are of evaluation data that no pass has seen; no fine-tuning.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Annotated

import torch
import typer

from ...backends.base import example_inputs
from ...backends.registry import backend_for
from ...backends.target import Target
from ...ir.capture import capture
from ...ir.data import Calibration
from ...ir.errors import OptionError, UnknownNameError
from ...ir.program import Program, origin_of
from ...passes.base import PassContext
from ...passes.manager import PassManager, parameter_bytes
from ...passes.pipeline import parse
from ...passes.sparsify.base import sparse_layers
from ...passes.sparsify.magnitude import lamp
from ...search.sparsity import allocate
from ..predict import program_predict
from ..progress import TerminalProgress
from ..sources import Source, resolve
from ..zoo import Metric, perplexity
from .markdown import machine, markdown

app = typer.Typer(no_args_is_help=True, add_completion=False)

#: Method -> pass and further options. `METHOD+lamp` and `METHOD+dp` give each layer a sparsity of its own.
METHODS = {
    "magnitude": ("sparsify-magnitude", ""),
    "wanda": ("sparsify-wanda", ""),
    "dsnot-magnitude": ("sparsify-dsnot", "start=magnitude"),
    "dsnot-wanda": ("sparsify-dsnot", "start=wanda"),
    "sparsegpt": ("sparsify-sparsegpt", ""),
    "chita": ("sparsify-chita", ""),
}

#: Ways to the artifact whose sizes and times are compared.
ROADS = {"float": "", "int8": "smooth-quant,quantize,lower-integer"}


def sparsify(method: str, level: str, program: Program, calibration: Calibration) -> str:
    """The pass that makes a canonical program sparse by one method, as text.

    Raises:
        UnknownNameError: no such method or allocation. OptionError: an allocation of a pattern, which leaves nothing to allocate.
    """
    method, _, allocation = method.partition("+")
    if method not in METHODS or allocation not in ("", "lamp", "dp"):
        raise UnknownNameError("method", f"{method}+{allocation}".rstrip("+"), [*METHODS, *(f"{m}+lamp" for m in METHODS)])
    name, options = METHODS[method]
    amount = f'pattern="{level}"' if ":" in level else f"sparsity={level}"
    if allocation:
        if ":" in level:
            raise OptionError(f"pattern {level} fixes the sparsity of every layer; '+{allocation}' has nothing to allocate")
        make = allocate if allocation == "dp" else lamp_rules
        amount = "layers=[" + ",".join(f'"{rule}"' for rule in make(program, calibration, float(level))) + "]"
    return f"{name}{{{','.join(filter(None, (amount, options)))}}}"


def lamp_rules(program: Program, _calibration: Calibration, sparsity: float) -> list[str]:
    """LAMP's allocation as rules that every sparsity pass takes."""
    layers = sparse_layers(program)
    shares = lamp([layer.weight.detach() for layer in layers], sparsity)
    return [f"{origin_of(layer.node)}={share:.6f}" for layer, share in zip(layers, shares, strict=True)]


def prepare(model: str, samples: int) -> tuple[Source, Program, Calibration]:
    source = resolve(model)
    program = PassManager().run(source.program, parse("canonicalize")).program
    return source, program, Calibration.for_program(program, source.calibration(None, samples) or [])


@app.command()
def accuracy(
    model: str,
    level: Annotated[list[str] | None, typer.Option(help="sparsity, or a pattern such as 2:4; several are allowed")] = None,
    method: Annotated[list[str] | None, typer.Option(help=", ".join(METHODS) + "; with +lamp or +dp")] = None,
    samples: Annotated[int, typer.Option(help="calibration samples")] = 64,
    evaluate: Annotated[int, typer.Option(help="evaluation samples; 0: all")] = 0,
    permute: Annotated[bool, typer.Option("--permute", help="permute channels before a pattern")] = False,
) -> None:
    """Score of a model by method and level."""
    source, program, calibration = prepare(model, samples)
    typer.echo(f"\n{model}, {len(calibration)} calibration samples, {evaluate or 'all'} evaluation samples; {machine()}\n")
    first = ["dense", "", _score(source, program, evaluate), ""]
    typer.echo(markdown(["level", "method", _heading(source), "seconds"], [first]))
    with TerminalProgress() as progress:
        cases = itertools.product(level or ["0.5"], method or list(METHODS))
        for label, name, sparse, seconds in _sparse(program, calibration, cases, permute, progress):
            row = label, name, _score(source, sparse, evaluate), f"{seconds:.0f}"
            typer.echo(f"| {' | '.join(row)} |")  # at once: a run that is stopped leaves its rows


def _sparse(
    program: Program, calibration: Calibration, cases: Iterable[tuple[str, str]], permute: bool, progress: TerminalProgress
) -> Iterator[tuple[str, str, Program, float]]:
    """(level, method, sparse program, processor seconds) for cases (level, method)."""
    for level, method in cases:
        start = time.process_time()
        text = sparsify(method, level, program, calibration)
        if permute and ":" in level:
            text = f'permute-channels{{pattern="{level}"}},{text}'
            method = f"{method}, permuted"
        result = PassManager().run(program, parse(text), PassContext(calibration, progress=progress))
        yield level, method, result.program, time.process_time() - start


def _heading(source: Source) -> str:
    reference = source.reference
    assert reference is not None
    return "perplexity" if reference.metric_name == Metric.LOG_LIKELIHOOD else reference.metric_name


def _score(source: Source, program: Program, count: int) -> str:
    evaluate = source.evaluate(count or None)
    assert evaluate is not None
    score = evaluate(program_predict(program))
    return f"{perplexity(score):.2f}" if _heading(source) == "perplexity" else f"{100 * score:.2f}"


@app.command()
def storage(
    model: str,
    level: Annotated[list[str] | None, typer.Option(help="sparsity, or a pattern such as 2:4; several are allowed")] = None,
    samples: Annotated[int, typer.Option(help="calibration samples")] = 16,
    turns: Annotated[int, typer.Option(help="turns of ten timed runs of each artifact")] = 5,
) -> None:
    """Bytes and time of artifacts with and without zeros, float and int8. By magnitude: which weights go changes neither."""
    _, program, calibration = prepare(model, samples)
    target = Target.parse("cpu")
    backend = backend_for(target)
    rows = []
    for road, passes in ROADS.items():
        for text in level or ["0.5"]:
            made = []
            for last in ("", "compress-sparse"):
                steps = filter(None, (sparsify("magnitude", text, program, calibration), passes, last))
                result = PassManager().run(program, parse(",".join(steps)), PassContext(calibration)).program
                made.append((result, backend.compile(result, target)))
            # Medians of ten; the least of several turns, for other work on the machine only ever adds.
            times = [1e9] * len(made)
            for _ in range(turns):
                for index, (result, compiled) in enumerate(made):
                    times[index] = min(times[index], backend.latency(compiled, example_inputs(result), 10))
            (dense, full), (sparse, small) = made
            rows.append(
                [
                    road, text, f"{parameter_bytes(dense) / 1e6:.2f}", f"{parameter_bytes(sparse) / 1e6:.2f}",
                    f"{len(full.library) / 1e6:.2f}", f"{len(small.library) / 1e6:.2f}",
                    f"{times[0]:.3f}", f"{times[1]:.3f}",
                ]
            )  # fmt: skip
    typer.echo(f"\n{model}; {machine()}\n")
    head = ["weights", "level", "parameters (MB)", "compressed", "library (MB)", "compressed", "run (ms)", "compressed"]
    typer.echo(markdown(head, rows))


@app.command()
def decode(
    width: Annotated[int, typer.Option(help="inputs and outputs of the layers")] = 1024,
    rows: Annotated[list[int] | None, typer.Option(help="rows of activations")] = None,
    level: Annotated[str, typer.Option(help="sparsity")] = "0.5",
) -> None:
    """Time of the decoders beside that of the linear layers they serve, in place, one thread."""
    backend, body = backend_for(Target.parse("cpu")), []
    for count, (road, passes) in itertools.product(rows or [1, 256], {"float": "", "int8": "quantize,lower-integer"}.items()):
        model, inputs = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4))), torch.randn(count, width)
        program = capture(model.eval(), inputs)
        context = PassContext(Calibration.for_program(program, [inputs]))
        steps = filter(None, ("canonicalize", f"sparsify-magnitude{{sparsity={level}}}", passes, "compress-sparse"))
        compiled = backend.compile(PassManager().run(program, parse(",".join(steps)), context).program, Target.parse("cpu"))
        least: dict[str, float] = {"expand": math.inf, "linear": math.inf}
        for _ in range(6):
            times = backend.profile(compiled, [inputs], 15, threads=1).microseconds
            for kernel, spent in zip(compiled.kernels, times, strict=True):
                name = kernel.name.partition("_")[0]
                least |= {name: min(least[name], spent)} if name in least else {}
        body.append([road, str(count), f"{least['expand']:.0f}", f"{least['linear']:.0f}"])
    typer.echo(f"\n{width}x{width}, sparsity {level}, one thread; {machine()}\n")
    typer.echo(markdown(["weights", "rows", "decoding (us)", "layer (us)"], body))


if __name__ == "__main__":
    app()
