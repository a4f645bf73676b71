"""`gw::fake_quantize`, the op of the annotated stage: a float value held on its quantization grid."""

from __future__ import annotations

import torch

from ._library import LIBRARY


def broadcast_along(value: torch.Tensor, rank: int, axis: int | None) -> torch.Tensor:
    """Reshapes a per-channel vector so that it broadcasts along `axis` of a rank-`rank` tensor."""
    if axis is None or value.numel() == 1:
        return value.reshape(())
    shape = [1] * rank
    shape[axis] = value.numel()
    return value.reshape(shape)


class _FakeQuantize(torch.autograd.Function):
    """clamp(round_half_even(x * (1 / scale)) + zero_point, qmin, qmax), minus zero_point, times scale.

    `codes`, where given, stand for the rounded ones: somebody chose them by more than distance (`adaround`, `gptq`).
    The gradient is the straight-through estimator, cut where the value saturates (Bengio et al. 2013, arXiv:1308.3432).
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, qmin: int, qmax: int, axis: int | None, codes):  # type: ignore[override]
        scale = broadcast_along(scale, x.dim(), axis)
        zero_point = broadcast_along(zero_point, x.dim(), axis).to(x.dtype)
        # The product is clamped first: with integer bounds this equals rounding first, and it never overflows.
        low, high = qmin - zero_point, qmax - zero_point
        needs_gradient = ctx.needs_input_grad[0]
        if codes is None or needs_gradient:
            product = x * torch.reciprocal(scale)
            steps = torch.clamp(product, low, high) if needs_gradient else product.clamp_(low, high)
            if needs_gradient:
                ctx.save_for_backward(product == steps)
        # Everything is a fresh tensor by now, so the rest is in place: activations are large, and memory is what takes time.
        return steps.round_().mul_(scale) if codes is None else (codes.to(x.dtype) - zero_point) * scale

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None, None, None


LIBRARY.define(
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int? axis=None, Tensor? codes=None) -> Tensor"
)
LIBRARY.impl(
    "fake_quantize",
    lambda *args: _FakeQuantize.apply(*args, *(None,) * (7 - len(args))),
    "CompositeImplicitAutograd",
)


def _over_samples(info, in_dims, x, scale, zero_point, qmin, qmax, axis=None, codes=None):
    """`torch.func.vmap` over x: one encoding for all samples, so a sample axis in front changes nothing but `axis`."""
    if any(dim is not None for dim in in_dims[1:3]) or (codes is not None and in_dims[6] is not None):
        raise ValueError("fake_quantize runs over samples of x; scale, zero point and codes are the same for all of them")
    along = None if axis is None else axis + 1
    return torch.ops.gw.fake_quantize(x.movedim(in_dims[0], 0), scale, zero_point, qmin, qmax, along, codes), 0


torch.library.register_vmap("gw::fake_quantize", _over_samples, lib=LIBRARY)
