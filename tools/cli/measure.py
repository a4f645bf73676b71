"""Verbs that measure: bench and tune."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from ...ir.errors import OptionError
from .options import DryRun, ModelArgument, Overwrite, Samples, app, check_outputs, err, out, settings

if TYPE_CHECKING:
    from ...backends.target import Target
    from ...backends.tvm.tuning.board import Board


@app.command()
def bench(
    model: ModelArgument,
    peers: Annotated[
        str,
        typer.Option(help="Comma-separated: ort, ort-int8, ort-dynamic, openvino[-f32, -bf16, -nncf], torch-compile."),
    ] = "",
    threads: Annotated[int, typer.Option(min=1, help="Threads of every system.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved timing rounds.")] = 20,
    samples: Samples = 512,
    evaluate: Annotated[int, typer.Option(min=0, help="Evaluation samples; 0: all.")] = 0,
    profile: Annotated[bool, typer.Option("--profile", help="Instead: time of every kernel beside its floor.")] = False,
    precision: Annotated[
        str,
        typer.Option(help="Of our artifacts beside float32, comma-separated: int8, bfloat16, float16. Of the profiled program."),
    ] = "int8",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the rows.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Measure accuracy and latency of float, ours and peers in one interleaved run, or profile our program kernel by kernel."""
    from ...ir.files import write_atomically
    from ..bench import check_peers, run_bench, table
    from ..progress import TerminalProgress
    from ..quick import check_precision
    from ..sources import resolve

    check_outputs((model,), (as_json,), overwrite)
    if profile:
        _profile(model, precision, threads, rounds, as_json, dry_run)
        return
    names = [p for p in peers.split(",") if p]
    check_peers(names)
    precisions = [p for p in precision.split(",") if p]
    for name in precisions:
        check_precision(name)
    settings(
        "bench",
        model=model,
        precisions=", ".join(("float32", *precisions)),
        peers=", ".join(names) or "none",
        threads=threads,
        rounds=rounds,
        evaluate=evaluate or "all",
    )
    if dry_run:
        resolve(model)
        err.print("dry run: nothing was measured or written")
        return
    with TerminalProgress(err) as progress:
        result = run_bench(model, names, threads, rounds, samples, evaluate or None, progress, precisions=precisions)
    out.print(table(result))
    for peer, reason in result.failures.items():
        err.print(f"{peer} did not run: {reason}", markup=False, highlight=False)
    if as_json is not None:
        write_atomically(as_json, (json.dumps([dataclasses.asdict(r) for r in result.rows], indent=2) + "\n").encode())


def _profile(model: str, precision: str, threads: int, rounds: int, as_json: Path | None, dry_run: bool) -> None:
    from ...ir.files import write_atomically
    from ..bench import profile as bench_profile
    from ..progress import TerminalProgress
    from ..quick import check_precision

    check_precision(precision)
    settings("profile", model=model, precision=precision, threads=threads, runs=rounds * bench_profile.RUNS_A_ROUND)
    if dry_run:
        err.print("dry run: nothing was measured or written")
        return
    with TerminalProgress(err) as progress:
        found = bench_profile.profile_model(model, precision, threads, rounds, progress)
    wide = Console(width=max(out.width, 120))  # one line a kernel, also where the output is no terminal
    for columns, rows in (
        (bench_profile.STEP_COLUMNS, bench_profile.step_rows(found)),
        (bench_profile.KIND_COLUMNS, bench_profile.kind_rows(found)),
    ):
        table = Table(*(Column(name, justify="left" if i < 2 else "right") for i, name in enumerate(columns)))
        for row in rows:
            table.add_row(*row)
        wide.print(table)
    out.print(
        f"one run: {found.total / 1e3:.3f} ms (median), floor of its kernels {found.floor / 1e3:.3f} ms\n"
        f"{found.peaks.text}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    if as_json is not None:
        write_atomically(as_json, (json.dumps(found.to_json(), indent=1) + "\n").encode())


@app.command()
def tune(
    models: Annotated[list[str] | None, typer.Argument(help="Model files or reference models' names.")] = None,
    all_zoo: Annotated[bool, typer.Option("--all-zoo", help="Every reference model.")] = False,
    target: Annotated[str, typer.Option(help="cpu or x86[:level], which must run here; with --rpc: the board's.")] = "cpu",
    rpc: Annotated[str | None, typer.Option(help="Measure on a board, through TVM's RPC tracker at HOST:PORT.")] = None,
    key: Annotated[str | None, typer.Option(help="With --rpc: the name that the board's server registered.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads the kernels are tuned for; 0: every core.")] = 0,
    precision: Annotated[list[str], typer.Option(help="int8, float32, bfloat16 or float16; repeatable.")] = ["int8"],  # noqa: B006
    budget: Annotated[float, typer.Option(help="Minutes; what is left over waits for the next run.")] = 30.0,
    database: Annotated[Path | None, typer.Option(help="Rows are kept here; default: the user's own database.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure kernels anew that have a row.")] = False,
    compare: Annotated[bool, typer.Option(help="Time each whole model with the guesses and with its rows.")] = True,
    dry_run: DryRun = False,
) -> None:
    """Measure how the kernels of MODELS are best cut, here or on a board. Ctrl-C is safe: finished kernels are kept."""
    from ...backends.host import host_threads
    from ...backends.target import Target
    from ...backends.tvm.target import require_run
    from .. import tune as tuning
    from .. import zoo
    from ..progress import TerminalProgress
    from ..quick import check_precision, quick_program
    from ..sources import resolve

    names = list(zoo.names()) if all_zoo else list(models or [])
    if not names or (all_zoo and models):
        raise OptionError("tune takes MODELS or --all-zoo, exactly one of them")
    if not 0 < budget < math.inf:
        raise OptionError(f"--budget takes minutes, a number above 0, not {budget:g}")
    for name in precision:
        check_precision(name)
    chosen = Target.parse(target)
    board = _board(chosen, rpc, key, threads)
    if board is None:
        require_run(chosen)
    threads = threads or host_threads() if board is None else board.threads
    path = database or tuning.default_path(chosen)
    settings(
        "tune", models=", ".join(names), target=chosen, on="this machine" if board is None else f"{key} at {rpc}",
        threads=threads, precision=", ".join(precision), budget=f"{budget:g} min", database=path,
    )  # fmt: skip
    with TerminalProgress(err) as progress:
        programs = {(n, p): quick_program(resolve(n), p, progress) for n in names for p in precision}
        kernels = {k.key: k for program in programs.values() for k in tuning.kernels_of(program, chosen)}
        if dry_run:
            for key in kernels:
                out.print(key, highlight=False, markup=False)
            err.print(f"dry run: {len(kernels)} kernels; nothing was measured or written")
            return
        outcome = tuning.tune(list(kernels.values()), chosen, threads, path, budget, again, progress, board)
    table = Table("kernel", "guess (us)", "tuned (us)", "choice")
    for row in outcome.measured:
        choice = " ".join(f"{k}={v}" for k, v in row.choice.items()) if row.choice else "the guess"
        table.add_row(row.key, f"{row.guess_microseconds:.1f}", f"{row.microseconds:.1f}", choice)
    Console(width=max(out.width, 120)).print(table)
    out.print(f"{len(outcome.measured)} kernels measured, {outcome.kept} had rows, {outcome.remaining} remain", highlight=False)
    for (name, kind), program in programs.items() if compare and not outcome.remaining else ():
        found = tuning.end_to_end(program, chosen, threads, path, board=board)
        out.print(
            f"{name} {kind}: guess {found.guess[0]:.3f} ms (median {found.guess[1]:.3f}), "
            f"tuned {found.tuned[0]:.3f} ms (median {found.tuned[1]:.3f})", highlight=False,
        )  # fmt: skip


def _board(target: Target, address: str | None, key: str | None, threads: int) -> Board | None:
    """The board that --rpc and --key name; None for this machine."""
    if (address is None) != (key is None):
        raise OptionError("--rpc and --key belong together: the tracker's HOST:PORT, and the name of the board's server")
    if address is None or key is None:
        return None
    if target.arch == "cuda":
        raise OptionError("--rpc measures on processors; tune for a GPU on the machine that has it")
    from ...backends.tvm.target import require_emit
    from ...backends.tvm.tuning.board import Board

    require_emit(target)
    return Board(address, key, threads)
