"""The manager bites: each deliberately wrong pass is stopped, with its name and the first differing value."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.errors import DataError, PassContractError, PassError
from graphwright.ir.program import Program, Stage
from graphwright.passes.base import EXACT, LOSSY, Pass, PassContext, PassResult, bounded
from graphwright.passes.fold.layer import fold_after, layer_of
from graphwright.passes.manager import Dump, Instrument, PassManager, PrintAfter, compare
from graphwright.passes.pipeline import Pipeline, parse
from torch import nn

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.norm.bias.data.uniform_(0.5, 1)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


@pytest.fixture(scope="module")
def captured() -> Program:
    torch.manual_seed(0)
    return capture(Net(), torch.randn(2, 3, 6, 6))


@pytest.fixture
def program(captured) -> Program:
    """A clone with tensors of its own: some wrong passes write into them."""
    fresh = captured.clone()
    for name, value in fresh.parameters().items():
        setattr(fresh.graph_module, name, value.clone())
    return fresh


def find(program: Program, target) -> torch.fx.Node:
    return next(n for n in program.nodes if n.target is target)


@dataclass(frozen=True)
class Wrong(Pass):
    """Base of the deliberately wrong passes below."""

    name = "wrong"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program, self.edit(program))

    def edit(self, program: Program) -> bool:
        raise NotImplementedError


class WrongSign(Wrong):
    """Folds batch norm with beta + mean * scale instead of beta - mean * scale."""

    def edit(self, program):
        node = find(program, aten.batch_norm.default)
        weight, bias, mean, var = (program.parameter(a).double() for a in node.args[1:5])
        scale = weight * torch.rsqrt(var + node.args[7])
        fold_after(program, layer_of(program, node.args[0]), scale, bias + mean * scale)
        node.replace_all_uses_with(node.args[0])
        return True


class WrongShape(Wrong):
    def edit(self, program):
        node = program.outputs[0]
        flat = program.insert(aten.reshape.default, (node, [2, -1]), program.output)
        program.output.replace_input_with(node, flat)
        return True


class WrongType(Wrong):
    def edit(self, program):
        node = program.outputs[0]
        wide = program.insert(aten._to_copy.default, (node,), program.output, dtype=torch.float64)
        program.output.replace_input_with(node, wide)
        return True


class HidesEdit(Wrong):
    def edit(self, program):
        node = find(program, aten.relu.default)
        node.target = aten.hardswish.default
        return False


class HidesParameter(Wrong):
    """The graph's text is the same; only the values behind a name are other ones."""

    def edit(self, program):
        name = str(find(program, aten.convolution.default).args[2].target)
        setattr(program.graph_module, name, getattr(program.graph_module, name) + 1)
        return False


class ClaimsEdit(Wrong):
    def edit(self, program):
        return True


class StaleShape(Wrong):
    """Sets another padding and leaves the recorded shapes as they were."""

    def edit(self, program):
        node = find(program, aten.convolution.default)
        node.update_arg(4, [1, 1])
        return True


class NoShape(Wrong):
    def edit(self, program):
        node = program.outputs[0]
        with program.graph.inserting_before(program.output):
            program.output.replace_input_with(node, program.graph.call_function(aten.relu.default, (node,)))
        return True


class WritesNan(Wrong):
    def edit(self, program):
        bias = find(program, aten.convolution.default).args[2]
        program.replace_parameter(bias, torch.full_like(program.parameter(bias), float("nan")))
        return True


class LossyNan(WritesNan):
    effect = LOSSY


class InPlace(Wrong):
    def edit(self, program):
        program.parameter(find(program, aten.convolution.default).args[1]).mul_(1.0001)
        return False


class InPlaceData(Wrong):
    """Writes behind autograd's back, where version counters do not see it."""

    def edit(self, program):
        program.parameter(find(program, aten.convolution.default).args[1]).data.mul_(1.0001)
        return False


class Crashes(Wrong):
    def edit(self, program):
        raise IndexError("list index out of range")


class Refuses(Wrong):
    def edit(self, program):
        raise PassError("needs a square input")


class ForgetsBatchNorm(Wrong):
    """Declares the canonical stage and leaves batch norm in."""

    leaves = Stage.CANONICAL

    def edit(self, program):
        return True


class TooFar(Wrong):
    effect = bounded(1e-3)

    def edit(self, program):
        relu = find(program, aten.relu.default)
        shifted = program.insert(aten.mul.Tensor, (relu, 1.01), program.output)
        program.output.replace_input_with(relu, shifted)
        return True


class CloseEnough(TooFar):
    effect = bounded(0.02)


class Lossy(TooFar):
    effect = LOSSY


def run(program: Program, *passes: Pass, context: PassContext | None = None):
    return PassManager().run(program, Pipeline(passes), context)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (WrongSign, r"moved the outputs by .* of their largest.*first differing value: output 0, element \d+: \S+ became"),
        (WrongShape, r"changed the program's outputs: .*2x4x4x4.* became .*2x64"),
        (WrongType, r"changed the program's outputs: .*float32.* became .*float64"),
        (HidesEdit, r"says modified=False but changed the program"),
        (HidesParameter, r"says modified=False but changed the program"),
        (ClaimsEdit, r"says modified=True but left the program as it was"),
        (StaleShape, r"an invalid program: .*'convolution' \(from conv\): records \(2, 4, 4, 4\) .* computes \(2, 4, 6, 6\)"),
        (NoShape, r"left an invalid program: .*no shape"),
        (WritesNan, r"first differing value: output 0, element 0: \S+ became nan"),
        (LossyNan, r"no NaN or infinity may appear.*became nan"),
        (InPlace, r"wrote into parameter 'conv_weight'"),
        (InPlaceData, r"wrote into parameter 'conv_weight'"),
        (ForgetsBatchNorm, r"left an invalid program: .*not a valid canonical program.*'batch_norm\w*' \(from norm\)"),
        (TooFar, r"declares itself bounded\(0.001\) but moved the outputs by 0.01 .*first differing value: output 0, element"),
    ],
)  # fmt: skip
def test_wrong_pass_is_caught_and_named(program, wrong, message):
    with pytest.raises(PassContractError, match=rf"(?s)pass 1 'wrong' \(after \(none\)\).*{message}"):
        run(program, wrong())


def test_the_value_reported_is_the_first_that_differs(program):
    context = PassContext(probes=((torch.randn(2, 3, 6, 6),),))
    with pytest.raises(PassContractError) as caught:
        run(program, WrongSign(), context=context)
    wrong = program.clone()
    WrongSign().run(wrong, context)
    wrong.sweep()
    before, after = (p(*context.probes[0])[0].flatten() for p in (program, wrong))
    at = int((before != after).nonzero()[0])
    assert f"element {at}: {float(before[at]):.9g} became {float(after[at]):.9g}" in str(caught.value)


def test_error_names_the_passes_before_and_the_command_that_reproduces_it(program):
    pipeline = Pipeline((*parse("remove-no-ops,canonicalize-activation").passes, WrongSign()))
    with pytest.raises(PassContractError) as caught:
        PassManager().run(program, pipeline)
    text = "remove-no-ops,canonicalize-activation"
    assert f"pass 3 'wrong' (after {text})" in str(caught.value)
    assert f"graphwright rewrite MODEL -p '{text},wrong'" in str(caught.value)


def test_crash_names_the_pass_and_keeps_the_cause(program):
    with pytest.raises(PassError, match=r"pass 1 'wrong' .* crashed: IndexError: list index out of range") as caught:
        run(program, Crashes())
    assert isinstance(caught.value.__cause__, IndexError)


def test_refusal_names_the_pass(program):
    with pytest.raises(PassError, match=r"pass 1 'wrong' .*: needs a square input"):
        run(program, Refuses())


def test_wrong_stage_is_refused(program):
    program = run(program, parse("fold-batch-norm").passes[0]).program
    program.stage = Stage.INTEGER
    with pytest.raises(PassError, match="takes a program in stage captured, canonical, compressed, but 'Net' is integer"):
        run(program, parse("fold-batch-norm").passes[0])


def test_the_input_program_is_verified_and_left_alone(program):
    text = str(program.graph)
    result = run(program, parse("fold-batch-norm").passes[0])
    assert str(program.graph) == text
    assert result.program is not program
    find(program, aten.convolution.default).update_arg(4, [1, 1])
    with pytest.raises(Exception, match="records"):
        run(program)


def test_dead_code_of_the_input_is_no_lie(program):
    program.insert(aten.tanh.default, (program.inputs[0],), program.output)
    result = run(program, parse("fold-pad").passes[0])
    assert not result.certificate[0].modified
    assert all(n.target is not aten.tanh.default for n in result.program.nodes)


def test_bounded_and_lossy_changes_are_measured(program):
    for kind in (CloseEnough, Lossy):
        row = run(program, kind()).certificate[0]
        assert row.modified
        assert row.relative == pytest.approx(0.01, rel=1e-3)
        assert row.sqnr_db == pytest.approx(40, abs=0.1)


def test_certificate_rows_are_json(program):
    result = PassManager().run(program, parse("fold-batch-norm,remove-no-ops"))
    rows = json.loads(json.dumps([row.to_json() for row in result.certificate], allow_nan=False))
    assert [(r["index"], r["name"], r["modified"]) for r in rows] == [(1, "fold-batch-norm", True), (2, "remove-no-ops", False)]
    first = rows[0]
    assert first["effect"] == "exact"
    assert first["probes"] == 2
    assert first["stats"] == {"after_layer": 1, "before_layer": 0, "scale_and_shift": 0}
    assert first["nodes_after"] < first["nodes_before"]
    assert first["bytes_after"] == first["bytes_before"] - 4 * 4 * 4
    assert 0 < first["relative"] < 1e-5
    assert rows[1]["sqnr_db"] is None


def test_an_infinite_ratio_is_valid_json():
    class Zero(nn.Module):
        def forward(self, x):
            return x * 0

    @dataclass(frozen=True)
    class Shift(Wrong):
        effect = LOSSY

        def edit(self, program):
            node = program.outputs[0]
            program.output.replace_input_with(node, program.insert(aten.add.Tensor, (node, 1), program.output))
            return True

    row = run(capture(Zero(), torch.randn(3)), Shift()).certificate[0]
    assert row.max_abs == 1
    assert json.loads(json.dumps(row.to_json(), allow_nan=False))["relative"] is None


def test_probes_are_calibration_samples_and_random_ones(program):
    calibration = Calibration.for_program(program, [torch.randn(6, 3, 6, 6)])
    context = PassContext(calibration=calibration, probes=((torch.zeros(2, 3, 6, 6),),))
    row = run(program, parse("fold-batch-norm").passes[0], context=context).certificate[0]
    assert row.probes == 1 + 2 + 2
    with pytest.raises(DataError, match="holds nan"):
        Calibration.for_program(program, [torch.full((2, 3, 6, 6), float("nan"))])


def test_a_symbolic_batch_is_probed_at_two_sizes():
    class FixesBatch(Wrong):
        """Right at batch 1 only: repeats the first row."""

        def edit(self, program):
            node = program.outputs[0]
            rows = program.insert(aten.sym_size.int, (program.inputs[0], 0), program.output)
            first = program.insert(aten.slice.Tensor, (node, 0, 0, 1), program.output)
            spread = program.insert(aten.expand.default, (first, [rows, -1, -1, -1]), program.output)
            program.output.replace_input_with(node, spread)
            return True

    symbolic = capture(Net(), torch.randn(2, 3, 6, 6), dynamic_batch=True)
    with pytest.raises(PassContractError, match="first differing value: output 0"):
        run(symbolic, FixesBatch())


def test_dump_writes_numbered_files(program, tmp_path):
    PassManager([Dump(tmp_path / "dump")]).run(program, parse("fold-batch-norm,remove-no-ops"))
    names = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert names == ["000_input.txt", "001_fold-batch-norm.txt", "002_remove-no-ops.txt"]
    texts = [(tmp_path / "dump" / n).read_text() for n in names]
    assert "aten.batch_norm" in texts[0]
    assert "aten.batch_norm" not in texts[1]
    assert texts[1] == texts[2]


def test_print_after_prints_the_named_passes_only(program):
    printed: list[str] = []
    PassManager([PrintAfter(["fold-batch-norm"], printed.append)]).run(program, parse("remove-no-ops,fold-batch-norm"))
    assert len(printed) == 1
    assert printed[0].startswith("// after fold-batch-norm\nprogram Net (captured)")


def test_instruments_see_each_pass_before_and_after(program):
    seen: list[tuple] = []

    class Watch(Instrument):
        def before(self, index, total, instance, program):
            seen.append(("before", index, total, instance.name))

        def after(self, row, total, program):
            seen.append(("after", row.index, total, row.name))

    PassManager([Watch()]).run(program, parse("remove-no-ops,fold-batch-norm"))
    assert seen == [
        ("before", 1, 2, "remove-no-ops"),
        ("after", 1, 2, "remove-no-ops"),
        ("before", 2, 2, "fold-batch-norm"),
        ("after", 2, 2, "fold-batch-norm"),
    ]


def test_compare_counts_a_lost_nan_as_infinite():
    clean, broken = torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])
    assert compare([[clean]], [[broken]]).max_abs == float("inf")
    assert compare([[broken]], [[broken]]).first is None
    assert compare([[clean]], [[torch.tensor([1.0, float("inf")])]]).max_abs == float("inf")
    assert compare([[clean]], [[clean + 1]]).first == (0, 0, 1.0, 2.0)
