"""One system on the GPU in a process of its own: what `tools.bench.cuda` measures. Needs torch and no compiler of ours.

A process builds its system (`torch.compile` takes a minute, so all build at once) and then waits: it runs only in its turn.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Calls before the first time is taken, and before those of a further turn, while the clocks of the chip come back up.
FIRST_CALLS, WAKING_CALLS = 30, 5

Call = Callable[[], Any]


@dataclass(frozen=True)
class System:
    """name: "graphwright", or "torch" and how: eager, compile or torchao. file: the artifact, or whose inputs a peer takes."""

    model: str
    name: str
    precision: str
    batch: int
    file: Path


@dataclass(frozen=True)
class Accuracy:
    """equal: share of output values that are the reference's in every bit; difference: the largest absolute one, of values whose
    largest magnitude is `magnitude`."""

    equal: float
    difference: float
    magnitude: float


class Worker:
    """The parent's end of a system's process."""

    def __init__(self, system: System, compile_threads: int) -> None:
        self.system, self.accuracy, self.failure = system, None, ""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, system, compile_threads), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self, seconds: float) -> bool:
        """Until the system is built; False where it is not, `failure` saying why."""
        if not self._pipe.poll(seconds):
            self.failure = f"not built within {seconds:.0f} s"
            return False
        self.accuracy = self._receive()
        return not self.failure

    def times(self, calls: int) -> list[float]:
        """Milliseconds of each of `calls` calls; empty where the process died, `failure` saying so."""
        self._pipe.send(calls)
        return self._receive() or []

    def close(self) -> None:
        self._process.kill()
        self._process.join()

    def _receive(self) -> Any:
        try:
            done, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            self.failure = f"its process died (exit code {self._process.exitcode})"
            return None
        if not done:
            self.failure = value
            return None
        return value


def _serve(pipe: Connection, system: System, compile_threads: int) -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(compile_threads)
    torch.set_num_threads(2)
    try:
        accuracy, call = artifact(system) if system.name.startswith("graphwright") else (None, peer(system))
        for _ in range(FIRST_CALLS):
            call()
        torch.cuda.synchronize()
        pipe.send((True, accuracy))
        while True:
            calls = pipe.recv()
            for _ in range(WAKING_CALLS):
                call()
            pipe.send((True, [timed(call) for _ in range(calls)]))
    except EOFError:
        return
    except Exception as error:  # the row says why; the other systems are still measured
        words = traceback.format_exception_only(error)[-1].strip()
        pipe.send((False, words[-400:]))


def timed(call: Call) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def arrays_of(file: Path, prefix: str, batch: int) -> list[np.ndarray]:
    """The arrays x0, x1, ... or y0, y1, ... beside an artifact, repeated until they fill `batch`."""
    arrays = np.load(file.with_suffix(".npz"))
    found = [arrays[name] for name in sorted(arrays.files) if name.startswith(prefix)]
    return [array if len(array) == batch else np.concatenate([array] * -(-batch // len(array)))[:batch] for array in found]


def artifact(system: System) -> tuple[Accuracy, Call]:
    """What the artifact's outputs are worth, and its call on tensors of the GPU."""
    from ...backends.loader import load

    model = load(system.file)
    inputs = [torch.from_numpy(x).cuda() for x in arrays_of(system.file, "x", system.batch)]
    expected = arrays_of(system.file, "y", system.batch)
    outputs = model(*inputs)
    found = [y.cpu().numpy() for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
    equal = sum(int((a == b).sum()) for a, b in zip(found, expected, strict=True)) / sum(y.size for y in expected)
    difference = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in zip(found, expected, strict=True))
    magnitude = max(float(np.abs(y).max()) for y in expected)
    return Accuracy(round(equal, 6), difference, magnitude), lambda: model(*inputs)


def network(model: str) -> torch.nn.Module:
    """The architecture with random weights: a time does not depend on them, and published ones need not be at hand.

    Raises:
        DataError: a model that has no peer here.
    """
    from ...ir.errors import DataError
    from ..zoo.efficientnet_lite import EfficientNetLite0, MBConv
    from ..zoo.minilm import MiniLM
    from ..zoo.random_weights import randomized
    from ..zoo.resnet50 import random_resnet50

    if model == "resnet50":
        return random_resnet50()
    if model == "efficientnet-lite0":
        return randomized(EfficientNetLite0(), 0, lambda module: module.project[1] if isinstance(module, MBConv) else None)
    if model == "minilm-l6":
        return MiniLM().eval()
    raise DataError(f"'{model}' has no float16 network to compare with: resnet50, efficientnet-lite0 and minilm-l6 have")


def peer(system: System) -> Call:
    """PyTorch in half precision, channels last: eager, or compiled into CUDA graphs; there, too, with torchao's int8 layers."""
    module = network(system.model).half().cuda()
    inputs = [torch.from_numpy(x).cuda() for x in arrays_of(system.file, "x", system.batch)]
    given = [x.half() if x.is_floating_point() else x for x in inputs]
    if given[0].dim() == 4:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        given = [x.to(memory_format=torch.channels_last) for x in given]
    if system.name == "torch torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # pyright: ignore[reportMissingImports]

        quantize_(module, Int8DynamicActivationInt8WeightConfig())  # linear layers; it has no int8 convolutions
    if system.name != "torch eager":
        module = torch.compile(module, mode="reduce-overhead")

    def call() -> Any:
        with torch.no_grad():
            return module(*given)

    call()
    return call
