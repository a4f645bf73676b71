"""One shared library from a program's launches: their tables as C, cubins, weights, and `runtime/region_cuda.c`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...target import Target
from ..link import embedded, place_entry, shared_library, table
from ..region import Region, Step
from .launch import Launch
from .overlap import overlaps


def link(region: Region, target: Target) -> bytes:
    """The library runs on the architecture that builds it. Raises TargetError where the C compiler fails."""
    with tempfile.TemporaryDirectory(prefix="graphwright-") as name:
        folder = Path(name)
        images = list(dict.fromkeys(launch.image for launch in map(launch_of, region.steps)))
        paths = [folder / f"image{index}.cubin" for index in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            path.write_bytes(image)
        weights = folder / "weights.bin"
        weights.write_bytes(region.weights)
        return shared_library(folder, tables(region, target, images, paths, weights), "region_cuda.c", target)


def launch_of(step: Step) -> Launch:
    if not isinstance(step.phase, Launch):
        raise RuntimeError(f"step '{step.phase.name}' is no launch")
    return step.phase


def tables(region: Region, target: Target, images: Sequence[bytes], paths: Sequence[Path], weights: Path) -> str:
    """The region's tables as C source."""
    chip = f"{target.level.removeprefix('sm_')}, {int(overlaps(target.level))}"
    numbers = {image: index for index, image in enumerate(images)}
    launches, places = [], []
    for step in region.steps:
        launch = launch_of(step)
        sizes = ", ".join(f"{{{x}, {y}, {z}}}" for x, y, z in (launch.grid, launch.block))
        own = step.places if launch.pointers is None else [step.places[pointer] for pointer in launch.pointers]
        count = f"{len(places)}, {len(own)}, {launch.hidden}"
        launches.append(f"{{{json.dumps(launch.symbol)}, {numbers[launch.image]}, {sizes}, {launch.shared}, {count}}}")
        places += map(place_entry, own)
    tensors = [*region.inputs, *region.outputs]
    return "\n".join(
        [
            '#include "region_cuda.h"',
            *(embedded(f"gw_image_{index}", path) for index, path in enumerate(paths)),
            embedded("gw_weights", weights),
            table("gw_launch", "gw_launches", launches),
            table("gw_place", "gw_places", places),
            table("uint8_t* const", "gw_images", [f"gw_image_{index}" for index in range(len(paths))]),
            table("uint64_t", "gw_sizes", [str(tensor.size) for tensor in tensors]),
            "const gw_cuda_region gw_cuda_program = {",
            f"  gw_launches, gw_places, {len(launches)}, gw_images, {len(images)}, {chip},",
            f"  {region.arena}, {len(region.weights)}, gw_weights, {len(region.inputs)}, {len(region.outputs)}, gw_sizes,",
            f"  {json.dumps(region.description(on_device=True))}}};",
            "",
        ]
    )
