r"""Train one of the reference models whose weights this repository holds.

    python -m graphwright.tools.zoo.train resnet20 --device cuda --seed 0 \
        --output resnet20.safetensors

For the Fashion-MNIST models the whole data set sits on the device, and augmentation (shifted crop, flip, random erasing of
Zhong et al., 2020) runs there on whole batches. Each file written is the moving average of the weights, in float16, at the
epoch with the best accuracy on the 5,000 images held out of the training split; the test split is looked at once, after the
last epoch. `gpt-small` (train_gpt.py) is chosen likewise, by its likelihood of the calibration manuals. Runs are seeded, and
repeat up to the order of the GPU's float sums.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ...ir.errors import GraphwrightError
from ...ir.files import check_output
from . import fashion_mnist, manuals, train_gpt
from .gpt import GPTSmall
from .mobilenetv2 import MobileNetV2
from .optimization import WeightAverage, autocast, cosine_schedule, parameter_groups
from .resnet import ResNet20
from .vit import ViTTiny
from .weights_file import load_weights, save_weights

_CROP_SHIFT = 2
_EVALUATIONS = 40


@dataclass(frozen=True)
class Recipe:
    """What differs between the models; learning rates are for the batch size given here."""

    build: Callable[[], nn.Module]
    optimizer: Callable[[list[dict]], torch.optim.Optimizer]
    weight_decay: float
    epochs: int
    batch: int = 256
    label_smoothing: float = 0.1
    erasing: float = 0.5
    max_norm: float | None = None


def _sgd(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.2, momentum=0.9, nesterov=True, foreach=True)


def _adamw(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), foreach=True)


RECIPES = {
    "resnet20": Recipe(ResNet20, _sgd, weight_decay=5e-4, epochs=150, label_smoothing=0.05),
    "mobilenetv2": Recipe(MobileNetV2, _sgd, weight_decay=2e-4, epochs=120),
    "vit-tiny": Recipe(ViTTiny, _adamw, weight_decay=0.05, epochs=102, max_norm=1.0),
}

LANGUAGE_MODEL = "gpt-small"


def augment(images: torch.Tensor, erasing: float) -> torch.Tensor:
    """Shift by up to two pixels, flip half the images, erase a rectangle in the share `erasing` of them.

    Shapes:
        `(N, 1, 28, 28)` in and out. New and erased pixels take zero, the mean of the normalized data (shifts use
        the background's own value). Rectangles cover 2% to 33% of an image, aspect ratio 0.3 to 3.3, as in the paper.
    """
    count, _, height, width = images.shape
    device = images.device
    background = (0.0 - fashion_mnist.MEAN) / fashion_mnist.STD
    padded = F.pad(images, (_CROP_SHIFT,) * 4, value=background)
    rows = torch.arange(height, device=device) + torch.randint(0, 2 * _CROP_SHIFT + 1, (count, 1), device=device)
    columns = torch.arange(width, device=device) + torch.randint(0, 2 * _CROP_SHIFT + 1, (count, 1), device=device)
    flipped = torch.rand(count, 1, device=device) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    sample = torch.arange(count, device=device)[:, None, None]
    images = padded[sample, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)

    area = torch.empty(count, 1, device=device).uniform_(0.02, 0.33) * height * width
    aspect = torch.exp(torch.empty(count, 1, device=device).uniform_(math.log(0.3), math.log(3.3)))
    box_height = (area * aspect).sqrt().clamp(1, height - 1).round()
    box_width = (area / aspect).sqrt().clamp(1, width - 1).round()
    top = (torch.rand(count, 1, device=device) * (height - box_height)).floor()
    left = (torch.rand(count, 1, device=device) * (width - box_width)).floor()
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    in_rows = (y >= top) & (y < top + box_height)
    in_columns = (x >= left) & (x < left + box_width)
    chosen = torch.rand(count, 1, 1, device=device) < erasing
    erased = (in_rows[:, :, None] & in_columns[:, None, :] & chosen).unsqueeze(1)
    return images.masked_fill(erased, 0.0)


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of `images` `(N, 1, 28, 28)` whose largest logit is the label, in float32."""
    model.eval()
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return float(torch.stack(hits).sum()) / len(labels)


class Trainer:
    """One model, its moving average, and the optimizer and cosine schedule of `total` steps that train it."""

    def __init__(self, recipe: Recipe, device: torch.device, total: int) -> None:
        self.recipe = recipe
        self.device = device
        self.model = recipe.build().to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.average = WeightAverage(self.model)
        self._optimizer = recipe.optimizer(parameter_groups(self.model, recipe.weight_decay))
        self._schedule = cosine_schedule(self._optimizer, total)

    def epoch(self, images: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
        """Train on `steps` shuffled batches of `(N, 1, 28, 28)` images; returns the last batch's loss."""
        recipe, model = self.recipe, self.model
        model.train()
        order = torch.randperm(len(labels), device=self.device)
        loss = torch.zeros((), device=self.device)
        for index in order[: steps * recipe.batch].split(recipe.batch):
            batch = augment(images[index], recipe.erasing).contiguous(memory_format=torch.channels_last)
            with autocast(self.device):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=recipe.label_smoothing)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm, foreach=True)
            self._optimizer.step()
            self._schedule.step()
            self.average.update()
        return loss.item()


def train(name: str, device: torch.device, data: Path, output: Path, epochs: int, seed: int, steps: int | None) -> None:
    """Train `name` and leave its best averaged weights in `output`; `steps` cuts every epoch short.

    Raises:
        DataError: the data set in `data` is missing or damaged.
        OutputError: `output` cannot be written.
    """
    recipe = RECIPES[name]
    check_output(output, overwrite=True)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True  # shapes never change, so the search pays off at once
    x_train, y_train = _on_device(fashion_mnist.training_slice(data), device)
    x_held, y_held = _on_device(fashion_mnist.held_out_slice(data), device)
    per_epoch = len(y_train) // recipe.batch if steps is None else steps
    trainer = Trainer(recipe, device, epochs * per_epoch)
    interval = max(1, epochs // _EVALUATIONS)
    best, started = -1.0, time.monotonic()
    for epoch in range(1, epochs + 1):
        loss = trainer.epoch(x_train, y_train, per_epoch)
        if epoch % interval == 0 or epoch == epochs:
            score = accuracy(trainer.average.model, x_held, y_held)
            if score > best:
                best = score
                save_weights(trainer.average.model, output)
            spent = time.monotonic() - started
            print(
                f"{name} epoch {epoch}/{epochs} loss {loss:.4f} held-out {score:.4f} best {best:.4f} {spent:.0f} s",
                flush=True,
            )
    stored = recipe.build()
    load_weights(stored, output)
    stored = stored.to(device)
    held = accuracy(stored, x_held, y_held)
    test = accuracy(stored, *_on_device(fashion_mnist.load_split("test", data), device))
    print(f"{name} stored float16 weights: held-out {held:.4f} test {test:.4f}", flush=True)


def train_language_model(device: torch.device, output: Path, epochs: int, seed: int, steps: int | None) -> None:
    """Train `gpt-small` on the training manuals and leave its best averaged weights in `output`.

    Raises:
        DataError: the manuals of a Debian package are missing.
        OutputError: `output` cannot be written.
    """
    check_output(output, overwrite=True)
    tokens = manuals.training_tokens().to(device)
    held_out = manuals.held_out_windows("calibration").to(device)
    train_gpt.train_gpt(
        tokens, held_out, lambda model: save_weights(model, output), epochs, train_gpt.STEPS if steps is None else steps, seed
    )
    stored = GPTSmall()
    load_weights(stored, output)
    stored = stored.to(device)
    scores = [train_gpt.log_likelihood(stored, manuals.held_out_windows(side).to(device)) for side in ("calibration", "test")]
    held, test = (math.exp(-score) for score in scores)
    print(f"gpt-small stored float16 weights: perplexity held-out {held:.3f} test {test:.3f}", flush=True)


def _on_device(split: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = split
    return fashion_mnist.normalize(images.to(device)), labels.to(device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m graphwright.tools.zoo.train", description="Train a reference model.")
    parser.add_argument("model", choices=sorted([*RECIPES, LANGUAGE_MODEL]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, default=fashion_mnist.DEFAULT_ROOT, help="folder of Fashion-MNIST's four .gz files")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="steps per epoch, to try the script out (default: the whole epoch)")
    options = parser.parse_args(arguments)
    recipe_epochs = train_gpt.EPOCHS if options.model == LANGUAGE_MODEL else RECIPES[options.model].epochs
    epochs = recipe_epochs if options.epochs is None else options.epochs
    for flag, value in (("--epochs", epochs), ("--steps", options.steps)):
        if value is not None and value < 1:
            parser.error(f"{flag} must be 1 or more, not {value}")
    device = torch.device(options.device)
    try:
        if options.model == LANGUAGE_MODEL:
            train_language_model(device, options.output, epochs, options.seed, options.steps)
        else:
            train(options.model, device, options.data, options.output, epochs, options.seed, options.steps)
    except GraphwrightError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
