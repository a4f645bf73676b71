"""Networks pruned by Torch-Pruning, inside an environment of its own; `torch_pruning.py` starts it.

It takes nothing of this package: the model comes as a `torch.package` archive, samples and settings as files of the folder named
on the command line, and results go back there.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.package.package_importer import PackageImporter

#: By name: beside this file stands a module of ours that is called the same, for type checkers at least.
tp: Any = importlib.import_module("torch_pruning")

#: Bisection steps for the ratio that meets the budget.
STEPS = 12


def importance(name: str) -> Any:
    return {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "lamp": lambda: tp.importance.LAMPImportance(p=2),
        "fpgm": lambda: tp.importance.FPGMImportance(p=2),
        "bn-scale": lambda: tp.importance.BNScaleImportance(),
        "taylor": lambda: tp.importance.GroupTaylorImportance(),
        "random": lambda: tp.importance.RandomImportance(),
    }[name]()


def with_gradients(model: torch.nn.Module, calibration: list[torch.Tensor]) -> torch.nn.Module:
    """The model with the gradients of the cross entropy with its own predictions."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for batch in calibration:
        scores = model(batch)
        torch.nn.functional.cross_entropy(scores, scores.argmax(1)).backward()
    return model


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """A copy, gradients included, which deepcopy leaves out."""
    other = copy.deepcopy(model)
    for new, old in zip(other.parameters(), model.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return other


def prune(model: torch.nn.Module, ranked: Any, example: torch.Tensor, ratio: float, everywhere: bool) -> torch.nn.Module:
    """`model`, pruned in place; its last linear layer keeps its outputs."""
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1:]
    pruner = tp.pruner.BasePruner(
        model, example, importance=ranked, pruning_ratio=ratio, global_pruning=everywhere, ignored_layers=last
    )
    pruner.step()
    return model


def to_budget(
    model: torch.nn.Module, name: str, everywhere: bool, share: float, example: torch.Tensor
) -> tuple[torch.nn.Module, float]:
    """The largest pruned network whose multiply-accumulates are at most `share` of the original's, and its share."""
    whole, _ = tp.utils.count_ops_and_params(model, example)
    low, high, best = 0.0, 0.95, None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        found = prune(copied(model), importance(name), example, ratio, everywhere)
        macs, _ = tp.utils.count_ops_and_params(found, example)
        if macs <= share * whole:
            high = ratio
            if best is None or macs / whole > best[1]:
                best = found, macs / whole
        else:
            low = ratio
    assert best is not None, "no ratio up to 0.95 meets the budget"
    return best


def restate(model: torch.nn.Module, calibration: list[torch.Tensor]) -> torch.nn.Module:
    """A copy whose batch normalizations hold the statistics of the pruned network on the calibration samples."""
    model = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in calibration:
            model(batch)
    return model.eval()


def main(folder: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    torch.manual_seed(0)
    torch.set_num_threads(settings["threads"])
    model = PackageImporter(folder / "model.pt").load_pickle("model", "model.pkl").eval()
    with np.load(folder / "calibration.npz") as stored:
        calibration = [torch.from_numpy(stored[name]) for name in stored.files]
    with np.load(folder / "evaluation.npz") as stored:
        evaluation = [torch.from_numpy(stored[name]) for name in stored.files]
    with_gradients(model, calibration)
    example, rows = calibration[0][:1], []
    for name in settings["importances"]:
        for everywhere in (False, True):
            start = time.monotonic()
            pruned, share = to_budget(model, name, everywhere, settings["share"], example)
            seconds = time.monotonic() - start
            for statistics in (False, True):
                final = restate(pruned, calibration) if statistics else pruned.eval()
                with torch.no_grad():
                    outputs = [final(batch).numpy() for batch in evaluation]
                index = len(rows)
                np.savez(folder / f"outputs-{index}.npz", *outputs)
                if settings["programs"]:
                    torch.export.save(torch.export.export(final, (example,)), folder / f"model-{index}.pt2")
                rows.append(
                    {"importance": name, "global": everywhere, "statistics": statistics, "share": share, "seconds": seconds}
                )
    (folder / "result.json").write_text(json.dumps({"version": version("torch-pruning"), "rows": rows}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
