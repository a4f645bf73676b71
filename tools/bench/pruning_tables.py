"""The table of channel pruning in docs/BENCHMARKS.md: a verb of tables.py.

python -m graphwright.tools.bench.tables pruning resnet20 mobilenetv2 --torch-pruning tp/bin/python
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..progress import TerminalProgress
from .markdown import machine, markdown
from .pruning import Bench, Point, peer_points, points, save_networks
from .torch_pruning import IMPORTANCES

CRITERIA = "random,l1,l2,geometric-median,batch-norm,taylor,fisher,hessian-trace,relevance,thinet"


def pruning(
    models: Annotated[list[str], typer.Argument(help="Reference models that classify.")],
    share: Annotated[float, typer.Option(help="Multiply-accumulates that stay.")] = 0.5,
    criteria: Annotated[str, typer.Option(help="Ranked by each, one ratio for all groups, reconstructed or not.")] = CRITERIA,
    allocated: Annotated[str, typer.Option(help="Ranked by each, counts allocated by measured distortion.")] = "thinet",
    torch_pruning: Annotated[Path | None, typer.Option(help="Interpreter of an environment with Torch-Pruning.")] = None,
    importances: Annotated[str, typer.Option(help="Torch-Pruning's criteria.")] = ",".join(IMPORTANCES),
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 1024,
    evaluate: Annotated[int, typer.Option(help="Samples scored; 0: all.")] = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="Score on held-out calibration samples, to choose by.")] = False,
    networks: Annotated[Path | None, typer.Option(help="Folder for every network as ONNX, which pruned-latency times.")] = None,
) -> None:
    """Accuracy at a budget of multiply-accumulates without fine-tuning: criteria, reconstruction, allocation, Torch-Pruning."""
    for model in models:
        with TerminalProgress() as progress:
            bench = Bench.of(model, samples, evaluate or None, progress, held_out)
            rows = list(points(bench, share, _names(criteria), _names(allocated)))
            if torch_pruning is not None:
                rows += peer_points(bench, torch_pruning, share, _names(importances), networks is not None)
            if networks is not None:
                save_networks(rows, networks)
        where = "held-out calibration samples" if held_out else "evaluation samples"
        typer.echo(f"\n{model}, {samples} calibration samples, scored on {where}; {machine()}\n")
        head = ["method", "multiply-accumulates", f"score (float {rows[0].float_score:.4f})", "points lost", "made in (s)"]
        typer.echo(markdown(head, [_row(p) for p in rows]))


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _row(p: Point) -> list[str]:
    return [p.method, f"{p.share:.3f}", f"{p.score:.4f}", f"{p.drop:+.2f}", f"{p.seconds:.1f}"]


def register(app: typer.Typer) -> None:
    """Adds the verb to the command of all tables."""
    app.command()(pruning)
