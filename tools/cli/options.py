"""What the verbs share: consoles, option types, and the checks before long work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ...ir.errors import OptionError

if TYPE_CHECKING:
    from ...passes.pipeline import Pipeline
    from ..bit_search import BitSearch
    from ..finetune import Finetune as Finetune_
    from ..sources import Source

app = typer.Typer(
    name="graphwright", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Compress a trained network with verified passes and compile it to one deployable artifact.",
)  # fmt: skip
out = Console()
err = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="An .onnx file, a .pt2 archive, or a reference model's name.")]
Calibration = Annotated[Path | None, typer.Option(help="Samples, .npz (one array an input), .npy, or the word distilled.")]
Shapes = Annotated[list[str], typer.Option("--input-shape", help="ONNX input shape, NAME=1x3x224x224; repeatable.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print what would be done; write nothing.")]
Dump = Annotated[Path | None, typer.Option(help="Folder for numbered program dumps, one a pass.")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration samples of a reference model.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
Ratio = Annotated[str | None, typer.Option(help="Most, relative to the float model: 0.4 or 0.4x.")]
Formats = Annotated[str | None, typer.Option(help="Weight formats to choose from; default: int8,int4,int2.")]
Scorer = Annotated[str | None, typer.Option(help="What a plan loses, such as hessian-trace{probes=32}; see `analyze`.")]
Minimize = Annotated[str | None, typer.Option(help="size, latency, bops or average_bits: the least of it within --max-drop.")]
Labels = Annotated[Path | None, typer.Option(help="Integer classes of the calibration samples, .npy; some scorers need them.")]
Finetune = Annotated[
    str | None, typer.Option(help="Train towards the float model: distill, with options such as distill{epochs=2}; see `passes`.")
]
FinetuneData = Annotated[
    Path | None, typer.Option(help="Inputs for it, .npz or .npy; default: the reference model's, or the calibration samples.")
]
FinetuneSamples = Annotated[int | None, typer.Option(min=1, help="Training inputs of a reference model; default: all.")]
Checkpoints = Annotated[Path | None, typer.Option(help="Folder for unfinished training; default: the user's cache.")]
Device = Annotated[str | None, typer.Option(help="Device that trains; default: cuda where there is one, else cpu.")]
Cache = Annotated[Path | None, typer.Option(help="Folder for scores, prices and evaluations; default: the user's cache.")]


def settings(title: str, **values: Any) -> None:
    """Echoes what the options resolved to."""
    err.print(f"[bold]{title}[/bold]")
    for key, value in values.items():
        err.print(f"  {key.replace('_', ' '):<12} {value}", highlight=False, markup=False)


def check_outputs(
    reads: Sequence[str | Path | None],
    outputs: Sequence[Path | None],
    overwrite: bool = False,
    folders: Sequence[Path | None] = (),
) -> None:
    """Refuses outputs that cannot be written, that are one and the same, or that would replace what this run reads."""
    from ...ir.errors import OutputError
    from ...ir.files import check_folder, check_output

    for folder in folders:
        if folder is not None:
            check_folder(folder)
    taken = {Path(path).resolve(): "an input" for path in reads if path is not None}
    for path in outputs:
        if path is None:
            continue
        check_output(path, overwrite)
        place = path.resolve()
        if place in taken:
            raise OutputError(f"'{path}' is {taken[place]} of this run; choose another name")
        taken[place] = "another output"


def batches_of(source: Source, passes: Pipeline, path: Path | None, samples: int) -> list | None:
    """Batches for the pipeline, checked against the model's inputs; None where there are none and no pass needs them.

    Nothing is read for passes that cannot follow each other.
    """
    from ...ir.data import Calibration as Samples_
    from ...passes.base import PassContext
    from ...passes.order import check_order

    check_order(source.program, passes)
    batches = source.calibration(path, samples)
    context = PassContext(None if batches is None else Samples_.for_program(source.program, batches))
    for instance in passes:
        if instance.needs_calibration:
            context.require_calibration(instance.name)
    return batches


def ratio(text: str, name: str) -> float:
    """A limit relative to the float model, written 0.4 or 0.4x."""
    try:
        value = float(text.removesuffix("x"))
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise OptionError(f"--{name} takes a number such as 0.4 or 0.4x, not '{text}'")
    return value


def limits_of(example: str, **given: str | None) -> dict[str, float]:
    """The limits that were given, by name. Raises OptionError where none was; `example` shows how to write them."""
    limits = {name: ratio(text, name) for name, text in given.items() if text is not None}
    if not limits:
        raise OptionError(f"name at least one limit: {example}")
    return limits


def limits_text(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {most:g}" for name, most in limits.items())


def data_text(calibration: Path | None, samples: int, batches: list | None) -> str:
    """Where calibration samples come from, for the settings."""
    return str(calibration or (f"{samples} of the reference data" if batches else "none"))


def search_of(
    source: Source,
    samples: int,
    formats: str | None,
    scorer: str | None,
    solver: str | None,
    minimize: str | None,
    labels: Path | None,
    calibration: Path | None,
    cache: Path | None,
) -> BitSearch:
    """The bit search that options ask for; what is not given has the library's default."""
    from ...backends.cache import cache_folder
    from ..bit_search import BitSearch

    given = {
        "formats": None if formats is None else tuple(formats.split(",")),
        "scorer": scorer,
        "solver": solver,
        "minimize": minimize,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    return BitSearch(**chosen, labels=source.labels(labels, calibration, samples), cache=cache or cache_folder() / "search")


def finetune_of(
    source: Source,
    text: str | None,
    passes: Pipeline,
    data: Path | None,
    samples: int | None,
    checkpoints: Path | None,
    device: str | None,
) -> Finetune_ | None:
    """The fine-tuning that `--finetune`, or a pipeline that names `distill`, asks for; None where neither does."""
    from ...backends.cache import cache_folder
    from ...passes.pipeline import parse
    from ...passes.recover.distill import Distill
    from ..finetune import Finetune

    given = {"finetune-data": data, "finetune-samples": samples, "checkpoints": checkpoints, "device": device}
    asked = [p for p in (parse(text).passes if text is not None else passes) if isinstance(p, Distill)]
    if text is not None and (len(asked) != 1 or len(parse(text)) != 1):
        raise OptionError(f"--finetune takes distill with its options, such as 'distill{{epochs=2}}', not '{text}'")
    if not asked:
        for name, value in given.items():
            if value is not None:
                raise OptionError(f"--{name} is for --finetune, or for a pipeline that names distill")
        return None
    recipe = vars(asked[0]) if text is not None else {}
    batches = source.training(data, samples)
    return Finetune(**recipe, data=batches, checkpoints=checkpoints or cache_folder() / "finetune", device=device)
