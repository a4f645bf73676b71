"""What criteria say of channels whose worth is known."""

import itertools

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.errors import CalibrationError, GraphwrightError, OptionError, PassError, UnknownNameError
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.passes.prune.coupling import coupled_groups
from graphwright.passes.prune.criteria import criterion_text, parse_criterion
from graphwright.passes.prune.criteria.base import registry
from graphwright.passes.prune.criteria.thinet import Reader, eliminate, eliminate_fixed
from torch import nn

CRITERIA = tuple(registry())


class Plain(nn.Module):
    """Two convolutions and a classifier; the first has 6 channels, and channel 2 is dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.first.weight[2] = 0
            self.first.bias[2] = 0

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


def prepared(module, batch=1):
    example = torch.zeros(batch, 2, 8, 8)
    return PassManager().run(capture(module.eval(), (example,)), parse("canonicalize")).program


def context(program, count=16, seed=0):
    x = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    return PassContext(calibration=Calibration.for_program(program, [x]), seed=seed)


def scores(text, module=None, **options):
    program = prepared(module or Plain())
    groups = [g for g in coupled_groups(program) if not g.pinned]
    return parse_criterion(text).importance(program, groups, context(program, **options))


@pytest.mark.parametrize("name", [n for n in CRITERIA if n not in ("random", "geometric-median")])
def test_a_dead_channel_is_worth_least(name):
    found = scores(name)
    assert {k: len(v) for k, v in found.items()} == {"first": 6, "second": 8}
    assert all(bool((v >= 0).all()) and bool(torch.isfinite(v).all()) for v in found.values())
    first = found["first"]
    assert int(first.argmin()) == 2 and float(first[2]) < 0.01 * float(first.median())


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_repeats_itself_and_leaves_the_program_alone(name):
    program = prepared(Plain())
    groups = [g for g in coupled_groups(program) if not g.pinned]
    before = {k: v.clone() for k, v in program.parameters().items()}
    one, two = (parse_criterion(name).importance(program, groups, context(program)) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert all(torch.equal(before[k], v) and not v.grad_fn for k, v in program.parameters().items())


def test_the_geometric_median_goes_first():
    module = Plain()
    with torch.no_grad():
        module.first.weight[4] = module.first.weight[[0, 1, 2, 3, 5]].mean(0)
    assert int(scores("geometric-median", module)["first"].argmin()) == 4


def test_random_depends_on_the_seed():
    assert not torch.equal(scores("random", seed=0)["first"], scores("random", seed=1)["first"])


def test_norms_of_one_layer_are_relative_to_its_mean():
    module = Plain()
    expected = module.first.weight.detach().flatten(1).abs().sum(1).double()
    torch.testing.assert_close(scores("l1", module)["first"], expected / expected.mean(), rtol=1e-6, atol=0)


def test_the_deviation_of_a_folded_layer_is_the_scale_of_its_batch_normalization():
    torch.manual_seed(3)
    module = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    nn.init.uniform_(module[1].weight, -2, 2)
    x = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        values = module[0](x).movedim(1, 0).flatten(1)
        module[1].running_mean.copy_(values.mean(1))
        module[1].running_var.copy_(values.var(1, correction=0))
    (found,) = scores("batch-norm", module).values()
    torch.testing.assert_close(found, module[1].weight.detach().abs().double(), rtol=1e-3, atol=1e-4)


def test_taylor_is_the_squared_effect_of_a_gate():
    module, x = Plain().eval(), torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    gate = torch.ones(6, requires_grad=True)

    def loss(row):
        hidden = torch.relu(module.first(row) * gate[:, None, None])
        out = module.head(torch.relu(module.second(hidden)).mean((2, 3)))
        return torch.nn.functional.cross_entropy(out, out.argmax(1))

    slopes = torch.stack([torch.autograd.grad(loss(row[None]), gate)[0] for row in x]).double()
    torch.testing.assert_close(scores("taylor", module)["first"], slopes.square().mean(0), rtol=1e-4, atol=1e-9)


def test_fisher_is_half_the_squared_gradient_times_the_squared_weight():
    module, x = Plain().eval(), torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    squares = torch.zeros(6, dtype=torch.float64)
    for row in x:
        out = module(row[None])
        own = [module.first.weight, module.first.bias]
        grads = torch.autograd.grad(nn.functional.cross_entropy(out, out.argmax(1)), own)
        both = [(g.double() * p.detach()).square() for g, p in zip(grads, own, strict=True)]
        squares += 0.5 * (both[0].sum((1, 2, 3)) + both[1])
    torch.testing.assert_close(scores("fisher", module)["first"], squares / 16, rtol=1e-4, atol=1e-12)


# -- the greedy eliminations against brute force ---------------------------------------------------------------------------


def random_reader(seed, atoms=5, width=2, groups=1, outputs=3):
    generator = torch.Generator().manual_seed(seed)
    size = atoms * width
    x = torch.randn(groups, 60, size, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, size, outputs, generator=generator, dtype=torch.float64)
    columns = torch.arange(size).reshape(atoms, width)
    return x, Reader(x.transpose(1, 2) @ x, weight, columns, 7.0)


def left_error(x, reader, gone, refit):
    """Squared error of the outputs without the atoms `gone`."""
    stay = [c for a in range(len(reader.columns)) if a not in gone for c in reader.columns[a].tolist()]
    y = x @ reader.weight
    weight = torch.linalg.lstsq(x[:, :, stay], y).solution if refit else reader.weight[:, stay]
    return float((y - x[:, :, stay] @ weight).square().sum()) / reader.signal


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_importances_add_up_to_the_error_that_is_left(refit, groups):
    readers = [random_reader(1, groups=groups), random_reader(2, outputs=4)]
    find = eliminate if refit else eliminate_fixed
    importance = find([reader for _, reader in readers], 5)
    order = importance.argsort().tolist()
    for count in range(1, 5):
        expected = sum(left_error(x, reader, order[:count], refit) for x, reader in readers)
        # Importance never falls along the order, so it may only be above what an atom adds.
        assert float(importance[order[:count]].sum()) >= expected * (1 - 1e-6)
        least = min(sum(left_error(x, r, [*order[: count - 1], a], refit) for x, r in readers) for a in order[count - 1 :])
        assert expected == pytest.approx(least, rel=1e-6)
    assert float(importance[order[0]]) == pytest.approx(sum(left_error(x, r, order[:1], refit) for x, r in readers), rel=1e-6)


def test_refitting_finds_a_better_pair_than_keeping_weights():
    x, reader = random_reader(4)
    errors = {pair: left_error(x, reader, pair, True) for pair in itertools.combinations(range(5), 2)}
    chosen = {f: tuple(sorted(f([reader], 5).argsort()[:2].tolist())) for f in (eliminate, eliminate_fixed)}
    assert errors[chosen[eliminate]] <= errors[chosen[eliminate_fixed]]
    assert errors[chosen[eliminate]] <= sorted(errors.values())[2]


# -- text and refusals ----------------------------------------------------------------------------------------------------------


def test_criteria_are_written_like_passes():
    assert criterion_text(parse_criterion("thinet{samples=64,refit=false}")) == "thinet{refit=false,samples=64}"
    with pytest.raises(UnknownNameError, match="did you mean 'taylor'"):
        parse_criterion("tailor")
    with pytest.raises(OptionError, match="one criterion"):
        parse_criterion("l1,l2")


@pytest.mark.parametrize("name", [n for n, c in registry().items() if c.needs_calibration])
def test_data_is_asked_for(name):
    program = prepared(Plain())
    with pytest.raises(PassError, match="needs calibration"):
        parse_criterion(name).importance(program, coupled_groups(program)[:1], PassContext())
    with pytest.raises((OptionError, CalibrationError), match="samples"):
        parse_criterion(f"{name}{{samples=0}}").importance(program, coupled_groups(program)[:1], context(program))


def test_thinet_names_a_group_that_no_layer_reads():
    program = prepared(Plain())
    group = next(g for g in coupled_groups(program) if g.name == "first")
    blind = type(group)(group.name, group.size, tuple(m for m in group.members if m.role != "in"), group.values)
    with pytest.raises(GraphwrightError, match="reads the channels of 'first'"):
        parse_criterion("thinet").importance(program, [blind], context(program))
