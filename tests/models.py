"""Small trained-looking models that several tests share."""

from __future__ import annotations

import torch


class SmallCNN(torch.nn.Module):
    """Convolution, batch normalization, a residual add, pooling and a linear layer: one of everything a CNN has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = torch.nn.Conv2d(8, 8, 1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.pointwise(torch.nn.functional.relu6(self.depthwise(x)))
        return self.head(torch.nn.functional.max_pool2d(torch.relu(x), 2).mean((2, 3)))


def small_cnn(seed: int = 0) -> SmallCNN:
    """A SmallCNN with batch-norm statistics that are not the identity."""
    torch.manual_seed(seed)
    model = SmallCNN()
    model.norm.running_mean.uniform_(-0.5, 0.5)
    model.norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def small_inputs(count: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
