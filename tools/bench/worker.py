"""One system in its own process, driven over a pipe."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ...ir.errors import GraphwrightError


class WorkerError(GraphwrightError):
    """A system that could not be built or crashed; carries its own message."""


class Worker:
    """Starts the process and waits until the system is built.

    Raises:
        WorkerError: the system could not be built (a missing package is named), or its process died.
    """

    def __init__(self, system: str, folder: Path, threads: int) -> None:
        self.system = system
        self._pipe, theirs = multiprocessing.Pipe()
        # Thread counts are read when a runtime is first loaded, so they go into the environment before the start.
        limits = {"OMP_NUM_THREADS": str(threads), "TVM_NUM_THREADS": str(threads)}
        saved = {key: os.environ.get(key) for key in limits}
        os.environ.update(limits)
        try:
            context = multiprocessing.get_context("spawn")
            self._process = context.Process(target=_serve, args=(theirs, system, str(folder), threads), daemon=True)
            self._process.start()
        finally:
            for key, value in saved.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
        theirs.close()
        self.system_name, self.precision, self.size_bytes = self._receive()

    def predict(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Outputs for a batch of any size; the system runs it in pieces of its own batch size."""
        self._pipe.send(("predict", [x.numpy() for x in inputs]))
        outputs = tuple(torch.from_numpy(y) for y in self._receive())
        return outputs[0] if len(outputs) == 1 else outputs

    def time(self, warm_up: int, runs: int) -> list[float]:
        """Milliseconds of `runs` consecutive runs on one calibration sample, after `warm_up` uncounted ones."""
        self._pipe.send(("time", (warm_up, runs)))
        return self._receive()

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(("stop", None))
            self._process.join(timeout=10)
            if self._process.is_alive():
                self._process.kill()

    def _receive(self):
        try:
            ok, value = self._pipe.recv()
        except EOFError as error:
            raise WorkerError(f"the process of '{self.system}' died (exit code {self._process.exitcode})") from error
        if not ok:
            raise WorkerError(f"'{self.system}': {value}")
        return value


def _serve(pipe: Connection, name: str, folder: str, threads: int) -> None:
    import numpy as np

    from .systems import build

    try:
        system = build(name, Path(folder), threads)
        sample = system.sample()
        pipe.send((True, (system.name, system.precision, system.size_bytes)))
    except Exception as error:
        # The parent raises it again, as WorkerError: nothing is lost here.
        pipe.send((False, f"{type(error).__name__}: {error}"))
        return
    size = sample[0].shape[0]
    while True:
        request, payload = pipe.recv()
        if request == "stop":
            return
        try:
            if request == "time":
                warm_up, runs = payload
                for _ in range(warm_up):
                    system.run(sample)
                times = []
                for _ in range(runs):
                    start = time.perf_counter()
                    system.run(sample)
                    times.append((time.perf_counter() - start) * 1e3)
                pipe.send((True, times))
            else:
                count = payload[0].shape[0]
                pieces = [system.run([x[i : i + size] for x in payload]) for i in range(0, count, size)]
                pipe.send((True, [np.concatenate(column) for column in zip(*pieces, strict=True)]))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))
