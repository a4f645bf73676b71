"""Float attention against float64: operands that lie anywhere, masks that broadcast, odd sizes."""

from __future__ import annotations

import numpy as np
import pytest
from graphwright.backends.tvm.kernels.attention_f32 import Attention, Rows, attention
from graphwright.ir.errors import OptionError
from hypothesis import given, settings
from hypothesis import strategies as st

from .float_cases import EPS, LEVELS, normal, run

EXAMPLES = settings(max_examples=8, deadline=None)


def rows_of(shape: tuple[int, int, int, int], axes: str, offset: int, pitch: int) -> tuple[Rows, tuple[int, ...]]:
    """Rows of a (batch, heads, rows, width) operand stored with its axes in the order `axes` and `pitch` floats between rows of
    width, `offset` floats in; and the order of axes to view them in."""
    sizes = dict(zip("bhr", shape[:3], strict=True))
    steps, step = {}, pitch
    for axis in reversed(axes):
        steps[axis] = step
        step *= sizes[axis]
    return Rows(step, offset, steps["b"], steps["h"], steps["r"]), tuple(sizes[a] for a in axes)


def read(buffer: np.ndarray, rows: Rows, shape: tuple[int, int, int, int]) -> np.ndarray:
    b, h, r, d = np.ogrid[tuple(slice(n) for n in shape)]
    return buffer[rows.at(b, h, r) + d]


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 70),
    width=st.integers(1, 40),
    value_width=st.integers(1, 70),
    order=st.sampled_from(["bhr", "brh"]),
    spare=st.integers(0, 5),
    mask=st.sampled_from([None, "keys", "heads", "full"]),
    merged=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_attention(level, batch, heads, queries, keys, width, value_width, order, spare, mask, merged, seed):
    rng = np.random.default_rng(seed)
    shapes = {"q": (batch, heads, queries, width), "k": (batch, heads, keys, width), "v": (batch, heads, keys, value_width)}
    places = {n: rows_of(s, order, min(spare, 3), s[3] + spare)[0] for n, s in shapes.items()}
    buffers = {n: normal(rng, place.size) for n, place in places.items()}
    q, k, v = (read(buffers[n], places[n], shapes[n]).astype(np.float64) for n in "qkv")
    hidden, extra = None, np.zeros(1)
    if mask is not None:
        lead = {"keys": (1, 1, 1), "heads": (1, heads, 1), "full": (batch, heads, queries)}[mask]
        extra = np.where(rng.random((*lead, keys)) < 0.3, -10000.0, 0.0).astype(np.float32)
        steps = [0 if n == 1 else int(np.prod((*lead, keys)[i + 1 :])) for i, n in enumerate(lead)]
        hidden = Rows(extra.size, 0, *steps)
    scale = 1 / np.sqrt(width)
    shape = Attention(
        batch, heads, queries, keys, width, value_width, scale, places["q"], places["k"], places["v"], hidden, merged
    )  # fmt: skip
    y = run(attention(shape, level), level, [*buffers.values(), *([extra.reshape(-1)] if mask else [])], shape.out)
    scores = scale * q @ k.swapaxes(-1, -2)
    total = scores + extra
    below = np.minimum(total.max(-1, keepdims=True) - total, 64)
    p = np.exp(total - total.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    # A score of -10000 keeps fewer digits; its weight is nothing unless the whole row is masked.
    off = (width + 4) * EPS * (scale * np.abs(q) @ np.abs(k).swapaxes(-1, -2) + np.abs(extra))
    relative = 2 * off.max(-1, keepdims=True) + (keys + 24 + below) * EPS
    limit = (relative * p) @ np.abs(v) + 2e-28 * np.abs(v).sum(-2, keepdims=True)
    exact = p @ v
    y = y.swapaxes(1, 2) if merged else y
    assert (np.abs(y - exact) <= limit).all(), f"{np.max(np.abs(y - exact) / limit):.3g} times the bound"


def test_empty_extents_are_refused():
    rows = Rows(1, 0, 1, 1, 1)
    with pytest.raises(OptionError, match="at least 1"):
        Attention(1, 1, 0, 1, 1, 1, 1.0, rows, rows, rows)
