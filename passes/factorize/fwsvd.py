"""factorize-fwsvd: a layer as two, nearest in the weights that matter to the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.func import functional_call

from ...ir.content import program_hash
from ...ir.data import Sample
from ...ir.errors import OptionError
from ...ir.program import Program
from ..base import PassContext, register
from ..fold.layer import Layer
from ..outputs import class_scores, is_classifier
from .base import Factorize, factorizable
from .decomposition import Rank
from .matrix import Matrix, Metric


@register
@dataclass(frozen=True)
class FactorizeFwsvd(Factorize):
    """Weighs every input of a layer by the Fisher information of its weights before the truncation.

        %y = linear(%x, W, b)   ->   %h = linear(%x, A);  %y = linear(%h, B, b)             B A D nearest to W D

    Hsu et al. 2022, FWSVD (arXiv:2207.00112, section 3): D is diagonal, D_j^2 = sum over outputs of the Fisher information of
    W[:, j], the mean squared gradient of the loss. (The paper writes z = x W, so its rows are the inputs.) There are no labels
    here: classes are drawn from the network's own distribution, which gives the Fisher matrix proper; a network that is no
    classifier is taken as the mean of a normal distribution.

    Options and stats: see `Factorize`; `samples` is how many calibration samples are used at most, one gradient each.
    """

    name: ClassVar[str] = "factorize-fwsvd"
    needs_calibration: ClassVar = True

    samples: int = 128

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if self.samples < 1:
            raise OptionError(f"option 'samples' of {self.name} must be at least 1, not {self.samples}")

    def decompositions(
        self, program: Program, layers: Sequence[Layer], context: PassContext, taken: dict[fx.Node, Rank]
    ) -> Iterator[Matrix]:
        samples = context.require_calibration(self.name).samples[: self.samples]
        # One backward pass a sample has the gradients of all layers, whichever are asked for.
        every, _ = factorizable(program)
        key = f"{self.name} {self.samples} {context.seed} {program_hash(program)}"

        def compute() -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(context.seed)
            found = fisher(program, every, samples, generator, context.progress)
            return {layer.node.name: row.flatten(1).sum(0) for layer, row in zip(every, found, strict=True)}

        information = context.remember(key, compute)
        for layer in layers:
            inputs = information[layer.node.name]
            # Inputs no gradient reaches keep a little weight: the metric must be regular.
            yield Matrix(layer, Metric(columns=inputs.clamp_min(1e-6 * float(inputs.mean()) + 1e-30).sqrt()))


def fisher(
    program: Program,
    layers: Sequence[Layer],
    samples: Sequence[Sample],
    generator: torch.Generator,
    progress: Callable[[int, int, str], None],
) -> list[torch.Tensor]:
    """Mean over the samples of the squared gradient of -log p(y) over each layer's weight, float64.

    y is drawn from the network's own distribution p: of the classes, independent at each position, where it is a classifier, else
    a normal distribution of unit variance around its outputs.
    """
    names = [str(layer.node.args[1].target) for layer in layers]  # type: ignore[union-attr]
    weights = {name: layer.weight.detach().clone().requires_grad_() for name, layer in zip(names, layers, strict=True)}
    sums = [torch.zeros_like(layer.weight, dtype=torch.float64) for layer in layers]
    classes = is_classifier(program)
    probabilities = classes and class_scores(program.outputs[0]) is not program.outputs[0]
    for done, sample in enumerate(samples, 1):
        with torch.enable_grad():
            outputs = functional_call(program.graph_module, weights, sample)
            outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
            if classes:
                logits = outputs[0].log() if probabilities else outputs[0]
                scores = logits.flatten(0, -2).log_softmax(-1)
                drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
                loss = -scores.gather(1, drawn).sum()
            else:
                loss = torch.stack([(torch.randn(y.shape, generator=generator) * y).sum() for y in outputs]).sum()
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total += gradient.to(torch.float64).square() / len(samples)
        progress(done, len(samples), "gradients")
    return sums
