"""prune-channels: what goes, what the reconstruction makes up for, and what is refused."""

import functools
import math

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.errors import OptionError, PassError, UnknownNameError
from graphwright.ir.program import Stage
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.passes.prune.coupling import coupled_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from models import small_cnn, small_inputs
from torch import nn


class Redundant(nn.Module):
    """Twelve channels of which four carry everything: the others are multiples of them. A residual sum and two readers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Conv2d(3, 12, 3, padding=1)
        self.read = nn.Conv2d(12, 8, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            for channel in range(4, 12):
                self.wide.weight[channel] = self.wide.weight[channel % 4] * (0.5 + channel / 10)
                self.wide.bias[channel] = self.wide.bias[channel % 4] * (0.5 + channel / 10)

    def forward(self, x):
        x = self.read(torch.relu(self.wide(x)))
        x = torch.relu(x + self.branch(torch.relu(x)))
        return self.head(x.mean((2, 3)))


@functools.cache
def prepared(build):
    """The network that `build` makes, canonical. Passes leave the program they are given as it is, so all tests share it."""
    return PassManager().run(capture(build().eval(), (small_inputs(),)), parse("canonicalize")).program


def context(program, count=16, seed=0):
    return PassContext(calibration=Calibration.for_program(program, [small_inputs(count, seed=5)]), seed=seed)


def run(program, text, samples=None):
    outcome = PassManager().run(program, parse(text), samples or context(program))
    return outcome.program, outcome.certificate[-1]


def sizes(program):
    return {group.name: group.size for group in coupled_groups(program)}


def error(before, after, count=16):
    x = small_inputs(count, seed=9).split(before.input_specs[0].shape[0] or count)
    exact, made = (torch.cat([p(row)[0] for row in x]) for p in (before, after))
    return float((exact - made).square().sum() / exact.square().sum())


@pytest.mark.parametrize("criterion", ["thinet", "taylor", "random"])
def test_every_group_loses_its_share_and_the_program_is_really_smaller(criterion):
    before = prepared(small_cnn)
    after, row = run(before, f"prune-channels{{ratio=0.25,criterion={criterion}}}")
    assert sizes(before) == {"stem": 8, "head": 5}
    assert row.modified and after.stage is Stage.COMPRESSED
    for name, (whole, kept) in row.stats["groups"].items():
        assert kept == whole - math.floor(whole * 0.25) == sizes(after)[name]
    assert row.bytes_after < row.bytes_before
    assert row.stats["pinned"] == 1  # the classes


def test_what_is_redundant_goes_without_loss():
    before = prepared(Redundant)
    cut, _ = run(before, 'prune-channels{keep=["wide=4"],reconstruct=false}')
    fitted, row = run(before, 'prune-channels{keep=["wide=4"],damping=1e-9}')
    assert sizes(fitted)["wide"] == 4
    assert error(before, fitted) < 1e-6 < error(before, cut)
    assert max(after for _, after in row.stats["errors"].values()) < 1e-5


def test_refitting_selects_one_of_each_kind():
    before = prepared(Redundant)
    after, _ = run(before, 'prune-channels{keep=["wide=4"],reconstruct=false}')
    weight = next(p for p in after.parameters().values() if p.shape[:2] == (4, 3)).flatten(1)
    alike = torch.nn.functional.cosine_similarity(weight[:, None], weight[None], dim=2)
    assert float((alike - torch.eye(4)).abs().max()) < 0.999


def test_reconstruction_lowers_the_error_of_every_criterion():
    before = prepared(Redundant)
    for criterion in ("l2", "random", "thinet"):
        errors = [
            error(before, run(before, f"prune-channels{{ratio=0.5,criterion={criterion},reconstruct={flag}}}")[0])
            for flag in ("false", "true")
        ]
        assert errors[1] < 0.5 * errors[0], criterion


def test_a_plan_written_out_replays_it():
    before = prepared(Redundant)
    after, row = run(before, "prune-channels{ratio=0.5}")
    keep = ",".join(f'"{name}={kept}"' for name, (_, kept) in row.stats["groups"].items())
    again, _ = run(before, f"prune-channels{{keep=[{keep}]}}")
    assert sizes(again) == sizes(after)
    assert all(torch.equal(a, b) for a, b in zip(after.parameters().values(), again.parameters().values(), strict=True))


def test_keep_leaves_other_groups_whole_and_ignore_keeps_them_so():
    before = prepared(Redundant)
    assert sizes(run(before, 'prune-channels{keep=["wide=6"]}')[0]) == sizes(before) | {"wide": 6}
    assert sizes(run(before, 'prune-channels{ratio=0.5,keep=["wide=9"]}')[0]) == sizes(before) | {"wide": 9, "read": 4}
    assert sizes(run(before, 'prune-channels{ratio=0.5,ignore=["read"]}')[0]) == sizes(before) | {"wide": 6}


def test_counts_are_rounded_up_to_what_kernels_like():
    before = prepared(Redundant)
    assert sizes(run(before, "prune-channels{ratio=0.5,round_to=8}")[0]) == sizes(before) | {"wide": 8}
    assert sizes(run(before, "prune-channels{ratio=0.7,round_to=4}")[0]) == sizes(before) | {"wide": 4, "read": 4}


def test_a_global_ranking_takes_its_share_of_all_atoms():
    before = prepared(Redundant)
    after, row = run(before, "prune-channels{ratio=0.4,scope=global,criterion=l1}")
    gone = sum(whole - kept for whole, kept in row.stats["groups"].values())
    assert gone == math.floor(0.4 * 20)
    assert all(kept >= 1 for _, kept in row.stats["groups"].values()) and sizes(after)["wide"] < 12


def test_nothing_asked_for_nothing_done():
    before, _ = run(prepared(Redundant), "prune-channels{ratio=0.5}")
    after, row = run(before, "prune-channels{ratio=0}")
    assert not row.modified and sizes(after) == sizes(before)


def test_a_symbolic_batch_gives_the_same_network():
    fixed = prepared(Redundant)
    free = PassManager().run(capture(Redundant().eval(), (small_inputs(2),), dynamic_batch=True), parse("canonicalize")).program
    samples = PassContext(calibration=Calibration.for_program(free, list(small_inputs(32, seed=5).split(8))))
    one, two = run(fixed, 'prune-channels{keep=["wide=4"]}')[0], run(free, 'prune-channels{keep=["wide=4"]}', samples)[0]
    assert sizes(one) == sizes(two)
    assert error(free, two) < 1e-4 and error(fixed, one) < 1e-4


@settings(max_examples=4)
@given(ratio=st.floats(0.0, 0.95), seed=st.integers(0, 5), round_to=st.integers(1, 5))
def test_any_ratio_leaves_a_network_that_runs(ratio, seed, round_to):
    before = prepared(small_cnn)
    text = f"prune-channels{{ratio={ratio},criterion=random,round_to={round_to},samples=4}}"
    after, row = run(before, text, context(before, 4, seed))
    assert all(1 <= kept < whole for whole, kept in row.stats["groups"].values())
    assert torch.isfinite(after(small_inputs())[0]).all()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ("ratio=1.0", OptionError, "every group would be empty"),
        ("ratio=-0.1", OptionError, "0 <= ratio < 1"),
        ('keep=["wode=4"]', UnknownNameError, "did you mean 'wide'"),
        ('ignore=["wode"]', UnknownNameError, "did you mean 'wide'"),
        ('keep=["branch=4"]', OptionError, "'branch' is no group of channels: what this layer writes goes with 'read'"),
        ('ignore=["branch"]', OptionError, "goes with 'read'; name that instead"),
        ('keep=["wide=13"]', OptionError, "1 to 12 can stay, not 13"),
        ('keep=["wide=0"]', OptionError, "1 to 12 can stay, not 0"),
        ('keep=["wide"]', OptionError, "GROUP=COUNT"),
        ('keep=["wide=4"],ignore=["wide"]', OptionError, "in 'keep' and in 'ignore'"),
        ('keep=["head=3"]', PassError, "'head' cannot be cut: it reaches the network's output"),
        ("criterion=tailor", UnknownNameError, "did you mean 'taylor'"),
        ("ratio=0.96,scope=global", PassError, "would leave groups empty"),
        ("round_to=0", OptionError, "at least 1"),
        ("damping=0.0", OptionError, "above 0"),
    ],
)
def test_bad_requests_are_refused(options, kind, message):
    program = prepared(Redundant)
    with pytest.raises(kind, match=message):
        run(program, f"prune-channels{{{options}}}")


def test_a_network_of_which_nothing_can_be_cut_says_what_pins_it():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return torch.sort(self.first(x), 1)[0]

    with pytest.raises(PassError, match=r"can be cut \('first': aten.sort at 'sort' is an operator .* does not know\); inspect"):
        run(prepared(Sorted), "prune-channels{ratio=0.5}")


def test_calibration_is_asked_for_only_where_it_is_used():
    program = prepared(Redundant)
    with pytest.raises(PassError, match="prune-channels needs calibration"):
        run(program, "prune-channels{criterion=l1}", PassContext())
    with pytest.raises(PassError, match="criterion taylor needs calibration"):
        run(program, "prune-channels{criterion=taylor,reconstruct=false}", PassContext())
    after, _ = run(program, "prune-channels{criterion=l1,reconstruct=false}", PassContext())
    assert sizes(after)["wide"] == 6
