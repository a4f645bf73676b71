"""`graphwright.load(path)`: a `model.gw` as a Python function."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ..ir.errors import ArtifactError, DataError
from .artifact import Artifact
from .host import host_arch, host_flags
from .manifest import Manifest, TargetEntry
from .nvidia import missing_to_run
from .target import LEVELS
from .tiles import request_tiles

if TYPE_CHECKING:
    import torch


class LoadedModel:
    """A compiled model. Called with torch tensors it returns torch tensors, with numpy arrays numpy arrays. It imports no torch.

    Attributes:
        manifest: what the artifact says about itself; inputs and outputs: as it names them.
        target: the library that was chosen, the best one this machine can run.
    """

    def __init__(self, manifest: Manifest, target: TargetEntry, library: bytes, threads: int | None) -> None:
        from .tvm.executor import load_bytes  # loads TVM's runtime; only where a model runs

        self.manifest = manifest
        self.target = target
        self.inputs, self.outputs = manifest.inputs, manifest.outputs
        request_tiles(target.requires)
        self._run = load_bytes(library, threads)

    @overload
    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]: ...
    @overload
    def __call__(self, *inputs: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]: ...
    def __call__(self, *inputs):
        """Runs the model: one tensor for each input, in order; one tensor back, or a tuple where there are several outputs.

        A model for a GPU takes tensors that lie there as they are: where all do, so do the outputs, and the work is queued on
        torch's current stream like any other of torch's.

        Raises:
            DataError: a wrong number of inputs, or an input of the wrong kind, shape, dtype, layout or device.
        """
        if self.target.arch == "cuda" and self._take_as_they_are(inputs):
            return _single(self._on_device(inputs))
        name = self.manifest.name
        if len(inputs) != len(self.inputs):
            raise DataError(f"{name} takes {len(self.inputs)} inputs, not {len(inputs)}: {', '.join(map(str, self.inputs))}")
        if inputs and all(isinstance(x, np.ndarray) for x in inputs):
            self._check(inputs, self._run.inputs)
            return _single(self._run(*inputs))
        torch = sys.modules.get("torch")  # whoever has a tensor has imported it
        if torch is None or not all(isinstance(x, torch.Tensor) for x in inputs):
            kinds = ", ".join(type(x).__name__ for x in inputs)
            raise DataError(f"{name} takes torch tensors or numpy arrays, all of one kind, not {kinds}")
        self._check(inputs, self._as_torch[0])
        on_device = inputs and self.target.arch == "cuda" and inputs[0].is_cuda
        self._check_places(inputs, inputs[0].device if on_device else torch.device("cpu"), torch.strided)
        return _single(self._run.run_tensors(inputs))

    def _take_as_they_are(self, inputs: Sequence[Any]) -> bool:
        """Whether these are tensors of one GPU just as the library takes them, by one look at each. Where not, checks say why.

        The GPU waits for what Python does before a run: a tenth of a small model's time.
        """
        torch = sys.modules.get("torch")
        if torch is None or not inputs or len(inputs) != len(self.inputs) or not isinstance(inputs[0], torch.Tensor):
            return False
        kind, dense, device = torch.Tensor, torch.strided, inputs[0].device
        for x, (shape, dtype) in zip(inputs, self._as_torch[0], strict=True):
            if not (isinstance(x, kind) and x.is_cuda and x.shape == shape and x.dtype is dtype and x.device == device):
                return False
            if x.layout is not dense:
                return False
        return True

    def _on_device(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        outputs = tuple([inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in self._as_torch[1]])
        self._run.queue_on_device(inputs, outputs)
        return outputs

    @functools.cached_property
    def _as_torch(self) -> list[list[tuple[tuple[int, ...], torch.dtype]]]:
        """What the library takes and returns, in torch's types."""
        torch, run = sys.modules["torch"], self._run
        return [[(shape, getattr(torch, dtype.name)) for shape, dtype in specs] for specs in (run.inputs, run.outputs)]

    def _check(self, tensors: Sequence[Any], specs: Sequence[tuple[tuple[int, ...], Any]]) -> None:
        """Raises DataError where arrays or tensors have not the (shape, dtype) that the library takes."""
        for entry, tensor, (shape, dtype) in zip(self.inputs, tensors, specs, strict=True):
            if tensor.shape != shape:
                has = f"has shape {tuple(tensor.shape)}"
                raise DataError(f"input '{entry.name}' of {self.manifest.name} {has}, but the model takes {entry}")
            if tensor.dtype != dtype and _native(tensor.dtype) != dtype:
                has = f"is {str(tensor.dtype).removeprefix('torch.')}"
                raise DataError(f"input '{entry.name}' of {self.manifest.name} {has}, but the model takes {entry}; convert it")

    def _check_places(self, tensors: Sequence[torch.Tensor], device: torch.device, layout: torch.layout) -> None:
        """Raises DataError where a tensor is elsewhere, or lies in memory in another way."""
        for entry, tensor in zip(self.inputs, tensors, strict=True):
            if tensor.device != device:
                raise DataError(f"input '{entry.name}' of {self.manifest.name} is on {tensor.device}; move it to {device}")
            if tensor.layout is not layout:
                raise DataError(f"input '{entry.name}' of {self.manifest.name} is {tensor.layout}; make it dense: to_dense()")

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, entries)) for entries in (self.inputs, self.outputs))
        return f"LoadedModel({self.manifest.name} for {self.target}: {inputs} -> {outputs})"


def load(path: str | Path, threads: int | None = None) -> LoadedModel:
    """Loads an artifact for this machine.

    Args:
        path: a `model.gw`.
        threads: worker threads, shared by all models of the process; by default TVM_NUM_THREADS, else every core it may use.

    Raises:
        ArtifactError: missing, damaged, of another version, or built for another machine.
        OptionError: a thread count this process cannot have.
    """
    artifact = Artifact.load(path)
    target = choose(artifact.manifest, str(path))
    try:
        return LoadedModel(artifact.manifest, target, artifact.members[target.library], threads)
    except ArtifactError as error:
        built = artifact.manifest.versions.get("tvm", "unknown")
        raise ArtifactError(f"'{path}' does not load ({error}); it was built with TVM {built}: install that version") from error


def choose(manifest: Manifest, source: str) -> TargetEntry:
    """The best library this machine can run. Raises ArtifactError naming what each library needs and this machine lacks."""
    arch, flags = host_arch(), host_flags()
    reasons = []
    for target in manifest.targets:  # best first
        if target.arch == "cuda":
            missing = missing_to_run(target.level)
            if not missing:
                return target
            reasons.append(f"{target} needs a GPU, and {missing}")
            continue
        if target.arch == arch and flags.issuperset(target.requires):
            return target
        missing = sorted(set(target.requires) - flags)
        lack = f"lacks {', '.join(missing)}" if target.arch == arch else f"is {arch}"
        reasons.append(f"{target} needs {', '.join(target.requires) or target.arch}; this CPU {lack}")
    advice = f"Build it for a level that this machine has, or for target '{arch}:{LEVELS[arch][-1]}'"
    raise ArtifactError(f"'{source}' is built for another machine: {'; '.join(reasons)}. {advice}")


def _native(dtype: np.dtype | torch.dtype) -> np.dtype | torch.dtype:
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def _single(outputs: tuple) -> Any:
    return outputs[0] if len(outputs) == 1 else outputs
