"""`graphwright.load`: a real library in this process, and clear errors for what does not fit."""

import json
from concurrent.futures import ThreadPoolExecutor

import graphwright
import numpy as np
import pytest
import torch
from graphwright.backends import host, loader
from graphwright.backends.artifact import Artifact, sha256
from graphwright.backends.container import MANIFEST, pack
from graphwright.backends.target import Target
from graphwright.backends.tvm import executor
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.ir.capture import capture
from graphwright.ir.errors import ArtifactError, DataError, OptionError
from graphwright.ir.program import Stage
from integers import artifact, program, samples


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("load") / "model.gw"
    artifact("x86:avx2", "arm64:generic").save(path)
    return path


@pytest.fixture(scope="module")
def model(path):
    return graphwright.load(path)


def test_the_library_equals_the_reference_in_both_kinds(model):
    assert str(model.target) == "x86:avx2"
    for x in samples(20):
        expected = program()(x)
        as_torch, as_numpy = model(x), model(x.numpy())
        for wanted, tensor, array in zip(expected, as_torch, as_numpy, strict=True):
            assert isinstance(tensor, torch.Tensor) and isinstance(array, np.ndarray)
            assert torch.equal(tensor, wanted) and np.array_equal(array, wanted.numpy())


@pytest.mark.parametrize("skip", [1, 4, 15])
def test_unaligned_inputs_are_copied(model, skip):
    x = samples(1)[0]
    shifted = torch.empty(x.numel() + skip)[skip:].copy_(x.flatten()).reshape(x.shape)
    assert shifted.data_ptr() % executor.ALIGNMENT
    assert torch.equal(model(shifted)[0], program()(x)[0])


def test_strided_read_only_and_byte_swapped_inputs(model):
    x = samples(1)[0]
    expected = program()(x)[0]
    assert torch.equal(model(x.to(memory_format=torch.channels_last))[0], expected)
    frozen = x.numpy().copy()
    frozen.flags.writeable = False
    assert np.array_equal(model(frozen)[0], expected.numpy())
    assert np.array_equal(model(x.numpy()[..., ::-1][..., ::-1])[0], expected.numpy())
    assert np.array_equal(model(x.numpy().astype(">f4"))[0], expected.numpy())


def test_outputs_outlive_the_model_and_the_next_run(path):
    first, second = samples(2)
    model = graphwright.load(path)
    kept = model(first)
    model(second)
    del model
    assert all(torch.equal(a, b) for a, b in zip(kept, program()(first), strict=True))


def test_two_models_in_one_process_stay_apart(path, tmp_path):
    captured = capture(torch.nn.ReLU(), torch.zeros(4), name="relu")
    captured.stage = Stage.CANONICAL
    Artifact.build(captured, [TVMBackend().compile(captured, Target.parse("x86:avx2"))]).save(tmp_path / "relu.gw")
    models = [graphwright.load(path), graphwright.load(tmp_path / "relu.gw"), graphwright.load(path)]
    assert models[1](torch.tensor([-1.0, 2.0, -3.0, 4.0])).tolist() == [0.0, 2.0, 0.0, 4.0]
    x = samples(1)[0]
    assert torch.equal(models[0](x)[0], models[2](x)[0])


def test_parameters_and_negated_views_are_read_as_what_they_show(model):
    x = samples(1)[0]
    expected = program()(x)[0]
    assert torch.equal(model(torch.nn.Parameter(x))[0], expected)
    negated = torch.ops.aten._neg_view(-x)
    assert negated.is_neg() and negated.is_contiguous() and torch.equal(model(negated)[0], expected)


def test_calls_from_several_threads_keep_their_outputs_apart(model):
    given = samples(4)
    expected = [program()(x)[0] for x in given]

    def call(index: int) -> bool:
        x = given[index % 4]
        got = model(x if index % 8 < 4 else x.numpy())[0]
        return torch.equal(torch.as_tensor(got), expected[index % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(400)))


def test_a_library_refuses_inputs_it_would_read_past():
    run = executor.load_bytes(artifact("x86:avx2").members["lib/x86-avx2.so"])
    assert run.inputs == [((1, 3, 8, 8), np.dtype(np.float32))]
    with pytest.raises(ValueError, match=r"takes \[768\] bytes of inputs, not \[764\]"):
        run(np.zeros(191, np.float32))
    with pytest.raises(ValueError, match=r"takes \[768\] bytes of inputs, not \[\]"):
        run()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "takes 1 inputs, not 0"),
        ((torch.zeros(1, 3, 8, 8),) * 2, "takes 1 inputs, not 2: x: float32"),
        ((torch.zeros(1, 3, 8, 9),), r"shape \(1, 3, 8, 9\), but the model takes x: float32\[1x3x8x8\]"),
        ((torch.zeros(3, 8, 8),), r"shape \(3, 8, 8\)"),
        ((torch.zeros(1, 3, 8, 8, dtype=torch.float64),), "is float64, but the model takes x: float32"),
        ((torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16),), "'x' of integers is bfloat16, but the model takes x: float32"),
        ((torch.zeros(1, 3, 8, 8).to_sparse(),), r"'x' of integers is torch.sparse_coo; make it dense"),
        ((np.zeros((1, 3, 8, 8), ">f8"),), "is >f8, but the model takes x: float32"),
        ((np.zeros((3, 8, 8), np.float32),), r"shape \(3, 8, 8\)"),
        ((torch.zeros(1, 3, 8, 8, device="meta"),), "is on meta"),
        (([1.0],), "takes torch tensors or numpy arrays, all of one kind, not list"),
    ],
)
def test_wrong_inputs(model, inputs, message):
    with pytest.raises(DataError, match=message):
        model(*inputs)


def test_another_cpu_is_named_with_what_it_lacks(path, monkeypatch):
    monkeypatch.setattr(loader, "host_flags", lambda: host.host_flags() - {"avx2"})
    with pytest.raises(ArtifactError, match=r"x86:avx2 needs .*avx2.*; this CPU lacks avx2; arm64:generic needs .* is x86"):
        loader.load(path)


def test_the_best_library_that_runs_is_taken(monkeypatch):
    manifest = artifact("x86:avx512", "x86:avx2").manifest
    assert loader.choose(manifest, "m").level == "avx512"
    monkeypatch.setattr(loader, "host_flags", lambda: host.host_flags() - {"avx512f"})
    assert loader.choose(manifest, "m").level == "avx2"


def test_a_library_that_is_no_library(tmp_path):
    good = artifact("x86:avx2", "arm64:generic")
    members = {**good.members, "lib/x86-avx2.so": b"not an ELF file"}
    manifest = json.loads(good.manifest.to_bytes())
    manifest["members"]["lib/x86-avx2.so"] = {"sha256": sha256(b"not an ELF file"), "size": 15}
    (tmp_path / "model.gw").write_bytes(pack({MANIFEST: json.dumps(manifest).encode(), **members}))
    with pytest.raises(ArtifactError, match=r"does not load .*built with TVM"):
        graphwright.load(tmp_path / "model.gw")


def test_impossible_thread_counts(path):
    for threads in (0, -1, 100_000):
        with pytest.raises(OptionError, match="this process may use 1 to"):
            graphwright.load(path, threads=threads)
