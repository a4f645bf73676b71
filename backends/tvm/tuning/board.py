"""A board behind TVM's RPC tracker: libraries built here are uploaded, run and timed there.

    this machine ── HOST:PORT, the tracker ◄── KEY, `python -m tvm.exec.rpc_server` on the board
         └────────────── one session: upload, run, time ──────────────┘

A `Board` holds it for as long as it lives: other clients of the tracker wait. docs/DEPLOY.md says what runs on the board.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.rpc.base import RPC_TRACKER_MAGIC

from ....ir.errors import BoardError, OptionError
from ..kernels.half import NUMPY
from ..memory import SLACK

#: Seconds that the tracker has to answer.
PATIENCE = 10.0

#: After 10 silent seconds a board is asked for a sign of life every 5, and is gone after the third question.
KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}

#: ThreadGroup::kBig: workers are pinned to the fastest cores.
FAST_CORES = 1

#: What TVM's time evaluator runs before each timed call: every argument but the input leaves the caches.
FLUSH = "cache_flush_cpu_non_first_arg"


class Board:
    """One board that is held for this process.

    Attributes:
        name: what its rows are kept by: boards of one key are one kind of machine. threads: worker threads there.
    """

    def __init__(self, address: str, key: str, threads: int = 0) -> None:
        """address: HOST:PORT of the tracker. threads: 0 for as many as the board's runtime takes by itself.

        Raises:
            OptionError: an address that does not parse, or more threads than the board gives.
            BoardError: no tracker there, or no board of that key.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise OptionError(f"'{address}' is no address of an RPC tracker; write HOST:PORT, such as 192.168.0.2:9190")
        self.address, self.key, self.name = address, key, f"{key} (rpc)"
        tracker = self._tracker(host, int(port))
        before = _sockets()
        with self._reaching("asked for"):
            self._session = tracker.request(key)
            _keep_alive(_sockets() - before)
            self._device = self._session.cpu()
            self._libraries = 0
            self.threads = self._configure(threads)

    def _tracker(self, host: str, port: int) -> Any:
        from tvm import rpc

        try:
            with socket.create_connection((host, port), PATIENCE) as probe:
                probe.sendall(RPC_TRACKER_MAGIC.to_bytes(4, "little"))
                if probe.recv(4) != RPC_TRACKER_MAGIC.to_bytes(4, "little"):
                    raise BoardError(f"what listens at {self.address} is no RPC tracker; --rpc takes the tracker's HOST:PORT")
            tracker = rpc.connect_tracker(host, port)
        except (OSError, RuntimeError) as error:
            raise BoardError(
                f"no RPC tracker answers at {self.address} ({error}); start one there: "
                f"python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port}"
            ) from error
        keys = sorted({entry["key"].removeprefix("server:") for entry in tracker.summary()["server_info"]})
        if self.key not in keys:
            known = ", ".join(keys) or "none"
            raise BoardError(
                f"no board of key '{self.key}' is registered at the tracker {self.address} (registered: {known}); "
                f"start the server on the board: python -m tvm.exec.rpc_server --tracker {self.address} --key {self.key}"
            )
        return tracker

    def _configure(self, threads: int) -> int:
        count = self._session.get_function("runtime.NumThreads")
        if threads:
            self._session.get_function("runtime.config_threadpool")(FAST_CORES, threads)
            if count() != threads:
                raise OptionError(f"threads={threads}: the board '{self.key}' at {self.address} gives {count()}")
        return int(count())

    @contextmanager
    def _reaching(self, doing: str) -> Iterator[None]:
        """TVM reports a lost connection, and an error on the board, as RuntimeError."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise BoardError(
                f"the board '{self.key}' at {self.address} was lost while it was {doing} ({reason}). Kernels that were measured "
                "are kept. Its server may have stopped, or the processor may lack instructions of the target: start the server "
                "again and repeat the command; it goes on where it stopped"
            ) from error

    def load(self, library: bytes) -> Any:
        """The module of a shared library that is built for the board."""
        self._libraries += 1  # a name that is loaded already would give the older library
        name = f"{self._libraries}.so"
        with self._reaching("sent a library"):
            self._session.upload(bytearray(library), name)
            module = self._session.load_module(name)
            self._session.remove(name)
        return module

    def tensor(self, array: np.ndarray) -> Any:
        """A copy of an array in the board's memory, with readable bytes behind it."""
        dtype = next((name for name, kind in NUMPY.items() if kind == array.dtype), str(array.dtype))
        with self._reaching("sent data"):
            raw = tvm.runtime.empty((array.nbytes + SLACK,), "uint8", self._device)
            raw.copyfrom(np.pad(np.ascontiguousarray(array).reshape(-1).view(np.uint8), (0, SLACK)))
            return raw._create_view(array.shape, dtype)

    def time(self, module: Any, name: str, arguments: Sequence[Any], calls: int, preparation: str = "") -> list[float]:
        """Microseconds of each of `calls`, after one that is not counted. preparation: `FLUSH`, or nothing."""
        with self._reaching("measuring"):
            evaluator = module.time_evaluator(name, self._device, 1, calls, f_preproc=preparation)
            return [seconds * 1e6 for seconds in evaluator(*arguments).results]

    def timer(self, library: bytes, inputs: Sequence[np.ndarray]) -> Callable[[int], list[float]]:
        """Milliseconds of so many runs of a compiled program, after one that is not counted."""
        module = self.load(library)
        with self._reaching("asked for a program's outputs"):
            description = json.loads(module["describe"]())
        empty = [np.zeros(o["shape"], o["dtype"]) for o in description["outputs"]]
        arena = self.tensor(np.zeros(description["arena"], np.uint8))
        arguments = [arena, *map(self.tensor, inputs), *map(self.tensor, empty)]
        return lambda runs: [microseconds / 1e3 for microseconds in self.time(module, "main", arguments, runs)]


def _sockets() -> set[int]:
    """Descriptors of this process's sockets."""
    entries = {int(entry.name): entry for entry in Path("/proc/self/fd").iterdir()}
    return {number for number, entry in entries.items() if entry.is_socket()}


def _keep_alive(descriptors: set[int]) -> None:
    """Has the kernel notice a board whose power or network is gone: TVM itself would wait for its answer for ever."""
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in KEEPALIVE.items():
                    connection.setsockopt(socket.IPPROTO_TCP, option, value)
