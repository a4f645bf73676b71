"""What gradients are taken of, where calibration has no labels.

A classifier is asked for the class it names itself: cross entropy with its own prediction (the divergence from its own
probabilities has no gradient at the float point). Outputs that are no class scores are asked for half their squared length.
"""

from __future__ import annotations

import torch

from ....ir.program import Program
from ...outputs import class_scores, is_classifier
from .activations import Values


def loss(program: Program, values: Values) -> torch.Tensor:
    """The loss of one sample, (); see the module text."""
    if not is_classifier(program):
        return torch.stack([0.5 * values[node].square().sum() for node in program.outputs]).sum()
    scores = values[class_scores(program.outputs[0])]
    scores = scores.reshape(-1, scores.shape[-1])
    return torch.nn.functional.cross_entropy(scores, scores.detach().argmax(-1))


def probe(program: Program, values: Values, generator: torch.Generator) -> torch.Tensor:
    """A random projection of the outputs, (), whose squared gradient is on average the diagonal of the Gauss-Newton matrix.

    (B r) . y with random signs r and B B^T the Hessian of the loss over the outputs y: diag(p) - p p^T for class scores,
    averaged over positions, 1 for half the squared length. It needs no labels.
    """
    if not is_classifier(program):
        return torch.stack([(values[n] * _signs(values[n], generator)).sum() for n in program.outputs]).sum()
    scores = values[class_scores(program.outputs[0])]
    with torch.no_grad():
        root = scores.softmax(-1).sqrt()
        signs = _signs(scores, generator)
        projected = root * (signs - root * (root * signs).sum(-1, keepdim=True))
        projected /= (scores.numel() / scores.shape[-1]) ** 0.5
    return (projected * scores).sum()


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like.dtype)
