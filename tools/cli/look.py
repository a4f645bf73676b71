"""Verbs that look at models, artifacts and targets: inspect, run, runner, targets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ...ir.errors import OptionError
from .options import Overwrite, Shapes, app, check_outputs, out

if TYPE_CHECKING:
    from ...ir.program import Program


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A model, or an artifact (.gw).")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    input_shape: Shapes = [],  # noqa: B006
    blocks: Annotated[
        bool, typer.Option("--blocks", help="The residual blocks that remove-blocks and share-blocks name.")
    ] = False,
    groups: Annotated[bool, typer.Option("--groups", help="What pruning could cut, and what pins the rest.")] = False,
) -> None:
    """Print a model's program, what pruning could take from it, or an artifact's manifest and certificate."""
    if groups and blocks:
        raise OptionError("--groups and --blocks are two listings: ask for one at a time")
    if path.endswith(".gw"):
        if groups or blocks:
            asked = "--groups" if groups else "--blocks"
            raise OptionError(f"{asked} looks at models, and '{path}' is an artifact: give the model that it was made from")
        from ...backends.artifact import Artifact

        artifact = Artifact.load(path)
        manifest = artifact.manifest.model_dump()
        if as_json:
            typer.echo(json.dumps({"manifest": manifest, "certificate": artifact.certificate}, indent=2))
            return
        out.print_json(json.dumps(manifest))
        table = Table("pass", "effect", "max |diff|", "stage", title="certificate")
        for row in artifact.certificate:
            table.add_row(row["text"], row["effect"], f"{row['max_abs']:.3g}", row["stage"])
        out.print(table)
        return
    from ...ir.printer import print_program
    from ..sources import parse_shapes, resolve

    program = resolve(path, parse_shapes(input_shape)).program
    if groups or blocks:
        (_print_groups if groups else _print_blocks)(_canonical(program), as_json)
        return
    if as_json:
        ops: dict[str, int] = {}
        for node in program.nodes:
            if node.op == "call_function":
                ops[str(node.target)] = ops.get(str(node.target), 0) + 1
        specs = {"inputs": [str(s) for s in program.input_specs], "outputs": [str(s) for s in program.output_specs]}
        typer.echo(json.dumps({"name": program.name, "stage": program.stage.label, **specs, "ops": ops}, indent=2))
        return
    out.print(print_program(program), markup=False, highlight=False, soft_wrap=True)


def _canonical(program: Program) -> Program:
    """The program as pruning sees it."""
    from ...ir.program import Stage
    from ...passes.manager import PassManager
    from ...passes.pipeline import parse

    return PassManager().run(program, parse("canonicalize")).program if program.stage is Stage.CAPTURED else program


def _print_blocks(program: Program, as_json: bool) -> None:
    """The residual blocks, layers and the branches in them."""
    from ...passes.prune.blocks import blocks_text, find_blocks

    if not as_json:
        out.print(blocks_text(program), markup=False, highlight=False, soft_wrap=True)
        return
    found = find_blocks(program)
    rows = [
        {"name": block.name, "unit": unit, "entry": block.entry.name, "exit": block.exit.name, "nodes": len(block.nodes)}
        for unit, blocks in (("layer", found.layers), ("branch", found.branches))
        for block in blocks
    ]
    typer.echo(json.dumps(rows, indent=2))


def _print_groups(program: Program, as_json: bool) -> None:
    """Every group with its members."""
    from ...passes.prune.coupling import coupled_groups

    found = coupled_groups(program)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(group) for group in found], indent=2))
        return
    for group in found:
        out.print(str(group), markup=False, highlight=False, soft_wrap=True)
    pinned = sum(1 for group in found if group.pinned)
    out.print(f"groups that can be cut: {len(found) - pinned}, pinned: {pinned}", highlight=False)


@app.command()
def run(
    artifact: Annotated[Path, typer.Argument(help="An artifact (.gw).")],
    inputs: Annotated[Path, typer.Option("--input", "-i", help=".npz (one array an input) or .npy.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help=".npz to write; none: print a summary.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Run an artifact on inputs from a file."""
    import io

    import numpy as np

    from ...backends.loader import load
    from ...ir.files import write_atomically
    from ..sources import read_arrays

    check_outputs((artifact, inputs), (output,), overwrite)
    model = load(artifact)
    arrays = read_arrays(inputs, [entry.name for entry in model.inputs], model.manifest.name)
    results = model(*arrays)
    results = results if isinstance(results, tuple) else (results,)
    if output is None:
        for index, value in enumerate(results):
            flat = np.asarray(value).ravel()
            out.print(
                f"output {index}: {value.dtype}{list(value.shape)} first {flat[:8]} argmax {int(flat.argmax())}", highlight=False
            )
        return
    buffer = io.BytesIO()
    named: dict[str, Any] = {f"output{i}": v for i, v in enumerate(results)}
    np.savez(buffer, **named)
    write_atomically(output, buffer.getvalue())


@app.command()
def runner(
    arch: Annotated[str, typer.Argument(help="x86_64 or aarch64: the machine that will run artifacts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for gw-run and the two libraries it loads.")],
) -> None:
    """Build gw-run, which runs artifacts without Python. Copy its folder to the machine as it is."""
    from ...ir.errors import UnknownNameError
    from ..runner import ARCHITECTURES, build_runner

    if arch not in ARCHITECTURES:
        raise UnknownNameError("architecture", arch, ARCHITECTURES)
    build_runner(arch, output)
    out.print(f"{output / 'gw-run'} runs on {arch} machines, with no Python", highlight=False, markup=False)


@app.command()
def targets() -> None:
    """List targets: what this build can emit, what this machine can run, and what is missing for the rest."""
    from ...backends.tvm.backend import TVMBackend

    table = Table("target", "emits", "runs here", "missing")
    for info in TVMBackend().targets():
        table.add_row(str(info.target), "yes" if info.emits else "no", "yes" if info.runs else "no", escape(info.missing))
    out.print(table)
