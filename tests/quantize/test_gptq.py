"""GPTQ against optimal brain quantization, solved directly."""

import torch
from graphwright.passes.quantize.encoding import symmetric
from graphwright.passes.quantize.gptq import Gptq, damped, gptq, on_grid
from graphwright.passes.quantize.rounding import Rows, Steps
from hypothesis import given, settings
from hypothesis import strategies as st


def problem(seed: int, groups: int = 1, outputs: int = 3, size: int = 6, rows: int = 40, spread: float = 1.0):
    """A weight (G, O, K), correlated inputs' X X^T (the more, the smaller `spread`), and a 3-bit grid."""
    generator = torch.Generator().manual_seed(seed)
    mix = spread * torch.randn(groups, size, size, generator=generator, dtype=torch.float64) + (spread < 1)
    inputs = torch.randn(groups, rows, size, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(groups, outputs, size, generator=generator, dtype=torch.float64)
    scale = weight.abs().amax(2, keepdim=True) / 3
    return weight, inputs.transpose(1, 2) @ inputs, Steps(scale, torch.full_like(scale, -3), torch.full_like(scale, 3))


def loss(weight, values, hessian):
    gap = weight - values
    return (gap @ hessian * gap).sum((1, 2))


def brain_surgeon(weight, hessian, steps, order):
    """OBQ in a given order: after each rounding, the free weights of the row are solved for again by least squares."""
    rows, size = weight.shape
    result = torch.zeros_like(weight)
    for row in range(rows):
        current, free = weight[row].clone(), [int(i) for i in order]
        while free:
            column = free.pop(0)
            chosen = torch.round(current[column] / steps.scale[0, row, 0]).clamp(-3, 3)
            result[row, column] = chosen
            current[column] = chosen * steps.scale[0, row, 0]
            if free:
                fixed = [i for i in range(size) if i not in free]
                gap = weight[row, fixed] - current[fixed]
                moved = torch.linalg.solve(hessian[free][:, free], hessian[free][:, fixed] @ gap)
                current[free] = weight[row, free] + moved
    return result


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.booleans(), block=st.sampled_from([1, 4, 128]))
def test_equals_optimal_brain_quantization_in_the_same_order(seed, order, block):
    weight, hessian, steps = problem(seed)
    chosen = gptq(weight, hessian, on_grid(steps), 0.01, order, block)
    full = damped(hessian, 0.01)[0]
    places = torch.argsort(full.diagonal(), descending=True) if order else torch.arange(6)
    assert torch.equal(chosen[0], brain_surgeon(weight[0], full, steps, places))


def test_lies_between_nearest_and_the_best_of_all_codes():
    ratios = []
    for seed in range(12):
        weight, hessian, steps = problem(seed, outputs=8, size=4, spread=0.1)
        full = damped(hessian, 1e-3)
        grid = torch.cartesian_prod(*[torch.arange(-3, 4, dtype=torch.float64)] * 4)
        best = torch.stack([loss(weight[:, [o]], grid[:, None, :] * steps.scale[0, o], full).min() for o in range(8)]).sum()
        chosen, nearest = (
            loss(weight, codes * steps.scale, full)[0]
            for codes in (gptq(weight, hessian, on_grid(steps), 1e-3, True, 128), steps.nearest(weight))
        )
        assert best <= chosen + 1e-9
        ratios.append((float(chosen / nearest), float(chosen / best)))
    assert sum(r for r, _ in ratios) / 12 < 0.6, "far below nearest"
    assert sorted(r for _, r in ratios)[6] < 2.5, "near the best"


def test_groups_do_not_meet():
    weight, hessian, steps = problem(3, groups=5)
    together = gptq(weight, hessian, on_grid(steps), 0.01, True, 128)
    for g in range(5):
        alone = Steps(*(v[g : g + 1] for v in (steps.scale, steps.low, steps.high)))
        assert torch.equal(gptq(weight[g : g + 1], hessian[g : g + 1], on_grid(alone), 0.01, True, 128), together[g : g + 1])


def test_inputs_that_are_never_read_keep_the_nearest_code():
    weight, hessian, steps = problem(1)
    hessian[:, 2, :] = hessian[:, :, 2] = 0
    chosen = gptq(weight, hessian, on_grid(steps), 0.01, True, 128)
    assert torch.equal(chosen[:, :, 2], steps.nearest(weight)[:, :, 2])


def test_the_float_target_makes_up_for_inputs_that_are_off():
    weight, _, steps = problem(5, outputs=16, size=8)
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(1, 400, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    inputs = 0.8 * exact + 0.05 * torch.randn(exact.shape, generator=generator)
    weight = weight.float()
    steps = Steps(*(v.float() for v in (steps.scale, steps.low, steps.high)))
    rows = Rows(inputs, exact, exact @ weight.transpose(1, 2), weight, torch.zeros(1, 1, 16), 300, steps.nearest(weight))
    to_float, to_annotated = (
        Gptq(target=t).choose(rows, steps, None, generator).steps * steps.scale for t in ("float", "annotated")
    )
    assert rows.error(to_float) < 0.7 * rows.error(to_annotated)


def test_a_target_that_samples_do_not_share_is_left_alone():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(1, 60, 40, generator=generator)
    exact = inputs + 0.3 * torch.randn(inputs.shape, generator=generator)
    weight = torch.randn(1, 4, 40, generator=generator)
    steps = Steps.of(symmetric(weight[0].abs().amax(1), 4, axis=0), weight)
    rows = Rows(inputs, exact, exact @ weight.transpose(1, 2), weight, torch.zeros(1, 1, 4), 45, steps.nearest(weight))
    moved = Gptq()._shift(rows, weight.double())
    whole = torch.linalg.lstsq(inputs[0, :45].double(), ((exact - inputs)[0, :45] @ weight[0].T).double()).solution.T
    assert float(moved.norm()) < 0.3 * float(whole.norm()), "noise of the inputs is no reason to move weights"
