"""The artifact file: what it holds, that every damaged byte is noticed, and that saving is whole or not at all."""

import io
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from graphwright.backends.artifact import Artifact, sha256
from graphwright.backends.base import Compiled, KernelRow
from graphwright.backends.container import MANIFEST, pack, unpack
from graphwright.backends.host import required_flags
from graphwright.backends.target import Target
from graphwright.ir.capture import capture
from graphwright.ir.errors import ArtifactError, OutputError

X86, ARM = Target.parse("x86:avx2"), Target.parse("arm64:cortex-a72")


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    """Real in everything but the libraries' bytes, which this file never runs."""
    program = capture(torch.nn.Linear(4, 3), torch.zeros(2, 4), name="tiny")
    kernel = KernelRow("dense", ("linear",), "designed", macs=24)
    compiled = [Compiled(ARM, b"arm code", (kernel,)), Compiled(X86, bytes(range(256)), options={"mcpu": "haswell"})]
    rows = [{"name": "canonicalize", "sqnr_db": float("inf")}]
    return Artifact.build(
        program, compiled, certificate=rows, plan={"pipeline": "canonicalize"}, documents={"report.html": b"<html>"}
    )


def resealed(artifact: Artifact, edit) -> bytes:
    """The file after `edit(manifest, members)`, sealed again: what someone who knows the format could write."""
    members = {name: bytes(data) for name, data in artifact.members.items()}
    manifest = json.loads(artifact.manifest.to_bytes())
    edit(manifest, members)
    return pack({MANIFEST: json.dumps(manifest).encode(), **members})


def test_round_trip(artifact, tmp_path):
    path = tmp_path / "model.gw"
    artifact.save(path)
    loaded = Artifact.load(path)
    assert loaded == artifact
    assert path.stat().st_size == artifact.size
    assert loaded.certificate == [{"name": "canonicalize", "sqnr_db": "inf"}]
    assert loaded.plan == {"pipeline": "canonicalize"} and loaded.manifest.recipe == "canonicalize"
    assert [str(s) for s in loaded.input_specs] == ["input: float32[2x4]"]
    assert [str(s) for s in loaded.output_specs] == ["linear: float32[2x3]"]
    assert loaded.members["report.html"] == b"<html>"


def test_manifest_names_targets_flags_and_versions(artifact):
    arm, x86 = artifact.manifest.targets
    assert set(x86.requires) == required_flags(X86) >= {"avx2", "fma"} and x86.options == {"mcpu": "haswell"}
    assert set(arm.requires) == required_flags(ARM) >= {"asimd"} and arm.library == "lib/arm64-cortex-a72.so"
    assert set(artifact.manifest.versions) == {"graphwright", "tvm", "torch"}


def test_libraries_come_best_first():
    program = capture(torch.nn.ReLU(), torch.zeros(2), name="tiny")
    levels = ["avx2", "avx512-vnni", "avx512"]
    built = Artifact.build(program, [Compiled(Target("x86", level), level.encode()) for level in levels])
    assert [t.level for t in built.manifest.targets] == ["avx512-vnni", "avx512", "avx2"]


def test_any_zip_tool_reads_it_and_bytes_repeat(artifact):
    data = artifact.to_bytes()
    assert data == artifact.to_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == MANIFEST
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


def test_every_flipped_bit_is_noticed(artifact):
    data = artifact.to_bytes()
    positions = random.Random(0).sample(range(8 * len(data)), 1500) + list(range(8 * (len(data) - 700), 8 * len(data)))
    for bit in positions:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArtifactError, match="damaged|not a whole"):
            Artifact.from_bytes(bytes(damaged), "model.gw")


def test_every_truncation_and_every_addition_is_noticed(artifact):
    data = artifact.to_bytes()
    for size in [*range(0, len(data), 7), len(data) - 1]:
        with pytest.raises(ArtifactError, match="not a whole graphwright artifact"):
            Artifact.from_bytes(data[:size], "model.gw")
    for changed in (data + b"x", b"x" + data):
        with pytest.raises(ArtifactError, match="not a whole graphwright artifact"):
            Artifact.from_bytes(changed, "model.gw")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m, f: m.update(version=3), "format version 3; this graphwright reads version 2"),
        (lambda m, f: m.update(format="other"), "not a graphwright artifact"),
        (lambda m, f: m.pop("inputs"), "wrong at 'inputs'"),
        (lambda m, f: m["inputs"][0].update(dtype="float33"), "wrong at 'inputs.0.dtype'"),
        (lambda m, f: m["inputs"][0].update(shape=["2"]), "wrong at 'inputs.0.shape.0"),
        (lambda m, f: m.update(surprise=1), "wrong at 'surprise'"),
        (lambda m, f: m["members"]["plan.json"].update(size=1), "member 'plan.json' does not match its SHA-256"),
        (lambda m, f: m["members"]["plan.json"].update(sha256=sha256(b"")), "member 'plan.json' does not match its SHA-256"),
        (lambda m, f: f.pop("plan.json"), "member 'plan.json' is missing"),
        (lambda m, f: f.update(extra=b"x"), "member 'extra' is not in the manifest"),
        (lambda m, f: (f.pop("lib/x86-avx2.so"), m["members"].pop("lib/x86-avx2.so")), "lacks the member 'lib/x86-avx2.so'"),
        (lambda m, f: m.update(targets=[]), "holds no compiled library"),
    ],
)
def test_a_wrong_manifest_is_refused_even_with_a_valid_seal(artifact, edit, message):
    with pytest.raises(ArtifactError, match=message):
        Artifact.from_bytes(resealed(artifact, edit), "model.gw")


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"NaN"])
def test_a_manifest_that_is_no_json_object_is_refused(manifest):
    with pytest.raises(ArtifactError, match="model.gw"):
        Artifact.from_bytes(pack({MANIFEST: manifest}), "model.gw")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../b", "a//b", ".hidden", "a\\b", "C:x", "ä"])
def test_member_names_that_could_escape_a_folder_are_refused(name):
    with pytest.raises(ArtifactError, match="cannot put these members into an artifact: member name .* is not allowed"):
        pack({MANIFEST: b"{}", name: b"x"})
    raw = name.encode("latin-1")
    forged = pack({MANIFEST: b"{}", "q" * len(raw): b"x"}).replace(b"q" * len(raw), raw)
    with pytest.raises(ArtifactError, match="member name .* is not allowed"):
        unpack(forged, "model.gw")


def test_compressed_members_are_refused_before_they_are_inflated():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(MANIFEST), b"{}")
        archive.writestr("bomb", b"\0" * (100 << 20), compresslevel=9)
        archive.comment = b"graphwright seal sha256:" + b"0" * 64
    with pytest.raises(ArtifactError, match="'bomb' is compressed"):
        unpack(buffer.getvalue(), "model.gw")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip" * 100, b"\x7fELF" + bytes(1000)])
def test_garbage_is_refused(content, tmp_path):
    path = tmp_path / "model.gw"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"not a whole graphwright artifact.*copy or build"):
        Artifact.load(path)


def test_a_missing_file_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="No such file"):
        Artifact.load(tmp_path / "none.gw")


def test_build_refuses_what_cannot_be_loaded(artifact):
    program = capture(torch.nn.ReLU(), torch.zeros(2), name="tiny")
    library = Compiled(X86, b"")
    for compiled in ([], [library, library]):
        with pytest.raises(ArtifactError, match="at least one target and each only once"):
            Artifact.build(program, compiled)
    with pytest.raises(ArtifactError, match="reserved"):
        Artifact.build(program, [library], documents={"certificate.json": b""})
    with pytest.raises(ArtifactError, match="cannot take or return input: bfloat16"):
        Artifact.build(capture(torch.nn.ReLU(), torch.zeros(2, dtype=torch.bfloat16)), [library])


def test_saving_refuses_bad_paths(artifact, tmp_path):
    with pytest.raises(OutputError, match="does not exist; create it first"):
        artifact.save(tmp_path / "none" / "model.gw")
    with pytest.raises(OutputError, match="is a folder"):
        artifact.save(tmp_path)
    with pytest.raises(OutputError, match="cannot write '/proc/model.gw'"):  # not writable, not even by root
        artifact.save(Path("/proc/model.gw"))


def test_an_existing_artifact_is_replaced_only_on_request(artifact, tmp_path):
    path = tmp_path / "model.gw"
    artifact.save(path)
    with pytest.raises(OutputError, match="exists already; choose another name or pass --overwrite"):
        artifact.save(path)
    path.write_bytes(path.read_bytes()[:500])  # damaged, but still an artifact
    artifact.save(path, overwrite=True)
    assert Artifact.load(path) == artifact


@pytest.mark.parametrize("content", [b"", b"my thesis", b"PK\3\4 another zip"])
def test_something_else_is_never_replaced(artifact, tmp_path, content):
    path = tmp_path / "model.gw"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="not a graphwright artifact; delete it or choose another name"):
        artifact.save(path, overwrite=True)
    assert path.read_bytes() == content


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_an_interrupted_save_leaves_the_folder_as_it_was(artifact, tmp_path, monkeypatch, call):
    path = tmp_path / "model.gw"
    artifact.save(path)
    before = path.read_bytes()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        artifact.save(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gw"] and path.read_bytes() == before


def test_importing_the_package_loads_neither_torch_nor_tvm():
    code = "import sys, graphwright; graphwright.__version__; sys.exit(any(m in sys.modules for m in ('torch', 'tvm', 'numpy')))"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root / ".link")}).returncode == 0
