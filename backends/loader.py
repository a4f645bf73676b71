"""`graphwright.load(path)`: a `model.gw` as a Python function."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, overload

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
            DataError: a wrong number of inputs, or an input of the wrong kind, shape or dtype.
        """
        if inputs and all(isinstance(x, np.ndarray) for x in inputs):
            return _single(self._run(*self._checked(inputs)))
        if all(_is_torch(x) for x in inputs):
            if inputs and self.target.arch == "cuda" and all(x.is_cuda for x in inputs):
                return _single(self._on_device(self._checked(inputs)))
            arrays = [_as_numpy(self.manifest.name, x) for x in inputs]
            return _single(tuple(sys.modules["torch"].from_numpy(x) for x in self._run(*self._checked(arrays))))
        kinds = ", ".join(type(x).__name__ for x in inputs)
        raise DataError(f"{self.manifest.name} takes torch tensors or numpy arrays, all of one kind, not {kinds}")

    def _on_device(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        outputs = tuple(inputs[0].new_empty(shape, dtype=_torch_dtype(dtype)) for shape, dtype in self._run.outputs)
        self._run.run_on_device([x.detach().contiguous() for x in inputs], outputs)
        return outputs

    def _checked(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Arrays or tensors, as they are. Raises DataError where they are not what the model takes."""
        name, specs = self.manifest.name, self.inputs
        if len(tensors) != len(specs):
            raise DataError(f"{name} takes {len(specs)} inputs, not {len(tensors)}: {', '.join(map(str, specs))}")
        for spec, tensor in zip(specs, tensors, strict=True):
            shape = tuple(tensor.shape)
            if len(shape) != len(spec.shape) or any(e not in (None, d) for e, d in zip(spec.shape, shape, strict=True)):
                raise DataError(f"input '{spec.name}' of {name} has shape {shape}, but the model takes {spec}")
            if _name_of(tensor.dtype) != spec.dtype:
                raise DataError(f"input '{spec.name}' of {name} is {tensor.dtype}, but the model takes {spec}; convert it")
        return tensors

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


def _as_numpy(model: str, tensor: torch.Tensor) -> np.ndarray:
    """Shares the tensor's memory; the copy a strided one needs is made on the way to TVM."""
    if tensor.device.type != "cpu":
        raise DataError(f"an input of {model} is on {tensor.device}; move it to the CPU")
    try:
        return tensor.detach().resolve_conj().resolve_neg().numpy()
    except TypeError as error:
        raise DataError(f"an input of {model} is {tensor.dtype}, which no artifact takes; convert it") from error


def _is_torch(value: Any) -> TypeGuard[torch.Tensor]:
    """Whoever has a tensor has imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _name_of(dtype: np.dtype | torch.dtype) -> str:
    return dtype.newbyteorder("=").name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return getattr(sys.modules["torch"], dtype.name)


def _single(outputs: tuple) -> Any:
    return outputs[0] if len(outputs) == 1 else outputs
