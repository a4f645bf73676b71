"""The attention kernel equals the chain of gw:: ops that it replaces, bit for bit, whatever the strides of its operands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.backends.tvm.kernels import attention_int8
from graphwright.backends.tvm.kernels.attention_int8 import AttentionInt8
from graphwright.backends.tvm.kernels.base import Tail
from graphwright.backends.tvm.kernels.quantize_image import Quantize
from graphwright.backends.tvm.strided import Strided
from graphwright.ir.dialect import gw
from graphwright.ir.errors import OptionError
from hypothesis import given, settings
from hypothesis import strategies as st

from .kernel_cases import LEVELS, TORCH, random_values, run, tails


def permuted(array: np.ndarray, order: tuple[int, ...]) -> tuple[np.ndarray, Strided]:
    """The same tensor stored with its axes in `order`, and the index map back."""
    stored = np.ascontiguousarray(array.transpose(order))
    return stored, Strided.whole(stored.shape).permute(tuple(np.argsort(order)))


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_equals_the_chain_of_ops(level, data):
    batch, heads, rows, keys, columns = (data.draw(st.integers(1, most)) for most in (2, 3, 40, 90, 40))
    keys, columns = data.draw(st.sampled_from([(keys, columns), (128, 32)]))
    inner = 4 * data.draw(st.integers(1, 9))
    q_dtype, q_zero = data.draw(st.sampled_from([("uint8", 126), ("int8", 0), ("int8", 5)]))
    limits = data.draw(
        st.sampled_from([(0, 0, 255, "uint8"), (0, 0, 200, "uint8"), (-128, -128, 127, "int8"), (3, 0, 255, "uint8")])
    )
    quantize = Quantize(data.draw(st.sampled_from([1 / 255, 0.01, 1e-3])), *limits)
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    q = random_values(rng, q_dtype, (batch, heads, rows, inner))
    k = random_values(rng, "int8", (batch, heads, inner, keys))
    v = random_values(rng, "int8", (batch, heads, keys, columns))
    kind = data.draw(st.sampled_from(["none", "keys", "batch", "causal", "whole"]))
    shapes = {"keys": (1, 1, 1, keys), "batch": (batch, 1, 1, keys), "causal": (rows, keys), "whole": (batch, heads, rows, keys)}
    mask = (
        None
        if kind == "none"
        else np.where(rng.random(shapes[kind]) < 0.2, -1e4, rng.normal(size=shapes[kind])).astype(np.float32)
    )
    scale = float(np.float32(data.draw(st.sampled_from([1e-5, 1e-4, 1e-3]))))
    case = data.draw(tails(columns, with_residual=False))

    order = data.draw(st.permutations(range(3)))  # q must stay contiguous along its last axis
    stored = [permuted(q, (*order, 3)), permuted(k, tuple(data.draw(st.permutations(range(4)))))]
    stored.append(permuted(v, tuple(data.draw(st.permutations(range(4))))))
    maps = [strided for _, strided in stored]
    masked = None if mask is None else Strided.whole(mask.shape).expand((batch, heads, rows, keys))
    spec = AttentionInt8(*maps, masked, q_dtype, q_zero, scale, quantize, data.draw(st.booleans()))
    packed = attention_int8.pack(spec, case.tail, level, **case.values)
    arrays = [array for array, _ in stored] + ([] if mask is None else [mask]) + list(packed)
    got = run(attention_int8.build(spec, case.tail, level), level, arrays, np.zeros(spec.out_shape, case.tail.dtype))

    scores = gw.scale(gw.matmul(torch.from_numpy(q), torch.from_numpy(k), q_zero, 0), torch.tensor([scale]), 0)
    scores = scores if mask is None else scores + torch.from_numpy(mask)
    codes = gw.quantize(gw.softmax(scores), quantize.scale, *limits[:3], TORCH[quantize.dtype])
    want = case.reference(gw.matmul(codes, torch.from_numpy(v), quantize.zero_point, 0), 3).numpy()
    np.testing.assert_array_equal(got, want.transpose(0, 2, 1, 3) if spec.swapped else want)


def test_rows_that_do_not_fit_are_refused():
    whole = Strided.whole((1, 8, 6))
    spec = AttentionInt8(
        whole, Strided.whole((1, 6, 8)), Strided.whole((1, 8, 4)), None, "uint8", 0, 1.0, Quantize(1.0, 0, 0, 255, "uint8")
    )
    assert not attention_int8.fits(spec, "avx512-vnni")
    with pytest.raises(OptionError, match="does not fit"):
        attention_int8.build(spec, Tail("none", "int32"), "avx512-vnni")
    assert attention_int8.fits(spec, "portable")
