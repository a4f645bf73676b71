"""Movements of data through the TVM backend: pads, slices, concatenations and permutations keep every bit."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from graphwright.backends.tvm.executor import load_bytes
from graphwright.ir.dialect import gw
from graphwright.ir.program import Stage
from integer_graphs import codes, integers, normal, program, scales
from tvm_programs import check_bits, compiled, kinds

U8, S8 = torch.uint8, torch.int8


def test_concatenation_padding_and_slices_of_channels():
    def body(p, x):
        c = gw.rescale(gw.convolution(x, p.w, None, [1, 1], [0, 0], [1, 1], 1, 0), p.s, 50, 0, 255, U8, 1)
        a, b = c.split([7, 13], dim=1)
        joined = torch.cat([b, c, a], 1)
        framed = F.pad(joined, [1, 0, 2, 1], value=50)
        return gw.max_pool2d(framed, [3, 3], [1, 1], [0, 0], [1, 1], False), c[:, 3:8], c[:, :, 1:], c.permute(0, 2, 3, 1)

    graph = program(body, codes(2, 5, 4, 6), w=integers(-127, 128, 20, 5, 1, 1), s=scales(20, 1e-3))
    names = kinds(check_bits(graph, (codes(2, 5, 4, 6),)))
    assert names["concatenate_channels"] == names["pad_channels"] == 1


def test_a_convolution_pads_and_quantizes_its_image_itself():
    """What an explicit pad (Keras "same") and the quantization of the input become: no kernel of their own."""

    def body(p, x):
        q = F.pad(gw.quantize(x, 0.03, 118, 0, 255, U8), [0, 1, 1, 2], value=118)
        c = gw.rescale(gw.convolution(q, p.w, None, [2, 2], [0, 1], [1, 1], 1, 118), p.s, 50, 0, 255, U8, 1)
        framed = F.pad(c, [1, 2, 0, 1], value=50)
        depthwise = gw.convolution(framed, p.d, None, [2, 2], [0, 0], [1, 1], 20, 50)
        return depthwise, gw.max_pool2d(framed, [3, 3], [1, 1], [0, 0], [1, 1], False)

    w, d = integers(-127, 128, 20, 3, 3, 3), integers(-127, 128, 20, 1, 3, 3)
    graph = program(body, normal(2, 3, 19, 22), w=w, d=d, s=scales(20, 1e-3))
    names = kinds(check_bits(graph, (normal(2, 3, 19, 22),)))
    names.pop("from_channels")  # of the outputs
    assert names == {"convolution_int": 1, "depthwise_int": 1, "pad_channels": 1, "max_pool2d": 1}


def test_a_pad_with_another_value_stays():
    def body(p, x):
        return gw.convolution(F.pad(x, [0, 1, 0, 1], value=3), p.w, None, [1, 1], [1, 1], [1, 1], 1, 50)

    graph = program(body, codes(1, 5, 6, 7), w=integers(-127, 128, 4, 5, 3, 3))
    assert kinds(check_bits(graph, (codes(1, 5, 6, 7),)))["pad_channels"] == 1


def test_float_convolutions_pad_themselves():
    def body(p, x):
        first = F.conv2d(F.pad(x, [0, 1, 0, 1]), p.w, stride=2)
        return F.conv2d(F.pad(first, [1, 2, 0, 1]), p.d, stride=2, groups=8)

    graph = program(body, normal(1, 3, 18, 22), stage=Stage.CANONICAL, w=normal(8, 3, 3, 3), d=normal(8, 1, 3, 3))
    result = compiled(graph)
    x = normal(1, 3, 18, 22)
    np.testing.assert_allclose(load_bytes(result.library)(x.numpy())[0], graph(x)[0].numpy(), rtol=1e-4, atol=1e-4)
    assert set(kinds(result)) <= {"convolution_f", "depthwise_f", "from_channels"}


def test_patches_become_rows_without_a_copy():
    def body(p, x):
        c = gw.rescale(gw.convolution(x, p.w, None, [4, 4], [0, 0], [1, 1], 1, 0), p.s, 50, 0, 255, U8, 1)
        return gw.scale(gw.linear(c.flatten(2).transpose(1, 2), p.v, None, 50), p.t, 2)

    parameters = {
        "w": integers(-127, 128, 32, 3, 4, 4),
        "s": scales(32, 1e-3),
        "v": integers(-127, 128, 5, 32),
        "t": scales(1, 1e-3),
    }
    names = kinds(check_bits(program(body, codes(2, 3, 8, 8), **parameters), (codes(2, 3, 8, 8),)))
    assert names == {"to_channels": 1, "convolution_int": 1, "linear_int": 1}


def test_chains_of_movement_are_copied_once():
    def body(p, x):
        y = x.permute(2, 0, 1)[1::2].select(1, 1).unsqueeze(0).expand(3, -1, -1)
        return gw.lookup(y, p.table), x.transpose(0, 1)[:, 0].clone()

    graph = program(body, codes(2, 6, 8), table=codes(256))
    assert kinds(check_bits(graph, (codes(2, 6, 8),))) == {"copy_strided": 2, "lookup": 1}


def test_inputs_and_parameters_may_be_returned():
    def body(p, x):
        return x, x.reshape(-1), p.table

    check_bits(program(body, codes(2, 3), table=codes(5)), (codes(2, 3),))
