"""Target strings parse, print back, and refuse what does not exist with the nearest name."""

import pytest
from graphwright.backends import host
from graphwright.backends.target import LEVELS, Target
from graphwright.backends.tiles import request_tiles
from graphwright.ir.errors import TargetError, UnknownNameError


@pytest.mark.parametrize("text", [f"{arch}:{level}" for arch, levels in LEVELS.items() for level in levels])
def test_round_trip(text):
    assert str(Target.parse(text)) == text


def test_cpu_means_this_machine():
    assert Target.parse("cpu") == Target(host.host_arch(), host.host_level())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x87", "did you mean 'x86'"),
        ("x86:avx2000", "did you mean 'avx2'"),
        ("arm64:cortex-a67", "did you mean 'cortex-a"),
        ("", "target ''"),
    ],
)
def test_unknown_targets_name_the_nearest(text, message):
    with pytest.raises(UnknownNameError, match=message):
        Target.parse(text)


def test_arm_levels_are_best_first_and_the_usual_one_is_not_the_rarest():
    flags = [host.ARM64_FLAGS[level] for level in LEVELS["arm64"]]
    assert all(not later > earlier for i, earlier in enumerate(flags) for later in flags[i + 1 :])
    if host.host_arch() != "arm64":
        assert Target.parse("arm64") == Target("arm64", "cortex-a76")


@pytest.mark.parametrize(("level", "others"), [("neoverse-v1", {"sve"}), ("cortex-a76", {"i8mm"}), ("generic", {"crc32"})])
def test_an_arm_machine_takes_the_best_level_that_it_has(monkeypatch, level, others):
    monkeypatch.setattr(host, "host_arch", lambda: "arm64")
    monkeypatch.setattr(host, "host_flags", lambda: host.ARM64_FLAGS[level] | others)
    assert host.host_level() == level


def test_native_of_another_machine_is_refused():
    other = "arm64" if host.host_arch() == "x86" else "x86"
    with pytest.raises(TargetError, match="name a level"):
        Target.parse(f"{other}:native")


def test_levels_follow_the_cpu_flags(monkeypatch):
    monkeypatch.setattr(host, "host_arch", lambda: "x86")
    for level, flags in host.X86_FLAGS.items():
        monkeypatch.setattr(host, "host_flags", lambda flags=flags: flags | {"sse2"})
        assert host.host_level() == level
    monkeypatch.setattr(host, "host_flags", lambda: frozenset({"sse2"}))
    with pytest.raises(TargetError, match="AVX2"):
        host.host_level()


@pytest.mark.skipif(host.host_arch() != "x86", reason="tiles are an x86 feature")
def test_tiles_need_the_kernels_permission():
    request_tiles({"avx2", "avx512_vnni"})  # asks for nothing
    if "amx_tile" in host.host_flags():
        request_tiles({"amx_tile"})
        request_tiles({"amx_tile"})
    else:
        with pytest.raises(TargetError, match="refuses this process AMX tiles.*x86:avx512-vnni"):
            request_tiles({"amx_tile"})
