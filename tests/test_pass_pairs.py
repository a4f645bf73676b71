"""Every pass behind every other: it runs and verifies, or it is refused with a message of ours; never an exception of torch's."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from block_models import canonical, images
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.errors import CalibrationError, GraphwrightError, PassContractError, PassError
from graphwright.ir.program import Program, Stage
from graphwright.passes.base import PassContext, find, registry
from graphwright.passes.manager import PassManager
from graphwright.passes.order import check_order
from graphwright.passes.pipeline import parse
from torch import nn

#: Options without which a pass refuses every program, and those that keep this file short.
OPTIONS = {
    "adaquant": "iterations=2",
    "adaround": "iterations=2",
    "eora": "rank=1",
    "linearize-activations": 'layers=["relu_2"]',
    "prune-channels": "samples=2",
    "quantize": "activation_observer=min-max",
    "reduce-tokens": "per_layer=1",
    "remove-blocks": "count=1",
    "remove-heads": "count=1",
    "share-blocks": "count=1",
    "sparsify-chita": "stages=1,steps=2",
}
OPTIONS |= {name: "ratio=0.5,multiple=1" for name in registry() if name.startswith("factorize-")}

#: Passes that find nothing to do without an attention.
ATTENTION = ("reduce-tokens", "remove-heads")


class Convolutions(nn.Module):
    """Two equal residual blocks, and two linear layers with an activation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(torch.relu(self.middle(x.mean((2, 3)))))


class Attention(nn.Module):
    """An attention of two heads in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(1, 4, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head((x + self.proj(y.transpose(1, 2).reshape(1, 4, 4))).mean(1))


def pass_of(name: str) -> str:
    return f"{name}{{{OPTIONS[name]}}}" if name in OPTIONS else name


class Pairs:
    """Runs pairs of passes on one network, captured once, and each first pass once."""

    def __init__(self, model: nn.Module, *shape: int) -> None:
        self.program = canonical(model, *shape)
        self.calibration = images(self.program, 1)
        self.annotated = self.run(self.program, "quantize")
        self.firsts: dict[str, Program | None] = {}
        #: (program, second pass) that ran or were refused. A pass that changes nothing hands the same program on.
        self.seconds: set[tuple[int, str]] = set()

    def run(self, program: Program, name: str) -> Program:
        """The program after the pass; the same where the pass changes nothing."""
        result = PassManager().run(program, parse(pass_of(name)), PassContext(calibration=self.calibration))
        return result.program if result.certificate[0].modified else program

    def first(self, name: str) -> Program | None:
        """What the pass makes of the canonical program, or of the quantized one where it asks for that; None: it is refused."""
        if name not in self.firsts:
            start = self.program if Stage.CANONICAL in find(name).accepts else self.annotated
            try:
                self.firsts[name] = self.run(start, name)
            except GraphwrightError as error:
                require_ours(error, name)
                self.firsts[name] = None
        return self.firsts[name]

    def second(self, first: str, name: str) -> None:
        program = self.first(first)
        if program is None or (id(program), name) in self.seconds:
            return
        self.seconds.add((id(program), name))
        try:
            self.run(program, name)
        except GraphwrightError as error:
            require_ours(error, f"{first},{name}")


def require_ours(error: GraphwrightError, pair: str) -> None:
    """A refusal is no broken promise, and its cause is no exception of somebody else's."""
    causes, cause = [], error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    assert all(isinstance(cause, GraphwrightError) and not isinstance(cause, PassContractError) for cause in causes), (
        f"{pair}: {error}"
    )


@pytest.fixture(scope="module")
def convolutions():
    torch.manual_seed(0)
    return Pairs(Convolutions(), 1, 2, 4, 4)


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(0)
    return Pairs(Attention(), 1, 4, 4)


@pytest.mark.parametrize("first", registry())
def test_a_pass_runs_behind_another_or_is_refused(convolutions, first):
    for name in registry():
        convolutions.second(first, name)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_pass_on_attention_runs_beside_another_or_either_is_refused(attention, name):
    for other in registry():
        attention.second(name, other)
        attention.second(other, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cast-float,quantize", "pass 2 'quantize' computes in float32, but 'cast-float' before it .*keep one of the two"),
        ("cast-float,remove-no-ops,spqr", "pass 3 'spqr' computes in float32, but 'cast-float' .*put cast-float behind spqr"),
        ("adaround", "pass 1 'adaround' takes a program in stage annotated, but .* is canonical; put quantize before adaround"),
        ("quantize,equalize", "pass 2 'equalize' .* 'quantize' before it leaves .* annotated; put equalize before quantize"),
        ("quantize,compress-sparse", "put lower-integer before compress-sparse, or put compress-sparse before quantize"),
    ],
)
def test_a_wrong_order_is_refused_before_anything_runs(convolutions, text, message):
    context = PassContext(progress=mock.Mock())
    with pytest.raises(PassError, match=message):
        PassManager().run(convolutions.program, parse(text), context)
    assert not context.progress.called


def test_orders_of_the_contract_are_taken(convolutions):
    check_order(convolutions.program, parse("equalize,quantize,align-scales,lower-integer,compress-sparse"))
    check_order(convolutions.program, parse("sparsify-magnitude,cast-float,compress-sparse"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_16_bits_is_canonical_but_not_quantized(dtype):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval().to(dtype)
    inputs = torch.randn(1, 2, 5, 5, dtype=dtype)
    program = PassManager().run(capture(model, inputs, name="test"), parse("canonicalize")).program
    assert program.stage is Stage.CANONICAL
    context = PassContext(Calibration(((inputs,),)))
    with pytest.raises(
        PassError, match=rf"quantize computes in float32, but 'input' of 'test' is {str(dtype)[6:]}; take the model in"
    ):
        PassManager().run(program, parse("quantize"), context)


def test_samples_that_the_model_does_not_run_on_are_the_calibrations_fault():
    torch.manual_seed(0)
    program = capture(nn.Embedding(3, 2), torch.tensor([[0, 1]]))
    with pytest.raises(CalibrationError, match="does not run on sample 0 of its calibration: IndexError.*vocabulary"):
        PassManager().run(program, parse("canonicalize"), PassContext(Calibration(((torch.tensor([[0, 3]]),),))))
