"""`distill`: it recovers what was lost, keeps encodings and zeros, resumes to the same bits, and says what it cannot do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.errors import DataError, OptionError, PassError
from graphwright.ir.program import Program, Stage
from graphwright.passes.base import LOSSY, Pass, PassContext, PassResult, Training
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import Pipeline, parse
from graphwright.passes.quantize.encoding import is_fake_quantize, read_codes, read_encoding
from graphwright.passes.recover import training
from graphwright.passes.recover.distill import Distill
from graphwright.passes.recover.student import Network, free_codes
from torch import nn

from ..quantize_models import Block, correlated, prepared, run, seeded, weights_of

SHAPE = (1, 3, 8, 8)
ANNOTATE = "canonicalize,quantize{weight_bits=2,activation_bits=4}"


class Net(nn.Module):
    """Convolutions with a batch norm and a residual sum, and a linear head behind a reshape that bakes the batch in."""

    def __init__(self, head: str = "classes") -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 6)
        self.kind = head

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.conv(x)).mean((2, 3))
        y = self.head(x.reshape(x.shape[0], -1))
        return {"classes": lambda: y, "softmax": lambda: y.softmax(-1), "unit": lambda: y / y.norm(dim=-1, keepdim=True)}[
            self.kind
        ]()


@dataclass(frozen=True)
class Blur(Pass):
    """Damage to recover from: adds noise to every weight, and zeroes the smallest half of those of the second convolution."""

    name = "blur"
    effect = LOSSY
    accepts = (Stage.CANONICAL,)
    leaves = Stage.COMPRESSED

    def run(self, program: Program, context: PassContext) -> PassResult:
        generator = torch.Generator().manual_seed(1)
        convolutions = [n for n in program.nodes if n.target is torch.ops.aten.convolution.default]
        for layer in convolutions:
            weight = program.parameter(layer.args[1])
            assert weight is not None
            noisy = weight + 0.5 * weight.std() * torch.randn(weight.shape, generator=generator)
            if layer is convolutions[1]:
                noisy = torch.where(noisy.abs() > noisy.abs().median(), noisy, 0.0)
            program.replace_parameter(layer.all_input_nodes[1], noisy)
        return PassResult(program, True)


def program_of(head: str = "classes", **options) -> Program:
    return capture(seeded(Net, head=head).eval(), torch.randn(SHAPE), **options)


def context_of(program: Program, count: int = 96, device: str = "cpu", checkpoints: Path | None = None) -> PassContext:
    samples = Calibration.for_program(program, correlated(SHAPE, count, 3))
    return PassContext(calibration=samples, training=Training(device=device, checkpoints=checkpoints))


def distilled(program: Program, context: PassContext, **options) -> tuple[Program, dict]:
    """The program after damage and distillation, and the pass's stats."""
    recipe = Distill(**({"epochs": 4, "batch_size": 8, "learning_rate": 3e-3} | options))
    result = PassManager().run(program, Pipeline((*parse("canonicalize"), Blur(), recipe)), context)
    return result.program, result.certificate[-1].stats


def same(left: Program, right: Program) -> bool:
    ours, theirs = left.parameters(), right.parameters()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("head, loss", [("classes", "kl"), ("softmax", "kl"), ("unit", "squared")])
def test_it_moves_the_outputs_back_to_the_float_models(head, loss):
    program = program_of(head)
    context = context_of(program)
    damaged = PassManager().run(program, Pipeline((*parse("canonicalize"), Blur())), context).program
    recovered, stats = distilled(program, context)
    unseen = correlated(SHAPE, 32, 99)

    def error(other: Program) -> float:
        return float(sum((other(x)[0] - program(x)[0]).square().sum() for x in unseen))

    assert stats["loss"] == loss and stats["steps"] == 4 * (90 // 8)
    assert stats["held_out_after"] < 0.3 * stats["held_out_before"]
    assert error(recovered) < 0.4 * error(damaged)
    assert recovered.stage is Stage.COMPRESSED


def test_it_never_writes_into_the_users_model():
    model = seeded(Net).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    program = capture(model, torch.randn(SHAPE))
    distilled(program, context_of(program), epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_symbolic_batch_trains_to_the_same_weights_as_a_fixed_one():
    """One sample at a time through vmap, or one batch through the graph: the same steps up to the order of sums."""
    fixed, free = program_of(), program_of(dynamic_batch=True)
    first, _ = distilled(fixed, context_of(fixed), epochs=1)
    second, _ = distilled(free, context_of(free), epochs=1)
    for a, b in zip(first.parameters().values(), second.parameters().values(), strict=True):
        assert torch.allclose(a, b, atol=2e-3)


def test_a_batch_that_the_graph_has_baked_in_trains():
    program = capture(seeded(Net).eval(), torch.randn(4, *SHAPE[1:]))
    assert any(4 in a for n in program.nodes for a in n.args if isinstance(a, (list, tuple)))
    samples = Calibration.for_program(program, [torch.cat(correlated(SHAPE, 96, 3))])
    _, stats = distilled(program, PassContext(calibration=samples, training=Training(device="cpu")), batch_size=2)
    assert stats["held_out_after"] < 0.5 * stats["held_out_before"]


@pytest.mark.parametrize(
    "compression",
    [
        "prune-channels{ratio=0.5,criterion=l1,reconstruct=false}",
        "sparsify-magnitude{sparsity=0.7}",
        "sparsify-magnitude{sparsity=0.7},compress-sparse",
        "factorize-svd{ratio=0.5,multiple=1}",
    ],
)
def test_every_kind_of_compressed_program_trains(compression):
    program = program_of()
    result = run(program, f"canonicalize,{compression},distill{{epochs=6,batch_size=8,learning_rate=0.003}}", context_of(program))
    before, after = result.certificate[-2], result.certificate[-1]
    assert after.stats["held_out_after"] < 0.7 * after.stats["held_out_before"]
    assert after.bytes_after == before.bytes_after
    zeros = [
        sum(int((t == 0).sum()) for t in p.parameters().values() if t.dim() > 1)
        for p in (run(program, f"canonicalize,{compression}", context_of(program)).program, result.program)
    ]
    assert zeros[0] == zeros[1]


def test_gradients_pass_ops_of_the_dialect():
    """The layer before a sparse one, and before tokens are merged, learns as if the op were plain torch."""
    program, context = prepared(Block, (1, 8, 32))
    assert context.calibration is not None
    for pipeline in ("spqr{share=0.1}", "reduce-tokens{merge=[2]}"):
        compressed = run(program, pipeline, context).program
        network = Network.of(compressed, torch.device("cpu"), train=True, scores=True)
        inputs = torch.cat([s[0] for s in context.calibration.samples])[:, None]
        network((inputs,))[0].square().sum().backward()
        assert all(value.grad is not None and bool((value.grad != 0).any()) for value in network.learned.values())
        for expected, sample in zip(network((inputs,))[0], context.calibration.samples, strict=True):
            assert torch.allclose(expected, compressed(*sample)[0], atol=1e-5)


def test_zeros_stay_zero():
    program = program_of()
    recovered, _ = distilled(program, context_of(program))
    layer = [n for n in recovered.nodes if n.target is torch.ops.aten.convolution.default][1]
    weight = recovered.parameter(layer.args[1])
    assert float((weight == 0).float().mean()) == 0.5


def test_annotated_programs_train_straight_through_and_keep_their_encodings():
    program = program_of()
    context = context_of(program)
    annotated = run(program, ANNOTATE, context).program
    result = run(program, f"{ANNOTATE},distill{{epochs=4,batch_size=8,learning_rate=0.003}}", context)
    stats = result.certificate[-1].stats
    assert stats["held_out_after"] < 0.5 * stats["held_out_before"]
    assert result.program.stage is Stage.ANNOTATED
    pairs = [[n for n in p.nodes if is_fake_quantize(n)] for p in (annotated, result.program)]
    for old, new in zip(*pairs, strict=True):
        a, b = read_encoding(annotated, old), read_encoding(result.program, new)
        assert torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point) and (a.qmin, a.qmax) == (b.qmin, b.qmax)
    codes = [[read_codes(p, n) for n in weights_of(p)] for p in (annotated, result.program)]
    assert any(not torch.equal(a, b) for a, b in zip(*codes, strict=True))


def test_a_distilled_annotated_program_lowers_to_integers_that_agree_with_it():
    program = program_of()
    context = context_of(program)
    pipeline = "canonicalize,quantize{weight_bits=4},align-scales,adaround{iterations=20},distill{batch_size=8}"
    annotated = run(program, pipeline, context)
    lowered = run(program, f"{pipeline},lower-integer", context).program
    assert annotated.certificate[-1].stats["freed_codes"] == 3
    for x in correlated(SHAPE, 8, 7):
        assert torch.allclose(annotated.program(x)[0], lowered(x)[0], atol=1e-5)


def test_chosen_codes_are_where_training_starts():
    """Taking the codes into the weights changes no bit of any output."""
    program = program_of()
    rounded = run(program, f"{ANNOTATE},gptq", context_of(program)).program
    before = [read_codes(rounded, n) for n in weights_of(rounded)]
    assert any(len(n.args) > 6 for n in weights_of(rounded))
    freed = rounded.clone()
    assert free_codes(freed) >= 1
    assert all(len(n.args) == 6 for n in weights_of(freed))
    assert all(torch.equal(a, read_codes(freed, n)) for a, n in zip(before, weights_of(freed), strict=True))
    for x in correlated(SHAPE, 4, 5):
        assert torch.equal(rounded(x)[0], freed(x)[0])


def test_codes_chosen_from_a_table_are_refused():
    program = program_of()
    coded = run(program, 'canonicalize,quantize{weights=["*=int4g8"]}', context_of(program)).program
    node = next(n for n in coded.nodes if n.target is torch.ops.gw.fake_codebook.default)
    codes = coded.add_parameter("codes", torch.zeros(node.meta["val"].shape, dtype=torch.uint8), node)
    node.args = (*(*node.args, None)[:5], codes)
    with pytest.raises(PassError, match="chose its codes from a table; put distill before"):
        free_codes(coded)


def test_weights_behind_a_table_train():
    program = program_of()
    result = run(program, 'canonicalize,quantize{weights=["*=int2g8"]},distill{epochs=4,batch_size=8}', context_of(program))
    stats = result.certificate[-1].stats
    assert stats["held_out_after"] < 0.5 * stats["held_out_before"]


def test_a_model_that_lost_nothing_stays_as_it_is():
    program = program_of()
    result = run(program, "canonicalize,distill{epochs=1,batch_size=8}", context_of(program))
    assert not result.certificate[-1].modified
    assert result.certificate[-1].stats["held_out_after"] == result.certificate[-1].stats["held_out_before"]


def test_blended_samples_train_too_and_token_ids_are_not_blended():
    program = program_of()
    _, stats = distilled(program, context_of(program), mixup=0.5)
    assert stats["held_out_after"] < 0.3 * stats["held_out_before"]
    tokens = capture(nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 4)), torch.zeros(1, 5, dtype=torch.int64))
    samples = Calibration.for_program(tokens, [torch.arange(20).reshape(4, 5) % 16])
    with pytest.raises(OptionError, match="'mixup' of distill blends inputs"):
        run(tokens, "canonicalize,distill{mixup=0.5}", PassContext(calibration=samples))


def test_the_seed_decides_and_nothing_else():
    program = program_of()
    first, again = (distilled(program, context_of(program), epochs=1)[0] for _ in range(2))
    context = context_of(program)
    context.seed = 1
    other, _ = distilled(program, context, epochs=1)
    assert same(first, again)
    assert not same(first, other)


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    program = program_of()
    whole, stats = distilled(program, context_of(program))
    done: list[int] = []

    def interrupt(step: int, total: int, what: str) -> None:
        if what == "distill":
            done.append(step)
            if step == 17:
                raise KeyboardInterrupt

    stopped = context_of(program, checkpoints=tmp_path)
    stopped.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        distilled(program, stopped)
    done.clear()
    stopped.progress = lambda step, total, what: done.append(step) if what == "distill" else None
    resumed, again = distilled(program, stopped)
    assert done[0] == 17
    assert same(whole, resumed) and again == stats
    done.clear()
    stopped.memo.clear()
    assert same(whole, distilled(program, stopped)[0]) and done == [stats["steps"]]


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    """kill -9 in the middle of another process, then the same run here."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.recover.slow_run", str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    program = program_of()
    context, steps = context_of(program, checkpoints=tmp_path), []
    context.progress = lambda step, total, what: steps.append(step) if what == "distill" else None
    resumed, stats = distilled(program, context)
    assert 0 < steps[0] < stats["steps"]
    assert same(resumed, distilled(program, context_of(program))[0])


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    program = program_of()
    distilled(program, context_of(program, checkpoints=tmp_path), epochs=1)
    (path,) = tmp_path.glob("*.pt")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged .*delete it"):
        distilled(program, context_of(program, checkpoints=tmp_path), epochs=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epochs": 0}, "'epochs' of distill must be at least 1"),
        ({"batch_size": 0}, "'batch_size' of distill must be at least 1"),
        ({"learning_rate": 0.0}, "'learning_rate' of distill must be above 0"),
        ({"mixup": 1.5}, "'mixup' of distill must lie in 0 to 1"),
        ({"temperature": -1.0}, "'temperature' of distill must be above 0"),
    ],
)
def test_numbers_out_of_range_are_errors(options, message):
    program = program_of()
    with pytest.raises(OptionError, match=message):
        distilled(program, context_of(program), **options)


def test_wrong_surroundings_are_errors():
    program = program_of()
    for context, error, message in (
        (context_of(program, count=1), DataError, "at least 2 samples"),
        (context_of(program, device="cuda:99"), OptionError, "device 'cuda:99' cannot be used here"),
        (context_of(program, device="gpu"), OptionError, "device 'gpu' cannot be used here"),
        (PassContext(), PassError, "distill needs calibration data"),
    ):
        with pytest.raises(error, match=message):
            distilled(program, context)
    with pytest.raises(OptionError, match="loss kl takes one output of class scores"):
        wide = capture(nn.Sequential(nn.Conv2d(3, 1, 8), nn.Flatten()), torch.randn(SHAPE))
        run(wide, "canonicalize,distill{loss=kl}", context_of(wide))
    with pytest.raises(PassError, match="no float weight"):
        bare = capture(nn.ReLU(), torch.randn(SHAPE))
        run(bare, "canonicalize,distill", context_of(bare))


def test_a_loss_that_is_not_finite_says_what_to_do():
    program = program_of()
    with pytest.raises(PassError, match="distill diverged.*lower learning_rate"):
        distilled(program, context_of(program), learning_rate=1e30, optimizer="sgd")
