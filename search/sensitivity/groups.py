"""Samples in small groups: the unit of computation, of what a killed run keeps, and of confidence intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ...ir.content import content_key
from ...ir.errors import DataError
from .base import Scorer, Task

#: Samples a group at most: they are in memory together, derivatives included.
LARGEST_GROUP = 8
#: Groups are smaller where there would be fewer of them: the confidence interval needs their spread.
FEWEST_GROUPS = 16


@dataclass(frozen=True)
class Group:
    """A few samples.

    Attributes:
        index: position among the groups; random probes are seeded with it.
        inputs: one tensor a program input, (samples, *input shape).
        labels: (samples, batch, ...) or None.
    """

    index: int
    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def generator(self, seed: int) -> torch.Generator:
        # Hashed: the first bits that torch's generator gives for neighbouring seeds are correlated.
        digest = hashlib.sha256(f"{seed}/{self.index}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def groups_of(task: Task, limit: int | None = None) -> tuple[Group, ...]:
    """The task's samples, or the first `limit` of them, in groups of nearly equal size.

    A sample is one run of the program at its fixed batch, or one row where the batch is symbolic.

    Raises:
        DataError: not one label a row of the samples.
    """
    assert task.samples is not None
    batch = task.program.input_specs[0].shape[:1]
    rows = [row for sample in task.samples for row in _rows(sample, split=batch == (None,))][:limit]
    labels = _labels(task, len(rows), 1 if batch in ((), (None,)) else int(batch[0] or 1), limit)
    count = min(len(rows), max(-(-len(rows) // LARGEST_GROUP), FEWEST_GROUPS))
    found = []
    for index, members in enumerate(np.array_split(np.arange(len(rows)), count)):
        start, stop = int(members[0]), int(members[-1]) + 1
        inputs = tuple(torch.stack(values) for values in zip(*rows[start:stop], strict=True))
        found.append(Group(index, inputs, None if labels is None else labels[start:stop]))
    return tuple(found)


def _rows(sample: tuple[torch.Tensor, ...], split: bool) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*(value.split(1) for value in sample), strict=True)) if split else [sample]


def _labels(task: Task, rows: int, batch: int, limit: int | None) -> torch.Tensor | None:
    """Labels (rows, batch, ...)."""
    if task.labels is None:
        return None
    stacked = task.labels.dim() > 1 and len(task.labels) < rows * batch
    flat = task.labels.flatten(0, 1) if stacked else task.labels
    enough = len(flat) == rows * batch or (limit is not None and len(flat) >= rows * batch)
    if not enough or flat.is_floating_point():
        raise DataError(
            f"{tuple(task.labels.shape)} labels of type {task.labels.dtype} do not fit {rows} samples of batch {batch}: "
            "give one integer class a row"
        )
    return flat[: rows * batch].unflatten(0, (rows, batch)).long()


def collect(
    task: Task,
    scorer: Scorer,
    groups: tuple[Group, ...],
    compute: Callable[[Group], np.ndarray],
    depends: tuple = (),
) -> tuple[np.ndarray, np.ndarray]:
    """`compute` of every group, (groups, ...), and the groups' sizes (groups,). Each result is stored as soon as it is there.

    Args:
        compute: from a group to means over its samples, (...).
        depends: what the results depend on besides the program, the group, the scorer's options and the seed.
    """
    program = content_key(task.program, repr(scorer), task.seed, *depends)
    values = []
    for done, group in enumerate(groups, 1):
        key = content_key(program, group.index, group.inputs, group.labels)
        values.append(np.array(task.store.remember(scorer.name, key, lambda g=group: compute(g).tolist()), dtype=np.float64))
        task.progress(done, len(groups), f"score: {scorer.name}")
    return np.stack(values), np.array([len(group) for group in groups])


def choices_key(task: Task) -> str:
    """A hash of every layer's name and weight in every choice."""
    return content_key(*((layer.origin, choice, layer.rounded(choice)) for layer in task.layers for choice in task.choices))


def layers_key(task: Task) -> str:
    """A hash of which layers there are."""
    return content_key(*(layer.origin for layer in task.layers))
