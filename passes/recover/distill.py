"""Distillation: a compressed program learns the outputs of the float model it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...ir.content import content_key
from ...ir.data import Calibration
from ...ir.errors import OptionError, PassError
from ...ir.program import Program, Stage, shape_of
from ..base import LOSSY, Pass, PassContext, PassResult, register
from ..outputs import class_scores, is_classifier
from .recipe import Recipe
from .student import Network, free_codes, learned_names, write_back
from .training import Trainer, choose_device, stack


@register
@dataclass(frozen=True)
class Distill(Recipe, Pass):
    """Trains weights and biases so that the outputs are again those of the program the pipeline began with.

        %y = convolution(%x, w, b)                              ->    %y = convolution(%x, w', b')
        %y = convolution(%x', fake_quantize(w, s, z, ...), b)   ->    %y = convolution(%x', fake_quantize(w', s, z, ...), b')

    Hinton et al. 2015 (arXiv:1503.02531), with the teacher's outputs alone: no labels. The loss is the KL divergence from the
    teacher's class probabilities where the one output is made by a linear layer of two or more outputs (a softmax or moves
    behind it count as part of it), and otherwise, for embeddings and maps, the squared distance to the teacher's outputs,
    relative to their squared length. A regression with a linear head must ask for `squared`.

    It works on float programs and on annotated ones. There the gradient goes straight through each rounding, and is cut where
    a value saturates (Bengio et al. 2013, arXiv:1308.3432); encodings stay as they are. Codes that a rounding pass chose
    (`adaround`, `gptq`, ...) are where training starts: each weight goes to the nearest value that rounds to its code, so place
    this pass behind them, right before `lower-integer`; bias correction and rounding measure against the weights as they are,
    and would undo it. Weights that are exactly 0 stay 0, so sparse layers stay sparse. What learns are the weights and biases
    of convolutions, linear layers, layer norms and embeddings.

    A sixteenth of the samples, at most 1024, is held out: the weights after the epoch of least loss on them are kept, or those
    the pass found, where training helps none of them. The samples are the context's training samples (`optimize(finetune=...)`),
    or the calibration samples. With a checkpoint folder a killed run goes on where it was, to the same bits. A run repeats on
    one kind of device with one number of threads; another may add in another order.

    Stats: loss, samples, steps, held-out loss before and after, tensors and numbers that learned, weights whose chosen codes
    training started from, and the device.

    Raises:
        OptionError: a number out of range, class scores asked for where there are none, or a device that is not there.
        PassError: nothing can be trained, codes of a table that a pass chose, or a loss that is not finite.
        CalibrationError, DataError: no samples, fewer than two, or a damaged checkpoint.
    """

    name: ClassVar[str] = "distill"
    effect: ClassVar = LOSSY
    float32_only: ClassVar = True
    accepts: ClassVar = (Stage.CANONICAL, Stage.COMPRESSED, Stage.ANNOTATED)

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        self.check(self.name)
        self._samples(context)
        if context.original is None:
            raise PassError(f"{self.name} needs the program before compression: run it through PassManager")
        if self.mixup and not all(spec.dtype.is_floating_point for spec in program.input_specs):
            raise OptionError(f"option 'mixup' of {self.name} blends inputs, and those of '{program.name}' are not all float")
        if not learned_names(program):
            raise PassError(f"{self.name} finds no float weight in '{program.name}' to train")

    def run(self, program: Program, context: PassContext) -> PassResult:
        original, samples = context.original, self._samples(context)
        assert original is not None
        loss = self._loss(program)
        device = choose_device(context.training.device)
        freed = free_codes(program)
        recipe = Recipe(**{name: getattr(self, name) for name in Recipe.__dataclass_fields__})
        key = content_key(program, original, samples.samples, recipe, loss, context.seed, device.type)
        student = Network.of(program, device, train=True, scores=loss == "kl")
        teacher = Network.of(original, device, train=False, scores=loss == "kl")

        def train() -> dict[str, Any]:
            inputs = stack(samples.samples, student.free_batch)
            trainer = Trainer(
                student, teacher, inputs, recipe, loss, device, context.seed, context.progress, key, context.training.checkpoints
            )
            state = trainer.run()
            return {"steps": trainer.total, "best": state.best, "before": state.first_loss, "after": state.best_loss}

        # Many plans of one model share the passes before quantize; they are trained once.
        found = context.remember(f"distill {key}", train)
        improved = found["after"] < found["before"]
        if improved:
            write_back(program, found["best"])
        stats = {
            "loss": loss,
            "samples": sum(len(sample[0]) for sample in samples.samples) if student.free_batch else len(samples),
            "steps": found["steps"],
            "held_out_before": found["before"],
            "held_out_after": found["after"],
            "learned_tensors": len(student.learned),
            "learned_numbers": sum(value.numel() for value in student.learned.values()),
            "freed_codes": freed,
            "device": device.type,
        }
        return PassResult(program, improved or freed > 0, stats)

    def _samples(self, context: PassContext) -> Calibration:
        return context.training.samples or context.require_calibration(self.name)

    def _loss(self, program: Program) -> str:
        """`kl` or `squared`."""
        if self.loss == "auto":
            return "kl" if is_classifier(program) else "squared"
        outputs = program.outputs
        if self.loss == "kl" and (len(outputs) != 1 or shape_of(class_scores(outputs[0]))[-1:] in ((), (1,))):
            found = ", ".join(str(tuple(shape_of(o))) for o in outputs)
            raise OptionError(
                f"loss kl takes one output of class scores (..., classes); '{program.name}' has {found}: use squared"
            )
        return self.loss
