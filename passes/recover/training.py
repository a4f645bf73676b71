"""The training loop of `distill`: resumable, and the same bits whether it was interrupted or not."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...ir.data import Sample
from ...ir.errors import DataError, OptionError, PassError
from ...ir.files import make_folder, write_atomically
from .recipe import Recipe
from .student import Network

#: A killed run loses so much work at most.
CHECKPOINT_SECONDS = 10.0
#: Samples that are not trained on but choose between the weights after each epoch: a share of all, and how many at most.
HELD_OUT_SHARE, HELD_OUT_MOST = 1 / 16, 1024
_WARMUP = 0.05
_LARGEST_NORM = 1.0

Values = dict[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]


@dataclass
class State:
    """Everything a run needs to go on. `best` are the weights of least held-out loss so far, those at the start included."""

    key: str
    step: int
    learned: Values
    optimizer: dict[str, Any]
    best: Values
    best_loss: float
    first_loss: float


def kl(student: Outputs, teacher: Outputs, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) over the last axis, in nats, averaged over everything else.

    Hinton et al. 2015 (arXiv:1503.02531): with T^2 the gradient's size does not depend on T.
    """
    (expected,), (actual,) = ([scores / temperature for scores in side] for side in (teacher, student))
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def squared(student: Outputs, teacher: Outputs) -> torch.Tensor:
    """||student - teacher||^2 / ||teacher||^2 over the batch, summed over outputs."""
    parts = [(s - t).square().sum() / t.square().sum().clamp_min(1e-30) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(parts).sum()


def choose_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is. Raises OptionError where it is unknown or absent."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(
            f"device '{name}' cannot be used here: {str(error).splitlines()[0]}; leave it out, or say cpu"
        ) from error
    return device


def stack(samples: Sequence[Sample], free_batch: bool) -> tuple[torch.Tensor, ...]:
    """One tensor an input, samples first: (N, ...) where the program takes any batch, (N, batch, ...) where it is fixed."""
    join = torch.cat if free_batch else torch.stack
    return tuple(join(column) for column in zip(*samples, strict=True))


@dataclass
class Trainer:
    """Trains `student` towards `teacher` on `inputs` (see `stack`).

    Attributes:
        key: a hash of everything the result depends on; the checkpoint is `folder`/`key`.pt.
    """

    student: Network
    teacher: Network
    inputs: tuple[torch.Tensor, ...]
    recipe: Recipe
    loss: str
    device: torch.device
    seed: int
    progress: Callable[[int, int, str], None]
    key: str
    folder: Path | None

    def __post_init__(self) -> None:
        count = len(self.inputs[0])
        if count < 2:
            raise DataError("distill needs at least 2 samples: one to train on, one to see whether that helped")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        held = min(HELD_OUT_MOST, max(1, round(count * HELD_OUT_SHARE)))
        self._held, self._fitted = order[:held], order[held:]
        self._shuffled: tuple[int, torch.Tensor] | None = None
        self._steps = max(1, len(self._fitted) // self.recipe.batch_size)
        parameters = list(self.student.learned.values())
        if self.recipe.optimizer == "adam":
            self._optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=self.recipe.learning_rate)
        else:
            self._optimizer = torch.optim.SGD(parameters, lr=self.recipe.learning_rate, momentum=0.9)

    @property
    def total(self) -> int:
        return self.recipe.epochs * self._steps

    def run(self) -> State:
        """The state at the end: its `best` are the weights to take."""
        with _deterministic():
            state = self._read() or self._start()
            self._load(state)
            saved = time.monotonic()
            while state.step < self.total:
                self.progress(state.step, self.total, "distill")
                self._step(state.step)
                state.step += 1
                if state.step % self._steps == 0:
                    self._evaluate(state)
                if time.monotonic() - saved >= CHECKPOINT_SECONDS or state.step == self.total:
                    self._write(state)
                    saved = time.monotonic()
            self.progress(self.total, self.total, "distill")
        return state

    def _start(self) -> State:
        loss = self._held_out_loss()
        return State(self.key, 0, self._values(), self._optimizer.state_dict(), self._values(), loss, loss)

    def _step(self, step: int) -> None:
        epoch, index = divmod(step, self._steps)
        size = self.recipe.batch_size
        order = self._order(epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * rate(step, self.total)
        batch = order[index * size : (index + 1) * size]
        loss = self._loss(self._blended(batch, step) if self.recipe.mixup else self._inputs(batch))
        if not bool(torch.isfinite(loss)):
            high = f"learning_rate={self.recipe.learning_rate:g}"
            raise PassError(f"distill diverged: the loss of step {step} is {loss.item()}; lower {high}")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for p in self.student.learned.values() if p.grad is not None]
        for name, kept in self.student.kept.items():
            gradient = self.student.learned[name].grad
            if gradient is not None:
                gradient.mul_(kept)
        torch.nn.utils.clip_grad_norm_(parameters, _LARGEST_NORM)
        self._optimizer.step()

    def _order(self, epoch: int) -> torch.Tensor:
        """The samples trained on, shuffled anew each epoch; the same whenever it is asked for."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._shuffled = epoch, self._fitted[torch.randperm(len(self._fitted), generator=generator)]
        return self._shuffled[1]

    def _inputs(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x[index].to(self.device) for x in self.inputs)

    def _blended(self, index: torch.Tensor, step: int) -> tuple[torch.Tensor, ...]:
        """The samples `index`, a share of them (`mixup`) each blended with another sample of the step."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        other = index[torch.randperm(len(index), generator=generator)]
        blended = torch.rand(len(index), generator=generator) < self.recipe.mixup
        share = torch.where(blended, torch.rand(len(index), generator=generator), 1.0)
        mixed = [torch.lerp(x[other], x[index], share.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)) for x in self.inputs]
        return tuple(x.to(self.device) for x in mixed)

    def _loss(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with torch.no_grad():
            expected = self.teacher(inputs)
        actual = self.student(inputs)
        return kl(actual, expected, self.recipe.temperature) if self.loss == "kl" else squared(actual, expected)

    def _evaluate(self, state: State) -> None:
        loss = self._held_out_loss()
        if loss < state.best_loss:
            state.best, state.best_loss = self._values(), loss

    def _held_out_loss(self) -> float:
        with torch.no_grad():
            parts = self._held.split(self.recipe.batch_size)
            return sum(self._loss(self._inputs(part)).item() * len(part) for part in parts) / len(self._held)

    def _values(self) -> Values:
        return {name: value.detach().to("cpu", copy=True) for name, value in self.student.learned.items()}

    def _load(self, state: State) -> None:
        for name, value in state.learned.items():
            self.student.learned[name].data.copy_(value)
        self._optimizer.load_state_dict(state.optimizer)

    # -- checkpoints -----------------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.key}.pt"

    def _write(self, state: State) -> None:
        if self._path is None:
            return
        state.learned, state.optimizer = self._values(), self._optimizer.state_dict()
        content = io.BytesIO()
        torch.save(vars(state), content)
        make_folder(self._path.parent)
        write_atomically(self._path, content.getvalue())

    def _read(self) -> State | None:
        if self._path is None or not self._path.is_file():
            return None
        try:
            state = State(**torch.load(self._path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise DataError(f"checkpoint '{self._path}' is damaged ({error}); delete it to train from the start") from error
        if state.key != self.key or set(state.learned) != set(self.student.learned):
            raise DataError(f"checkpoint '{self._path}' belongs to another run; delete it to train from the start")
        return state


def rate(step: int, total: int) -> float:
    """Share of the highest learning rate: a line up over the first 5% of the steps, then half a cosine down to 0."""
    return min((step + 1) / max(1.0, _WARMUP * total), 0.5 + 0.5 * math.cos(math.pi * step / total))


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Float32 products and convolutions that repeat, also on a GPU."""
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False), torch.enable_grad():
        yield
