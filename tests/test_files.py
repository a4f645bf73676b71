"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest
from graphwright.ir.errors import OutputError
from graphwright.ir.files import check_folder, check_output, make_folder, write_atomically


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.bin"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, failure):
    (tmp_path / "a.bin").write_bytes(b"old")

    def stop(handle):
        raise failure

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        write_atomically(tmp_path / "a.bin", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_bad_outputs_are_refused_early(tmp_path):
    (tmp_path / "taken").write_text("something else")
    with pytest.raises(OutputError, match=r"folder .* does not exist"):
        check_output(tmp_path / "no" / "x.gw")
    with pytest.raises(OutputError, match="it is a folder"):
        check_output(tmp_path)
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        check_output(tmp_path / "taken")
    check_output(tmp_path / "taken", overwrite=True)
    check_output(tmp_path / "fresh")


@pytest.mark.parametrize("check", [check_output, check_folder])
def test_a_place_where_no_file_can_be_made_is_refused(check):
    # Mode bits would let root write there.
    with pytest.raises(OutputError, match="no file can be made in '/proc'"):
        check(Path("/proc/x"))


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="file' is a file; name another folder"):
            check_folder(path)
        with pytest.raises(OutputError, match="cannot make the folder"):
            make_folder(path)
    check_folder(tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_missing_folder_is_a_typed_error(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        write_atomically(tmp_path / "gone" / "x", b"")
