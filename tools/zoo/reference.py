"""A reference model together with its data and its metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import nn

from ...ir.errors import DataError
from .samples import Inputs, Samples

Predict = Callable[[Inputs], torch.Tensor]


class Metric(StrEnum):
    """How outputs are scored; every metric is better when larger, and 1 at best (a log-likelihood 0)."""

    TOP1 = "top-1"
    TOP1_AGREEMENT = "top-1 agreement"
    SPEARMAN = "spearman"
    CORRELATION = "logit correlation"
    LOG_LIKELIHOOD = "log-likelihood"


#: These compare with labels; the others with the float model's outputs.
_LABELLED = (Metric.TOP1, Metric.LOG_LIKELIHOOD)


@dataclass(frozen=True)
class ReferenceModel:
    """A trained model in eval mode, one example input, its calibration and evaluation samples, and its metric.

    Attributes:
        example_inputs: one real evaluation sample, batch size 1.
        metric: `top-1` compares with true labels, `top-1 agreement` with the float model's own classes, `spearman` is the
            rank correlation of the cosine similarities of all pairs of evaluation samples with the float model's. `logit
            correlation` is for networks with random weights, whose classes mean nothing: the correlation of the outputs with
            the float model's, each output's mean over the samples taken off. It is no accuracy. `log-likelihood` is that of a
            token given those before it, in nats, averaged over all tokens; `perplexity` turns it into the usual figure.
    """

    name: str
    model: nn.Module
    example_inputs: Inputs
    metric: Metric
    samples: Samples
    _float_outputs: dict[int | None, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def metric_name(self) -> str:
        return self.metric.value

    def calibration(self, count: int = 512) -> list[Inputs]:
        """`count` samples in batches of at most 32; none of them, nor their source, occurs in `evaluation`."""
        return self.samples.calibration(count)

    def training(self, count: int | None = None) -> list[Inputs] | None:
        """`count` inputs (None: all) that the model was trained on, without labels; None where they are not at hand."""
        return self.samples.training(count)

    def calibration_labels(self, count: int = 512) -> torch.Tensor | None:
        """The labels of `calibration(count)`, one row a sample (see `Samples`); None where there are none."""
        return self.samples.calibration_labels(count)

    def evaluation(self, count: int | None = None) -> Iterable[tuple[Inputs, torch.Tensor | None]]:
        """The first `count` evaluation samples (None: all) in batches of at most 32, with labels (see `Samples`) or None."""
        return self.samples.evaluation(count)

    def evaluate(self, predict: Predict, count: int | None = None) -> float:
        """Score `predict`, which maps a batch of inputs to the outputs of the model, on the first `count` samples.

        The float model's outputs, where the metric needs them, are computed once per `count` and kept.

        Raises:
            DataError: `predict` gives outputs of another shape than the model, or values that are not finite.
        """
        return self.evaluate_all([predict], count)[0]

    def evaluate_all(self, predicts: Sequence[Predict], count: int | None = None) -> list[float]:
        """`evaluate` for several systems in one pass over the samples, which are made once for all of them."""
        outputs: list[list[torch.Tensor]] = [[] for _ in predicts]
        labels: list[torch.Tensor] = []
        references: list[torch.Tensor] = []
        wants_float = self.metric not in _LABELLED and count not in self._float_outputs
        for inputs, batch_labels in self.evaluation(count):
            for predict, collected in zip(predicts, outputs, strict=True):
                collected.append(self._reduced(self._checked(predict(inputs), inputs), batch_labels))
            if batch_labels is not None:
                labels.append(batch_labels)
            if wants_float:
                with torch.no_grad():
                    references.append(self.model(*inputs))
        if wants_float:
            self._float_outputs[count] = torch.cat(references)
        return [self._score(torch.cat(collected), labels, count) for collected in outputs]

    def _reduced(self, output: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """What is kept of a batch until the end: a language model's logits of all samples would take gigabytes."""
        if self.metric is not Metric.LOG_LIKELIHOOD or labels is None:
            return output
        return output.log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    def _score(self, predicted: torch.Tensor, labels: list[torch.Tensor], count: int | None) -> float:
        if self.metric is Metric.TOP1:
            return _share_equal(predicted.argmax(1), torch.cat(labels))
        if self.metric is Metric.LOG_LIKELIHOOD:
            return float(predicted.double().mean())
        expected = self._float_outputs[count]
        if self.metric is Metric.TOP1_AGREEMENT:
            return _share_equal(predicted.argmax(1), expected.argmax(1))
        if self.metric is Metric.CORRELATION:
            return centered_correlation(predicted, expected)
        return similarity_spearman(predicted, expected)

    def _checked(self, output: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        leading = inputs[0].shape[: 2 if self.metric is Metric.LOG_LIKELIHOOD else 1]
        if output.ndim != len(leading) + 1 or output.shape[:-1] != leading:
            raise DataError(
                f"predict returned shape {tuple(output.shape)} for {len(inputs[0])} samples of {self.name}, expected "
                f"({', '.join(map(str, leading))}, outputs)"
            )
        if not torch.isfinite(output).all():
            raise DataError(f"predict returned values that are not finite for {self.name}")
        return output.detach().to("cpu", torch.float32)


def perplexity(log_likelihood: float) -> float:
    """The perplexity that a mean log-likelihood per token in nats stands for."""
    return math.exp(-log_likelihood)


def _share_equal(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left == right).sum()) / len(right)


def centered_correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    """Pearson's correlation of all entries of two `(N, D)` matrices whose columns are centered.

    Raises:
        DataError: fewer than two rows, or a matrix that is constant along its rows: no correlation exists.
    """
    centered = [values.double() - values.double().mean(0) for values in (left, right)]
    norms = [float(values.norm()) for values in centered]
    if len(right) < 2 or not all(norms):
        raise DataError("a correlation over samples needs two samples or more with different outputs")
    return float((centered[0] * centered[1]).sum()) / (norms[0] * norms[1])


def similarity_spearman(left: torch.Tensor, right: torch.Tensor) -> float:
    """Spearman's rank correlation of the cosine similarities of all pairs of rows, `(N, D)` against `(N, E)`.

    Raises:
        DataError: fewer than three rows, or similarities that are all equal: no rank correlation exists.
    """
    if len(right) < 3:
        raise DataError(f"a rank correlation of pairwise similarities needs 3 samples or more, got {len(right)}")
    similarities = []
    for rows in (left, right):
        unit = torch.nn.functional.normalize(rows.double(), dim=1)
        upper = torch.triu_indices(len(rows), len(rows), offset=1)
        similarities.append((unit @ unit.T)[upper[0], upper[1]])
    ranks = torch.stack([_average_ranks(values) for values in similarities])
    correlation = float(torch.corrcoef(ranks)[0, 1])
    if correlation != correlation:
        raise DataError("all pairwise similarities are equal: their rank correlation does not exist")
    return correlation


def _average_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1, equal values sharing the mean of their ranks; `(N,)` float64."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1.0) / 2.0)[inverse]
