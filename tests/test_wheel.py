"""The wheel holds every module of the repository, and nothing generic at its top level."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ir", "passes", "search", "backends", "tools")


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Names inside a wheel built from a copy of the tracked and new files, so that the build leaves nothing in the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_every_module_is_inside(members):
    modules = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(modules) > 20
    missing = [str(m) for m in modules if f"graphwright/{m}" not in members]
    assert not missing, f"add their packages to pyproject.toml: {missing}"


def test_weights_and_runner_sources_are_inside(members):
    data = [*(ROOT / "tools/zoo/weights").glob("*.safetensors"), *(ROOT / "backends/runtime").glob("*.cc")]
    data.append(ROOT / "backends/runtime/Makefile")
    data += (ROOT / "backends/tvm/tuning").glob("*.jsonl")
    assert data
    assert not [str(p) for p in data if f"graphwright/{p.relative_to(ROOT)}" not in members]


def test_nothing_generic_at_the_top_level(members):
    assert {name.split("/")[0].split("-")[0] for name in members} == {"graphwright"}
    assert not any(name.startswith("graphwright/tests") for name in members)
