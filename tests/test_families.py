"""A target's own kernels take the place of the CPUs', function by function; a Triton launch survives being an attribute."""

import types

import pytest
from graphwright.backends.tvm import families
from graphwright.backends.tvm.cuda.launch import TritonCall, device_function, triton_call
from graphwright.backends.tvm.kernels import convolution_int8, layout


@pytest.fixture
def own_layout(monkeypatch):
    own = types.ModuleType("own")
    own.to_channels = lambda *spec: "own"  # type: ignore[attr-defined]
    monkeypatch.setattr(families, "_own_module", lambda arch, name: own if arch == "cuda" and name.endswith(".layout") else None)
    families.family_of.cache_clear()
    families.generator_of.cache_clear()
    yield own
    families.family_of.cache_clear()
    families.generator_of.cache_clear()


def test_a_target_without_families_of_its_own_uses_the_cpu_modules():
    assert families.family_of("x86", convolution_int8) is convolution_int8
    assert families.generator_of("arm64", convolution_int8.build) is convolution_int8.build


def test_own_functions_replace_those_of_the_same_name(own_layout):
    family = families.family_of("cuda", layout)
    assert family.to_channels is own_layout.to_channels
    assert family.from_channels is layout.from_channels
    assert families.generator_of("cuda", layout.to_channels) is own_layout.to_channels
    assert families.generator_of("cuda", layout.from_channels) is layout.from_channels
    with pytest.raises(AttributeError, match="layout has no 'to_columns'"):
        _ = family.to_columns


def test_a_triton_call_travels_with_its_function():
    call = TritonCall.of("gemm:linear", {"M": 3, "RELU": True, "TAIL": "rescale", "ZERO": None}, (7,), warps=8, stages=4)
    function = device_function("linear", [("X", (3, 32), "uint8"), ("Y", (3, 16), "int8")], call)
    assert triton_call(function) == call
    assert [(str(p.dtype), [int(d) for d in p.shape]) for p in function.params] == [("uint8", [3, 32]), ("int8", [3, 16])]
    assert call.grid == (7, 1, 1)


def test_other_functions_hold_no_triton_call():
    assert triton_call(layout.to_channels((1, 3, 4, 4), "float32")) is None
